"""eval winrate: responses against responses, judged by a local model in both orders or by annotations that exist.

OUT/judged             the pairs with their verdicts, as `judge` writes them (not where annotations are given)
OUT/annotations.json   AlpacaEval's fields, so that its tools can count again: preference is 1 + P(the model under test wins)
OUT/                   a `scores` dataset: one row an instruction and two models
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scir_cli.analysis import win_rates
from scir_cli.analysis.verdicts import from_table, subset_rows
from scir_cli.analysis.win_rates import Array, Gamed
from scir_cli.data import dataset, folders, hashing, readers, schemas
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json, write_json
from scir_cli.data.storage import to_path
from scir_cli.errors import DataError, install_hint
from scir_cli.report import html
from scir_cli.rewards import prompts
from scir_cli.settings import EvalWinrateSettings
from scir_cli.stages.pairing import PairInput
from scir_cli.stages.scoring import Scorer, write_judged_dataset

Row = dict[str, Any]
NO_SKLEARN = f"needs scikit-learn: {install_hint('eval')}"


@dataclass(frozen=True, eq=False)
class Match:
    """Two models' responses to the same instructions."""

    model: str
    other: str
    rows: list[
        Row
    ]  # instruction, messages, output, other_output, index (in AlpacaEval's set), place (row of the file, rows of it), subset
    preference: Array  # (rows,) P(model's response is better); NaN: no verdict

    @property
    def lengths(self) -> Array:
        """(2, rows) characters."""
        return np.array(
            [[len(row[side]) for row in self.rows] for side in ("output", "other_output")],
            dtype=np.float64,
        )


def run(settings: EvalWinrateSettings) -> Json:
    """Writes each verdict and returns the manifest with the win rates under "summary"."""
    out = settings.output_dir
    inputs = [
        *settings.annotations,
        *settings.responses,
        *([settings.baseline] if settings.baseline else []),
    ]
    digests = [readers.digest(spec) for spec in inputs]
    scorer = None if settings.annotations else Scorer(settings)
    gamed = read_gamed(settings.gamed_baselines) if settings.gamed_baselines else None
    plan = {
        "stage": "eval winrate",
        "settings": settings.plan(),
        "inputs": digests,
        **(scorer.keys if scorer else {}),
    }
    if settings.gamed_baselines:
        plan["gamed_baselines"] = hashing.digest_path(settings.gamed_baselines)
    matches, dropped = (
        from_annotations(settings.annotations, settings.limit)
        if settings.annotations
        else from_responses(settings)
    )
    n = sum(len(match.rows) for match in matches)
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": n + dropped.total()}

    def make(low: int, high: int) -> Part:
        scored = (
            _judged(matches, settings, scorer, hashing.digest_json(digests)) if scorer else matches
        )
        rows = [row for match in scored for row in _score_rows(match)]
        if scorer:
            write_json(
                out / "annotations.json",
                [row for match in scored for row in _annotation_rows(match)],
            )
        return Part(rows, len(rows))

    def summarise(made: dataset.Dataset) -> Json:
        return summary(_with_scores(matches, made), dropped, gamed, settings.seed)

    manifest = dataset.write_dataset(
        out,
        "scores",
        plan,
        [(0, 1)],
        make,
        overwrite=settings.overwrite,
        dropped_before=dropped,
        summarise=summarise,
        inputs={"inputs": ", ".join(inputs), "model": settings.model},
    )
    html.write_for("eval winrate", settings)
    return manifest


# ----------------------------------------------------------------------------------------------------------------- what is compared


