"""Dataset cards: the README.md of a dataset folder, from plan, manifest and schemas.py.

The YAML front matter is what the Hugging Face hub reads: tags, size, and the files of the one split,
so that `datasets.load_dataset` opens an uploaded folder. A card depends on plan and manifest alone:
the same dataset has the same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from scir_cli.data import schemas
from scir_cli.data.schemas import Column

Json = Mapping[str, Any]
#: The hub's size categories: fewer rows than -> name
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
}
ABSENT: tuple[Any, ...] = (None, "", [], {})


def render(plan: Json, manifest: Json) -> str:
    """The card of a dataset whose manifest is about to be written, as Markdown."""
    kind = manifest["kind"]
    settings = {k: v for k, v in plan.get("settings", {}).items() if v not in ABSENT}
    drops = manifest["drops"].items() or [("none", 0)]
    sections = [
        _front_matter(kind, manifest["rows_out"]),
        f"# A {kind} dataset, written by `scir {plan.get('stage')}`\n\n{schemas.ROWS[kind]}",
        _table(("", ""), _facts(plan, manifest)),
        "## Columns",
        _table(("column", "type", "meaning"), _columns(schemas.COLUMNS[kind])),
        "## Dropped rows\n\nRows read = rows written + rows dropped.",
        _table(("reason", "rows"), drops),
        "## Settings\n\nSettings that determine the rows; those without a value are left out.",
        _table(("setting", "value"), settings.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(kind: str, rows: int) -> str:
    size = next((name for limit, name in SIZES.items() if rows < limit), "n>10M")
    lines = [
        "---",
        f"pretty_name: scir {kind}",
        "tags: [scir, preference-optimization]",
        f'size_categories: ["{size}"]',
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        '    path: "data-*.arrow"',
        "---",
    ]
    return "\n".join(lines)


def _facts(plan: Json, manifest: Json) -> Iterable[tuple[str, Any]]:
    """What the dataset is and where it came from.

    A model or an input has the name that the user gave it, and its weights key or digest from the plan.
    """
    yield "kind", f"{manifest['kind']}, schema version {manifest['schema_version']}"
    yield "rows", f"{manifest['rows_out']:,} of {manifest['rows_in']:,} read"
    yield "digest", manifest["digest"]
    names = dict(manifest["inputs"])
    described = ("stage", "settings", "schema_version")
    keys = {k: v for k, v in plan.items() if k not in described and v is not None}
    for name in dict.fromkeys([*names, *keys]):
        yield name.replace("_", " "), "; ".join(str(of[name]) for of in (names, keys) if name in of)
    yield "versions", ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())


def _columns(columns: Sequence[Column], prefix: str = "") -> Iterable[tuple[str, str, str]]:
    """Rows of the table of columns, the fields of a struct below their column.

    Fields that were listed before are not repeated.
    """
    listed: list[tuple[Column, ...]] = []
    for column in columns:
        is_list = pa.types.is_list(column.dtype)
        yield f"`{prefix}{column.name}`", _type(column), column.meaning
        if column.fields and column.fields not in listed:
            listed.append(column.fields)
            yield from _columns(column.fields, f"{prefix}{column.name}{'[]' if is_list else ''}.")


def _type(column: Column) -> str:
    """The type in words, as `list of int32, may be null`."""
    dtype, words = column.dtype, ""
    while pa.types.is_list(dtype):
        dtype, words = dtype.value_type, words + "list of "
    words += "struct" if pa.types.is_struct(dtype) else str(dtype)
    return words + (", may be null" if column.nullable else "")


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; a cell is one line, and its vertical bars are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    cells = ([" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
