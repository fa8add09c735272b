"""Rows of pairs -> token ids and `Pair`s, as the engine scores them.

No other module tokenizes pairs.
"""

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
from scir_cli.engine.chat import Chat, Message, Unrenderable
from scir_cli.errors import warn
from scir_cli.rewards.columns import with_column

SIDES = ("first", "second")
PAIR_COLUMNS = ["pair_id", "messages", *SIDES, "rewards", "reference_logps"]

# the token ids of each pair's prompt
PromptIds = list[tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """A pair as the engine sees it: token ids to score, and text for a judge to read."""

    pair_id: str
    messages: Sequence[Message]
    prompt_ids: tuple[int, ...]
    # first, second
    response_ids: tuple[tuple[int, ...], tuple[int, ...]]
    # first, second
    texts: tuple[str, str]
    # weights key -> summed log-probabilities of first and second, nats
    reference_logps: dict[str, tuple[float, float]] = field(default_factory=dict)
    # reward model -> the token ids of its answers to `requests`
    rationale_token_ids: dict[str, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """The inputs of `odds` besides the policy's log-probabilities; pairs along the last axis."""

    # (2, pairs) tokens of first and second
    n_tokens: Tensor
    # (2, pairs) under --reward-reference, nats; NaN if unknown
    reference_logps: Tensor
    # (pairs,) float64 as in the data, on the CPU: it enters no loss; NaN: no verdict
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

        reward_reference: weights key of the reference model; None if no model reads it.
        external: (pairs,) log-odds from the data, nats; None if the data has none.
        """
        key = reward_reference or ""
        unknown = (float("nan"), float("nan"))
        reference = [pair.reference_logps.get(key, unknown) for pair in pairs]

        lengths = []
        for pair in pairs:
            lengths.append([len(ids) for ids in pair.response_ids])

        if external is None:
            external = torch.full((len(pairs),), torch.nan)
        return cls(
            n_tokens=torch.tensor(lengths, dtype=torch.float32, device=device).T,
            reference_logps=torch.tensor(reference, dtype=torch.float32, device=device).T,
            external=external.double().cpu(),
        )


def without_foreign_ids(table: pa.Table, encoding: str | None, own: str) -> tuple[pa.Table, int]:
    """The pairs without what depends on another encoding, and the number of pairs that lost ids.

    These are the token ids of responses and rationales, and the log-probabilities of those tokens.
    encoding: digest of the encoding of the ids; None: unknown. own: that of the model.
    """
    if encoding == own:
        return table, 0
    sides = [_response_fields(table, side) for side in SIDES]
    has_ids = ~np.all([_without_token_ids(side) for side in sides], axis=0)
    if not has_ids.any():
        return table, 0
    for name, side in zip(SIDES, sides, strict=True):
        no_ids: dict[int, list[int]] = {row: [] for row in range(len(table))}
        table = with_column(table, name, _with_token_ids(side, no_ids))
    table = with_column(table, "rewards", _without_rationales(table["rewards"]))
    no_logps = pa.array([[]] * len(table), schemas.REFERENCE_LOGPS)
    return with_column(table, "reference_logps", no_logps), int(has_ids.sum())


def warn_of_foreign_ids(manifest: Mapping[str, Any], spec: str, model: str) -> None:
    """Warns if a manifest counts pairs that were encoded again.

    spec: where the pairs are from; model: whose tokenizer and chat template were used
    """
    count = manifest.get("encoded_again")
    if count and not manifest.get("reused"):
        warn(
            f"{spec}: {count} pairs hold token ids of another tokenizer or chat template than "
            f"{model}'s; their texts were encoded again"
        )


def _without_rationales(rewards: pa.ChunkedArray) -> pa.Array:
    """The verdicts of each pair, without the token ids of their rationales."""
    rows = rewards.to_pylist()
    for row in rows:
        for verdict in row:
            verdict["rationale_token_ids"] = None
    return pa.array(rows, schemas.REWARDS)


def encode_pairs(table: pa.Table, chat: Chat) -> tuple[pa.Table, list[Pair], Counter[str]]:
    """The pairs of a table that can be tokenized, as rows and as `Pair`s, and the drops by reason.

    Drops: as in `tokenize_pairs`.
    """
    table, prompt_ids, drops = tokenize_pairs(table, chat)
    return table, make_pairs(table, prompt_ids), drops


def tokenize_pairs(table: pa.Table, chat: Chat) -> tuple[pa.Table, PromptIds, Counter[str]]:
    """The pairs with token ids of both responses, the token ids of their prompts, and the drops.

    Token ids in the table are used as they are: sampled ids are never encoded again.
    Neighbors with the same prompt share one tuple of its ids.
    Drops: template_refused, content_missing (the chat template refuses the conversation, or
    leaves out a turn), prompt_boundary (it does not render a response as a continuation of its
    prompt), no_answer (a response ends inside its reasoning).
    Responses that are tokenized here are split into reasoning and text.
    """
    sides = [_response_fields(table, side) for side in SIDES]
    lacking = [_without_token_ids(side) for side in sides]
    texts = []
    for side, lacks in zip(sides, lacking, strict=True):
        texts.append(_whole_texts(side) if lacks.any() else [])

    # of each side: row -> token ids
    encoded: list[dict[int, list[int]]] = [{} for _ in SIDES]
    prompt_ids: PromptIds = []
    opens = chat.opening is not None and chat.opening.changes_prompt
    rendered = np.ones(len(table), bool)
    drops: Counter[str] = Counter()
    for row, messages in enumerate(table["messages"].to_pylist()):
        responses = [
            side[row] if lacks[row] else None for side, lacks in zip(texts, lacking, strict=True)
        ]
        try:
            _check_answers(chat, responses)
            opened = _opened(chat, messages, sides, row) if opens else None
            prompt, answers = opened or _encoded(chat, messages, responses)
        except Unrenderable as error:
            rendered[row] = False
            drops[error.reason] += 1
            continue
        if prompt_ids and prompt_ids[-1] == prompt:
            prompt = prompt_ids[-1]
        prompt_ids.append(prompt)
        for rows, response, answer in zip(encoded, responses, answers, strict=True):
            if response is not None:
                rows[row] = answer

    for name, side, rows, whole in zip(SIDES, sides, encoded, texts, strict=True):
        if rows:
            if chat.markers is not None:
                _split_texts(side, {row: whole[row] for row in rows}, chat)
            table = with_column(table, name, _with_token_ids(side, rows))
    return table.filter(pa.array(rendered)), prompt_ids, drops


def _encoded(
    chat: Chat, messages: Sequence[Message], responses: Sequence[str | None]
) -> tuple[tuple[int, ...], list[list[int]]]:
    """The ids of a generation prompt, and of each response; none for a response that is None."""
    prompt = tuple(chat.prompt_ids(messages))
    answers = []
    for response in responses:
        answers.append([] if response is None else chat.response_ids(messages, response))
    return prompt, answers


def _opened(
    chat: Chat, messages: Sequence[Message], sides: Sequence[Mapping[str, pa.Array]], row: int
) -> tuple[tuple[int, ...], list[list[int]]] | None:
    """A labeled row's prompt with the start of an answer without reasoning, and both responses.

    None for a row with a candidate, whose ids follow the prompt that it was sampled after, and for
    responses that do not start in this way.
    sides: the fields of the responses, (pairs,) each.
    """
    responses = []
    for side in sides:
        if side["candidate_id"][row].is_valid:
            return None
        reasoning = side["reasoning"][row].as_py() or ""
        responses.append(reasoning + side["text"][row].as_py())
    prompt, answers = chat.labeled_ids(messages, responses)
    for side, answer in zip(sides, answers, strict=True):
        stored = side["token_ids"][row].as_py()
        if stored and stored != answer:
            return None
    return tuple(prompt), answers


def _response_fields(table: pa.Table, side: str) -> dict[str, pa.Array]:
    """The fields of one side's responses, (pairs,) each."""
    fields = {}
    for response_field in schemas.RESPONSE:
        values = pc.struct_field(table[side], response_field.name)
        fields[response_field.name] = values.combine_chunks()
    return fields


def _whole_texts(side: dict[str, pa.Array]) -> list[str]:
    """Reasoning and text of one side's responses.  -> (pairs,)"""
    if side["reasoning"].null_count == len(side["reasoning"]):
        texts: list[str] = side["text"].to_pylist()
        return texts
    reasoning = side["reasoning"].fill_null("")
    whole: list[str] = pc.binary_join_element_wise(reasoning, side["text"], "").to_pylist()
    return whole


def _check_answers(chat: Chat, responses: Sequence[str | None]) -> None:
    """Raises Unrenderable if a response ends inside its reasoning; None is no response."""
    for response in responses:
        reasoning, answer = chat.split(response or "", sampled=False)
        if reasoning and not answer.strip():
            raise Unrenderable(f"the response {reasoning[:40]!r} has no answer", "no_answer")


def _split_texts(side: dict[str, pa.Array], whole: Mapping[int, str], chat: Chat) -> None:
    """Splits responses of one side into reasoning and text, in place.

    whole: row -> both together.
    """
    reasonings = side["reasoning"].to_pylist()
    texts = side["text"].to_pylist()
    for row, response in whole.items():
        if reasonings[row] is None:
            reasoning, texts[row] = chat.split(response, sampled=False)
            reasonings[row] = reasoning or None
    side["reasoning"] = pa.array(reasonings, side["reasoning"].type)
    side["text"] = pa.array(texts, side["text"].type)


def _without_token_ids(side: dict[str, pa.Array]) -> np.ndarray:
    """Whether a response has no token ids.  -> (pairs,) bool"""
    lengths = pc.list_value_length(side["token_ids"]).fill_null(0)
    return lengths.to_numpy() == 0


def _with_token_ids(side: dict[str, pa.Array], encoded: dict[int, list[int]]) -> pa.Array:
    """One side's responses, with token ids inserted in the encoded rows.  -> (pairs,)

    side: the fields of the responses, (pairs,) each; encoded: row -> token ids.
    """
    ids = side["token_ids"].to_pylist()
    for row, tokens in encoded.items():
        ids[row] = tokens
    side["token_ids"] = pa.array(ids, side["token_ids"].type)
    return pa.StructArray.from_arrays(list(side.values()), fields=list(schemas.RESPONSE))


def make_pairs(table: pa.Table, prompt_ids: Sequence[tuple[int, ...]]) -> list[Pair]:
    """The `Pair` of each row; the table holds the token ids of all responses.

    prompt_ids: token ids of each row's prompt.
    """
    rows = table.select(PAIR_COLUMNS).to_pylist()
    return [_make_pair(row, ids) for row, ids in zip(rows, prompt_ids, strict=True)]


def _make_pair(row: Mapping[str, Any], prompt_ids: tuple[int, ...]) -> Pair:
    """The `Pair` of a row.  row: the columns PAIR_COLUMNS"""
    first, second = (row[side] for side in SIDES)

    reference_logps = {}
    for logps in row["reference_logps"]:
        reference_logps[logps["weights_key"]] = (logps["first"], logps["second"])

    rationales = {}
    for reward in row["rewards"]:
        token_ids = reward.get("rationale_token_ids")
        if token_ids:
            rationales[reward["reward_model"]] = token_ids

    return Pair(
        pair_id=row["pair_id"],
        messages=row["messages"],
        prompt_ids=prompt_ids,
        response_ids=(tuple(first["token_ids"]), tuple(second["token_ids"])),
        texts=(first["text"], second["text"]),
        reference_logps=reference_logps,
        rationale_token_ids=rationales,
    )
