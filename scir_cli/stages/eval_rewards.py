"""eval: accuracy of each reward model on labelled pairs; responses for other evaluators.

OUT/judged     the pairs with their verdicts, as `judge` writes them: the figures are computed from nothing else
OUT/           a `scores` dataset: one row an example and a metric
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from scir_cli.analysis import consistency, reward_bench, verdicts
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
JUDGED = ("judged", "preferences")  # kinds that hold verdicts


def run(settings: EvalRewardsSettings) -> Json:
    """Writes scores of each reward model on labelled pairs and returns the manifest; accuracies are under "summary"."""
    path, out = to_path(settings.input), settings.output_dir
    judged = folders.is_dataset(path) and not settings.model
    if not judged and not settings.model:
        raise ConfigError(
            "--model is needed: the input has no verdicts yet (give a judged dataset, or a model to judge with)"
        )
    if folders.is_dataset(path):
        dataset.open_dataset(path, *JUDGED)  # refused before the output folder is claimed
    scorer = None if judged else Scorer(settings)
    digest = readers.digest(settings.input)
    plan = {
        "stage": "eval rewards",
        "settings": settings.plan(),
        "input": digest,
        **(scorer.keys if scorer else {}),
    }
    if settings.dry_run:
        return {"dry_run": True, "plan": plan}

    def make(low: int, high: int) -> Part:
        drops: Json = {}
        if scorer:
            table, dropped = readers.open_pairs(
                settings.input, settings.limit, settings.score_column
            )
            inner = settings.model_copy(update={"output_dir": out / "judged", "overwrite": False})
            bounds = dataset.part_bounds(table.num_rows, settings.rows_per_part)
            pair_input = PairInput(table, bounds, dropped, digest)
            drops = write_judged_dataset("eval rewards", inner, scorer, pair_input)["drops"]
        v = _verdicts(path if judged else out / "judged")
        rows = _accuracy_rows(v)
        if not any(row["value"] is not None for row in rows):
            labelled = f"{int((~np.isnan(v.gold)).sum())} of {len(v.gold)} pairs have a gold label"
            raise DataError(
                f"{settings.input} leaves no labelled pair with a verdict ({labelled}; dropped: {drops or 'none'})"
            )
        return Part(rows, len(rows))

    def summarise(made: dataset.Dataset) -> Json:
        pairs = dataset.read_dataset(path if judged else out / "judged", *JUDGED)
        v = verdicts.from_table(pairs)
        by_subset = consistency.by_subset(v)
        figures = {
            "by_subset": by_subset,
            "curves": consistency.curves(v),
            "benchmark": _benchmark(pairs, v, by_subset),
        }
        return (
            consistency.summary(v)
            | figures
            | {"notes": consistency.data_notes(v, len(v.pair_ids) - len(set(v.pair_ids)))}
        )

    inputs = {
        "input": settings.input,
        "model": settings.model,
        "reward_reference": settings.reward_reference,
    }
    manifest = dataset.write_dataset(
        out,
        "scores",
        plan,
        [(0, 1)],
        make,
        overwrite=settings.overwrite,
        summarise=summarise,
        inputs=inputs,
    )
    html.write_for("eval rewards", settings, judged=path if judged else out / "judged")
    return manifest


def _verdicts(path: Path) -> verdicts.Verdicts:
    return verdicts.from_table(dataset.read_dataset(path, *JUDGED))


def _benchmark(pairs: Any, v: verdicts.Verdicts, by_subset: Json) -> Json | None:
    """The figures of the benchmark that the subsets (RewardBench) or the candidate ids (RewardBench 2) say this is; None: neither."""
    examples = _examples(pairs)
    if examples and len(examples) == len(v.pair_ids):
        models = {
            name: reward_bench.reward_bench_2(_margins(examples, v, v.log_odds[k]))
            for k, name in enumerate(v.names)
        }
        return {"name": "RewardBench 2", "models": models}
    if set(by_subset) - {"(none)"} and set(by_subset) <= reward_bench.KNOWN:
        accuracy = {
            name: {s: f["models"].get(name, {}).get("accuracy") for s, f in by_subset.items()}
            for name in v.names
        }
        return {
            "name": "RewardBench",
            "models": {name: reward_bench.reward_bench(a) for name, a in accuracy.items()},
        }
    return None


def _examples(pairs: Any) -> list[tuple[str, int, int, int, int]]:
    """Example id, place of the chosen and the rejected response in its lists, and their lengths, for each pair that came from such lists."""
    found = []
    for first, second in zip(
        *(pc.struct_field(pairs[side], "candidate_id").to_pylist() for side in ("first", "second")),
        strict=True,
    ):
        ids = [
            re.fullmatch(r"(.*)/(chosen|rejected)/(\d+)/(\d+)", name or "", re.DOTALL)
            for name in (first, second)
        ]
        by_side = {match[2]: match for match in ids if match}
        if len(by_side) == 2:
            chosen, rejected = by_side["chosen"], by_side["rejected"]
            found.append(
                (chosen[1], int(chosen[3]), int(rejected[3]), int(chosen[4]), int(rejected[4]))
            )
    return found


def _margins(
    examples: list[tuple[str, int, int, int, int]], v: verdicts.Verdicts, log_odds: Any
) -> dict[tuple[str, str], Any]:
    """(subset, example id) -> (chosen, rejected) log-odds that the chosen one is better; NaN where a pair was dropped or has no verdict."""
    margins: dict[tuple[str, str], Any] = {}
    for row, (name, i, j, n_chosen, n_rejected) in enumerate(examples):
        table = margins.setdefault(
            (v.subset[row] or "(none)", name), np.full((n_chosen, n_rejected), np.nan)
        )
        table[i, j] = log_odds[row] * v.gold[row]
    return margins


def _accuracy_rows(v: verdicts.Verdicts) -> list[Row]:
    """One row a pair and reward model: 1 right, 0 wrong, 0.5 a tie, null without a verdict or a label."""
    right = np.where(v.log_odds == 0, 0.5, (v.log_odds * v.gold > 0).astype(float))
    right = np.where(np.isnan(v.log_odds * v.gold), np.nan, right)  # (models, pairs)
    return [
        {
            "example_id": pair_id,
            "subset": v.subset[i],
            "metric": f"accuracy/{name}",
            "value": None if math.isnan(right[k, i]) else float(right[k, i]),
            "detail": json.dumps(
                {"log_odds": None if math.isnan(v.log_odds[k, i]) else float(v.log_odds[k, i])}
            ),
        }
        for i, pair_id in enumerate(v.pair_ids)
        for k, name in enumerate(v.names)
    ]
