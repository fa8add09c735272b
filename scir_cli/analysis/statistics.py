"""Log-odds -> agreement and statistics, as pure functions of arrays (numpy and pyarrow only).

These are the figures that METHOD 6 requires.

    log_odds           (models, pairs) nats, positive: first better, 0: a tie, NaN: no verdict
    forward, swapped   (models, pairs) the same, with first, then with second, in seat A;
                       NaN: the model has no seats
    gold               (pairs,) +1 first better, -1 second better, NaN unlabeled

Swapping first and second negates log_odds, gold and length difference, makes forward -swapped and
swapped -forward, and changes no statistic.
A missing verdict is left out of a statistic and lowers its count: it is never a tie, a disagreement
or a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scir_cli.analysis.verdicts import Array, Verdicts

# tau of METHOD 3 [ours]: 0.5 requires nothing beyond equal signs.
MIN_CONFIDENCE = 0.5
# The 97.5 % quantile of a standard normal: half the width of a 95 % interval.
Z = 1.959964
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Whether some models agree on each pair.

    Every field is (pairs,), NaN if one of the models has no verdict.
    """

    # 1.0 or 0.0
    agree: Array
    # Smallest |log-odds|, nats.
    margin: Array
    # Mean log-odds, nats.
    mean: Array
    # Largest less smallest log-odds, nats.
    spread: Array


# Agreement


def agreement(log_odds: Array, min_confidence: float = MIN_CONFIDENCE) -> Agreement:
    """Agreement of all models on each pair; a tie never agrees, and no verdict is NaN.

    m = 1[all a_i have one sign] 1[min_i max(p_i, 1-p_i) >= tau]  (METHOD 3)

    log_odds: (models, pairs) nats.
    """
    if not len(log_odds):
        log_odds = np.full((1, log_odds.shape[1]), np.nan)

    sign = np.sign(log_odds)
    same_sign = (sign == sign[0]).all(0)
    not_a_tie = sign[0] != 0
    # min and max propagate NaN.
    margin = np.abs(log_odds).min(0)
    confident = confidence_of(margin) >= min_confidence

    agree = same_sign & not_a_tie & confident
    return Agreement(
        agree=np.where(np.isnan(margin), np.nan, agree),
        margin=margin,
        mean=log_odds.mean(0),
        spread=log_odds.max(0) - log_odds.min(0),
    )


def confidence_of(log_odds: Array) -> Array:
    """Probability of the preferred side, max(p, 1-p) = sigmoid(|a|).

    log_odds: (...) nats.
    -> (...) in [1/2, 1], NaN for no verdict
    """
    size = np.abs(log_odds)
    return 1 / (1 + np.exp(-size))


def entropy(log_odds: Array) -> Array:
    """Entropy of sigmoid(a), nats; NaN for no verdict.

    H = softplus(a) - a sigmoid(a), computed for |a|, since H is even.

    log_odds: (...) nats.
    -> (...)
    """
    size = np.abs(log_odds)
    # softplus(|a|) - |a|
    excess = np.log1p(np.exp(-size))
    p_other_side = 1 - confidence_of(size)
    return excess + size * p_other_side


def cohen_kappa(a: Array, b: Array) -> float:
    """Cohen's kappa of the signs of a and b over pairs on which both have a verdict.

    kappa = (p_o - p_e) / (1 - p_e), p_e = sum_k P(a = k) P(b = k)  (Cohen 1960)
    A tie is a third category. NaN if undefined.

    a, b: (pairs,)
    """
    kappa, _, _ = kappa_interval(a, b)
    return kappa


