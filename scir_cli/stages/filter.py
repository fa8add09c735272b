"""filter: judged pairs -> labelled preference pairs. Every dropped row is counted under the first reason that applies to it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scir_cli import consistency, labels, schemas, store
from scir_cli.config import FilterSettings
from scir_cli.consistency import Verdicts
from scir_cli.errors import ConfigError, DataError, suggest
from scir_cli.places import place
from scir_cli.stages.progress import progress
from scir_cli.store import Json, Part

#: Reasons for which a pair has no label; --keep-unlabelled keeps it without one. The others are about the pair itself.
UNLABELLED = ("no_verdict", "tie", "disagree", "below_confidence", "below_margin", "not_sampled")


@dataclass
class Rule:
    """Who labels, read from --rule: `models` vote, "agree" or "majority" decides, and a random share may be kept."""

    models: list[str]
    how: str
    rate: float = 1.0

    @classmethod
    def of(cls, settings: FilterSettings, known: list[str]) -> Rule:
        name, _, number = settings.rule.partition(":")
        if name in ("agree", "majority") and not number:
            models = settings.agree_on or known
        elif name == "random":
            models = [settings.random_label]
        else:
            models = [settings.rule]
        for model in models:
            if model not in known:
                raise ConfigError(
                    f"--rule {settings.rule}: the dataset has no verdicts of '{model}'.{suggest(model, [*known, 'agree', 'majority'])}"
                )
        return cls(models, "majority" if name == "majority" else "agree", _rate(number) if name == "random" else 1.0)

    def votes(self, v: Verdicts) -> np.ndarray:
        return np.stack([v.log_odds[v.names.index(name)] for name in self.models])  # (models, pairs)


def _rate(number: str) -> float:
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:
        raise ConfigError(f"--rule random:{number} needs a rate above 0 and at most 1, as random:0.5")
    return rate


def run(settings: FilterSettings) -> Json:
    """Writes a preferences dataset and returns its manifest."""
    path = place(settings.input)
    table = store.read_dataset(path, "judged", "consistency").slice(0, settings.limit).select(schemas.schema("judged").names)
    if not table.num_rows:
        raise DataError(f"{path} holds no pairs")
    verdicts = consistency.from_table(table)
    rule = Rule.of(settings, verdicts.names)
    digests = {"input": store.digest_path(path), "previous": settings.previous and store.digest_path(place(settings.previous))}
    plan = {"stage": "filter", "settings": settings.plan(), **digests}
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": table.num_rows}
    votes = rule.votes(verdicts)  # (models that label, pairs)
    if settings.length_neutral:
        votes = np.stack([labels.length_neutral(a, verdicts.length_difference)[0] for a in votes])
    reasons, sign, margin = decide(votes, verdicts.pair_ids, table, rule, settings)
    certainty = _certainty(votes, verdicts.pair_ids, table, rule, settings)
    out = settings.output_dir
    with progress("filter", table.num_rows) as advance:

        def make(low: int, high: int) -> Part:
            rows = slice(low, high)
            kept = np.array([not r or (settings.keep_unlabelled and r in UNLABELLED) for r in reasons[rows]])
            drops = Counter(r for r, keep in zip(reasons[rows], kept, strict=True) if not keep)
            labelled = np.where([not r for r in reasons[rows]], sign[rows], 0.0)
            made = _preferences(table.slice(low, high - low), kept, labelled, margin[rows], certainty[rows])
            return Part(made, high - low, drops)

        bounds = store.part_bounds(table.num_rows, settings.rows_per_part)
        manifest = store.write_dataset(
            out, "preferences", plan, bounds, make, overwrite=settings.overwrite, advance=advance, summarise=_summary
        )
    if settings.format == "trl" and not (out / "trl.jsonl").exists():
        write_trl(store.read_dataset(out, "preferences"), out / "trl.jsonl")
    return manifest


def decide(
    votes: np.ndarray, pair_ids: list[str], table: pa.Table, rule: Rule, settings: FilterSettings
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Why each pair is dropped ("" where it is kept), the sign of its label, and its margin in nats, (pairs,) each.  votes: (models, pairs)"""
    agreed = consistency.agreement(votes)
    sign = np.sign(np.sign(votes).sum(0)) if rule.how == "majority" else np.sign(votes[0])
    margin = np.abs(votes).min(0)
    confidence = 1 / (1 + np.exp(-margin))
    lengths = np.stack([pc.list_value_length(pc.struct_field(table[side], "token_ids")).to_numpy() for side in ("first", "second")])
    drawn = (
        np.array([int(store.digest_json([settings.seed, i])[:15], 16) / 16**15 < rule.rate for i in pair_ids])
        if rule.rate < 1
        else True
    )
    tests = [
        ("no_verdict", np.isnan(votes).any(0)),
        ("tie", sign == 0),
        ("disagree", (agreed.agree != 1.0) & (rule.how == "agree")),
        ("below_confidence", confidence < settings.min_confidence),
        ("below_margin", margin < settings.min_margin),
        ("not_sampled", ~np.broadcast_to(drawn, margin.shape)),
        ("too_short", lengths.min(0) < settings.min_response_tokens),
        ("too_long", lengths.max(0) > (settings.max_response_tokens or np.inf)),
    ]
    reasons = [""] * len(pair_ids)
    for name, hit in reversed(tests):  # the first reason of the list wins
        for row in np.flatnonzero(hit):
            reasons[row] = name
    _drop_repeated(reasons, table, settings)
    _cap_prompts(reasons, table, margin, settings)
    return reasons, sign, margin


