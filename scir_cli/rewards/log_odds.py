"""Branch log-probabilities -> log-odds, one pure function per reward model (docs/method.md, 2).

    a = log P(first better) - log P(second better), nats.  P(first better) = sigmoid(a).

Swapping the responses of a pair negates a.
Every tensor here has pairs along its last axis, and gradients flow through every function.
The two generative models that compare (judge, rationale) share `average_orders`.
The models that subtract one number per response from another share `difference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardOutput:
    """Log-odds of one reward model for each pair.

    `orders` is None for models that do not seat the responses as A and B.
    """

    # (pairs,) nats
    log_odds: Tensor
    # (2, pairs) nats, read with first, then with second, in seat A; positive: first better, in both
    orders: Tensor | None = None
    # (pairs,) probability on the verdict tokens, mean over the prompts of the pair
    verdict_mass: Tensor | None = None

    def where(self, decided: Tensor) -> RewardOutput:
        """This output, with log-odds NaN for the other pairs.  decided: (pairs,) bool"""
        log_odds = self.log_odds.masked_fill(~decided, torch.nan)
        orders = self.orders
        if orders is not None:
            orders = orders.masked_fill(~decided, torch.nan)
        return RewardOutput(log_odds, orders, self.verdict_mass)


def average_orders(verdict_logps: Tensor) -> RewardOutput:
    """Log-odds of a pairwise judge from log P(A), log P(B) in both orders.

    verdict_logps: (2 orders, 2 tokens, pairs), nats.

    a = 1/2 [l(y1,y2) - l(y2,y1)],  l = log P(A) - log P(B).
    A constant preference for a seat cancels exactly.
    """
    # log-odds for seat A in each order, (pairs,)
    forward, swapped = verdict_logps[:, 0] - verdict_logps[:, 1]
    # log-odds for first, which has the other seat in the second order, (2, pairs)
    orders = torch.stack([forward, -swapped])
    # (pairs,)
    mass = verdict_logps.exp().sum(1).mean(0)
    return RewardOutput(0.5 * (orders[0] + orders[1]), orders, mass)


def expected_score(score_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Expected additive score, and the probability mass on the score tokens.

    score_logps: (scores, ...) log-probabilities of the scores 0, 1, 2 …, nats -> (...), (...)
    """
    values = torch.arange(
        len(score_logps),
        dtype=score_logps.dtype,
        device=score_logps.device,
    )
    expected = torch.einsum("s,s...->...", values, score_logps.softmax(0))
    mass = score_logps.exp().sum(0)
    return expected, mass


def difference(rewards: Tensor, scale: float = 1.0) -> RewardOutput:
    """Log-odds from one reward per response (Bradley-Terry).

    rewards: (2, pairs) -> a = scale * (r(y1) - r(y2)), (pairs,) nats
    """
    return RewardOutput(scale * (rewards[0] - rewards[1]))
