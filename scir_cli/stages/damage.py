"""Pairs ordered by construction: a response beside itself damaged (`judge --pairs damaged`).

They need no person's labels and calibrate soft labels (`filter --calibrate-on`). Whether they suit
a model's own pairs is not measured yet: damage is easier to see than the difference of two samples.
Every damage is a function of the text and of other candidates of the part; nothing is drawn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from scir_cli.data import hashing, schemas
from scir_cli.errors import ConfigError

Row = dict[str, Any]

#: Fewer words than this are not cut.
MIN_WORDS = 4


def sentences(text: str) -> list[str]:
    """The sentences of a text: it is cut after . ! or ? before white space."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def truncated(text: str) -> str | None:
    """The first half of the words."""
    words = text.split()
    return " ".join(words[: len(words) // 2]) if len(words) >= MIN_WORDS else None


def shuffled(text: str) -> str | None:
    """The sentences with the last one first."""
    parts = sentences(text)
    moved = " ".join([*parts[-1:], *parts[:-1]])
    return moved if moved != " ".join(parts) else None


def repeated(text: str) -> str | None:
    """The text with its last sentence twice."""
    parts = sentences(text)
    return " ".join([*parts, parts[-1]]) if parts else None


#: Kind of damage -> text to damaged text, or None if the text cannot be damaged so.
DAMAGES: dict[str, Callable[[str], str | None]] = {
    "truncated": truncated,
    "shuffled": shuffled,
    "repeated": repeated,
}


def damaged_pairs(table: pa.Table, external: str | None = None) -> tuple[pa.Table, Counter[str]]:
    """Each candidate beside itself damaged in each way, and beside the answer to another prompt.

    `gold_label` is the undamaged one, `subset` the kind of damage; a hash decides which is `first`.
    Drops: unusable_candidate (a duplicate or empty one). Raises ConfigError for external scores.
    """
    if external is not None:
        raise ConfigError(
            "--pairs damaged makes responses that have no score: leave --score-column out"
        )
    candidates = table.to_pylist()
    usable = [c for c in candidates if not c["duplicate_of"] and c["response"].strip()]
    drops = Counter(unusable_candidate=len(candidates) - len(usable))
    rows: list[Row] = []
    others = _other_prompts(usable)
    for candidate, other in zip(usable, others, strict=True):
        for kind, damage in DAMAGES.items():
            text = damage(candidate["response"])
            if text is not None:
                rows.append(_pair(candidate, kind, _written(text, kind)))
        if other is not None and other["response"] != candidate["response"]:
            rows.append(_pair(candidate, "other prompt", _sampled(other)))
    return schemas.to_table("judged", rows), +drops


def _other_prompts(candidates: list[Row]) -> list[Row | None]:
    """The candidate of another prompt nearest in length to each; None if there is none."""
    lengths = np.array([len(c["token_ids"]) for c in candidates])
    prompts = np.array([c["prompt_id"] for c in candidates])
    found: list[Row | None] = []
    for length, prompt in zip(lengths, prompts, strict=True):
        others = np.flatnonzero(prompts != prompt)
        nearest = others[np.abs(lengths[others] - length).argmin()] if len(others) else None
        found.append(None if nearest is None else candidates[nearest])
    return found


def _pair(candidate: Row, kind: str, damaged: Row) -> Row:
    """A row of a judged dataset, without verdicts."""
    digest = hashing.digest_json([candidate["candidate_id"], kind])
    sides = [_sampled(candidate), damaged]
    is_first = int(digest[:16], 16) % 2 == 0
    first, second = sides if is_first else reversed(sides)
    shared = {name: candidate[name] for name in ("prompt_id", "messages", "extra")}
    return shared | {
        "pair_id": digest[:16],
        "subset": kind,
        "first": first,
        "second": second,
        "gold_label": "first" if is_first else "second",
        "rewards": [],
        "reference_logps": [],
    }


def _sampled(candidate: Row) -> Row:
    """A candidate as one side of a pair."""
    return {
        "candidate_id": candidate["candidate_id"],
        "reasoning": candidate["reasoning"],
        "text": candidate["response"],
        "token_ids": candidate["token_ids"],
        "finish_reason": candidate["finish_reason"],
        "author": candidate["weights_key"],
    }


def _written(text: str, kind: str) -> Row:
    """A text that nobody sampled, not tokenized yet, as one side of a pair."""
    return {
        "candidate_id": None,
        "text": text,
        "token_ids": [],
        "finish_reason": "stop",
        "author": f"damage: {kind}",
    }
