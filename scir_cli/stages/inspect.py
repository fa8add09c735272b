"""inspect: what a file, a data set of the hub, or a folder of ours holds; it writes nothing.

An input file is read as both `generate` and `judge` read it, so the drops are those that they would
count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scir_cli.analysis import verdicts
from scir_cli.data import (
    dataset,
    files,
    folders,
    manifests,
    readers,
    schemas,
    storage,
    without_pandas,
)
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import ConfigError, DataError, suggest

SORTS = ("disagreement", "confident-mistakes")
#: Kinds of datasets with verdicts
JUDGED = ("judged", "preferences")
#: Examples of an overview, if no number is asked for
EXAMPLES = 3
#: Pairs that are read in order, if no number is asked for
PAIRS = 20


def look(spec: str, sort: str | None = None, limit: int | None = None) -> Json:
    """What an input holds, for `report.reading`.

    sort: the order of judged pairs, one of SORTS; None: an overview.
    limit: number of examples or pairs.
    Raises DataError if the input cannot be read, ConfigError for a sort that does not fit it.
    """
    without_pandas.keep_out()
    if sort is not None and sort not in SORTS:
        raise ConfigError(f"--sort {sort}: no such order.{suggest(sort, SORTS)}")
    path = to_path(spec)
    if not storage.is_remote(path) and path.is_dir() and folders.is_dataset(path):
        return _look_at_ours(path, sort, limit)
    if sort is not None:
        raise ConfigError(f"--sort needs a judged dataset, and {spec} is an input without verdicts")
    return _look_at_input(spec, limit)


# ------------------------------------------------------------------------ datasets of ours


def _look_at_ours(path: Path, sort: str | None, limit: int | None) -> Json:
    """What a folder that a stage wrote holds."""
    plan = files.read_json(path / "plan.json")
    manifest = manifests.read(path) if (path / manifests.NAME).is_file() else {}
    found: Json = {
        "path": str(path),
        "written by": f"scir {plan.get('stage')}",
        "kind": manifest.get("kind") or "unfinished",
        "manifest": manifest,
        "settings": plan.get("settings", {}),
    }
    is_table = manifest and manifest["kind"] != "model"
    if sort is not None and found["kind"] not in JUDGED:
        raise ConfigError(f"--sort needs a judged dataset; {path} is of kind '{found['kind']}'")
    if not is_table:
        return found

    data = dataset.open_dataset(path)
    if found["kind"] in JUDGED:
        return found | _pairs(data, sort, limit)
    columns = {}
    for column in schemas.COLUMNS[found["kind"]]:
        columns[column.name] = column.meaning
    rows = data.head(EXAMPLES if limit is None else limit).read().to_pylist()
    return found | {"columns": columns, "rows": rows}


def _pairs(data: dataset.Dataset, sort: str | None, limit: int | None) -> Json:
    """The pairs to read, with the verdicts on them and how far they disagree or are wrong."""
    if not data.num_rows:
        return {"pairs": [], "n_pairs": 0}
    most = (PAIRS if sort else EXAMPLES) if limit is None else limit
    v = verdicts.from_tables(data.tables())
    size = np.zeros(len(v.gold))
    if sort == "disagreement":
        size = verdicts.surest_disagreement(v.log_odds)
    elif sort:
        size = verdicts.surest_mistake(v)
    if sort and not (size > 0).any():
        what = "no two reward models disagree" if sort == SORTS[0] else "no labeled pair is wrong"
        return {"pairs": [], "n_pairs": 0, "note": f"{what} in {data.num_rows} pairs"}

    # Stable, so that equal pairs keep their order.
    order = np.argsort(-size, kind="stable")
    chosen = [int(i) for i in order if not sort or size[i] > 0]
    pairs = []
    for index in chosen[:most]:
        row = data.slice(index, 1).to_pylist()[0]
        models = []
        for m, name in enumerate(v.names):
            values = (v.log_odds[m, index], v.forward[m, index], v.swapped[m, index])
            models.append([name, *(None if np.isnan(x) else float(x) for x in values)])
        pairs.append(
            {"row": row, "number": index + 1, "size": float(size[index]), "models": models}
        )
    return {"pairs": pairs, "n_pairs": len(chosen), "sort": sort}


# ------------------------------------------------------------------------ inputs


def _look_at_input(spec: str, limit: int | None) -> Json:
    """What a file, a saved folder or a data set of the hub holds, and what becomes of its rows."""
    rows = list(itertools.islice(readers.raw_rows(spec), 1))
    columns = {name: _type_of(value) for name, value in rows[0].items()} if rows else {}
    most = EXAMPLES if limit is None else limit
    return {
        "path": spec,
        "columns": columns,
        "first": rows[0] if rows else {},
        "layout": readers.layout_of(rows[0]) if rows else "no rows",
        "as prompts": _attempt(readers.open_prompts, spec, most),
        "as pairs": _attempt(readers.open_pairs, spec, most),
    }


def _attempt(open_rows: Callable[[str], Any], spec: str, most: int) -> Json:
    """The rows out, the drops by reason and some rows; or the error, in one line."""
    try:
        rows, drops = open_rows(spec)
    except DataError as error:
        return {"error": str(error)}
    return {
        "rows_out": rows.num_rows,
        "drops": dict(drops),
        "rows": rows.slice(0, most).to_pylist(),
    }


def _type_of(value: Any) -> str:
    """The type of a cell in words."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"list of {_type_of(value[0])}" if value else "empty list"
    if isinstance(value, dict):
        return f"object ({', '.join(map(str, value))})"
    names = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    return names.get(type(value), type(value).__name__)