def from_responses(settings: EvalWinrateSettings) -> tuple[list[Match], Counter[str]]:
    """Each file of responses beside the baseline's, or every two of them where there is no baseline; and instructions dropped by reason."""
    dropped: Counter[str] = Counter()
    specs = [*settings.responses, *([settings.baseline] if settings.baseline else [])]
    files = [load_responses(spec, dropped, settings.limit) for spec in specs]
    names = [
        next((row["generator"] for row in file.values() if row["generator"]), Path(spec).stem)
        for spec, file in zip(specs, files, strict=True)
    ]
    if len(set(names)) < len(names):  # two checkpoints of one name: the files tell them apart
        names = specs
    pairs = (
        [(i, len(specs) - 1) for i in range(len(specs) - 1)]
        if settings.baseline
        else itertools.combinations(range(len(specs)), 2)
    )
    matches = []
    for i, j in pairs:
        rows = _common(files[i], files[j], dropped)
        if not rows:
            raise DataError(
                f"{specs[i]} and {specs[j]} have no instruction in common with two different answers ({dict(+dropped) or 'both are empty'})"
            )
        matches.append(Match(names[i], names[j], rows, np.full(len(rows), np.nan)))
    return matches, +dropped


def load_responses(spec: str, dropped: Counter[str], limit: int | None = None) -> dict[str, Row]:
    """Responses by instruction, from AlpacaEval's JSON list {instruction, output, generator} or a candidates dataset (first of each prompt)."""
    path = to_path(spec)
    found: dict[str, Row] = {}
    if folders.is_dataset(path):
        for row in dataset.read_dataset(path, "candidates").to_pylist():
            made = {
                "messages": row["messages"],
                "output": row["response"],
                "generator": None,
                "author": row["weights_key"],
            }
            made |= {"place": None, "index": None, "subset": row["subset"], "extra": row["extra"]}
            found.setdefault(prompts.question_text(row["messages"]), made)
        return dict(itertools.islice(found.items(), limit))
    rows = _json_list(spec, ("instruction", "output"))[:limit]
    for i, row in enumerate(rows):
        if row["instruction"] in found:
            dropped["duplicate_instruction"] += 1
            continue
        messages = [{"role": "user", "content": row["instruction"]}]
        generator = row["generator"] if isinstance(row.get("generator"), str) else None
        made = {
            "messages": messages,
            "output": row["output"],
            "generator": generator,
            "author": generator,
        }
        made |= {"place": (i, len(rows)), "index": row.get("index"), "subset": row.get("dataset")}
        found[row["instruction"]] = made | {
            "extra": readers.extra_of(row, ("output", "generator", "dataset"))
        }
    return found


def _json_list(spec: str, texts: Sequence[str]) -> list[Row]:
    """A JSON list of objects with text in each of `texts`; raises DataError naming the file and the row."""
    try:
        rows = json.loads(Path(spec).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} is not a readable JSON file ({error})") from error
    expected = f"a JSON list of objects with {', '.join(map(repr, texts))}"
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{spec} should be {expected}, and not empty")
    for number, row in enumerate(rows, 1):
        wrong = [
            name
            for name in texts
            if not isinstance(row, dict) or not isinstance(row.get(name), str)
        ]
        if wrong:
            has = ", ".join(row) if isinstance(row, dict) else repr(row)[:60]
            raise DataError(
                f"{spec}, row {number}: no text in '{wrong[0]}' (it has {has}); expected {expected}"
            )
    return rows


def _common(ours: dict[str, Row], theirs: dict[str, Row], dropped: Counter[str]) -> list[Row]:
    """Instructions that both answer, differently; the others are counted."""
    rows = []
    for instruction, row in ours.items():
        other = theirs.get(instruction)
        if other is None:
            dropped["not_in_baseline"] += 1
        elif row["output"] == other["output"]:
            dropped["identical_responses"] += 1
        elif not row["output"].strip() or not other["output"].strip():
            dropped["empty_response"] += 1
        else:
            rows.append(
                {
                    "instruction": instruction,
                    "other_output": other["output"],
                    "other_author": other["author"],
                    **row,
                }
            )
    dropped["not_in_responses"] += len(set(theirs) - set(ours))
    return rows


