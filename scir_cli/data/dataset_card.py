"""Dataset cards: the README.md of a dataset folder, from plan, manifest and schemas.py.

The Hugging Face hub reads the YAML front matter: tags, size, and the files of the only split, so
that `datasets.load_dataset` opens an uploaded folder.
A card depends on plan and manifest alone: the same dataset has the same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from scir_cli.data import schemas
from scir_cli.data.schemas import Column

Json = Mapping[str, Any]
#: The hub's size categories: upper limit of rows, exclusive -> name.
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
}
#: Settings with these values have no value, and are left out.
ABSENT: tuple[Any, ...] = (None, "", [], {})
#: Keys of a plan that are not digests of inputs or models.
NOT_DIGESTS = ("stage", "settings", "schema_version")


def render(plan: Json, manifest: Json) -> str:
    """The card of a dataset as Markdown; its manifest is complete but need not be on disk."""
    kind = manifest["kind"]
    drops = manifest["drops"].items() or [("none", 0)]

    settings = {}
    for name, value in plan.get("settings", {}).items():
        if value not in ABSENT:
            settings[name] = value

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
    """The YAML block at the top of a card.

    rows: number of rows of the dataset, for its size category.
    """
    size = "n>10M"
    for limit, name in SIZES.items():
        if rows < limit:
            size = name
            break
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
    """Name and value of each fact about a dataset: kind, size, digest, inputs, versions.

    A model or an input has its name from the manifest, as the user wrote it, and its weights key or
    digest from the plan.
    """
    yield "kind", f"{manifest['kind']}, schema version {manifest['schema_version']}"
    yield "rows", f"{manifest['rows_out']:,} of {manifest['rows_in']:,} read"
    yield "digest", manifest["digest"]

    inputs = dict(manifest["inputs"])
    digests = {}
    for key, value in plan.items():
        if key not in NOT_DIGESTS and value is not None:
            digests[key] = value
    # A dict and not a set, to hold the order.
    for name in dict.fromkeys([*inputs, *digests]):
        texts = [str(source[name]) for source in (inputs, digests) if name in source]
        yield name.replace("_", " "), "; ".join(texts)

    versions = [f"{package} {version}" for package, version in manifest["versions"].items()]
    yield "versions", ", ".join(versions)


def _columns(columns: Sequence[Column], prefix: str = "") -> Iterable[tuple[str, str, str]]:
    """Name, type and meaning of each column, the fields of a struct below their column.

    Fields that were listed before are not repeated.
    prefix: dotted name of the struct that holds the columns, for nested fields.
    """
    listed: list[tuple[Column, ...]] = []
    for column in columns:
        name = prefix + column.name
        yield f"`{name}`", _type(column), column.meaning

        if column.fields and column.fields not in listed:
            listed.append(column.fields)
            brackets = "[]" if pa.types.is_list(column.dtype) else ""
            yield from _columns(column.fields, f"{name}{brackets}.")


def _type(column: Column) -> str:
    """The type in words, as `list of int32, may be null`."""
    dtype = column.dtype
    words = ""
    while pa.types.is_list(dtype):
        words += "list of "
        dtype = dtype.value_type
    words += "struct" if pa.types.is_struct(dtype) else str(dtype)
    if column.nullable:
        words += ", may be null"
    return words


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; white space in a cell becomes one space, vertical bars are escaped."""
    lines = []
    for row in (headings, ["---"] * len(headings), *rows):
        cells = [" ".join(str(cell).replace("|", "\\|").split()) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
