"""check-consistency: how far the internal reward models agree, as figures, and as a narrow dataset of one row per pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scir_cli.analysis import bias, consistency, stability, verdicts
from scir_cli.data import dataset, files, hashing, schemas
from scir_cli.data.dataset import Dataset, Part
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import CheckFailed, DataError
from scir_cli.report import html
from scir_cli.report.progress import progress
from scir_cli.settings import CheckConsistencySettings


def run(settings: CheckConsistencySettings) -> Json:
    """Writes a consistency dataset, returns its manifest with the figures under "summary"; raises CheckFailed under --fail-under."""
    path = to_path(settings.input)
    pairs = _judged(path).head(settings.limit).select(schemas.schema("judged").names)
    if not pairs.num_rows:
        raise DataError(f"{path} holds no pairs")
    plan = {
        "stage": "check-consistency",
        "settings": settings.plan(),
        "input": hashing.digest_path(path),
    }
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": pairs.num_rows}

    stays = _across(pairs.read(), settings) if settings.compare_to else None  # first: it may refuse

    def summarise(made: Dataset) -> Json:
        v, sides = _verdicts(pairs, settings)
        leanings = bias.biases(v, sides)
        notes = {
            "biases": leanings,
            "notes": _notes(v, _repeated(pairs), leanings, settings.judge_author),
        }
        return consistency.summary(v, settings.agree_on, settings.min_confidence) | notes

    with progress("check-consistency", pairs.num_rows) as advance:

        def make(low: int, high: int) -> Part:
            part = pairs.slice(low, high - low)
            columns = consistency.row_columns(
                verdicts.from_table(part, ids=False), settings.agree_on, settings.min_confidence
            )
            return Part(pa.table({"pair_id": part["pair_id"], **columns}), high - low, Counter())

        bounds = dataset.part_bounds(pairs.num_rows, settings.rows_per_part)
        manifest = dataset.write_dataset(
            settings.output_dir,
            "consistency",
            plan,
            bounds,
            make,
            overwrite=settings.overwrite,
            summarise=summarise,
            advance=advance,
            inputs={"input": settings.input},
        )
    if stays:
        manifest["across"] = stays
    if settings.by_subset:
        manifest["by_subset"] = _by_subset(pairs, settings)
    html.write_for("check-consistency", settings, judged=path, across=stays)
    if settings.fail_under is not None:
        _check(manifest["summary"]["agreed"]["rate"], settings.fail_under, path)
    return manifest


def _repeated(pairs: Dataset) -> int:
    """Rows whose pair_id an earlier one has."""
    return len(
        hashing.later_duplicates(
            np.concatenate([hashing.hash_texts(table["pair_id"]) for table in pairs.tables()])[None]
        )
    )


def _notes(
    v: verdicts.Verdicts, repeated: int, leanings: dict[str, Json], own: str | None
) -> list[str]:
    notes = consistency.data_notes(v, repeated)
    if own and not next(iter(leanings.values()), {}).get("own", {}).get("pairs"):
        notes.append(f"no pair has one response by '{own}' and one by another known author")
    return notes


def _check(rate: float | None, least: float, path: Path) -> None:
    if rate is None or rate < least:
        shown = "undefined (no pair has all verdicts)" if rate is None else f"{rate:.3f}"
        raise CheckFailed(
            f"the agreement rate of {path} is {shown}, below --fail-under {least}; the dataset is written"
        )


def _judged(path: Path) -> Dataset:
    return dataset.open_dataset(path, "judged", "preferences")


def _verdicts(
    pairs: Dataset, settings: CheckConsistencySettings
) -> tuple[verdicts.Verdicts, dict[str, bias.Side]]:
    """The verdicts, and what they should not depend on; of the texts no more than one part is in memory."""
    own, parts, sides = settings.judge_author or judge_of(to_path(settings.input)), [], []
    for table in pairs.tables():
        parts.append(verdicts.from_table(table, ids=False))
        sides.append(bias.properties(parts[-1], table, own))
    return verdicts.join(parts), {
        name: np.concatenate([side[name] for side in sides]) for name in sides[0]
    }


def judge_of(path: Path) -> str | None:
    """The weights key of the model whose verdicts a judged dataset holds, from its plan."""
    model = files.read_json(path / "plan.json").get("model")
    return model if isinstance(model, str) else None


def _by_subset(pairs: Dataset, settings: CheckConsistencySettings) -> Json:
    v, sides = _verdicts(pairs, settings)
    figures: Json = dict(consistency.by_subset(v, settings.agree_on, settings.min_confidence))
    for name, rows in verdicts.subset_rows(v.subset).items():
        figures[name]["biases"] = bias.biases(
            v.take(rows), {side: values[rows] for side, values in sides.items()}
        )
    return figures


def _across(table: Any, settings: CheckConsistencySettings) -> Json:
    """What stays of the verdicts in each other dataset, and in all of them; raises DataError where one holds none of the pairs."""
    v, found = verdicts.from_table(table), []
    prompt, response = stability.prompt_and_response_codes(table)
    runs: list[verdicts.Verdicts] = []
    shared = set(v.pair_ids)
    for spec in settings.compare_to:
        other = verdicts.from_tables(_judged(to_path(spec)).tables())
        here, there, left = stability.common_rows(v.pair_ids, other.pair_ids)
        if not len(here):
            raise DataError(
                f"{spec} holds none of the {len(v.pair_ids)} pairs of {settings.input}: only verdicts on the same responses can be compared "
                "(generate once, then judge with each model, prompt or seed)"
            )
        one, two = v.take(here), other.take(there)
        names = stability.unshared_reward_models(one, two)
        figures: Json = {
            "models": stability.verdict_stability(one, two, prompt[here], response[:, here])
        }
        if settings.by_subset:
            rows = verdicts.subset_rows(one.subset)
            parts = {
                k: (one.take(r), two.take(r), prompt[here[r]], response[:, here[r]])
                for k, r in rows.items()
            }
            figures["by_subset"] = {
                k: stability.verdict_stability(*part) for k, part in parts.items()
            }
        found.append(
            {
                "dataset": spec,
                "pairs": len(here),
                "left_out": left,
                "reward_models": names,
                **figures,
            }
        )
        runs.append(other)
        shared &= set(other.pair_ids)
    every = None
    if len(runs) > 1 and shared:
        ids = [pair for pair in dict.fromkeys(v.pair_ids) if pair in shared]
        every = stability.unanimous_rate(
            [run.take(stability.common_rows(ids, run.pair_ids)[1]) for run in (v, *runs)]
        )
    return {"against": found, "unanimous": every, "unanimous_pairs": len(shared) if every else 0}
