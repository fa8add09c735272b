"""Rows of pairs -> token ids and `Pair`s for the engine; the only place that tokenizes pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from scir_cli.data import schemas
from scir_cli.engine.chat import Chat, Message
from scir_cli.errors import DataError
from scir_cli.rewards.columns import filter_rows, with_column

SIDES = ("first", "second")
PAIR_COLUMNS = ["pair_id", "messages", *SIDES, "rewards", "reference_logps"]

#: Token ids of each pair's prompt
PromptIds = list[tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """A pair: token ids of what is scored, and text for the judge's prompt."""

    pair_id: str
    messages: Sequence[Message]
    prompt_ids: tuple[int, ...]
    #: first, second
    response_ids: tuple[tuple[int, ...], tuple[int, ...]]
    #: first, second
    texts: tuple[str, str]
    #: weights key -> summed log-probabilities of first and second, nats
    reference_logps: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: reward model -> token ids of the answers to its `requests`
    rationale_token_ids: dict[str, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Inputs of `odds` beside the policy's log-probabilities; pairs along the last axis."""

    #: (2, pairs) tokens of first and second
    n_tokens: Tensor
    #: (2, pairs) under the reward reference, nats; NaN if unknown
    reference_logps: Tensor
    #: (pairs,) log-odds in the data, nats; NaN: no verdict.
    #: fp64 and on the CPU, because no loss uses it
    external: Tensor

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        reward_reference: str | None,
        device: Any = "cpu",
        external: Tensor | None = None,
    ) -> Context:
        """The context of these pairs.

        reward_reference: weights key of the model whose log-probabilities to use.
        external: (pairs,) log-odds given in the data, or None.
        """
        unknown = (float("nan"), float("nan"))
        key = reward_reference or ""
        reference = [pair.reference_logps.get(key, unknown) for pair in pairs]
        if external is None:
            external = torch.full((len(pairs),), torch.nan)
        lengths = [[len(ids) for ids in pair.response_ids] for pair in pairs]
        return cls(
            torch.tensor(lengths, dtype=torch.float32, device=device).T,
            torch.tensor(reference, dtype=torch.float32, device=device).T,
            external.double().cpu(),
        )


def encode_pairs(table: pa.Table, chat: Chat) -> tuple[pa.Table, list[Pair], Counter[str]]:
    """The pairs that can be tokenized, as rows and as `Pair`s, and the number of drops by reason.

    Drops: as `tokenize_pairs`.
    """
    table, prompt_ids, drops = tokenize_pairs(table, chat)
    return table, make_pairs(table, prompt_ids), drops


def tokenize_pairs(table: pa.Table, chat: Chat) -> tuple[pa.Table, PromptIds, Counter[str]]:
    """The pairs with token ids of both responses, token ids of the prompts, and drops by reason.

    Token ids in the table are used unchanged: sampled ids are never encoded again.
    Neighbors with the same prompt share one rendering of it.
    Drops: prompt_boundary (the chat template does not render a response as a continuation of its
    prompt).
    """
    fields: list[dict[str, pa.Array]] = []
    lacking: list[np.ndarray] = []
    texts: list[list[str]] = []
    for side in SIDES:
        columns = {
            field.name: pc.struct_field(table[side], field.name).combine_chunks()
            for field in schemas.RESPONSE
        }
        lacks = pc.list_value_length(columns["token_ids"]).fill_null(0).to_numpy() == 0
        fields.append(columns)
        lacking.append(lacks)
        texts.append(columns["text"].to_pylist() if lacks.any() else [])
    # Row -> token ids, per side
    encoded: list[dict[int, list[int]]] = [{} for _ in SIDES]
    prompt_ids: PromptIds = []
    boundary = np.ones(len(table), bool)
    for row, messages in enumerate(table["messages"].to_pylist()):
        prompt = tuple(chat.prompt_ids(messages))
        prompt_ids.append(prompt_ids[-1] if prompt_ids and prompt_ids[-1] == prompt else prompt)
        try:
            for number in range(len(SIDES)):
                if lacking[number][row]:
                    encoded[number][row] = chat.response_ids(messages, texts[number][row])
        except DataError:
            boundary[row] = False
    for name, side, rows in zip(SIDES, fields, encoded, strict=True):
        if rows:
            table = with_column(table, name, _with_token_ids(side, rows))
    table, drops = filter_rows(table, boundary, "prompt_boundary")
    return table, [ids for ids, keep in zip(prompt_ids, boundary, strict=True) if keep], drops


def _with_token_ids(side: dict[str, pa.Array], encoded: dict[int, list[int]]) -> pa.Array:
    """The responses of one side with the token ids of some rows replaced.

    side: its fields, (pairs,) each.
    encoded: row -> token ids.
    """
    ids = side["token_ids"].to_pylist()
    for row, tokens in encoded.items():
        ids[row] = tokens
    side["token_ids"] = pa.array(ids, side["token_ids"].type)
    return pa.StructArray.from_arrays(list(side.values()), fields=list(schemas.RESPONSE))


def make_pairs(table: pa.Table, prompt_ids: Sequence[tuple[int, ...]]) -> list[Pair]:
    """The `Pair` of each row; the table has the token ids of all responses.

    prompt_ids: token ids of the prompt of each row.
    """
    rows = table.select(PAIR_COLUMNS).to_pylist()
    return [_make_pair(row, ids) for row, ids in zip(rows, prompt_ids, strict=True)]


def _make_pair(row: Mapping[str, Any], prompt_ids: tuple[int, ...]) -> Pair:
    first = row["first"]
    second = row["second"]
    reference_logps = {
        entry["weights_key"]: (entry["first"], entry["second"]) for entry in row["reference_logps"]
    }
    rationales = {}
    for reward in row["rewards"]:
        if token_ids := reward.get("rationale_token_ids"):
            rationales[reward["reward_model"]] = token_ids
    return Pair(
        row["pair_id"],
        row["messages"],
        prompt_ids,
        (tuple(first["token_ids"]), tuple(second["token_ids"])),
        (first["text"], second["text"]),
        reference_logps,
        rationales,
    )
