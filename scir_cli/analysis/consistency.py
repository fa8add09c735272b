"""The figures of a judged dataset: each reward model, each pair of models, and their agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from scir_cli.analysis import statistics
from scir_cli.analysis.statistics import MIN_CONFIDENCE, QUANTILES, Agreement
from scir_cli.analysis.verdicts import Array, Verdicts, from_table, join, subset_rows
from scir_cli.errors import DataError, suggest


def summary_of(tables: Iterable[pa.Table]) -> dict[str, Any]:
    """`summary` of several tables one after the other.

    Only the numbers that the summary needs stay in memory.
    Raises DataError as `from_table` does.
    """
    parts = []
    for table in tables:
        part = from_table(table, ids=False)
        parts.append(replace(part, subset=[]))
    return summary(join(parts))


# Reports


def curves(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, Any]:
    """Accuracy against confidence (`reliability`) and against coverage (`risk_coverage`).

    Both hold a curve per model. `risk_coverage` also holds "agreed": the pairs on which the models
    of `agree_on` agree, labeled by their mean log-odds, with their margin as the confidence.

    Raises DataError for a model of `agree_on` that `v` lacks.
    """
    # (models, pairs)
    correct = _correctness(v.log_odds, v.gold)
    agreement = _agreement_of(v, agree_on, min_confidence)

    reliability = {}
    risk_coverage = {}
    for k, name in enumerate(v.names):
        log_odds = v.log_odds[k]
        reliability[name] = statistics.reliability(log_odds, correct[k])
        risk_coverage[name] = _risk_coverage(log_odds, correct[k], v.gold)

    agreed_margin = np.where(agreement.agree == 1, agreement.margin, np.nan)
    agreed_correct = _correctness(agreement.mean, v.gold)
    risk_coverage["agreed"] = _risk_coverage(agreed_margin, agreed_correct, v.gold)
    return rounded_json({"reliability": reliability, "risk_coverage": risk_coverage})


def _correctness(log_odds: Array, gold: Array) -> Array:
    """1 for a correct verdict, 0 for a wrong one, 1/2 for a tie, NaN if either is missing.

    log_odds: (..., pairs)
    gold: (pairs,)
    -> (..., pairs)
    """
    return (1 + np.sign(log_odds) * gold) / 2


def _risk_coverage(log_odds: Array, correct: Array, gold: Array) -> list[dict[str, Any]]:
    """`statistics.risk_coverage` with confidence from the log-odds.

    log_odds: (pairs,) nats.
    correct, gold: (pairs,)
    """
    confidence = statistics.confidence_of(log_odds)
    # A labeled pair without a verdict is one that is not covered: a 0 there never counts.
    covered = np.nan_to_num(correct)
    labeled = np.where(np.isnan(gold), np.nan, covered)
    return statistics.risk_coverage(confidence, labeled)


def summary(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, Any]:
    """All statistics of `v`, ready for JSON.

    Floats have 6 digits; None is undefined (no seats, no gold labels, no verdicts).

    agree_on: the models that decide "agreed", all of them by default.

    Raises DataError for a model of `agree_on` that `v` lacks.
    """
    models = {name: _model(v, k) for k, name in enumerate(v.names)}
    between = [_between(v, i, j) for i, j in combinations(range(len(v.names)), 2)]
    agreement = _agreement_of(v, agree_on, min_confidence)
    return rounded_json(
        {
            "pairs": len(v.gold),
            "models": models,
            "between": between,
            "agreed": _agreed(v, agreement),
        }
    )


def data_notes(v: Verdicts, repeated: int) -> list[str]:
    """Properties of the rows that limit the figures, one sentence each.

    repeated: the number of rows whose pair_id an earlier row has.
    """
    notes = []
    if repeated:
        notes.append(f"{repeated} rows repeat the pair_id of another row; every row counts")

    labels = statistics.without_nan(v.gold)
    n_labels = len(labels)
    n_missing = len(v.gold) - n_labels
    if n_labels and n_missing:
        notes.append(
            f"{n_missing} of {len(v.gold)} pairs have no gold label and count in no accuracy"
        )
    if n_labels > 1 and (labels == labels[0]).all():
        side = "first" if labels[0] > 0 else "second"
        notes.append(
            f"all {n_labels} gold labels are '{side}': a reward model that always prefers "
            "that side has accuracy 1, so accuracy is not informative"
        )
    return notes


def by_subset(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, dict[str, Any]]:
    """The summary of each subset, in order of first appearance.

    Pairs without a subset are under "(none)".
    Raises DataError for a model of `agree_on` that `v` lacks.
    """
    summaries = {}
    for name, rows in subset_rows(v.subset).items():
        of_subset = v.take(rows)
        summaries[name] = summary(of_subset, agree_on, min_confidence)
    return summaries


def row_columns(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, pa.Array]:
    """The four columns that a consistency dataset adds, (pairs,) each.

    A value is null if a model of `agree_on` has no verdict.
    Raises DataError for a model of `agree_on` that `v` lacks.
    """
    agreement = _agreement_of(v, agree_on, min_confidence)
    return {
        "agree": _nullable(agreement.agree).cast(pa.bool_()),
        "margin": _nullable(agreement.margin),
        "mean_log_odds": _nullable(agreement.mean),
        "spread": _nullable(agreement.spread),
    }


def _nullable(values: Array) -> pa.Array:
    """The values as doubles, null for NaN.

    values: (n,)
    """
    return pa.array(values, pa.float64(), from_pandas=True)


def _agreement_of(v: Verdicts, agree_on: Sequence[str] | None, min_confidence: float) -> Agreement:
    """Agreement of the models `agree_on`, all of them by default.

    Raises DataError for a model that `v` lacks.
    """
    for name in agree_on or ():
        if name not in v.names:
            raise DataError(
                f"no verdicts of the reward model '{name}' in this dataset.{suggest(name, v.names)}"
            )
    rows = [v.names.index(name) for name in agree_on or v.names]
    # (models of agree_on, pairs)
    log_odds = v.log_odds[rows]
    return statistics.agreement(log_odds, min_confidence)


# Parts of a summary


def _model(v: Verdicts, k: int) -> dict[str, Any]:
    """The figures of model k: verdicts, confidence, seats, length and accuracy.

    Log-odds and entropy are in nats.
    """
    log_odds = v.log_odds[k]
    known = statistics.without_nan(log_odds)
    size = np.abs(known)
    length = statistics.spearman(log_odds, v.length_difference)
    length_low, length_high = statistics.correlation_interval(length, len(known))
    # (pairs,)
    correct = _correctness(log_odds, v.gold)
    n_labeled = len(statistics.without_nan(correct))
    return {
        "verdicts": len(known),
        "ties": int((known == 0).sum()),
        "median_abs_log_odds": statistics.quantile(size, 0.5),
        "mean_abs_log_odds": statistics.mean_of_known(size),
        "abs_log_odds_quantiles": {str(q): statistics.quantile(size, q) for q in QUANTILES},
        "mean_entropy": statistics.mean_of_known(statistics.entropy(known)),
        "verdict_mass": statistics.mean_of_known(v.verdict_mass[k]),
        **_seats(v, k),
        "length_correlation": length,
        "length_correlation_low": length_low,
        "length_correlation_high": length_high,
        **_answer_length(v, log_odds),
        **statistics.rate_with_interval("accuracy", correct),
        "calibration_error": statistics.calibration_error(log_odds, correct),
        # Pairs with both a gold label and a verdict.
        "labeled": n_labeled,
    }


def _answer_length(v: Verdicts, log_odds: Array) -> dict[str, Any]:
    """Rank correlation of log-odds and length without reasoning, over pairs with reasoning.

    {} if no response has reasoning.  log_odds: (pairs,) nats
    """
    difference = v.answer_length_difference
    if np.isnan(difference).all():
        return {}
    known, length = statistics.known_in_both(log_odds, difference)
    value = statistics.spearman(known, length)
    low, high = statistics.correlation_interval(value, len(known))
    return {
        "answer_length_correlation": value,
        "answer_length_correlation_low": low,
        "answer_length_correlation_high": high,
    }


def _seats(v: Verdicts, k: int) -> dict[str, Any]:
    """Order-flip rate of model k, kappa between its two orders, and its rate for seat A."""
    # (2, pairs) +1: first better
    signs = np.sign([v.forward[k], v.swapped[k]])
    # Opposite signs: the seat decides, not the response.
    opposite = signs[0] * signs[1] < 0
    flips = np.where(np.isnan(signs).any(0), np.nan, opposite)
    # (2, pairs) over both orders; a tie counts 1/2
    for_seat_a = (1 + statistics.seat_signs(v, k)) / 2
    return {
        **statistics.rate_with_interval("flip_rate", flips),
        "order_kappa": statistics.cohen_kappa(v.forward[k], v.swapped[k]),
        "first_seat_rate": statistics.mean_of_known(for_seat_a),
    }


def _between(v: Verdicts, i: int, j: int) -> dict[str, Any]:
    """The agreement of models i and j."""
    return {
        "first": v.names[i],
        "second": v.names[j],
        **pairwise_agreement(v.log_odds[i], v.log_odds[j]),
    }


def pairwise_agreement(a: Array, b: Array) -> dict[str, Any]:
    """Agreement of two columns of log-odds over pairs on which both have a verdict.

    Each figure has its 95 % interval.

    a, b: (pairs,) nats.
    """
    a, b = statistics.known_in_both(a, b)
    # p_o of kappa: two ties are equal.
    equal = (np.sign(a) == np.sign(b)).astype(float)
    kappa, kappa_low, kappa_high = statistics.kappa_interval(a, b)
    spearman = statistics.spearman(a, b)
    spearman_low, spearman_high = statistics.correlation_interval(spearman, len(a))
    return {
        "pairs": len(equal),
        **statistics.rate_with_interval("agreement", equal),
        "kappa": kappa,
        "kappa_low": kappa_low,
        "kappa_high": kappa_high,
        "spearman": spearman,
        "spearman_low": spearman_low,
        "spearman_high": spearman_high,
    }


def _agreed(v: Verdicts, agreement: Agreement) -> dict[str, Any]:
    """The number, rate, accuracy and margin of the pairs on which the models agree."""
    agree = agreement.agree == 1
    correct = _correctness(agreement.mean, v.gold)[agree]
    return {
        "pairs": int(agree.sum()),
        **statistics.rate_with_interval("rate", agreement.agree),
        **statistics.rate_with_interval("accuracy", correct),
        "labeled": len(statistics.without_nan(correct)),
        "mean_margin": statistics.mean_of_known(agreement.margin[agree]),
    }


def rounded_json(value: Any) -> Any:
    """The value with all floats at 6 digits; None for a float that is not finite.

    Dictionaries and lists are rounded at all depths.
    """
    if isinstance(value, dict):
        return {key: rounded_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded_json(item) for item in value]
    if isinstance(value, float):
        # Adding 0.0 turns -0.0 into 0.0.
        return round(value, 6) + 0.0 if math.isfinite(value) else None
    return value
