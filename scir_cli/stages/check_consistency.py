"""check-consistency: how far the internal reward models agree, as figures, and as a narrow dataset of one row per pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scir_cli import across, biases, consistency, pages, schemas, store
from scir_cli.config import CheckConsistencySettings
from scir_cli.errors import CheckFailed, DataError
from scir_cli.places import place
from scir_cli.stages.progress import progress
from scir_cli.store import Dataset, Json, Part


def run(settings: CheckConsistencySettings) -> Json:
    """Writes a consistency dataset, returns its manifest with the figures under "summary"; raises CheckFailed under --fail-under."""
    path = place(settings.input)
    pairs = _judged(path).head(settings.limit).select(schemas.schema("judged").names)
    if not pairs.num_rows:
        raise DataError(f"{path} holds no pairs")
    plan = {"stage": "check-consistency", "settings": settings.plan(), "input": store.digest_path(path)}
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": pairs.num_rows}

    stays = _across(pairs.read(), settings) if settings.compare_to else None  # first: it may refuse

    def summarise(made: Dataset) -> Json:
        v, sides = _verdicts(pairs, settings)
        leanings = biases.biases(v, sides)
        notes = {"biases": leanings, "notes": _notes(v, _repeated(pairs), leanings, settings.judge_author)}
        return consistency.summary(v, settings.agree_on, settings.min_confidence) | notes

    with progress("check-consistency", pairs.num_rows) as advance:

        def make(low: int, high: int) -> Part:
            part = pairs.slice(low, high - low)
            columns = consistency.row_columns(consistency.from_table(part, ids=False), settings.agree_on, settings.min_confidence)
            return Part(pa.table({"pair_id": part["pair_id"], **columns}), high - low, Counter())

        bounds = store.part_bounds(pairs.num_rows, settings.rows_per_part)
        manifest = store.write_dataset(
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
    pages.write_for("check-consistency", settings, judged=path, across=stays)
    if settings.fail_under is not None:
        _check(manifest["summary"]["agreed"]["rate"], settings.fail_under, path)
    return manifest


def _repeated(pairs: Dataset) -> int:
    """Rows whose pair_id an earlier one has."""
    return len(store.repeated(np.concatenate([store.hash_texts(table["pair_id"]) for table in pairs.tables()])[None]))


def _notes(v: consistency.Verdicts, repeated: int, leanings: dict[str, Json], own: str | None) -> list[str]:
    notes = consistency.data_notes(v, repeated)
    if own and not next(iter(leanings.values()), {}).get("own", {}).get("pairs"):
        notes.append(f"no pair has one response by '{own}' and one by another known author")
    return notes


def _check(rate: float | None, least: float, path: Path) -> None:
    if rate is None or rate < least:
        shown = "undefined (no pair has all verdicts)" if rate is None else f"{rate:.3f}"
        raise CheckFailed(f"the agreement rate of {path} is {shown}, below --fail-under {least}; the dataset is written")


def _judged(path: Path) -> Dataset:
    return store.open_dataset(path, "judged", "preferences")


def _verdicts(pairs: Dataset, settings: CheckConsistencySettings) -> tuple[consistency.Verdicts, dict[str, biases.Side]]:
    """The verdicts, and what they should not depend on; of the texts no more than one part is in memory."""
    own, parts, sides = settings.judge_author or judge_of(place(settings.input)), [], []
    for table in pairs.tables():
        parts.append(consistency.from_table(table, ids=False))
        sides.append(biases.properties(parts[-1], table, own))
    return consistency.join(parts), {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}


def judge_of(path: Path) -> str | None:
    """The weights key of the model whose verdicts a judged dataset holds, from its plan."""
    model = store.read_json(path / "plan.json").get("model")
    return model if isinstance(model, str) else None


def _by_subset(pairs: Dataset, settings: CheckConsistencySettings) -> Json:
    v, sides = _verdicts(pairs, settings)
    figures: Json = dict(consistency.by_subset(v, settings.agree_on, settings.min_confidence))
    for name, rows in consistency.subset_rows(v.subset).items():
        figures[name]["biases"] = biases.biases(v.take(rows), {side: values[rows] for side, values in sides.items()})
    return figures


def _across(table: Any, settings: CheckConsistencySettings) -> Json:
    """What stays of the verdicts in each other dataset, and in all of them; raises DataError where one holds none of the pairs."""
    v, found = consistency.from_table(table), []
    prompt, response = across.codes(table)
    runs: list[consistency.Verdicts] = []
    shared = set(v.pair_ids)
    for spec in settings.compare_to:
        other = consistency.from_tables(_judged(place(spec)).tables())
        here, there, left = across.in_common(v.pair_ids, other.pair_ids)
        if not len(here):
            raise DataError(
                f"{spec} holds none of the {len(v.pair_ids)} pairs of {settings.input}: only verdicts on the same responses can be compared "
                "(generate once, then judge with each model, prompt or seed)"
            )
        one, two = v.take(here), other.take(there)
        names = across.mutual_names(one, two)
        figures: Json = {"models": across.compare(one, two, prompt[here], response[:, here])}
        if settings.by_subset:
            rows = consistency.subset_rows(one.subset)
            parts = {k: (one.take(r), two.take(r), prompt[here[r]], response[:, here[r]]) for k, r in rows.items()}
            figures["by_subset"] = {k: across.compare(*part) for k, part in parts.items()}
        found.append({"dataset": spec, "pairs": len(here), "left_out": left, "reward_models": names, **figures})
        runs.append(other)
        shared &= set(other.pair_ids)
    every = None
    if len(runs) > 1 and shared:
        ids = [pair for pair in dict.fromkeys(v.pair_ids) if pair in shared]
        every = across.unanimous([run.take(across.in_common(ids, run.pair_ids)[1]) for run in (v, *runs)])
    return {"against": found, "unanimous": every, "unanimous_pairs": len(shared) if every else 0}