def _certainty(votes: np.ndarray, pair_ids: list[str], table: pa.Table, rule: Rule, settings: FilterSettings) -> np.ndarray:
    """How sure each label is, (pairs,): from how alike --previous ranks the same answers (CREAM); NaN, for sure, without it."""
    if settings.previous is None:
        return np.full(len(pair_ids), np.nan)
    before = consistency.from_table(store.read_dataset(place(settings.previous), "judged", "consistency"))
    name = settings.previous_model or rule.models[0]
    if name not in before.names:
        raise ConfigError(f"--previous {settings.previous} has no verdicts of '{name}'.{suggest(name, before.names)}")
    known = dict(zip(before.pair_ids, before.log_odds[before.names.index(name)], strict=True))
    past = np.array([known.get(i, np.nan) for i in pair_ids])
    if np.isnan(past).all():
        raise DataError(
            f"--previous {settings.previous} judged none of these pairs; judge the same candidates with the previous model"
        )
    return labels.rank_consistency(votes[0], past, table["prompt_id"].to_pylist(), settings.certainty == "average")


def _drop_repeated(reasons: list[str], table: pa.Table, settings: FilterSettings) -> None:
    if not settings.dedup:
        return
    texts = [pc.struct_field(table[side], "text").to_pylist() for side in ("first", "second")]
    seen: set[tuple[str, str, str]] = set()
    for row, (prompt, a, b) in enumerate(zip(table["prompt_id"].to_pylist(), *texts, strict=True)):
        key = (prompt, *sorted((a, b)))
        if key in seen:
            reasons[row] = "duplicate"
        seen.add(key)


def _cap_prompts(reasons: list[str], table: pa.Table, margin: np.ndarray, settings: FilterSettings) -> None:
    if settings.max_pairs_per_prompt is None:
        return
    groups: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(table["prompt_id"].to_pylist()):
        if not reasons[row]:
            groups[prompt].append(row)
    for rows in groups.values():
        for row in sorted(rows, key=lambda r: -margin[r])[settings.max_pairs_per_prompt :]:
            reasons[row] = "over_prompt_cap"


def _preferences(part: pa.Table, kept: np.ndarray, sign: np.ndarray, margin: np.ndarray, certainty: np.ndarray) -> pa.Table:
    """The kept rows with label, margin, certainty, prompt, chosen and rejected columns."""
    part, sign, margin, certainty = part.filter(pa.array(kept)), sign[kept], margin[kept], certainty[kept]
    known = pa.array(sign != 0)
    first_better = pa.array(sign > 0)
    texts = [pc.struct_field(part[side], "text").combine_chunks() for side in ("first", "second")]
    words = pc.if_else(first_better, pa.scalar("first"), pa.scalar("second"))
    part = part.append_column("label", pc.if_else(known, words, pa.scalar(None, pa.string())))
    part = part.append_column("margin", pa.array(margin, mask=np.isnan(margin) | (sign == 0)))
    part = part.append_column("certainty", pa.array(certainty, mask=np.isnan(certainty) | (sign == 0)))
    part = part.append_column("prompt", part["messages"])
    part = part.append_column("chosen", _assistant(pc.if_else(first_better, *texts), sign != 0))
    return part.append_column("rejected", _assistant(pc.if_else(first_better, *reversed(texts)), sign != 0))


def _assistant(texts: pa.Array, known: np.ndarray) -> pa.Array:
    """One assistant message a row, null where the pair has no label."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    turns = pa.StructArray.from_arrays([pa.array(["assistant"] * len(texts), pa.string()), texts], names=["role", "content"])
    return pa.ListArray.from_arrays(
        pa.array(np.arange(len(texts) + 1), pa.int32()), turns, type=schemas.MESSAGES, mask=pa.array(~known)
    )


def _summary(table: Any) -> Json:
    v = consistency.from_table(table)
    labels = [{"first": 1.0, "second": -1.0}.get(label, np.nan) for label in table["label"].to_pylist()]
    right = np.array(labels) * v.gold
    known = right[~np.isnan(right)]
    figures: Json = {"labelled": int(np.sum(~np.isnan(labels))), "unlabelled": int(np.sum(np.isnan(labels)))}
    return figures | {"label_accuracy": float(np.mean(known > 0)) if len(known) else None, "with_gold": len(known)}


def write_trl(table: pa.Table, path: Path) -> None:
    """A JSON-lines file of the labelled pairs with prompt, chosen and rejected as messages, as TRL's DPOTrainer takes them."""
    with store.writing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for batch in table.select(["prompt", "chosen", "rejected"]).to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                if row["chosen"] is not None:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
