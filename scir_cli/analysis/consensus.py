"""Several reward models -> one log-odds and a soft label per pair (numpy only).

A logarithmic opinion pool, and its temperature fitted to labeled pairs.

log_odds   (voters, pairs) nats, positive: first better, 0: a tie, NaN: no verdict
gold       (pairs,) +1 first better, -1 second better, NaN unlabeled

Pool: Genest & Zidek 1986, doi 10.1214/ss/1177013825.
Temperature: Guo et al. 2017, arXiv 1706.04599.
Swapping first and second negates log-odds, pooled log-odds and gold; temperatures stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from scir_cli.analysis.statistics import Z, wilson
from scir_cli.analysis.verdicts import Array

#: Labeled pairs with a verdict, at the least, for a temperature [ours]
MIN_CALIBRATION_PAIRS = 20

#: Newton steps; the bracket halves wherever one leaves it, so this is far more than needed.
MAX_NEWTON_STEPS = 100

#: A temperature's interval spans at most exp of twice this.
LARGEST_LOG_SPREAD = 100.0


class CalibrationError(Exception):
    """No temperature can be fitted to these pairs; the message is the reason."""


def sizes(log_odds: Array) -> Array:
    """Median |a| of each voter, nats, without zeros and missing verdicts.

    NaN if nothing is left.  log_odds: (voters, pairs) -> (voters,)
    """
    found = []
    for row in np.abs(log_odds):
        known = row[row > 0]
        found.append(float(np.median(known)) if len(known) else math.nan)
    return np.array(found)


def pool(log_odds: Array, voter_sizes: Array, weights: Array | None = None) -> Array:
    """Pooled log-odds of each pair, in the nats of the first voter.

    z = m_1 sum_k w_k a_k / m_k,  m_k: size of voter k,  sum_k w_k = 1.

    log_odds: (voters, pairs), voter_sizes: (voters,)
    weights: (voters,) of any sum; equal by default
    -> (pairs,), NaN if one voter has no verdict
    """
    if weights is None:
        weights = np.ones(len(log_odds))
    shares = weights / weights.sum()
    factors = shares * voter_sizes[0] / voter_sizes
    pooled: Array = factors @ log_odds
    return pooled


def label_probability(pooled: Array, temperature: float = 1.0) -> Array:
    """Probability that first is better.  p = sigmoid(z / T)

    pooled: (pairs,) nats -> (pairs,), NaN for no verdict
    """
    size = np.exp(-np.abs(pooled) / temperature)
    probability: Array = np.where(pooled >= 0, 1.0, size) / (1 + size)
    return probability


def calibrated_weights(log_odds: Array, gold: Array) -> Array:
    """Weights of the voters for `pool`, from labeled pairs.

    w_k = m_k / T_k, so that the pool is the sum of the calibrated log-odds a_k / T_k: Bayes' rule
    for voters whose errors are independent. T_k is fitted with two more pairs of size m_k, one
    labeled correctly and one not (Laplace's rule), so it exists for a voter without errors too.
    A voter that is no better than chance has weight 0.

    log_odds: (voters, pairs) nats, gold: (pairs,) -> (voters,)
    Raises CalibrationError for too few labeled pairs, or if every voter has weight 0.
    """
    weights = []
    for size, row in zip(sizes(log_odds), log_odds, strict=True):
        x = row * gold
        x = np.append(x[np.isfinite(x) & (x != 0)], [size, -size])
        _check_enough(len(x) - 2)
        weights.append(float(size * _newton(x)) if _better_than_chance(x) else 0.0)
    if not any(weights):
        raise CalibrationError(f"no voter is better than chance on the {len(gold)} labeled pairs")
    return np.array(weights)


@dataclass(frozen=True)
class Calibration:
    """A temperature, the ends of its 95 % interval, and what it was fitted to."""

    temperature: float
    low: float
    high: float
    pairs: int  # labeled, with a verdict that is no tie
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    nll: float  # mean negative log-likelihood of the gold labels at the temperature, nats
    nll_uncalibrated: float  # the same at temperature 1


def fit_temperature(pooled: Array, gold: Array) -> Calibration:
    """Maximum-likelihood temperature of p = sigmoid(z / T) for labeled pairs.

    Raises CalibrationError if there is none.

    With b = 1 / T and x = gold z, the negative log-likelihood  sum softplus(-b x)  is convex in b;
    Newton's method, bracketed. The interval is that of log T, from the curvature at the optimum:
    T exp(+-1.96 / (b sqrt(sum x^2 p (1 - p)))).
    It assumes independent pairs; pairs of one prompt are not quite.

    pooled: (pairs,) nats;  gold: (pairs,)
    """
    x = pooled * gold
    x = x[np.isfinite(x) & (x != 0)]
    _check_enough(len(x))
    if (x > 0).all():
        raise CalibrationError(
            f"all {len(x)} labeled pairs are labeled correctly (separable), "
            "so that every lower temperature fits better"
        )
    if not _better_than_chance(x):
        raise CalibrationError(
            f"the pooled log-odds are no better than chance on the {len(x)} labeled pairs "
            f"(accuracy {(x > 0).mean():.3f})"
        )
    inverse = _newton(x)
    wrong = label_probability(-x, 1 / inverse)
    curvature = float((x * x * wrong * (1 - wrong)).sum())
    # Near chance the interval is as good as endless; the bound keeps it finite.
    spread = math.exp(min(Z / (inverse * math.sqrt(curvature)), LARGEST_LOG_SPREAD))
    right = int((x > 0).sum())
    low, high = wilson(right, len(x))
    return Calibration(
        temperature=1 / inverse,
        low=1 / (inverse * spread),
        high=spread / inverse,
        pairs=len(x),
        accuracy=right / len(x),
        accuracy_low=low,
        accuracy_high=high,
        nll=float(np.logaddexp(0, -inverse * x).mean()),
        nll_uncalibrated=float(np.logaddexp(0, -x).mean()),
    )


def _check_enough(n_pairs: int) -> None:
    if n_pairs < MIN_CALIBRATION_PAIRS:
        raise CalibrationError(
            f"{n_pairs} labeled pairs have a verdict, and a temperature needs at least "
            f"{MIN_CALIBRATION_PAIRS}"
        )


def _better_than_chance(x: Array) -> bool:
    """Whether sum x is above 0 by more than rounding.  x: (pairs,) log-odds for the gold label"""
    return bool(x.sum() > 1e-12 * np.abs(x).sum())


def _newton(x: Array) -> float:
    """The b > 0 at which  sum x sigmoid(-b x)  is 0.  x: (pairs,)

    The sum falls in b: above 0 at b = 0, below 0 at last.
    """
    low, high = 0.0, math.inf
    b = 1 / float(np.abs(x).mean())
    for _ in range(MAX_NEWTON_STEPS):
        wrong = label_probability(-x, 1 / b)
        slope = float(x @ wrong)
        if slope > 0:
            low = b
        else:
            high = b
        step = slope / float((x * x * wrong * (1 - wrong)).sum() or math.inf)
        after = b + step
        if not low < after < high:
            after = (low + high) / 2 if math.isfinite(high) else 2 * b
        if abs(after - b) <= 1e-12 * b:
            return after
        b = after
    return b


def correlations(log_odds: Array) -> dict[tuple[int, int], float]:
    """Correlation about 0 of each two voters, by their places.

    Over the pairs on which both have a verdict; NaN if one is 0 everywhere.
    """
    found = {}
    for i, j in combinations(range(len(log_odds)), 2):
        both = ~np.isnan(log_odds[i] + log_odds[j])
        a, b = log_odds[i][both], log_odds[j][both]
        # About 0 and not about the mean: swapping a pair negates both and must not change it.
        scale = math.sqrt(float(a @ a) * float(b @ b))
        found[i, j] = float(a @ b) / scale if scale else math.nan
    return found


def is_constant(log_odds: Array) -> bool:
    """Whether a voter has one value on all its pairs, and has more than one pair.  (pairs,)"""
    known = log_odds[~np.isnan(log_odds)]
    return len(known) > 1 and bool(np.ptp(known) == 0)
