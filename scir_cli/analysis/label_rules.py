"""What a label rule adds to log-odds before they become labels, as pure functions of arrays (numpy only).

log_odds   (pairs,) nats, positive: first better, 0: a tie, NaN: no verdict
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def length_neutral(log_odds: Array, length_difference: Array) -> tuple[Array, float]:
    """Log-odds less alpha per token of length difference, and alpha >= 0 such that chosen and rejected are equally long on average.

    DICE (arXiv 2406.09760) searches the alpha with the least |E[ len(y_w) - len(y_l) ]|. That mean, E[ sign(a - alpha d) d ], only falls with alpha and
    jumps at a/d: the alpha that takes it to 0 is the median of a/d with weights |d|.  length_difference: (pairs,) d, tokens, first less second
    """
    known = ~np.isnan(log_odds) & (length_difference != 0)
    a, d = log_odds[known], length_difference[known]
    if not len(a):
        return log_odds, 0.0
    order = np.argsort(a / d)
    passed = np.cumsum(np.abs(d)[order])
    alpha = max(0.0, float((a / d)[order][np.searchsorted(passed, passed[-1] / 2)]))
    return log_odds - alpha * length_difference, alpha


def rank_consistency(
    now: Array, before: Array, prompts: Sequence[str] | NDArray[np.uint64], average: bool = True
) -> Array:
    """How alike two models rank the answers of a prompt: CREAM's consistency rate of each pair (arXiv 2410.12735), NaN where neither can say.

    tau = mean over a prompt's pairs of sign(a_t) sign(a_{t-1}): Kendall's, when all pairs of its answers are there.  C = (tau + 1) / 2, for each prompt or
    averaged over prompts.  now, before: (pairs,); prompts: the prompt of each pair, a name or a number -> (pairs,)
    """
    same = np.sign(now) * np.sign(before)
    _, first, code = np.unique(prompts, return_index=True, return_inverse=True)
    known = np.bincount(code, ~np.isnan(same))
    tau = np.divide(
        np.bincount(code, np.nan_to_num(same)),
        known,
        out=np.full(len(known), np.nan),
        where=known > 0,
    )
    rates = (tau + 1) / 2  # (prompts,)
    if not average:
        return rates[code]
    in_order = rates[np.argsort(first)]
    in_order = in_order[~np.isnan(in_order)]
    return np.full(len(same), in_order.mean() if len(in_order) else np.nan)