def from_annotations(
    specs: Sequence[str], limit: int | None = None
) -> tuple[list[Match], Counter[str]]:
    """Each two generators that AlpacaEval annotation files compare, in order of first appearance. Equal outputs stay, as the draws they are."""
    found: dict[tuple[str, str], list[Row]] = {}
    dropped: Counter[str] = Counter()
    for spec in specs:
        rows = _json_list(
            spec, ("instruction", "output_1", "output_2", "generator_1", "generator_2")
        )[:limit]
        annotators = sorted({str(row.get("annotator")) for row in rows})
        if len(annotators) > 1:
            raise DataError(
                f"{spec} holds annotations of {len(annotators)} annotators ({', '.join(annotators)}); give one file for each"
            )
        for number, row in enumerate(rows, 1):
            pair = found.setdefault((row["generator_2"], row["generator_1"]), [])
            made = {
                "instruction": row["instruction"],
                "output": row["output_2"],
                "other_output": row["output_1"],
            }
            made |= {
                "place": (number - 1, len(rows)),
                "index": row.get("index"),
                "subset": row.get("dataset"),
            }
            pair.append(made | {"preference": _preference(row, spec, number)})
    for rows in found.values():
        seen: set[tuple[str, str, str]] = set()
        for row in list(rows):
            key = (row["instruction"], row["output"], row["other_output"])
            if key in seen:
                rows.remove(row)
                dropped["duplicate_annotation"] += 1
            seen.add(key)
    return [
        Match(*names, rows, np.array([row.pop("preference") for row in rows]))
        for names, rows in found.items()
    ], dropped


def _preference(row: Row, spec: str, number: int) -> float:
    """P(output_2 is better): AlpacaEval 2 writes 1 + it; version 1 wrote 1, 2, and 0 or 1.5 for a draw. NaN for null."""
    if "preference" not in row:
        raise DataError(
            f"{spec}, row {number}: no 'preference' (it has {', '.join(row)}); expected AlpacaEval's annotations"
        )
    value = row["preference"]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value == 0 or 1 <= value <= 2)
    ):
        raise DataError(
            f"{spec}, row {number}: 'preference' is {value!r}; expected 1 (the baseline wins) to 2 (the model wins), 0 or 1.5 for a draw"
        )
    return 0.5 if value == 0 else float(value) - 1


# -------------------------------------------------------------------------------------------------------------------------- verdicts


def _judged(
    matches: list[Match], settings: EvalWinrateSettings, scorer: Scorer, digest: str
) -> list[Match]:
    """The matches with the first reward model's verdicts."""
    pairs = {pair["pair_id"]: pair for match in matches for pair in map(_pair, match.rows)}
    table = schemas.to_table("judged", pairs.values())
    inner = settings.model_copy(
        update={"output_dir": settings.output_dir / "judged", "overwrite": False}
    )
    bounds = dataset.part_bounds(table.num_rows, settings.rows_per_part)
    write_judged_dataset("eval winrate", inner, scorer, PairInput(table, bounds, Counter(), digest))
    v = from_table(dataset.read_dataset(inner.output_dir, "judged"))
    odds = dict(zip(v.pair_ids, v.log_odds[v.names.index(next(iter(scorer.models)))], strict=True))
    found = []
    for match in matches:
        log_odds = np.array([odds.get(_pair_id(row), math.nan) for row in match.rows])
        found.append(replace(match, preference=np.exp(-np.logaddexp(0, -log_odds))))
    return found


def _pair_id(row: Row) -> str:
    return hashing.digest_json([row["messages"], row["output"], row["other_output"]])[:16]


def _pair(row: Row) -> Row:
    sides: list[Row] = [
        {
            "candidate_id": None,
            "text": row[side],
            "token_ids": [],
            "finish_reason": "stop",
            "author": row[author],
        }
        for side, author in (("output", "author"), ("other_output", "other_author"))
    ]
    return {
        "pair_id": _pair_id(row), "prompt_id": hashing.digest_json(row["messages"])[:16], "messages": row["messages"],
        "subset": row["subset"], "first": sides[0], "second": sides[1], "gold_label": None, "rewards": [], "reference_logps": [], "extra": row["extra"],
    }  # fmt: skip


def _example_id(row: Row) -> str:
    return hashing.digest_json([row["instruction"], row["output"], row["other_output"]])[:16]


