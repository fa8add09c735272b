"""What `scir inspect` prints: an overview of an input, and pairs side by side.

It fits the width of the terminal, and 80 columns in a pipe (or $COLUMNS). Texts of others are shown
as `console` shows them: every character visible, the middle of long ones left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from scir_cli.data.files import Json
from scir_cli.data.messages import more_of
from scir_cli.report.console import PlainConsole
from scir_cli.report.tables import drops_by_reason, number

#: Characters of a cell of the first row
LONGEST_VALUE = 300


def show(found: Json) -> None:
    """Prints what `stages.inspect.look` found on stdout."""
    console = PlainConsole()
    if "as prompts" in found:
        _show_input(console, found)
    elif "pairs" in found:
        if not found.get("sort"):
            _show_manifest(console, found)
        _show_pairs(console, found)
    else:
        _show_manifest(console, found)
        _show_columns(console, found.get("columns", {}))
        for index, row in enumerate(found.get("rows", []), start=1):
            _show_row(console, f"row {index}", row)


def show_environment(found: Json) -> None:
    """Prints what `stages.environment.describe` found on stdout, one line per fact."""
    console = PlainConsole()
    for group, facts in found.items():
        console.print(f"{group}:")
        for name, value in facts.items():
            console.print(f"  {name}: {value}")


def _show_manifest(console: PlainConsole, found: Json) -> None:
    """Prints kind, rows, drops, digest and inputs of a folder of ours."""
    manifest = found["manifest"]
    lines = [("path", found["path"]), ("written by", found["written by"]), ("kind", found["kind"])]
    if manifest:
        dropped = drops_by_reason(manifest) or "0 dropped"
        rows = f"{manifest['rows_in']} in = {manifest['rows_out']} out + {dropped}"
        lines += [("rows", rows), ("digest", manifest["digest"])]
        lines += [(f"from {name}", source) for name, source in manifest.get("inputs", {}).items()]
        for name, count in manifest.get("nulls", {}).items():
            lines.append(("nulls", f"{count} in {name}"))
    else:
        lines.append(("rows", "not finished: the same command continues"))
    _show_lines(console, lines)


def _show_input(console: PlainConsole, found: Json) -> None:
    """Prints layout, columns and first row of an input, and what becomes of its rows."""
    _show_lines(console, [("path", found["path"]), ("layout", found["layout"])])
    _show_columns(console, found["columns"])
    _show_row(console, "first row", found["first"])
    for use, command in (("as prompts", "scir generate"), ("as pairs", "scir judge, scir train")):
        result = found[use]
        if "error" in result:
            console.print(f"{use}: not usable: {result['error']}\n")
            continue
        dropped = drops_by_reason(result) or "0 dropped"
        console.print(f"{use} ({command}): {result['rows_out']} rows + {dropped}\n")
    pairs = found["as pairs"].get("rows", [])
    for index, row in enumerate(pairs, start=1):
        _show_pair(console, f"pair {index}", row)
    if not pairs:
        for index, row in enumerate(found["as prompts"].get("rows", []), start=1):
            _show_lines(console, [(f"prompt {index}", conversation(row["messages"]))])


def _show_pairs(console: PlainConsole, found: Json) -> None:
    """Prints judged pairs, each with the verdict of every reward model."""
    if "note" in found:
        console.print(found["note"])
    total = found["n_pairs"]
    for index, pair in enumerate(found["pairs"], start=1):
        row = pair["row"]
        heading = f"pair {index} of {total}, row {pair['number']}, {row['pair_id']}"
        if row.get("subset"):
            heading += f", {row['subset']}"
        if found.get("sort"):
            heading += f", {found['sort'].replace('-', ' ')} of {pair['size']:.2f} nats"
        _show_pair(console, heading, row)
        _show_verdicts(console, pair["models"], row.get("gold_label"))


def _show_pair(console: PlainConsole, heading: str, row: Mapping[str, Any]) -> None:
    """Prints the prompt of a pair, and its responses side by side."""
    console.rule(console.render_str(heading), align="left", characters="─")
    console.print(conversation(row.get("messages") or row.get("prompt") or []))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for side in ("first", "second"):
        chosen = " (chosen)" if row.get("gold_label") == side else ""
        author = row[side].get("author") or ""
        table.add_column(
            f"{side}{chosen} {author}".strip(), ratio=1, overflow="fold", justify="left"
        )
    table.add_row(row["first"]["text"], row["second"]["text"])
    console.print(table)


def _show_verdicts(
    console: PlainConsole, models: Sequence[Sequence[Any]], gold: str | None
) -> None:
    """Prints what each reward model prefers.

    models: name, then log-odds for first in nats: of both orders, of each order
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("reward model", overflow="fold")
    for heading in ("prefers", "log-odds", "first as A", "first as B"):
        table.add_column(heading, justify="right")
    for name, log_odds, forward, swapped in models:
        prefers = "–"
        if log_odds is not None:
            prefers = "first" if log_odds > 0 else "second" if log_odds < 0 else "tie"
        if gold and prefers not in ("–", "tie", gold):
            prefers += " (wrong)"
        table.add_row(name, prefers, number(log_odds), number(forward), number(swapped))
    console.print(table)


def _show_columns(console: PlainConsole, columns: Mapping[str, str]) -> None:
    """Prints a table of columns and what is in them."""
    if not columns:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("column", overflow="fold")
    table.add_column("content", overflow="fold")
    for name, meaning in columns.items():
        table.add_row(name, meaning)
    console.print(table)


def _show_row(console: PlainConsole, heading: str, row: Mapping[str, Any]) -> None:
    """Prints the cells of a row, one below the other."""
    console.rule(console.render_str(heading), align="left", characters="─")
    lines = []
    for name, value in row.items():
        if isinstance(value, str):
            text = value
        elif name == "messages" and isinstance(value, list) and value:
            text = conversation(value)
        else:
            text = json.dumps(value, ensure_ascii=False, default=str)
        if len(text) > LONGEST_VALUE:
            text = f"{text[:LONGEST_VALUE]}… ({len(text)} characters)"
        lines.append((name, text))
    _show_lines(console, lines)


def _show_lines(console: PlainConsole, lines: Sequence[tuple[str, Any]]) -> None:
    """Prints names and values in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column("name", overflow="fold", max_width=24)
    table.add_column("value", overflow="fold")
    for name, value in lines:
        table.add_row(name, str(value))
    console.print(table)
    console.print()


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as a person reads them: the text of a single turn, else each turn with its role."""
    turns = []
    for message in messages:
        role = message.get("role", "?")
        text = message.get("content") or ""
        calls = more_of(message).get("tool_calls")
        if calls:
            text += json.dumps(calls, ensure_ascii=False)
        turns.append(f"{role}: {text}")
    return "\n".join(turns)
