"""Branch log-probabilities -> log-odds, one pure function per internal reward model (METHOD 2 in docs/method.md).

    a = log P(first better) - log P(second better), nats.  Swapping the pair negates a.  P(first better) = sigmoid(a).

Every tensor here has pairs along its last axis; gradients flow through all of it. The two generative models that compare (judge, rationale)
share `two_orders`; the three that are a difference of one number per response share `difference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardOutput:
    """What a reward model says of each pair; `orders` is None for models that do not seat the responses as A and B."""

    log_odds: Tensor  # (pairs,) nats
    # (2, pairs) nats, read with first, then with second, in seat A; positive: first better, in both
    orders: Tensor | None = None
    verdict_mass: Tensor | None = (
        None  # (pairs,) probability on the verdict tokens, mean over what was asked
    )


def average_orders(verdict_logps: Tensor) -> RewardOutput:
    """Log-odds of a pairwise judge from log P(A), log P(B) in both orders.  verdict_logps: (2 orders, 2 tokens, pairs), nats

    a = 1/2 [l(y1,y2) - l(y2,y1)],  l = log P(A) - log P(B): a constant preference for a seat cancels exactly.
    """
    # log-odds for seat A in each order, (pairs,)
    forward, swapped = verdict_logps[:, 0] - verdict_logps[:, 1]
    # log-odds for first, which has the other seat in the second order, (2, pairs)
    orders = torch.stack([forward, -swapped])
    mass = verdict_logps.exp().sum(1).mean(0)  # (pairs,)
    return RewardOutput(0.5 * (orders[0] + orders[1]), orders, mass)


def expected_score(score_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Expected additive score and the mass on score tokens.  score_logps: (scores, ...) of 0, 1, 2 …, nats -> (...), (...)"""
    values = torch.arange(len(score_logps), dtype=score_logps.dtype, device=score_logps.device)
    return torch.einsum("s,s...->...", values, score_logps.softmax(0)), score_logps.exp().sum(0)


def difference(rewards: Tensor, scale: float) -> RewardOutput:
    """Log-odds from one reward per response (Bradley-Terry).  rewards: (2, pairs) -> a = scale * (r(y1) - r(y2))"""
    return RewardOutput(scale * (rewards[0] - rewards[1]))
