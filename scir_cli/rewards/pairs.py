"""Rows of pairs -> token ids and `Pair`s, as the engine scores them. The one place where pairs are tokenized."""

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

PromptIds = list[tuple[int, ...]]  # of each pair


@dataclass(frozen=True)
class Pair:
    """A pair as the engine sees it: token ids for what is scored, text for what a judge reads."""

    pair_id: str
    messages: Sequence[Message]
    prompt_ids: tuple[int, ...]
    response_ids: tuple[tuple[int, ...], tuple[int, ...]]  # first, second
    texts: tuple[str, str]
    reference_logps: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # weights key -> summed logps of first, second
    # reward model -> the token ids of its answers to `requests`
    rationale_token_ids: dict[str, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What `odds` needs beside the policy's log-probabilities; pairs along the last axis."""

    n_tokens: Tensor  # (2, pairs) tokens of first and second
    reference_logps: Tensor  # (2, pairs) under reward_reference, nats; NaN where unknown
    external: Tensor  # (pairs,) fp64, as it is in the data, and on the CPU: it enters no loss; NaN: no verdict

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        reward_reference: str | None,
        device: Any = "cpu",
        external: Tensor | None = None,
    ) -> Context:
        """What is known of the pairs.  external: (pairs,) log-odds that came with the data; None: there are none"""
        unknown = (float("nan"), float("nan"))
        reference = [p.reference_logps.get(reward_reference or "", unknown) for p in pairs]
        if external is None:
            external = torch.full((len(pairs),), torch.nan)
        lengths = [[len(ids) for ids in p.response_ids] for p in pairs]
        return cls(
            torch.tensor(lengths, dtype=torch.float32, device=device).T,
            torch.tensor(reference, dtype=torch.float32, device=device).T,
            external.double().cpu(),
        )


def encode_pairs(table: pa.Table, chat: Chat) -> tuple[pa.Table, list[Pair], Counter[str]]:
    """The pairs of a table that can be tokenized, as rows and as `Pair`s, and the others by reason.

    Drops: as `tokenize_pairs`.
    """
    table, prompt_ids, drops = tokenize_pairs(table, chat)
    return table, make_pairs(table, prompt_ids), drops


def tokenize_pairs(table: pa.Table, chat: Chat) -> tuple[pa.Table, PromptIds, Counter[str]]:
    """The pairs with the token ids of both responses, the token ids of each pair's prompt, and the drops.

    Token ids in the table are used as they are: sampled ids are never encoded again.
    Neighbours with the same prompt share one rendering of it.
    Drops: prompt_boundary (the chat template does not render a response as a continuation of its prompt).
    """
    fields = [
        {f.name: pc.struct_field(table[side], f.name).combine_chunks() for f in schemas.RESPONSE}
        for side in SIDES
    ]
    lacking = [
        pc.list_value_length(side["token_ids"]).fill_null(0).to_numpy() == 0 for side in fields
    ]
    texts = [
        side["text"].to_pylist() if lacks.any() else []
        for side, lacks in zip(fields, lacking, strict=True)
    ]
    encoded: list[dict[int, list[int]]] = [{} for _ in SIDES]  # row -> token ids
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
    """One side's responses, with these rows' token ids put in.  side: its fields, (pairs,) each"""
    ids = side["token_ids"].to_pylist()
    for row, tokens in encoded.items():
        ids[row] = tokens
    side["token_ids"] = pa.array(ids, side["token_ids"].type)
    return pa.StructArray.from_arrays(list(side.values()), fields=list(schemas.RESPONSE))


def make_pairs(table: pa.Table, prompt_ids: Sequence[tuple[int, ...]]) -> list[Pair]:
    """The `Pair` of each row; the table holds the token ids of all responses.  prompt_ids: of each row"""
    rows = table.select(PAIR_COLUMNS).to_pylist()
    return [_make_pair(row, ids) for row, ids in zip(rows, prompt_ids, strict=True)]


def _make_pair(row: Mapping[str, Any], prompt_ids: tuple[int, ...]) -> Pair:
    first, second = (row[side] for side in SIDES)
    return Pair(
        row["pair_id"],
        row["messages"],
        prompt_ids,
        (tuple(first["token_ids"]), tuple(second["token_ids"])),
        (first["text"], second["text"]),
        {r["weights_key"]: (r["first"], r["second"]) for r in row["reference_logps"]},
        {r["reward_model"]: ids for r in row["rewards"] if (ids := r.get("rationale_token_ids"))},
    )
