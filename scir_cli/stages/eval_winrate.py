"""eval winrate: win rates of responses over other responses.

A local model judges every pair in both orders, or existing annotations are read.

OUT/judged             the pairs with their verdicts, as `judge` writes them; missing with
                       --annotations
OUT/annotations.json   AlpacaEval's fields, which its tools can read: `preference` is
                       1 + P(the model's response is better than the other's)
OUT/                   a `scores` dataset: one row per instruction and pair of models
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
from scir_cli.data.messages import without_nulls
from scir_cli.data.storage import to_path
from scir_cli.errors import DataError, install_hint
from scir_cli.report import html
from scir_cli.rewards import prompts
from scir_cli.settings import EvalWinrateSettings
from scir_cli.stages.pairing import PairInput
from scir_cli.stages.scoring import Scorer, write_judged_dataset

Row = dict[str, Any]

NO_SKLEARN = f"needs scikit-learn: {install_hint('eval')}"

#: Columns of AlpacaEval's annotations that must hold text.
ANNOTATION_TEXTS = ("instruction", "output_1", "output_2", "generator_1", "generator_2")

#: Columns of AlpacaEval's df_gamed.csv that are read.
GAMED_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty")


@dataclass(frozen=True, eq=False)
class Match:
    """Two models' responses to the same instructions.

    rows         instruction, messages, output, other_output, subset, index (in AlpacaEval's set),
                 position (index of the row in its file, number of rows in the file)
    preference   (rows,) P(the model's response is better); NaN without a verdict
    """

    model: str
    other: str
    rows: list[Row]
    preference: Array

    @property
    def lengths(self) -> Array:
        """Lengths of the model's and the other's responses.  -> (2, rows) characters"""
        lengths = []
        for column in ("output", "other_output"):
            lengths.append([len(row[column]) for row in self.rows])
        return np.array(lengths, dtype=np.float64)


def run(settings: EvalWinrateSettings) -> Json:
    """Writes each preference; returns the manifest, with the win rates under "summary"."""
    inputs = [*settings.annotations, *_response_specs(settings)]
    digests = [readers.digest(spec) for spec in inputs]
    scorer = None if settings.annotations else Scorer(settings)
    gamed = read_gamed(settings.gamed_baselines) if settings.gamed_baselines else None
    plan: Json = {
        "stage": "eval winrate",
        "settings": settings.plan(),
        "inputs": digests,
    }
    if scorer:
        plan |= scorer.keys
    if settings.gamed_baselines:
        plan["gamed_baselines"] = hashing.digest_path(settings.gamed_baselines)

    if settings.annotations:
        matches, dropped = from_annotations(settings.annotations, settings.limit)
    else:
        matches, dropped = from_responses(settings)
    if settings.dry_run:
        n_kept = sum(len(match.rows) for match in matches)
        return {
            "dry_run": True,
            "plan": plan,
            "rows_in": n_kept + dropped.total(),
        }

    def make(low: int, high: int) -> Part:
        scored = matches
        if scorer:
            digest = hashing.digest_json(digests)
            scored = _judged(matches, settings, scorer, digest)
            _write_annotations(settings.output_dir / "annotations.json", scored)
        rows = []
        for match in scored:
            rows += _score_rows(match)
        return Part(rows, len(rows))

    def summarize(written: dataset.Dataset) -> Json:
        scored = _with_scores(matches, written)
        return summary(scored, dropped, gamed, settings.seed)

    manifest = dataset.write_dataset(
        settings.output_dir,
        "scores",
        plan,
        [(0, 1)],
        make,
        overwrite=settings.overwrite,
        dropped_before=dropped,
        summarize=summarize,
        inputs={
            "inputs": ", ".join(inputs),
            "model": settings.model,
        },
    )
    html.write_for("eval winrate", settings)
    return manifest


def _response_specs(settings: EvalWinrateSettings) -> list[str]:
    """The files of responses, the baseline's last."""
    specs = [*settings.responses]
    if settings.baseline:
        specs.append(settings.baseline)
    return specs


# ------------------------------------------------------------------------ responses


def from_responses(settings: EvalWinrateSettings) -> tuple[list[Match], Counter[str]]:
    """Each file of responses against the baseline, and the dropped instructions by reason.

    Without a baseline, every pair of files is compared. The preferences are NaN: nothing is
    judged here.
    Raises DataError if two files have no instruction with different responses.
    """
    dropped: Counter[str] = Counter()
    specs = _response_specs(settings)
    files = [load_responses(spec, dropped, settings.limit) for spec in specs]
    names = _model_names(specs, files)
    matches = []
    for i, j in _compared(len(specs), has_baseline=bool(settings.baseline)):
        rows = _common(files[i], files[j], dropped)
        if not rows:
            reasons = dict(+dropped) or "both are empty"
            raise DataError(
                f"{specs[i]} and {specs[j]} have no instruction in common with two different "
                f"answers ({reasons})"
            )
        no_verdicts = np.full(len(rows), np.nan)
        matches.append(Match(names[i], names[j], rows, no_verdicts))
    return matches, +dropped


def _compared(n_files: int, *, has_baseline: bool) -> list[tuple[int, int]]:
    """The pairs of files to compare, by their indices.

    has_baseline: the last file is the baseline, and all others are compared with it alone
    """
    pairs = list(itertools.combinations(range(n_files), 2))
    if not has_baseline:
        return pairs
    last = n_files - 1
    return [pair for pair in pairs if pair[1] == last]


def _model_names(specs: list[str], files: list[dict[str, Row]]) -> list[str]:
    """The model of each file: its first generator, else the file's name without the suffix.

    If two models have the same name (two checkpoints, for example), the paths of the files.
    """
    names = []
    for spec, file in zip(specs, files, strict=True):
        name = Path(spec).stem
        for row in file.values():
            if row["generator"]:
                name = row["generator"]
                break
        names.append(name)

    is_unique = len(set(names)) == len(names)
    return names if is_unique else specs


def load_responses(spec: str, dropped: Counter[str], limit: int | None = None) -> dict[str, Row]:
    """The responses of one model, by instruction.

    spec: AlpacaEval's JSON list {instruction, output, generator}, or a candidates dataset (the
    first response to each prompt is used)
    """
    path = to_path(spec)
    if folders.is_dataset(path):
        return _from_candidates(path, limit)
    return _from_alpaca_eval(spec, dropped, limit)


def _from_candidates(path: Path, limit: int | None) -> dict[str, Row]:
    """The first response to each prompt in a candidates dataset, by instruction.

    Prompts that differ in their system turns only have those turns in their instructions.
    limit: number of prompts
    """
    first: dict[str, Row] = {}
    candidates = dataset.read_dataset(path, "candidates")
    for row in candidates.to_pylist():
        first.setdefault(hashing.digest_json(row["messages"]), row)
    taken = Counter(prompts.question_text(row["messages"]) for row in first.values())

    responses: dict[str, Row] = {}
    for row in first.values():
        instruction = prompts.question_text(row["messages"])
        if taken[instruction] > 1:
            instruction = prompts.question_text(row["messages"], system=True)
        response = {
            "messages": row["messages"],
            "output": row["response"],
            "generator": None,
            "author": row["weights_key"],
            "position": None,
            "index": None,
            "subset": row["subset"],
            "extra": row["extra"],
        }
        responses.setdefault(instruction, response)
    return dict(itertools.islice(responses.items(), limit))


def _from_alpaca_eval(spec: str, dropped: Counter[str], limit: int | None) -> dict[str, Row]:
    """The responses of an AlpacaEval file, by instruction; repeated ones are dropped.

    limit: number of rows
    """
    responses: dict[str, Row] = {}
    rows = _rows_with_texts(spec, ("instruction", "output"))[:limit]
    for i, row in enumerate(rows):
        instruction = row["instruction"]
        if instruction in responses:
            dropped["duplicate_instruction"] += 1
            continue

        generator = row.get("generator")
        if not isinstance(generator, str):
            generator = None
        message = {"role": "user", "content": instruction}
        responses[instruction] = {
            "messages": [message],
            "output": row["output"],
            "generator": generator,
            "author": generator,
            "position": (i, len(rows)),
            "index": row.get("index"),
            "subset": row.get("dataset"),
            "extra": readers.extra_of(row, ("output", "generator", "dataset")),
        }
    return responses


def _rows_with_texts(spec: str, texts: Sequence[str]) -> list[Row]:
    """The rows of a file.

    texts: the columns that each row must have, with text
    Raises DataError if the file holds something else.
    """
    rows = list(readers.raw_rows(spec))
    columns = ", ".join(map(repr, texts))
    expected = f"rows with {columns}"
    if not rows:
        raise DataError(f"{spec} is empty; expected {expected}")
    for number, row in enumerate(rows, 1):
        missing = _missing_text(row, texts)
        if missing is not None:
            shown = ", ".join(row) if isinstance(row, dict) else repr(row)[:60]
            raise DataError(
                f"{spec}, row {number}: no text in '{missing}' (it has {shown}); "
                f"expected {expected}"
            )
    return rows


def _missing_text(row: Any, texts: Sequence[str]) -> str | None:
    """The first of the columns `texts` in which a row has no text; None if it has all of them."""
    columns = row if isinstance(row, dict) else {}
    for name in texts:
        if not isinstance(columns.get(name), str):
            return name
    return None


def _common(responses: dict[str, Row], others: dict[str, Row], dropped: Counter[str]) -> list[Row]:
    """The instructions with two different responses; counts all others in `dropped`.

    responses, others: of two models, by instruction
    """
    rows = []
    for instruction, row in responses.items():
        other = others.get(instruction)
        if other is None:
            dropped["not_in_baseline"] += 1
            continue
        texts = (row["output"], other["output"])
        if texts[0] == texts[1]:
            dropped["identical_responses"] += 1
        elif not all(text.strip() for text in texts):
            dropped["empty_response"] += 1
        else:
            match = {
                "instruction": instruction,
                "other_output": other["output"],
                "other_author": other["author"],
            }
            rows.append(match | row)

    unanswered = set(others) - set(responses)
    dropped["not_in_responses"] += len(unanswered)
    return rows


# ------------------------------------------------------------------------ annotations


def from_annotations(
    specs: Sequence[str], limit: int | None = None
) -> tuple[list[Match], Counter[str]]:
    """The matches in AlpacaEval annotation files, and the dropped rows by reason.

    One match per pair of generators, in order of first appearance. Rows with two equal outputs
    stay: they are draws.
    Raises DataError if a file holds annotations of several annotators.
    """
    by_pair: dict[tuple[str, str], list[Row]] = {}
    for spec in specs:
        rows = _rows_with_texts(spec, ANNOTATION_TEXTS)[:limit]
        _check_one_annotator(spec, rows)
        for i, row in enumerate(rows):
            pair = (row["generator_2"], row["generator_1"])
            annotation = _annotation(row)
            annotation["position"] = (i, len(rows))
            annotation["preference"] = _preference(row, spec, i + 1)
            by_pair.setdefault(pair, []).append(annotation)

    dropped: Counter[str] = Counter()
    matches = []
    for (model, other), repeated in by_pair.items():
        rows = _without_repeated(repeated, dropped)
        preference = np.array([row.pop("preference") for row in rows])
        matches.append(Match(model, other, rows, preference))
    return matches, +dropped


def _annotation(row: Row) -> Row:
    """A row of `Match` from an AlpacaEval annotation, in which the model is the second one."""
    return {
        "instruction": row["instruction"],
        "output": row["output_2"],
        "other_output": row["output_1"],
        "index": row.get("index"),
        "subset": row.get("dataset"),
    }


def _check_one_annotator(spec: str, rows: list[Row]) -> None:
    """Raises DataError if a file holds annotations of several annotators."""
    annotators = sorted({str(row.get("annotator")) for row in rows})
    if len(annotators) > 1:
        names = ", ".join(annotators)
        raise DataError(
            f"{spec} holds annotations of {len(annotators)} annotators ({names}); "
            "pass one file for each"
        )


def _without_repeated(rows: list[Row], dropped: Counter[str]) -> list[Row]:
    """The first annotation of each two outputs; none if their preferences differ.

    Counts the others in `dropped`.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        key = (row["instruction"], row["output"], row["other_output"])
        groups.setdefault(key, []).append(row)

    kept = []
    for group in groups.values():
        # As text, NaN equals itself.
        if len({str(row["preference"]) for row in group}) > 1:
            dropped["contradictory_annotation"] += len(group)
            continue
        dropped["duplicate_annotation"] += len(group) - 1
        kept.append(group[0])
    return kept


def _preference(row: Row, spec: str, number: int) -> float:
    """P(output_2 is better) in an annotation; NaN for null.

    spec, number: file and row (from 1), for messages
    AlpacaEval 2 writes 1 + P; AlpacaEval 1 wrote 1, 2, and 0 or 1.5 for a draw.
    Raises DataError if the value is missing or none of these.
    """
    if "preference" not in row:
        columns = ", ".join(row)
        raise DataError(
            f"{spec}, row {number}: no 'preference' (it has {columns}); "
            "expected AlpacaEval's annotations"
        )
    value = row["preference"]
    if value is None:
        return math.nan
    if isinstance(value, float) and math.isnan(value):
        return math.nan

    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value == 0 or 1 <= value <= 2):
        raise DataError(
            f"{spec}, row {number}: 'preference' is {value!r}; expected 1 (the baseline wins) to "
            "2 (the model wins), or 0 or 1.5 for a draw"
        )
    return 0.5 if value == 0 else float(value) - 1


# ------------------------------------------------------------------------ verdicts


def _judged(
    matches: list[Match], settings: EvalWinrateSettings, scorer: Scorer, digest: str
) -> list[Match]:
    """The matches with the preferences of the first reward model; writes OUT/judged.

    scorer: the judge, with its reward models
    digest: of all inputs, which the plan of OUT/judged records
    A pair without a verdict has the preference NaN.
    """
    # A pair that occurs in several matches is judged once.
    pairs = {}
    for match in matches:
        for row in match.rows:
            pair = _pair(row)
            pairs[pair["pair_id"]] = pair
    table = schemas.to_table("judged", pairs.values())
    bounds = dataset.part_bounds(table.num_rows, settings.rows_per_part)
    inputs = PairInput(table, bounds, Counter(), digest)

    folder = settings.output_dir / "judged"
    changes = {
        "output_dir": folder,
        "overwrite": False,
    }
    inner = settings.model_copy(update=changes)
    write_judged_dataset("eval winrate", inner, scorer, inputs)

    log_odds_of = _log_odds(folder, next(iter(scorer.models)))
    judged = []
    for match in matches:
        log_odds = []
        for row in match.rows:
            pair_id = _pair_id(row)
            log_odds.append(log_odds_of.get(pair_id, math.nan))
        preference = _sigmoid(np.array(log_odds))
        judged.append(replace(match, preference=preference))
    return judged


def _log_odds(folder: Path, reward_model: str) -> dict[str, float]:
    """pair_id -> log-odds (nats) of one reward model in a judged dataset."""
    judged = dataset.read_dataset(folder, "judged")
    v = from_table(judged)
    k = v.names.index(reward_model)
    return dict(zip(v.pair_ids, v.log_odds[k], strict=True))


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), which does not overflow.  (rows,) -> (rows,)"""
    return np.exp(-np.logaddexp(0, -x))


def _pair_id(row: Row) -> str:
    """The id of a pair: a digest of the conversation and both responses."""
    content = [row["messages"], row["output"], row["other_output"]]
    return hashing.digest_json(content)[:16]


def _pair(row: Row) -> Row:
    """A row of a judged dataset, without verdicts: the model's response is the first."""
    return {
        "pair_id": _pair_id(row),
        "prompt_id": hashing.digest_json(without_nulls(row["messages"]))[:16],
        "messages": row["messages"],
        "subset": row["subset"],
        "first": _response(row["output"], row["author"]),
        "second": _response(row["other_output"], row["other_author"]),
        "gold_label": None,
        "rewards": [],
        "reference_logps": [],
        "extra": row["extra"],
    }


def _response(text: str, author: str | None) -> Row:
    """A response in the form of a judged dataset."""
    return {
        "candidate_id": None,
        "text": text,
        "token_ids": [],
        "finish_reason": "stop",
        "author": author,
    }


def _example_id(row: Row) -> str:
    """The id of a row of the scores dataset: a digest of the instruction and both responses."""
    content = [row["instruction"], row["output"], row["other_output"]]
    return hashing.digest_json(content)[:16]


def _with_scores(matches: list[Match], scores: dataset.Dataset) -> list[Match]:
    """The matches with their preferences from a scores dataset.

    The join is by the names of both models and the example's id, not by the order of rows.
    The figures of a resumed run are computed from the dataset, as those of a new run are.
    """
    preferences: dict[tuple[str, str, str], float | None] = {}
    for table in scores.tables():
        columns = table.select(["example_id", "value", "detail"])
        for row in columns.to_pylist():
            names = json.loads(row["detail"])
            key = (names["model"], names["other"], row["example_id"])
            preferences[key] = row["value"]

    joined = []
    for match in matches:
        values = []
        for row in match.rows:
            key = (match.model, match.other, _example_id(row))
            value = preferences[key]
            values.append(math.nan if value is None else value)
        joined.append(replace(match, preference=np.array(values)))
    return joined


def _score_rows(match: Match) -> list[Row]:
    """One row of the scores dataset per instruction; the value is null without a verdict."""
    names = {
        "model": match.model,
        "other": match.other,
    }
    detail = json.dumps(names, ensure_ascii=False)
    rows = []
    for row, value in zip(match.rows, match.preference, strict=True):
        rows.append(
            {
                "example_id": _example_id(row),
                "subset": row["subset"],
                "metric": "preference",
                "value": None if math.isnan(value) else float(value),
                "detail": detail,
            }
        )
    return rows


def _write_annotations(path: Path, matches: list[Match]) -> None:
    """Writes the preferences of all matches in AlpacaEval's form."""
    annotations = []
    for match in matches:
        annotations += _annotation_rows(match)
    write_json(path, annotations)


def _annotation_rows(match: Match) -> list[Row]:
    """One annotation in AlpacaEval's form per instruction."""
    rows = []
    for row, value in zip(match.rows, match.preference, strict=True):
        rows.append(
            {
                "instruction": row["instruction"],
                "dataset": row["subset"],
                "index": row["index"],
                "output_1": row["other_output"],
                "generator_1": match.other,
                "output_2": row["output"],
                "generator_2": match.model,
                "annotator": "scir",
                "preference": None if math.isnan(value) else 1 + float(value),
            }
        )
    return rows


# ------------------------------------------------------------------------ figures


def summary(matches: list[Match], dropped: Counter[str], gamed: Gamed | None, seed: int) -> Json:
    """The win rates of each match, one scale for all models, and notes on their reliability.

    dropped: instructions by reason
    gamed: AlpacaEval's baselines for its length-controlled rate
    """
    notes: list[str] = []
    unmatched = dropped["not_in_baseline"] + dropped["not_in_responses"]
    if unmatched:
        notes.append(
            f"{unmatched} instructions are answered in only one of two compared files, "
            "and are left out"
        )

    figures = []
    for match in matches:
        match_figures, match_notes = _figures(match, gamed, seed)
        figures.append(match_figures)
        notes += [f"{match.model} against {match.other}: {note}" for note in match_notes]
    has_controlled = any(m["length_controlled_win_rate"] is not None for m in figures)
    if gamed is None and has_controlled:
        notes.append(
            "without --gamed-baselines, length-controlled rates are not AlpacaEval's: "
            "the regression has no difficulty and no regularization to baselines"
        )

    scale = None
    if win_rates.sklearn_available():
        scale = _bradley_terry(matches, seed, notes)
    return {"matches": figures, "bradley_terry": scale, "notes": notes}


def _figures(match: Match, gamed: Gamed | None, seed: int) -> tuple[Json, list[str]]:
    """The win rates of one match, and notes on their reliability.

    The length-controlled rate is null, with a reason, if it cannot be computed.
    """
    lengths = match.lengths
    plain = win_rates.win_rate(match.preference)
    if win_rates.sklearn_available():
        difficulty = difficulties(match, gamed) if gamed else None
        controlled = win_rates.length_controlled(
            match.preference, lengths, difficulty, gamed, seed=seed
        )
    else:
        controlled = {
            "length_controlled_win_rate": None,
            "length_controlled_reason": NO_SKLEARN,
        }

    notes = win_rates.reliability_notes(match.preference, lengths)
    controlled_rate = controlled["length_controlled_win_rate"]
    if controlled["length_controlled_reason"]:
        notes.append(f"no length-controlled rate: {controlled['length_controlled_reason']}")
    elif win_rates.extreme_change(plain["win_rate"], controlled_rate):
        notes.append(
            "length control changes the win rate so much that AlpacaEval's authors consider the "
            "fit failed"
        )

    by_subset = {}
    subsets = subset_rows([row["subset"] for row in match.rows])
    if len(subsets) > 1:
        for name, rows in subsets.items():
            by_subset[name] = win_rates.win_rate(match.preference[rows])
    figures = {
        "model": match.model,
        "other": match.other,
        **plain,
        **controlled,
        "mean_characters": float(lengths[0].mean()),
        "mean_characters_other": float(lengths[1].mean()),
        "by_subset": by_subset,
    }
    return figures, notes


def _bradley_terry(matches: list[Match], seed: int, notes: list[str]) -> Json | None:
    """The strength of each model in nats above the last one, the strongest first.

    Each model also has its win rate over the last one. Both figures also exist with style
    controlled, if the data separate models and style; otherwise a note is added to `notes`.
    None if there is no verdict.
    """
    names = [match.model for match in matches] + [match.other for match in matches]
    models = list(dict.fromkeys(names))
    preference = np.concatenate([match.preference for match in matches])
    if np.isnan(preference).all():
        return None

    def fitted(matrix: Array) -> dict[str, Array]:
        return win_rates.bradley_terry(matrix, preference, groups, len(models), seed=seed)

    design, groups = _style_design(matches, models)
    without_style = design[:, : len(models) - 1]
    fits = {"": fitted(without_style)}
    style_weights = None
    condition = win_rates.condition_number(design)
    if condition <= win_rates.MAX_CONDITION:
        fits["style_controlled_"] = fitted(design)
        weights = fits["style_controlled_"]["style"].tolist()
        if weights:
            style_weights = dict(zip(win_rates.STYLE, weights, strict=True))
    else:
        notes.append(
            "no style-controlled rates: the models' style differs too regularly to separate it "
            f"from the models (condition number {condition:.2g})"
        )

    rows = []
    for i, name in enumerate(models):
        row: Row = {"model": name}
        for prefix, fit in fits.items():
            row |= _strength(prefix, fit, i)
        rows.append(row)
    rows.sort(key=_strongest_first)
    return {"models": rows, "style_weights": style_weights}


def _strongest_first(row: Row) -> float:
    strength: float = row["strength"]
    return -strength


def _style_design(matches: list[Match], models: list[str]) -> tuple[Array, list[str]]:
    """The design matrix with style columns, and the instruction of each row.

    The matrix is (rows of all matches, len(models) - 1 + style features).
    """
    indices = []
    counts = []
    other_counts = []
    instructions = []
    for match in matches:
        model = models.index(match.model)
        other = models.index(match.other)
        pair = (model, other)
        for row in match.rows:
            indices.append(pair)
            counts.append(win_rates.markdown_counts(row["output"]))
            other_counts.append(win_rates.markdown_counts(row["other_output"]))
            instructions.append(row["instruction"])

    style = win_rates.style_differences(
        np.array(counts, float),
        np.array(other_counts, float),
    )
    matrix = win_rates.design_matrix(np.array(indices), len(models), style)
    return matrix, instructions


def _strength(prefix: str, fit: dict[str, Array], i: int) -> dict[str, float]:
    """Strength of model i (nats) and win rate over the last model, with their intervals.

    prefix: of the names of the figures
    """
    strength = float(fit["strength"][i])
    low = float(fit["low"][i])
    high = float(fit["high"][i])
    return {
        f"{prefix}strength": strength,
        f"{prefix}low": low,
        f"{prefix}high": high,
        f"{prefix}win_rate": _probability(strength),
        f"{prefix}win_rate_low": _probability(low),
        f"{prefix}win_rate_high": _probability(high),
    }


def _probability(log_odds: float) -> float:
    """The probability that log-odds (nats) stand for."""
    return 1 / (1 + math.exp(-log_odds))


# ------------------------------------------------------------------------ gamed baselines


def read_gamed(path: Path) -> Gamed:
    """AlpacaEval's df_gamed.csv; raises DataError if a column or a number is missing."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error

    rows = list(csv.DictReader(text.splitlines()))
    columns = list(rows[0]) if rows else []
    expected = ", ".join(GAMED_COLUMNS)
    if set(GAMED_COLUMNS) - set(columns):
        shown = ", ".join(columns) or "no rows"
        raise DataError(
            f"{path} should be AlpacaEval's df_gamed.csv with the columns {expected}; "
            f"it has {shown}"
        )
    try:
        index = [int(float(row["index"])) for row in rows]
        preference = _csv_numbers(rows, "preference")
        std_delta_len = _csv_numbers(rows, "std_delta_len")
        difficulty = _csv_numbers(rows, "instruction_difficulty")
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected numbers in {expected}") from error

    # An instruction has one row per model; the difficulty of its first row is used.
    of_index: dict[int, float] = {}
    for i, value in zip(index, difficulty.tolist(), strict=True):
        of_index.setdefault(i, value)
    return Gamed(
        preference=preference,
        std_delta_len=std_delta_len,
        difficulty=difficulty,
        of_index=of_index,
    )


def _csv_numbers(rows: list[dict[str, str]], column: str) -> Array:
    """A column of numbers, NaN if a cell is empty.  -> (rows,)"""
    numbers = []
    for row in rows:
        cell = row[column]
        numbers.append(float(cell or math.nan))
    return np.array(numbers)


def difficulties(match: Match, gamed: Gamed) -> Array:
    """The difficulty of each instruction in AlpacaEval's set.  -> (rows,)

    A row without 'index' has its position in the file as index, but only if the file holds the
    whole set: one missing row would shift all rows after it.
    Raises DataError if an instruction has no index or no difficulty.
    """
    n_instructions = len(gamed.of_index)
    values = []
    no_index = 0
    for row in match.rows:
        index = row["index"]
        position = row["position"]
        if index is None and position:
            number, n_rows = position
            index = number if n_rows == n_instructions else None

        if index is None:
            no_index += 1
        values.append(gamed.of_index.get(index, math.nan))
    if no_index:
        raise DataError(
            f"{no_index} of {len(values)} rows have no 'index', and their file does not hold all "
            f"{n_instructions} instructions of --gamed-baselines, so their difficulty is unknown; "
            "add 'index', or omit --gamed-baselines"
        )
    no_difficulty = sum(math.isnan(value) for value in values)
    if no_difficulty:
        raise DataError(
            f"{no_difficulty} of {len(values)} rows have no difficulty in --gamed-baselines; "
            "correct their 'index', or omit --gamed-baselines"
        )
    return np.array(values)