def _with_scores(matches: list[Match], scores: dataset.Dataset) -> list[Match]:
    """The matches with the preferences that a scores dataset holds of them.

    Joined by the names of both models and the id of the example.
    """
    found: dict[tuple[str, str, str], float] = {}
    for table in scores.tables():
        for row in table.select(["example_id", "value", "detail"]).to_pylist():
            names = json.loads(row["detail"])
            value = math.nan if row["value"] is None else row["value"]
            found[names["model"], names["other"], row["example_id"]] = value
    values = [[found[m.model, m.other, _example_id(row)] for row in m.rows] for m in matches]
    return [replace(m, preference=np.array(of)) for m, of in zip(matches, values, strict=True)]


def _score_rows(match: Match) -> list[Row]:
    detail = json.dumps({"model": match.model, "other": match.other}, ensure_ascii=False)
    return [
        {
            "example_id": _example_id(row),
            "subset": row["subset"], "metric": "preference", "value": None if math.isnan(value) else float(value), "detail": detail,
        }
        for row, value in zip(match.rows, match.preference, strict=True)
    ]  # fmt: skip


def _annotation_rows(match: Match) -> list[Row]:
    return [
        {
            "instruction": row["instruction"], "dataset": row["subset"], "index": row["index"], "output_1": row["other_output"],
            "generator_1": match.other, "output_2": row["output"], "generator_2": match.model, "annotator": "scir",
            "preference": None if math.isnan(value) else 1 + float(value),
        }
        for row, value in zip(match.rows, match.preference, strict=True)
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------------- figures


def summary(matches: list[Match], dropped: Counter[str], gamed: Gamed | None, seed: int) -> Json:
    """Win rates of each match, the scale that holds all models, and what to know before believing them."""
    notes: list[str] = []
    unmatched = sum(dropped[reason] for reason in ("not_in_baseline", "not_in_responses"))
    if unmatched:
        notes.append(
            f"{unmatched} instructions are answered in only one of the files that are compared, and count nowhere"
        )
    figures = [_figures(match, gamed, seed, notes) for match in matches]
    if gamed is None and any(m["length_controlled_win_rate"] is not None for m in figures):
        notes.append(
            "length-controlled rates are not AlpacaEval's own without --gamed-baselines: the same model, not regularised"
        )
    scale = _bradley_terry(matches, seed, notes) if win_rates.sklearn_available() else None
    return {"matches": figures, "bradley_terry": scale, "notes": notes}


def _figures(match: Match, gamed: Gamed | None, seed: int, notes: list[str]) -> Json:
    names = {"model": match.model, "other": match.other}
    plain, lengths = win_rates.win_rate(match.preference), match.lengths
    if win_rates.sklearn_available():
        difficulty = difficulties(match, gamed) if gamed else None
        lc = win_rates.length_controlled(match.preference, lengths, difficulty, gamed, seed=seed)
    else:
        lc = {"length_controlled_win_rate": None, "length_controlled_reason": NO_SKLEARN}
    said = win_rates.reliability_notes(match.preference, lengths)
    if lc["length_controlled_reason"]:
        said.append(f"no length-controlled rate: {lc['length_controlled_reason']}")
    elif win_rates.extreme_change(plain["win_rate"], lc["length_controlled_win_rate"]):
        said.append(
            "length control moves the win rate so far that AlpacaEval's authors call it a sign of a failed fit"
        )
    notes += [f"{match.model} against {match.other}: {note}" for note in said]
    characters = {
        "mean_characters": float(lengths[0].mean()),
        "mean_characters_other": float(lengths[1].mean()),
    }
    subsets = subset_rows([row["subset"] for row in match.rows])
    parts = (
        {name: win_rates.win_rate(match.preference[rows]) for name, rows in subsets.items()}
        if len(subsets) > 1
        else {}
    )
    return names | plain | lc | characters | {"by_subset": parts}


def _bradley_terry(matches: list[Match], seed: int, notes: list[str]) -> Json | None:
    """Strength of each model in nats above the last, and its win rate against it, without and with style taken out; strongest first."""
    models = list(dict.fromkeys([m.model for m in matches] + [m.other for m in matches]))
    preference = np.concatenate([m.preference for m in matches])
    if np.isnan(preference).all():
        return None
    pairs = np.array(
        [(models.index(m.model), models.index(m.other)) for m in matches for _ in m.rows]
    )
    groups = [row["instruction"] for m in matches for row in m.rows]
    counts = [
        np.array([win_rates.markdown_counts(row[side]) for m in matches for row in m.rows], float)
        for side in ("output", "other_output")
    ]
    x = win_rates.design_matrix(pairs, len(models), win_rates.style_differences(*counts))
    fits = {
        "": win_rates.bradley_terry(
            x[:, : len(models) - 1], preference, groups, len(models), seed=seed
        )
    }
    condition = win_rates.condition_number(x)
    if condition <= win_rates.MAX_CONDITION:
        fits["style_controlled_"] = win_rates.bradley_terry(
            x, preference, groups, len(models), seed=seed
        )
    else:
        notes.append(
            f"no style-controlled rates: models and their style cannot be told apart here (condition number {condition:.2g})"
        )
    rows = [
        {"model": name} | {k: v for p, fit in fits.items() for k, v in _strength(p, fit, i)}
        for i, name in enumerate(models)
    ]
    style = fits["style_controlled_"]["style"].tolist() if "style_controlled_" in fits else []
    return {
        "models": sorted(rows, key=lambda row: -row["strength"]),
        "style_weights": dict(zip(win_rates.STYLE, style, strict=True)) if style else None,
    }


def _strength(prefix: str, fit: dict[str, Array], i: int) -> list[tuple[str, float]]:
    ends = {end: float(fit[end][i]) for end in ("strength", "low", "high")}
    rates = {
        "win_rate": ends["strength"],
        "win_rate_low": ends["low"],
        "win_rate_high": ends["high"],
    }
    return [(prefix + k, v) for k, v in ends.items()] + [
        (prefix + k, 1 / (1 + math.exp(-v))) for k, v in rates.items()
    ]


def read_gamed(path: Path) -> Gamed:
    """AlpacaEval's df_gamed.csv; raises DataError where a column or a number is missing."""
    columns = ("index", "preference", "std_delta_len", "instruction_difficulty")
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not rows or set(columns) - set(rows[0]):
        raise DataError(
            f"{path} should be AlpacaEval's df_gamed.csv with the columns {', '.join(columns)}; it has {', '.join(rows[0]) if rows else 'no rows'}"
        )
    try:
        index = [int(float(row["index"])) for row in rows]
        preference, delta, difficulty = (
            np.array([float(row[name] or math.nan) for row in rows]) for name in columns[1:]
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected numbers in {', '.join(columns)}") from error
    return Gamed(
        preference,
        delta,
        difficulty,
        dict(zip(index[::-1], difficulty[::-1].tolist(), strict=True)),
    )  # the first of an index stands


def difficulties(match: Match, gamed: Gamed) -> Array:
    """The difficulty of each instruction; raises DataError where its place in AlpacaEval's set is not known.

    A row without 'index' is taken at its place in a file that holds the whole set: after a missing row all others would be shifted.
    """
    whole = len(gamed.of_index)
    placed = [
        row["place"][0] if row["place"] and row["place"][1] == whole else None for row in match.rows
    ]
    index = [
        row["index"] if row["index"] is not None else place
        for row, place in zip(match.rows, placed, strict=True)
    ]
    values = np.array([math.nan if i is None else gamed.of_index.get(i, math.nan) for i in index])
    for wrong, why in (
        (
            sum(i is None for i in index),
            f"have no 'index', and their file does not hold all {whole} of --gamed-baselines",
        ),
        (int(np.isnan(values).sum()), "have no difficulty in --gamed-baselines"),
    ):
        if wrong:
            raise DataError(
                f"{wrong} of {len(values)} rows {why}: which instruction is which is not known; correct 'index', or leave the option out"
            )
    return values
