"""The figures of a judged dataset."""

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
    """`summary` of several tables one after the other; of their rows nothing but the numbers it needs is kept."""
    return summary(join([replace(from_table(table, ids=False), subset=[]) for table in tables]))


# Reports


def curves(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, Any]:
    """Accuracy against confidence (`reliability`) and coverage (`risk_coverage`) of each model, and of the label all agree on, by its margin."""
    correct = (1 + np.sign(v.log_odds) * v.gold) / 2  # (models, pairs)
    a = _agreement_of(v, agree_on, min_confidence)
    agreed = np.where(a.agree == 1, a.margin, np.nan)

    def covered(log_odds: Array, right: Array) -> list[dict[str, Any]]:
        """A labelled pair without a verdict is one that is not covered: a 0 there never counts."""
        return statistics.risk_coverage(
            statistics.confidence_of(log_odds),
            np.where(np.isnan(v.gold), np.nan, np.nan_to_num(right)),
        )

    return rounded_json(
        {
            "reliability": {
                name: statistics.reliability(v.log_odds[k], correct[k])
                for k, name in enumerate(v.names)
            },
            "risk_coverage": {
                name: covered(v.log_odds[k], correct[k]) for k, name in enumerate(v.names)
            }
            | {"agreed": covered(agreed, (1 + np.sign(a.mean) * v.gold) / 2)},
        }
    )


def summary(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, Any]:
    """All statistics of `v`, ready for JSON: floats to 6 digits, None for what is undefined (no seats, no gold, no verdicts).

    agree_on: the models that decide "agreed", all of them by default; raises DataError for one that `v` lacks.
    """
    return rounded_json(
        {
            "pairs": len(v.gold),
            "models": {name: _model(v, k) for k, name in enumerate(v.names)},
            "between": [_between(v, i, j) for i, j in combinations(range(len(v.names)), 2)],
            "agreed": _agreed(v, _agreement_of(v, agree_on, min_confidence)),
        }
    )


def data_notes(v: Verdicts, repeated: int) -> list[str]:
    """What a reader of the figures has to know of the rows, one sentence each.  repeated: rows whose pair_id an earlier one has"""
    known, notes = statistics.without_nan(v.gold), []
    if repeated:
        notes.append(f"{repeated} rows repeat the pair_id of another row; every row counts")
    if 0 < len(known) < len(v.gold):
        notes.append(
            f"{len(v.gold) - len(known)} of {len(v.gold)} pairs have no gold label and count in no accuracy"
        )
    if len(known) > 1 and (known == known[0]).all():
        side = "first" if known[0] > 0 else "second"
        notes.append(
            f"all {len(known)} gold labels say '{side}': whoever always prefers that side is right, so accuracy says little"
        )
    return notes


def by_subset(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, dict[str, Any]]:
    """The summary of each subset, in order of first appearance; pairs without one are under "(none)"."""
    return {
        name: summary(v.take(rows), agree_on, min_confidence)
        for name, rows in subset_rows(v.subset).items()
    }


def row_columns(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, pa.Array]:
    """The four columns a consistency dataset adds, (pairs,) each; null where one of `agree_on` has no verdict."""
    a = _agreement_of(v, agree_on, min_confidence)
    columns = {"agree": a.agree, "margin": a.margin, "mean_log_odds": a.mean, "spread": a.spread}
    arrays = {
        name: pa.array(values, pa.float64(), from_pandas=True) for name, values in columns.items()
    }  # NaN -> null
    return arrays | {"agree": arrays["agree"].cast(pa.bool_())}


def _agreement_of(v: Verdicts, agree_on: Sequence[str] | None, min_confidence: float) -> Agreement:
    for name in agree_on or ():
        if name not in v.names:
            raise DataError(
                f"no verdicts of the reward model '{name}' in this dataset.{suggest(name, v.names)}"
            )
    return statistics.agreement(
        v.log_odds[[v.names.index(name) for name in agree_on or v.names]], min_confidence
    )


def _model(v: Verdicts, k: int) -> dict[str, Any]:
    length = statistics.spearman(v.log_odds[k], v.length_difference)
    a = statistics.without_nan(v.log_odds[k])
    low, high = statistics.correlation_interval(length, len(a))
    correct = (1 + np.sign(v.log_odds[k]) * v.gold) / 2  # 1, 0, 1/2 for a tie
    return {
        "verdicts": len(a),
        "ties": int((a == 0).sum()),
        "median_abs_log_odds": statistics.quantile(np.abs(a), 0.5),
        "mean_abs_log_odds": statistics.mean_of_known(np.abs(a)),
        "abs_log_odds_quantiles": {str(q): statistics.quantile(np.abs(a), q) for q in QUANTILES},
        "mean_entropy": statistics.mean_of_known(statistics.entropy(a)),
        "verdict_mass": statistics.mean_of_known(v.verdict_mass[k]),
        **_seats(v, k),
        **{
            "length_correlation": length,
            "length_correlation_low": low,
            "length_correlation_high": high,
        },
        **statistics.rate_with_interval("accuracy", correct),
        "calibration_error": statistics.calibration_error(v.log_odds[k], correct),
        "labelled": len(statistics.without_nan(correct)),  # pairs with gold and a verdict
    }


def _seats(v: Verdicts, k: int) -> dict[str, Any]:
    signs = np.sign([v.forward[k], v.swapped[k]])  # (2, pairs) +1: first better
    flips = np.where(np.isnan(signs).any(0), np.nan, signs[0] * signs[1] < 0)
    return {
        **statistics.rate_with_interval(
            "flip_rate", flips
        ),  # opposite signs: the seat decides, not the response
        "order_kappa": statistics.cohen_kappa(v.forward[k], v.swapped[k]),
        "first_seat_rate": statistics.mean_of_known(
            (1 + statistics.seat_signs(v, k)) / 2
        ),  # over both orders; a tie counts one half
    }


def _between(v: Verdicts, i: int, j: int) -> dict[str, Any]:
    return {
        "first": v.names[i],
        "second": v.names[j],
        **pairwise_agreement(v.log_odds[i], v.log_odds[j]),
    }


def pairwise_agreement(a: Array, b: Array) -> dict[str, Any]:
    """How far two columns of log-odds agree where both have a verdict, each figure with its 95 % interval.  a, b: (pairs,)"""
    a, b = statistics.known_in_both(a, b)
    equal = (np.sign(a) == np.sign(b)).astype(float)  # p_o of kappa: two ties are equal
    kappa, r = statistics.kappa_interval(a, b), statistics.spearman(a, b)
    ends = statistics.correlation_interval(r, len(a))
    return {
        "pairs": len(a),
        **statistics.rate_with_interval("agreement", equal),
        **dict(zip(("kappa", "kappa_low", "kappa_high"), kappa, strict=True)),
        **dict(zip(("spearman", "spearman_low", "spearman_high"), (r, *ends), strict=True)),
    }


def _agreed(v: Verdicts, a: Agreement) -> dict[str, Any]:
    kept = a.agree == 1
    correct = (1 + np.sign(a.mean) * v.gold)[kept] / 2
    return {
        "pairs": int(kept.sum()),
        **statistics.rate_with_interval("rate", a.agree),
        **statistics.rate_with_interval("accuracy", correct),
        "labelled": len(statistics.without_nan(correct)),
        "mean_margin": statistics.mean_of_known(a.margin[kept]),
    }


def rounded_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded_json(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None  # + 0.0: -0.0 is 0.0
    return value
