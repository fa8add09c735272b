"""eval rewards: accuracy of each reward model on labeled pairs.

OUT/judged   the pairs with their verdicts, as `judge` writes them; all figures come from them
OUT/         a `scores` dataset: one row per pair and reward model
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scir_cli.analysis import consistency, reward_bench, verdicts
from scir_cli.analysis.verdicts import Array, Verdicts
from scir_cli.data import dataset, folders, readers
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import ConfigError, DataError
from scir_cli.report import html
from scir_cli.settings import EvalRewardsSettings
from scir_cli.stages.pairing import PairInput
from scir_cli.stages.scoring import Scorer, write_judged_dataset

Row = dict[str, Any]

#: Kinds of datasets with verdicts.
JUDGED = ("judged", "preferences")

#: A candidate id of RewardBench 2: example, side, index in the side's list, length of that list.
CANDIDATE_ID = re.compile(r"(.*)/(chosen|rejected)/(\d+)/(\d+)", re.DOTALL)


def run(settings: EvalRewardsSettings) -> Json:
    """Writes a score per labeled pair and reward model; returns the manifest.

    The accuracies are under "summary" of the manifest. Counts are in pairs times reward models.
    Raises ConfigError if the input needs a judge and --model is missing, and DataError if no
    labeled pair has a verdict.
    """
    path = to_path(settings.input)
    has_verdicts = folders.is_dataset(path) and not settings.model
    if not has_verdicts and not settings.model:
        raise ConfigError(
            "--model is missing and the input has no verdicts; "
            "pass a judged dataset, or a model that judges the pairs"
        )
    if folders.is_dataset(path):
        # Checks the kind before the output folder is created.
        dataset.open_dataset(path, *JUDGED)

    scorer = None if has_verdicts else Scorer(settings)
    digest = readers.digest(settings.input)
    plan: Json = {"stage": "eval rewards", "settings": settings.plan(), "input": digest}
    if scorer:
        plan |= scorer.keys
    if settings.dry_run:
        return {"dry_run": True, "plan": plan}

    judged = path if has_verdicts else settings.output_dir / "judged"

    def make(low: int, high: int) -> Part:
        drops = _judge(settings, scorer, digest) if scorer else {}
        return _scores(judged, settings.input, drops)

    manifest = dataset.write_dataset(
        settings.output_dir,
        "scores",
        plan,
        [(0, 1)],
        make,
        overwrite=settings.overwrite,
        summarize=lambda written: _summary(judged),
        inputs={
            "input": settings.input,
            "model": settings.model,
            "reward_reference": settings.reward_reference,
        },
    )
    html.write_for("eval rewards", settings, judged=judged)
    return manifest


def _judge(settings: EvalRewardsSettings, scorer: Scorer, digest: str) -> Json:
    """Writes OUT/judged; returns the dropped input rows by reason."""
    table, dropped = readers.open_pairs(settings.input, settings.limit, settings.score_column)
    bounds = dataset.part_bounds(table.num_rows, settings.rows_per_part)
    pairs = PairInput(table, bounds, dropped, digest)

    changes = {
        "output_dir": settings.output_dir / "judged",
        "overwrite": False,
    }
    inner = settings.model_copy(update=changes)
    manifest = write_judged_dataset("eval rewards", inner, scorer, pairs)
    drops: Json = manifest["drops"]
    return drops


def _scores(judged: Path, source: str, drops: Json) -> Part:
    """The part with all score rows. Its counts are pairs times reward models.

    source: the input, for messages
    drops: input rows by reason
    Raises DataError if no labeled pair has a verdict.
    """
    pairs = dataset.read_dataset(judged, *JUDGED)
    v = verdicts.from_table(pairs)
    rows = _accuracy_rows(v)
    if all(row["value"] is None for row in rows):
        n_pairs = len(v.gold)
        n_labeled = n_pairs - int(np.isnan(v.gold).sum())
        raise DataError(
            f"{source} leaves no labeled pair with a verdict ({n_labeled} of {n_pairs} pairs "
            f"have a gold label; dropped: {drops or 'none'})"
        )
    n_models = len(v.names)
    in_rows = Counter({reason: count * n_models for reason, count in drops.items()})
    return Part(rows, len(rows) + in_rows.total(), in_rows)


def _summary(judged: Path) -> Json:
    """The figures of a judged dataset: agreement, accuracy, curves and benchmark scores."""
    pairs = dataset.read_dataset(judged, *JUDGED)
    v = verdicts.from_table(pairs)
    by_subset = consistency.by_subset(v)
    n_repeated = len(v.pair_ids) - len(set(v.pair_ids))

    summary = consistency.summary(v)
    summary["by_subset"] = by_subset
    summary["curves"] = consistency.curves(v)
    summary["benchmark"] = _benchmark(pairs, v, by_subset)
    summary["notes"] = consistency.data_notes(v, n_repeated)
    return summary


def _accuracy_rows(v: Verdicts) -> list[Row]:
    """One row per pair and reward model, with its accuracy on the pair.

    The value is 1 if the verdict equals the gold label, 0 if not, 0.5 for a tie, and null
    without a verdict or a label.
    """
    correct = (v.log_odds * v.gold > 0).astype(float)  # (models, pairs)
    accuracy = np.where(v.log_odds == 0, 0.5, correct)
    accuracy = np.where(np.isnan(v.log_odds * v.gold), np.nan, accuracy)

    rows = []
    for i, pair_id in enumerate(v.pair_ids):
        for k, name in enumerate(v.names):
            rows.append(
                {
                    "example_id": pair_id,
                    "subset": v.subset[i],
                    "metric": f"accuracy/{name}",
                    "value": _number_or_none(accuracy[k, i]),
                    "detail": json.dumps({"log_odds": _number_or_none(v.log_odds[k, i])}),
                }
            )
    return rows


def _number_or_none(value: float) -> float | None:
    """None for NaN: a missing number is null in the dataset."""
    return None if math.isnan(value) else float(value)


# ------------------------------------------------------------------------ benchmarks


class ListedPair(NamedTuple):
    """A pair of one chosen and one rejected response from the lists of a RewardBench 2 example."""

    example_id: str
    chosen: int  # index in the list of chosen responses
    rejected: int  # index in the list of rejected responses
    n_chosen: int
    n_rejected: int


def _benchmark(pairs: pa.Table, v: Verdicts, by_subset: Json) -> Json | None:
    """The scores of RewardBench or RewardBench 2; None for other data.

    The candidate ids identify RewardBench 2, the names of the subsets RewardBench.
    """
    listed = _listed_pairs(pairs)
    if listed and len(listed) == len(v.pair_ids):
        return {"name": "RewardBench 2", "models": _reward_bench_2(listed, pairs, v)}

    subsets = set(by_subset)
    has_subsets = bool(subsets - {"(none)"})
    if has_subsets and subsets <= reward_bench.KNOWN:
        return {"name": "RewardBench", "models": _reward_bench(v.names, by_subset)}
    return None


def _reward_bench(names: Sequence[str], by_subset: Json) -> Json:
    """The scores of each reward model in RewardBench.

    by_subset: subset -> figures, with those of each reward model under "models"
    """
    scores = {}
    for name in names:
        accuracy = {}
        for subset, figures in by_subset.items():
            of_model = figures["models"].get(name, {})
            accuracy[subset] = of_model.get("accuracy")
        scores[name] = reward_bench.reward_bench(accuracy)
    return scores


def _reward_bench_2(listed: list[ListedPair], pairs: pa.Table, v: Verdicts) -> Json:
    """The scores of each reward model in RewardBench 2.

    listed: one per pair of `pairs` and `v`
    """
    listed = _told_apart(listed, pairs["prompt_id"].to_pylist())
    scores = {}
    for k, name in enumerate(v.names):
        margins = _margins(listed, v, v.log_odds[k])
        scores[name] = reward_bench.reward_bench_2(margins)
    return scores


def _listed_pairs(pairs: pa.Table) -> list[ListedPair]:
    """The pairs whose candidate ids name a chosen and a rejected response of one example."""
    first_ids = pc.struct_field(pairs["first"], "candidate_id").to_pylist()
    second_ids = pc.struct_field(pairs["second"], "candidate_id").to_pylist()
    listed = []
    for first, second in zip(first_ids, second_ids, strict=True):
        by_side = {}
        for candidate_id in (first, second):
            match = CANDIDATE_ID.fullmatch(candidate_id or "")
            if match:
                by_side[match[2]] = match
        if len(by_side) < 2:
            continue

        chosen = by_side["chosen"]
        rejected = by_side["rejected"]
        pair = ListedPair(
            example_id=chosen[1],
            chosen=int(chosen[3]),
            rejected=int(rejected[3]),
            n_chosen=int(chosen[4]),
            n_rejected=int(rejected[4]),
        )
        listed.append(pair)
    return listed


def _told_apart(listed: list[ListedPair], prompt_ids: list[str]) -> list[ListedPair]:
    """The pairs, with "#2" and so on after the ids of later examples with an id that is taken.

    The pairs of an example are neighbors, in the order of their indices, with one prompt.
    """
    # id -> number of examples with it, and the last pair of the last one
    examples: dict[str, int] = {}
    last: dict[str, tuple[Any, tuple[int, int]]] = {}
    renamed = []
    for pair, prompt_id in zip(listed, prompt_ids, strict=True):
        name = pair.example_id
        shape = (prompt_id, pair.n_chosen, pair.n_rejected)
        place = (pair.chosen, pair.rejected)
        before = last.get(name)
        if before is None or before[0] != shape or place <= before[1]:
            examples[name] = examples.get(name, 0) + 1
        last[name] = (shape, place)
        number = examples[name]
        renamed.append(pair if number == 1 else pair._replace(example_id=f"{name}#{number}"))
    return renamed


def _margins(
    listed: list[ListedPair], v: Verdicts, log_odds: Array
) -> dict[tuple[str, str], Array]:
    """(subset, example id) -> log-odds that the chosen response is better.

    log_odds: (pairs,) of one reward model, in nats
    Each result is (chosen, rejected); NaN if the pair was dropped or has no verdict.
    """
    margins: dict[tuple[str, str], Array] = {}
    for row, pair in enumerate(listed):
        subset = v.subset[row] or "(none)"
        key = (subset, pair.example_id)
        if key not in margins:
            shape = (pair.n_chosen, pair.n_rejected)
            margins[key] = np.full(shape, np.nan)
        # log_odds are for the first response; the gold label is 1 if it is the chosen one, else -1.
        margins[key][pair.chosen, pair.rejected] = log_odds[row] * v.gold[row]
    return margins
