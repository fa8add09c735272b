"""The columns of every dataset kind, checked on write and on read.

A pair is `first`/`second` until something labels it; `chosen`/`rejected` exist only after that. A missing verdict is null, never a number.
pyarrow does not enforce `nullable=False` and `Table.from_pylist` drops a misspelt key in silence, so both are checked here.
`datasets` cannot read map columns: lists of structs are used instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from scir_cli.errors import DataError, suggest

VERSION = "1"
KIND_KEY, VERSION_KEY = b"scir.kind", b"scir.version"

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
RESPONSE = pa.struct(
    [
        ("candidate_id", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("author", pa.string()),  # who wrote it: a weights key, or the name that came with the data; null: unknown
    ]
)
REWARDS = pa.list_(
    pa.struct(
        [
            ("reward_model", pa.string()),
            ("log_odds", pa.float64()),  # log P(first better) - log P(second better), nats; null: no verdict
            ("forward_log_odds", pa.float64()),  # the same, read with the first response in seat A; null: the model has no seats
            ("swapped_log_odds", pa.float64()),  # log-odds *for seat A* with the second response in seat A
            ("verdict_mass", pa.float64()),  # probability on the verdict tokens; null: the model has none
            ("written", pa.list_(pa.list_(pa.int32()))),  # token ids of what the model wrote before each verdict; null: nothing
        ]
    )
)
REFERENCE_LOGPS = pa.list_(pa.struct([("weights", pa.string()), ("first", pa.float64()), ("second", pa.float64())]))  # summed, nats

_PROMPT = [("prompt_id", pa.string(), False), ("messages", MESSAGES, False), ("subset", pa.string(), True)]
_PAIR = [
    ("pair_id", pa.string(), False),
    *_PROMPT,
    ("first", RESPONSE, False),
    ("second", RESPONSE, False),
    ("gold", pa.string(), True),  # "first" | "second": a label somebody else gave; used for evaluation only
    ("rewards", REWARDS, False),
    ("reference_logps", REFERENCE_LOGPS, False),
]
_AGREEMENT = [
    ("agree", pa.bool_(), True),  # null: some reward model gave no verdict
    ("margin", pa.float64(), True),  # smallest |log-odds|, nats
    ("mean_log_odds", pa.float64(), True),
    ("spread", pa.float64(), True),  # largest minus smallest log-odds, nats
]

#: kind -> [(column, type, may it be null)]
COLUMNS: dict[str, list[tuple[str, pa.DataType, bool]]] = {
    "prompts": _PROMPT,
    "candidates": [
        ("candidate_id", pa.string(), False),
        *_PROMPT,
        ("response", pa.string(), False),
        ("token_ids", pa.list_(pa.int32()), False),
        ("finish_reason", pa.string(), False),  # "stop": the end token was sampled and is kept; "length": cut at max_new_tokens
        ("duplicate_of", pa.string(), True),  # candidate_id of an earlier candidate of the same prompt with the same tokens
        ("model", pa.string(), False),  # weights key of the model that wrote it
        ("seed", pa.int64(), False),
    ],
    "judged": _PAIR,
    "consistency": [*_PAIR, *_AGREEMENT],
    "preferences": [
        *_PAIR,
        ("label", pa.string(), True),  # "first" | "second"; null: unlabelled, kept for the penalty
        ("margin", pa.float64(), True),
        ("certainty", pa.float64(), True),  # probability that the label is right; null: it is taken as sure
        ("prompt", MESSAGES, False),
        ("chosen", MESSAGES, True),
        ("rejected", MESSAGES, True),
    ],
    "scores": [
        ("example_id", pa.string(), False),
        ("subset", pa.string(), True),
        ("metric", pa.string(), False),
        ("value", pa.float64(), True),
        ("detail", pa.string(), True),
    ],
}


def schema(kind: str) -> pa.Schema:
    """The Arrow schema of a dataset kind, with kind and version in its metadata."""
    fields = [pa.field(name, dtype, nullable) for name, dtype, nullable in COLUMNS[kind]]
    return pa.schema(fields, metadata={KIND_KEY: kind.encode(), VERSION_KEY: VERSION.encode()})


def kind_of(table_schema: pa.Schema) -> str | None:
    """The kind a schema declares in its metadata, or None for data that is not ours."""
    value = (table_schema.metadata or {}).get(KIND_KEY)
    return value.decode() if value else None


def to_table(kind: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of `kind`; raises DataError for an unknown column, a missing one, or a null where none may be."""
    rows = list(rows)
    names = {name for name, _, _ in COLUMNS[kind]}
    for row in rows:
        for key in row:
            if key not in names:
                raise DataError(f"column '{key}' is not part of a {kind} dataset.{suggest(key, names)}")
    columns = [pa.array([row.get(name) for row in rows], dtype) for name, dtype, _ in COLUMNS[kind]]
    table = pa.Table.from_arrays(columns, schema=schema(kind))
    check_nulls(table, kind)
    return table


def check_nulls(table: pa.Table, kind: str) -> None:
    """Raises DataError naming the first column of `table` that is missing or holds a null it may not."""
    for name, _, nullable in COLUMNS[kind]:
        if name not in table.column_names:
            raise DataError(f"a {kind} dataset needs the column '{name}'; this one has {', '.join(table.column_names)}")
        if not nullable and table.column(name).null_count:
            raise DataError(f"column '{name}' of a {kind} dataset holds {table.column(name).null_count} nulls; it may hold none")
