"""Log-odds -> agreement and statistics, as pure functions of arrays (numpy and pyarrow only; what METHOD 6 asks to be reported).

    log_odds           (models, pairs) nats, positive: first better, 0: a tie, NaN: no verdict
    forward, swapped   (models, pairs) the same, read with first, then with second, in seat A;
                       NaN: the model has no seats
    gold               (pairs,) +1 first better, -1 second better, NaN unlabelled

Swapping first and second negates log_odds, gold and length difference, makes forward -swapped and
swapped -forward, and changes no statistic.
A missing verdict is left out of a statistic and lowers its count: it is never a tie, a disagreement or a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scir_cli.analysis.verdicts import Array, Verdicts

MIN_CONFIDENCE = 0.5  # tau of METHOD 3 [ours]: 0.5 asks for nothing beyond equal signs
Z = 1.959964  # a normal's 95 %
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Whether some models agree on each pair; every field is (pairs,), NaN where one of them has no verdict."""

    agree: Array  # 1.0 or 0.0
    margin: Array  # smallest |log-odds|, nats
    mean: Array  # mean log-odds, nats
    spread: Array  # largest minus smallest log-odds, nats


# Statistics


def agreement(log_odds: Array, min_confidence: float = MIN_CONFIDENCE) -> Agreement:
    """Agreement of all models on each pair; a tie never agrees, no verdict is NaN.  log_odds: (models, pairs)

    m = 1[all a_i have one sign] 1[min_i max(p_i, 1-p_i) >= tau]  (METHOD 3)
    """
    if not len(log_odds):
        log_odds = np.full((1, log_odds.shape[1]), np.nan)
    sign, margin = np.sign(log_odds), np.abs(log_odds).min(0)  # min and max hand NaN on
    agree = (sign == sign[0]).all(0) & (sign[0] != 0) & (confidence_of(margin) >= min_confidence)
    return Agreement(
        np.where(np.isnan(margin), np.nan, agree),
        margin,
        log_odds.mean(0),
        log_odds.max(0) - log_odds.min(0),
    )


def confidence_of(log_odds: Array) -> Array:
    return 1 / (1 + np.exp(-np.abs(log_odds)))  # max(p, 1-p) = sigmoid(|a|)


def entropy(log_odds: Array) -> Array:
    """Entropy of sigmoid(a), nats, NaN for no verdict.  H = softplus(a) - a sigmoid(a), here of |a|: H is even; (...) -> (...)"""
    size = np.abs(log_odds)
    return np.log1p(np.exp(-size)) + size * (1 - confidence_of(size))


def cohen_kappa(a: Array, b: Array) -> float:
    """Cohen's kappa of the signs of a and b where both have a verdict, a tie being a third category; NaN where undefined.

    kappa = (p_o - p_e) / (1 - p_e), p_e = sum_k P(a = k) P(b = k) (Cohen 1960).  a, b: (pairs,)
    """
    return kappa_interval(a, b)[0]


