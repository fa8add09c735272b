"""check-consistency: how far the internal reward models agree.

The figures go into the manifest; the dataset has one narrow row per pair.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scir_cli.analysis import bias, consistency, stability, verdicts
from scir_cli.analysis.bias import Side
from scir_cli.analysis.verdicts import Verdicts
from scir_cli.data import dataset, files, hashing, schemas
from scir_cli.data.dataset import Dataset, Part
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import CheckFailed, DataError
from scir_cli.report import html
from scir_cli.report.progress import progress
from scir_cli.settings import CheckConsistencySettings


def run(settings: CheckConsistencySettings) -> Json:
    """Writes a consistency dataset; returns its manifest, with figures under "summary".

    Raises DataError if the input holds no pairs, and CheckFailed if the agreement rate is below
    --fail-under; the dataset is written in that case.
    """
    path = to_path(settings.input)
    pairs = _open_judged(path).head(settings.limit)
    pairs = pairs.select(schemas.schema("judged").names)
    if not pairs.num_rows:
        raise DataError(f"{path} holds no pairs; check the drops in its manifest.json")

    plan = {
        "stage": "check-consistency",
        "settings": settings.plan(),
        "input": hashing.digest_path(path),
    }
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": pairs.num_rows}

    # Before the dataset is written: it raises DataError if the datasets share no pair.
    across = _compare(pairs.read(), settings) if settings.compare_to else None

    manifest = _write(pairs, plan, settings)
    if across:
        manifest["across"] = across
    if settings.by_subset:
        manifest["by_subset"] = _by_subset(pairs, settings)

    html.write_for("check-consistency", settings, judged=path, across=across)
    if settings.fail_under is not None:
        _check(manifest["summary"]["agreed"]["rate"], settings.fail_under, path)
    return manifest


def _write(pairs: Dataset, plan: Json, settings: CheckConsistencySettings) -> Json:
    """Writes the dataset, part by part; returns the manifest.

    The dataset has one row per pair. The figures are over all pairs, not over the rows written.
    """

    def make(low: int, high: int) -> Part:
        n_rows = high - low
        part = pairs.slice(low, n_rows)
        v = verdicts.from_table(part, ids=False)
        columns = {"pair_id": part["pair_id"]}
        columns |= consistency.row_columns(v, settings.agree_on, settings.min_confidence)
        return Part(pa.table(columns), n_rows, Counter())

    def summarize(written: Dataset) -> Json:
        return _summary(pairs, settings)

    bounds = dataset.part_bounds(pairs.num_rows, settings.rows_per_part)
    with progress("check-consistency", pairs.num_rows) as advance:
        return dataset.write_dataset(
            settings.output_dir,
            "consistency",
            plan,
            bounds,
            make,
            overwrite=settings.overwrite,
            summarize=summarize,
            advance=advance,
            inputs={"input": settings.input},
        )


def _summary(pairs: Dataset, settings: CheckConsistencySettings) -> Json:
    """The figures of all pairs: agreement, biases, and notes on the data."""
    v, sides = _load_verdicts(pairs, settings)
    biases = bias.biases(v, sides)
    n_repeated = _count_repeated(pairs)
    notes = consistency.data_notes(v, n_repeated)
    author = settings.judge_author
    if author and not _has_self_preference(biases):
        notes.append(f"no pair has one response by '{author}' and one by another known author")

    summary = consistency.summary(v, settings.agree_on, settings.min_confidence)
    summary["biases"] = biases
    summary["notes"] = notes
    return summary


def _count_repeated(pairs: Dataset) -> int:
    """The number of rows with the pair_id of an earlier row.

    Only hashes of the ids are in memory.
    """
    parts = []
    for table in pairs.tables():
        parts.append(hashing.hash_texts(table["pair_id"]))
    hashes = np.concatenate(parts)
    return len(hashing.later_duplicates(hashes[None]))


def _has_self_preference(biases: dict[str, Json]) -> bool:
    """True if some pair has one response by the judge's author and one by another author.

    biases: reward model -> figures; those of the first model are read
    """
    first_model: Json = next(iter(biases.values()), {})
    self_preference = first_model.get("own", {})
    return bool(self_preference.get("pairs"))


def _check(rate: float | None, least: float, path: Path) -> None:
    """Raises CheckFailed if the agreement rate is undefined or below `least`.

    path: of the judged dataset, for the message
    """
    if rate is not None and rate >= least:
        return

    shown = "undefined (no pair has all verdicts)"
    if rate is not None:
        shown = f"{rate:.3f}"
    raise CheckFailed(
        f"the agreement rate of {path} is {shown}, below --fail-under {least}; "
        "the dataset is written"
    )


def _open_judged(path: Path) -> Dataset:
    """A dataset with verdicts; raises DataError for another kind."""
    return dataset.open_dataset(path, "judged", "preferences")


def _load_verdicts(
    pairs: Dataset, settings: CheckConsistencySettings
) -> tuple[Verdicts, dict[str, Side]]:
    """The verdicts on all pairs, and the properties that they should not depend on.

    -> verdicts, and for each property (longer, lists, …) an array (pairs,)
    At most one part's texts are in memory at a time.
    """
    author = settings.judge_author or judge_of(to_path(settings.input))
    parts = []
    sides = []
    for table in pairs.tables():
        v = verdicts.from_table(table, ids=False)
        parts.append(v)
        sides.append(bias.properties(v, table, author))

    joined = {}
    for name in sides[0]:
        joined[name] = np.concatenate([side[name] for side in sides])
    return verdicts.join(parts), joined


def judge_of(path: Path) -> str | None:
    """The weights key of the model that judged a dataset, from its plan.

    None if the plan has none.
    """
    plan = files.read_json(path / "plan.json")
    model = plan.get("model")
    return model if isinstance(model, str) else None


def _by_subset(pairs: Dataset, settings: CheckConsistencySettings) -> Json:
    """The figures and biases of each value of the subset column."""
    v, sides = _load_verdicts(pairs, settings)
    by_subset = consistency.by_subset(v, settings.agree_on, settings.min_confidence)
    figures: Json = dict(by_subset)
    subsets = verdicts.subset_rows(v.subset)
    for name, rows in subsets.items():
        subset_sides = {}
        for side, values in sides.items():
            subset_sides[side] = values[rows]
        subset_verdicts = v.take(rows)
        figures[name]["biases"] = bias.biases(subset_verdicts, subset_sides)
    return figures


# ------------------------------------------------------------------------ --compare-to


def _compare(table: pa.Table, settings: CheckConsistencySettings) -> Json:
    """How verdicts and ranks change in each other dataset, and the unanimous rate over all.

    table: the judged pairs of --input
    Raises DataError if another dataset holds none of these pairs.
    """
    v = verdicts.from_table(table)
    codes = stability.prompt_and_response_codes(table)
    runs = [v]
    comparisons = []
    for spec in settings.compare_to:
        other = verdicts.from_tables(_open_judged(to_path(spec)).tables())
        comparisons.append(_comparison(spec, v, other, codes, settings))
        runs.append(other)

    unanimous = None
    shared = set(v.pair_ids).intersection(*(run.pair_ids for run in runs[1:]))
    if len(runs) > 2 and shared:
        unanimous = _unanimous_rate(runs, shared)
    return {
        "against": comparisons,
        "unanimous": unanimous,
        "unanimous_pairs": len(shared) if unanimous else 0,
    }


def _unanimous_rate(runs: list[Verdicts], shared: set[str]) -> Json:
    """For each reward model, the rate of pairs with the same verdict in all datasets.

    runs: verdicts of each dataset, in which pairs have any order
    shared: ids of the pairs that all of them hold
    """
    ids = [pair for pair in dict.fromkeys(runs[0].pair_ids) if pair in shared]
    aligned = []
    for run in runs:
        _, rows, _ = stability.common_rows(ids, run.pair_ids)
        aligned.append(run.take(rows))
    return stability.unanimous_rate(aligned)


def _comparison(
    spec: str,
    v: Verdicts,
    other: Verdicts,
    codes: tuple[Any, Any],
    settings: CheckConsistencySettings,
) -> Json:
    """How the verdicts `v` differ from those of one other dataset, on the pairs that both hold.

    codes: prompts (pairs,) and responses (2, pairs) of `v`
    Raises DataError if they share no pair.
    """
    rows, other_rows, left_out = stability.common_rows(v.pair_ids, other.pair_ids)
    if not len(rows):
        raise DataError(
            f"{spec} holds none of the {len(v.pair_ids)} pairs of {settings.input}: only verdicts "
            "on the same responses can be compared (generate once, then judge with each model, "
            "prompt or seed)"
        )
    prompt = codes[0][rows]
    response = codes[1][:, rows]
    first = v.take(rows)
    second = other.take(other_rows)

    figures: Json = {
        "dataset": spec,
        "pairs": len(rows),
        "left_out": left_out,
        "reward_models": stability.unshared_reward_models(first, second),
        "models": stability.verdict_stability(first, second, prompt, response),
    }
    if settings.by_subset:
        figures["by_subset"] = {
            name: stability.verdict_stability(
                first.take(subset), second.take(subset), prompt[subset], response[:, subset]
            )
            for name, subset in verdicts.subset_rows(first.subset).items()
        }
    return figures