def kappa_interval(a: Array, b: Array) -> tuple[float, float, float]:
    """`cohen_kappa` with the low and the high end of its 95 % interval.

    The ends are those of the Wilson interval of p_o, with p_e fixed [ours].
    The interval therefore never has width 0, even at p_o = 1.

    a, b: (pairs,)
    """
    a, b = known_in_both(np.sign(a), np.sign(b))
    n = len(a)
    undefined = (math.nan, math.nan, math.nan)
    if not n:
        return undefined

    chance = 0.0
    for category in (-1, 0, 1):
        share_of_a = (a == category).mean()
        share_of_b = (b == category).mean()
        chance += share_of_a * share_of_b
    if chance == 1:
        return undefined

    observed = float((a == b).mean())
    low, high = wilson(observed * n, n)

    def kappa(p: float) -> float:
        """Kappa for the observed agreement p."""
        return float((p - chance) / (1 - chance))

    return kappa(observed), kappa(low), kappa(high)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation over pairs on which neither is NaN; NaN if one side is constant.

    Ties share their average rank.

    a, b: (pairs,)
    """
    known_a, known_b = known_in_both(a, b)
    ranks_a = _centered_ranks(known_a)
    ranks_b = _centered_ranks(known_b)
    scale = math.sqrt((ranks_a @ ranks_a) * (ranks_b @ ranks_b))
    return float(ranks_a @ ranks_b) / scale if scale else math.nan


def _centered_ranks(values: Array) -> Array:
    """Ranks 1..n, ties averaged, less their mean (n + 1) / 2.

    values: (n,)
    -> (n,)
    """
    n = len(values)
    order = np.argsort(values)
    values = values[order]

    # The end of each run of equal values, exclusive.
    is_last = np.append(values[1:] != values[:-1], True)[:n]
    ends = np.flatnonzero(is_last) + 1
    counts = np.diff(ends, prepend=0)

    rank_of_run = ends - (counts - 1) / 2 - (n + 1) / 2
    ranks = np.empty(n)
    ranks[order] = np.repeat(rank_of_run, counts)
    return ranks


def known_in_both(a: Array, b: Array) -> tuple[Array, Array]:
    """The values of a and b at the indices at which neither is NaN.

    a, b: (pairs,)
    -> (known,) each
    """
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known]


# Calibration and selection by confidence


def calibration_error(log_odds: Array, correct: Array, bins: int = 10) -> float:
    """Expected calibration error of max(p, 1-p) in equal bins over [1/2, 1].

    ECE = sum_b n_b/n |accuracy_b - confidence_b|  (Guo et al. 2017)
    NaN if no pair has both a verdict and a label.

    log_odds: (pairs,) nats.
    correct: (pairs,) 1, 0, 1/2 for a tie, NaN unlabeled.
    """
    confidence, correct = known_in_both(confidence_of(log_odds), correct)
    if not len(correct):
        return math.nan
    # (bins,) n_b (accuracy_b - confidence_b)
    gaps = np.bincount(_bins(confidence, bins), correct - confidence)
    return float(np.abs(gaps).sum() / len(correct))


def _bins(confidence: Array, bins: int) -> NDArray[np.intp]:
    """The bin of each confidence in [1/2, 1]; 1 is in the last bin.

    confidence: (pairs,)
    -> (pairs,)
    """
    bin_of = ((confidence - 0.5) * 2 * bins).astype(int)
    return np.minimum(bin_of, bins - 1)


def reliability(log_odds: Array, correct: Array, bins: int = 10) -> list[dict[str, Any]]:
    """Mean confidence and accuracy in each bin of `calibration_error` that holds a pair.

    Accuracy has its Wilson interval. Shapes are those of `calibration_error`.
    """
    confidence, correct = known_in_both(confidence_of(log_odds), correct)
    bin_of = _bins(confidence, bins)
    rows = []
    for b in np.unique(bin_of):
        inside = bin_of == b
        row = {
            "pairs": int(inside.sum()),
            "confidence": mean_of_known(confidence[inside]),
            **rate_with_interval("accuracy", correct[inside]),
        }
        rows.append(row)
    return rows


def risk_coverage(confidence: Array, correct: Array, points: int = 20) -> list[dict[str, Any]]:
    """Accuracy on the most confident pairs against their share of the labeled pairs.

    It shows the gain of selection by confidence (El-Yaniv & Wiener 2010).
    Pairs of equal confidence enter together, so the order of the rows does not matter.
    The last point covers every pair that can be covered. Without labeled pairs there are no points.

    confidence: (pairs,) NaN: not covered.
    correct: (pairs,) as in `calibration_error`.
    """
    labeled = ~np.isnan(correct)
    n_labeled = int(labeled.sum())
    confidence, correct = known_in_both(confidence[labeled], correct[labeled])

    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    hits = np.cumsum(correct[order])

    curve = []
    for end in _curve_ends(confidence, n_labeled, points):
        n_covered = int(end) + 1
        low, high = wilson(float(hits[end]), n_covered)
        point = {
            "coverage": (end + 1) / n_labeled,
            "pairs": n_covered,
            "confidence": float(confidence[end]),
            "accuracy": float(hits[end]) / (end + 1),
            "accuracy_low": low,
            "accuracy_high": high,
        }
        curve.append(point)
    return curve


def _curve_ends(confidence: Array, n_labeled: int, points: int) -> NDArray[np.intp]:
    """The index of the last covered pair at each of up to `points` equal steps of coverage.

    An index is always the last of its run of equal confidences.

    confidence: (covered,) in descending order.
    """
    if not len(confidence):
        return np.empty(0, np.intp)
    is_last = np.append(np.diff(confidence) != 0, True)
    ends = np.flatnonzero(is_last)

    steps = np.arange(1, points + 1)
    wanted = np.ceil(n_labeled * steps / points) - 1
    nearest = np.searchsorted(ends, wanted)
    # Coverage ends before 100 % if some labeled pairs have no confidence.
    chosen = np.minimum(nearest, len(ends) - 1)
    return np.unique(ends[chosen])


def seat_signs(v: Verdicts, k: int) -> Array:
    """+1 if model k prefers seat A, -1 seat B, 0 a tie, in both orders.

    -> (2, pairs)
    """
    forward = v.forward[k]
    # In the swapped order the first response has seat B.
    swapped = -v.swapped[k]
    return np.sign([forward, swapped])


# Intervals and means


def wilson(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a rate with `successes` of `n`; NaN for n = 0.  (Wilson 1927)

    z: the normal quantile of the interval, 95 % by default.
    """
    if not n:
        return math.nan, math.nan
    rate = successes / n
    shrink = 1 + z * z / n
    center = rate + z * z / (2 * n)
    sampling = rate * (1 - rate) / n
    correction = z * z / (4 * n * n)
    half = z * math.sqrt(sampling + correction)
    low = max(0.0, (center - half) / shrink)
    high = min(1.0, (center + half) / shrink)
    return low, high