def kappa_interval(a: Array, b: Array) -> tuple[float, float, float]:
    """`cohen_kappa`, and its ends where p_o lies at the ends of its Wilson interval and p_e stays [ours]: never of width 0, as at p_o = 1."""
    a, b = known_in_both(np.sign(a), np.sign(b))
    chance = sum((a == k).mean() * (b == k).mean() for k in (-1, 0, 1)) if len(a) else 1.0
    if chance == 1:
        return math.nan, math.nan, math.nan
    observed = float((a == b).mean())
    kappa, low, high = (
        (p - chance) / (1 - chance) for p in (observed, *wilson(observed * len(a), len(a)))
    )
    return float(kappa), float(low), float(high)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation where neither is NaN, ties sharing their average rank; NaN when one side is constant.  a, b: (pairs,)"""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = _ranks(a[known]), _ranks(b[known])
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: Array) -> Array:
    """Ranks 1..n, ties averaged, less their mean (n + 1) / 2."""
    order = np.argsort(values)
    values = values[order]
    ends = (
        np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)]) + 1
    )  # of runs of equals
    counts = np.diff(ends, prepend=0)
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(ends - (counts - 1) / 2 - (len(values) + 1) / 2, counts)
    return ranks


def known_in_both(a: Array, b: Array) -> tuple[Array, Array]:
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known]


def wilson(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """Lowest and highest rate that `successes` of `n` allow (Wilson 1927; z: 95 %); NaN for n = 0."""
    if not n:
        return math.nan, math.nan
    rate, shrink = successes / n, 1 + z * z / n
    centre, half = (
        rate + z * z / (2 * n),
        z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)),
    )
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


def calibration_error(log_odds: Array, correct: Array, bins: int = 10) -> float:
    """Expected calibration error of max(p, 1-p) in equal bins over [1/2, 1]; NaN with nothing to compare.

    ECE = sum_b n_b/n |accuracy_b - confidence_b| (Guo et al. 2017).  correct: (pairs,) 1, 0, 1/2 for a tie, NaN unlabelled
    """
    confidence, correct = known_in_both(confidence_of(log_odds), correct)
    if not len(correct):
        return math.nan
    return float(
        np.abs(np.bincount(_bins(confidence, bins), correct - confidence)).sum() / len(correct)
    )


def _bins(confidence: Array, bins: int) -> NDArray[np.intp]:
    return np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)


def reliability(log_odds: Array, correct: Array, bins: int = 10) -> list[dict[str, Any]]:
    """Mean confidence and accuracy (with its Wilson interval) in each bin of `calibration_error` that holds a pair."""
    confidence, correct = known_in_both(confidence_of(log_odds), correct)
    bin_of = _bins(confidence, bins)
    inside = [bin_of == b for b in np.unique(bin_of)]
    return [
        {
            "pairs": int(i.sum()),
            "confidence": mean_of_known(confidence[i]),
            **rate_with_interval("accuracy", correct[i]),
        }
        for i in inside
    ]


def risk_coverage(confidence: Array, correct: Array, points: int = 20) -> list[dict[str, Any]]:
    """Accuracy on the surest pairs against the share of labelled pairs that they are: what selecting by confidence buys (El-Yaniv & Wiener 2010).

    confidence: (pairs,) NaN: not covered;  correct: (pairs,) as in `calibration_error`.  Equally sure pairs come in together, in any order of
    the rows; the last point is all that can be covered. No labelled pairs: no points.
    """
    labelled = ~np.isnan(correct)
    confidence, hits = known_in_both(confidence[labelled], correct[labelled])
    order = np.argsort(-confidence, kind="stable")
    confidence, hits = confidence[order], np.cumsum(hits[order])
    ends = (
        np.flatnonzero(np.append(np.diff(confidence) != 0, True)) if len(hits) else np.empty(0, int)
    )  # last of a run of equals
    wanted = np.ceil(labelled.sum() * np.arange(1, points + 1) / points) - 1
    chosen = (
        np.unique(ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)])
        if len(ends)
        else ends
    )
    curve = []
    for end in chosen:
        low, high = wilson(float(hits[end]), int(end) + 1)
        rate = {
            "accuracy": float(hits[end]) / (end + 1),
            "accuracy_low": low,
            "accuracy_high": high,
        }
        curve.append(
            {
                "coverage": (end + 1) / int(labelled.sum()),
                "pairs": int(end) + 1,
                "confidence": float(confidence[end]),
                **rate,
            }
        )
    return curve


def seat_signs(v: Verdicts, k: int) -> Array:
    """+1 where model k prefers seat A, -1 seat B, 0 a tie, in both orders.  -> (2, pairs)"""
    # in the swapped order the first response has seat B
    return np.sign([v.forward[k], -v.swapped[k]])


def correlation_interval(r: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation: Fisher's z with the variance (1 + r^2/2) / (n - 3) (Bonett & Wright 2000); NaN for n < 4."""
    if n < 4 or math.isnan(r):
        return math.nan, math.nan
    if abs(r) >= 1:
        return r, r
    half = Z * math.sqrt((1 + r * r / 2) / (n - 3))
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def mean_interval(name: str, values: Array) -> dict[str, float]:
    """The mean of the known values and mean +- z sd / sqrt(n), as `name`, `name_low` and `name_high`; no interval where all are equal."""
    known = without_nan(values)
    spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    mean, half = mean_of_known(known), Z * spread / math.sqrt(len(known)) if spread else math.nan
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def rate_with_interval(name: str, outcomes: Array) -> dict[str, float]:
    """The mean of the known outcomes, each in [0, 1], and its Wilson interval, as `name`, `name_low` and `name_high`."""
    known = without_nan(outcomes)
    low, high = wilson(float(known.sum()), len(known))
    return {name: mean_of_known(known), f"{name}_low": low, f"{name}_high": high}


def without_nan(values: Array) -> Array:
    return values[~np.isnan(values)]


def mean_of_known(values: Array) -> float:
    known = without_nan(values)
    return float(known.mean()) if known.size else math.nan


def quantile(values: Array, q: float) -> float:
    return float(np.quantile(values, q)) if values.size else math.nan
