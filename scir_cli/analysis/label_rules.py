"""Adjustments of log-odds before they become labels: pure functions of arrays (numpy only).

log_odds   (pairs,) nats, positive: first better, 0: a tie, NaN: no verdict
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def length_neutral(log_odds: Array, length_difference: Array) -> tuple[Array, float]:
    """Log-odds less alpha per token of length difference, and that alpha >= 0.

    alpha makes chosen and rejected equally long on average.
    DICE (arXiv 2406.09760) searches the alpha with the least |E[ len(y_w) - len(y_l) ]|.
    That mean, E[ sign(a - alpha d) d ], only falls with alpha, and jumps at a/d: the alpha at which
    it reaches 0 is the median of a/d with weights |d|.

    log_odds: (pairs,) a, nats.
    length_difference: (pairs,) d, tokens, first less second.
    """
    known = ~np.isnan(log_odds) & (length_difference != 0)
    a = log_odds[known]
    d = length_difference[known]
    if not len(a):
        return log_odds, 0.0

    ratios = a / d
    order = np.argsort(ratios)
    passed = np.cumsum(np.abs(d)[order])
    median = np.searchsorted(passed, passed[-1] / 2)
    alpha = max(0.0, float(ratios[order][median]))
    return log_odds - alpha * length_difference, alpha


def rank_consistency(
    now: Array, before: Array, prompts: Sequence[str] | NDArray[np.uint64], average: bool = True
) -> Array:
    """CREAM's consistency rate of each pair (arXiv 2410.12735).  -> (pairs,)

    tau = mean over a prompt's pairs of sign(a_t) sign(a_{t-1}), which is Kendall's tau if all pairs
    of the prompt's answers are present.
    C = (tau + 1) / 2, for each prompt or averaged over prompts.
    NaN if no pair of the prompt has a verdict of both models.

    now, before: (pairs,) log-odds of the two models, nats.
    prompts: (pairs,) the prompt of each pair, a name or a number.
    """
    same = np.sign(now) * np.sign(before)
    _, first, code = np.unique(prompts, return_index=True, return_inverse=True)

    # (prompts,)
    n_known = np.bincount(code, ~np.isnan(same))
    total = np.bincount(code, np.nan_to_num(same))
    undefined = np.full(len(n_known), np.nan)
    tau = np.divide(total, n_known, out=undefined, where=n_known > 0)
    rates = (tau + 1) / 2
    if not average:
        return rates[code]

    in_order = rates[np.argsort(first)]
    in_order = in_order[~np.isnan(in_order)]
    mean_rate = in_order.mean() if len(in_order) else np.nan
    return np.full(len(same), mean_rate)
