"""The columns of every dataset kind, checked on write and on read.

Each column states its meaning, unit and sign; dataset cards are built from them (dataset_card.py).
The responses of a pair are `first` and `second`; only a pair with a label has `chosen` and
`rejected`.
A missing verdict is null, never a number. Every log-odds is log P(first better) - log P(second
better) in nats, in whichever order the judge read the responses.
pyarrow does not enforce `nullable=False`, and `Table.from_pylist` drops a misspelled key without an
error, so both are checked here. `datasets` cannot read map columns: lists of structs replace them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from scir_cli.errors import DataError, suggest

#: Version of the columns below: a dataset of another version is refused.
VERSION = "3"
#: Keys of a table's Arrow metadata.
KIND_KEY = b"scir.kind"
VERSION_KEY = b"scir.version"


class Column(NamedTuple):
    """A column, or a field of a struct: its type, whether it may be null, and its meaning."""

    name: str
    dtype: pa.DataType
    nullable: bool
    meaning: str
    #: The fields of its struct, or of the structs in its list.
    fields: tuple[Column, ...] = ()


def _struct(fields: tuple[Column, ...]) -> pa.StructType:
    """The Arrow type of a struct with these fields."""
    return pa.struct([(field.name, field.dtype) for field in fields])


_TURN = (
    Column("role", pa.string(), False, "system, user, assistant or tool"),
    Column("content", pa.string(), False, "text of the message"),
    Column(
        "more",
        pa.string(),
        True,
        "its other fields (tool_calls …; on the first message, tools) as one JSON object; "
        "null: none",
    ),
)
_RESPONSE = (
    Column(
        "candidate_id",
        pa.string(),
        True,
        "id of the candidate; null: the response is from a file of pairs",
    ),
    Column(
        "reasoning",
        pa.string(),
        True,
        "what its author wrote before the response, with the marker between them; null: nothing",
    ),
    Column(
        "text",
        pa.string(),
        False,
        "the response, which judges read, without reasoning and without its end token",
    ),
    Column(
        "token_ids",
        pa.list_(pa.int32()),
        False,
        "tokens of reasoning and response, an end token included; empty: not tokenized yet",
    ),
    Column(
        "finish_reason",
        pa.string(),
        False,
        '"stop": ended by itself; "length": cut at max_new_tokens',
    ),
    Column(
        "author",
        pa.string(),
        True,
        "weights key of the model that wrote it, or a name from the input data; null: unknown",
    ),
)
_REWARD = (
    Column("reward_model", pa.string(), False, "name of the reward model"),
    Column(
        "log_odds",
        pa.float64(),
        True,
        "log P(first better) - log P(second better), nats; null: no verdict",
    ),
    Column(
        "forward_log_odds",
        pa.float64(),
        True,
        "the same, read with first in seat A; null: the model has no seats",
    ),
    Column(
        "swapped_log_odds",
        pa.float64(),
        True,
        "the same, also positive if first is better, read with second in seat A; "
        "null: the model has no seats",
    ),
    Column(
        "verdict_mass",
        pa.float64(),
        True,
        "probability of the verdict tokens together, 0 to 1; null: the model has none",
    ),
    Column(
        "rationale_token_ids",
        pa.list_(pa.list_(pa.int32())),
        True,
        "tokens of the text that the model wrote before each verdict; null: it wrote none",
    ),
)
_REFERENCE = (
    Column(
        "weights_key", pa.string(), False, "key of weights, precision, tokenizer and chat template"
    ),
    Column(
        "first",
        pa.float64(),
        False,
        "log-probability of the first response, summed over its tokens, nats",
    ),
    Column(
        "second",
        pa.float64(),
        False,
        "log-probability of the second response, summed over its tokens, nats",
    ),
)

MESSAGES = pa.list_(_struct(_TURN))
RESPONSE = _struct(_RESPONSE)
REWARDS = pa.list_(_struct(_REWARD))
REFERENCE_LOGPS = pa.list_(_struct(_REFERENCE))

_PROMPT = (
    Column("prompt_id", pa.string(), False, "hash of the messages"),
    Column("messages", MESSAGES, False, "the conversation that is answered", _TURN),
    Column(
        "subset",
        pa.string(),
        True,
        "part of the data set that the row belongs to; figures can be split by it",
    ),
    Column(
        "extra",
        pa.string(),
        True,
        "the input's other columns (id, source ...) as one JSON object; null: it had none",
    ),
)
_PAIR = (
    Column(
        "pair_id", pa.string(), False, "hash of the pair: of its two candidate ids, or of its texts"
    ),
    *_PROMPT,
    Column(
        "first",
        RESPONSE,
        False,
        "one response; its position does not depend on its quality",
        _RESPONSE,
    ),
    Column("second", RESPONSE, False, "the other response; fields as in `first`"),
    Column(
        "gold_label",
        pa.string(),
        True,
        '"first" or "second": the label in the input data, for evaluation only; null: none',
    ),
    Column("rewards", REWARDS, False, "verdicts, at most one per reward model", _REWARD),
    Column(
        "reference_logps",
        REFERENCE_LOGPS,
        False,
        "log-probabilities of both responses, one entry per weights",
        _REFERENCE,
    ),
)
_AGREEMENT = (
    Column(
        "agree",
        pa.bool_(),
        True,
        "whether all reward models prefer the same response, each confident enough; "
        "null: no verdict",
    ),
    Column(
        "margin",
        pa.float64(),
        True,
        "smallest |log-odds| among the reward models, nats; null: no verdict of one",
    ),
    Column(
        "mean_log_odds",
        pa.float64(),
        True,
        "mean log-odds, positive: first better, nats; null: no verdict of one",
    ),
    Column(
        "spread",
        pa.float64(),
        True,
        "largest minus smallest log-odds, nats; null: no verdict of one",
    ),
)

#: kind -> its columns.
COLUMNS: dict[str, tuple[Column, ...]] = {
    "prompts": _PROMPT,
    "candidates": (
        Column(
            "candidate_id", pa.string(), False, "hash of prompt, weights key, seed and settings"
        ),
        *_PROMPT,
        Column(
            "reasoning",
            pa.string(),
            True,
            "what the model wrote before its response, with the marker between them; null: nothing",
        ),
        Column(
            "response",
            pa.string(),
            False,
            "the sampled text, without reasoning and without its end token",
        ),
        Column(
            "token_ids", pa.list_(pa.int32()), False, "the sampled tokens, an end token included"
        ),
        Column(
            "finish_reason",
            pa.string(),
            False,
            '"stop": the end token was sampled; "length": cut at max_new_tokens',
        ),
        Column(
            "duplicate_of",
            pa.string(),
            True,
            "candidate_id of an earlier candidate of the prompt with the same tokens",
        ),
        Column(
            "weights_key",
            pa.string(),
            False,
            "key of the model that wrote it: weights, precision, tokenizer, template",
        ),
        Column("seed", pa.int64(), False, "seed of this sample"),
    ),
    "judged": _PAIR,
    "consistency": (
        Column("pair_id", pa.string(), False, "pair_id in the judged dataset"),
        *_AGREEMENT,
    ),
    "preferences": (
        *_PAIR,
        Column(
            "label",
            pa.string(),
            True,
            '"first" or "second": the better response; null: unlabeled, kept for the penalty',
        ),
        Column(
            "margin",
            pa.float64(),
            True,
            "smallest |log-odds| of the reward models that label, nats; null: unlabeled",
        ),
        Column(
            "label_probability",
            pa.float64(),
            True,
            "probability that the label is correct; null: it counts as 1",
        ),
        Column(
            "prompt",
            MESSAGES,
            False,
            "the messages, under the name that preference trainers expect",
            _TURN,
        ),
        Column(
            "chosen",
            MESSAGES,
            True,
            "the better response as one assistant message; null: unlabeled",
            _TURN,
        ),
        Column(
            "rejected",
            MESSAGES,
            True,
            "the worse response as one assistant message; null: unlabeled",
            _TURN,
        ),
    ),
    "scores": (
        Column(
            "example_id",
            pa.string(),
            False,
            "id of the pair, comparison or question that is scored",
        ),
        Column("subset", pa.string(), True, "part of the data set that the example belongs to"),
        Column("metric", pa.string(), False, "what is measured"),
        Column(
            "value",
            pa.float64(),
            True,
            "its value, in the unit of the metric; null: no verdict or no label",
        ),
        Column("detail", pa.string(), True, "more about the value, as a JSON object"),
    ),
}

#: kind -> meaning of one row, as a sentence.
ROWS = {
    "prompts": "One row per prompt.",
    "candidates": "One row per sampled response.",
    "judged": "One row per pair of responses to one prompt, with the verdict of each reward model.",
    "consistency": "One row per judged pair: how far its reward models agree.",
    "preferences": "One row per pair that was kept, with its label.",
    "scores": "One row per example and metric.",
}


def schema(kind: str) -> pa.Schema:
    """The Arrow schema of a dataset kind, with kind and version in its metadata."""
    fields = [pa.field(column.name, column.dtype, column.nullable) for column in COLUMNS[kind]]
    return pa.schema(fields, metadata={KIND_KEY: kind.encode(), VERSION_KEY: VERSION.encode()})


def version_of(table: pa.Table) -> str:
    """The schema version in a table's metadata; ours if there is none.

    A table without a version is accepted because its columns are checked in any case.
    """
    version: bytes = (table.schema.metadata or {}).get(VERSION_KEY, VERSION.encode())
    return version.decode()


def to_table(kind: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of `kind`.

    Raises DataError for an unknown column, a missing one, or a null in a column without nulls.
    """
    rows = list(rows)
    names = {column.name for column in COLUMNS[kind]}
    for row in rows:
        for key in row:
            if key not in names:
                hint = suggest(key, names)
                raise DataError(f"column '{key}' is not part of a {kind} dataset.{hint}")

    arrays = []
    for column in COLUMNS[kind]:
        values = [row.get(column.name) for row in rows]
        arrays.append(pa.array(values, column.dtype))
    table = pa.Table.from_arrays(arrays, schema=schema(kind))
    check_nulls(table, kind)
    return table


def check_nulls(table: pa.Table, kind: str) -> None:
    """Raises DataError for the first column that is missing or holds nulls it may not hold."""
    for column in COLUMNS[kind]:
        name = column.name
        if name not in table.column_names:
            present = ", ".join(table.column_names)
            raise DataError(f"a {kind} dataset needs the column '{name}'; this one has {present}")

        n_nulls = table.column(name).null_count
        if n_nulls and not column.nullable:
            raise DataError(
                f"column '{name}' of a {kind} dataset holds {n_nulls} nulls; it may hold none"
            )