def correlation_interval(r: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation r over n pairs; NaN for n < 4.

    Fisher's z with the variance (1 + r^2/2) / (n - 3)  (Bonett & Wright 2000)
    """
    if n < 4 or math.isnan(r):
        return math.nan, math.nan
    if abs(r) >= 1:
        return r, r
    variance = (1 + r * r / 2) / (n - 3)
    half = Z * math.sqrt(variance)
    z = math.atanh(r)
    return math.tanh(z - half), math.tanh(z + half)


def mean_interval(name: str, values: Array) -> dict[str, float]:
    """The mean of the known values and its 95 % interval, mean +- z sd / sqrt(n).

    The keys are `name`, `name_low` and `name_high`.
    The ends are NaN if all values are equal.

    values: (n,)
    """
    known = without_nan(values)
    n = len(known)
    mean = mean_of_known(known)
    spread = float(known.std(ddof=1)) if n > 1 else 0.0
    half = Z * spread / math.sqrt(n) if spread else math.nan
    return {
        name: mean,
        f"{name}_low": mean - half,
        f"{name}_high": mean + half,
    }


def rate_with_interval(name: str, outcomes: Array) -> dict[str, float]:
    """The mean of the known outcomes, each in [0, 1], and its Wilson interval.

    The keys are `name`, `name_low` and `name_high`.

    outcomes: (n,)
    """
    known = without_nan(outcomes)
    low, high = wilson(float(known.sum()), len(known))
    return {
        name: mean_of_known(known),
        f"{name}_low": low,
        f"{name}_high": high,
    }


def without_nan(values: Array) -> Array:
    """The values that are not NaN.

    values: (n,)
    -> (known,)
    """
    known = ~np.isnan(values)
    return values[known]


def mean_of_known(values: Array) -> float:
    """The mean of the values that are not NaN; NaN if there are none.

    values: (n,)
    """
    known = without_nan(values)
    return float(known.mean()) if known.size else math.nan


def quantile(values: Array, q: float) -> float:
    """The q-quantile of the values; NaN without values.

    values: (n,)
    """
    return float(np.quantile(values, q)) if values.size else math.nan
