"""Branch log-probabilities -> log-odds: the equations of the internal reward models.

    a = log P(first better) - log P(second better), nats
    P(first better) = sigmoid(a);  exchanging the responses negates a

Every tensor has the pairs along its last axis, and gradients flow through every function.
Judge and rationale share `average_orders`; models with one reward per response share `difference`.
See docs/method.md, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardOutput:
    """Log-odds of each pair that first is better, with their parts."""

    #: (pairs,) nats
    log_odds: Tensor
    #: (2, pairs) nats; first in seat A, then second in seat A; positive: first is better.
    #: None for models that do not compare the responses as A and B.
    orders: Tensor | None = None
    #: (pairs,) probability of all verdict tokens together, mean over the prompts of the pair
    verdict_mass: Tensor | None = None


def average_orders(verdict_logps: Tensor) -> RewardOutput:
    """Log-odds of a pairwise judge from log P(A) and log P(B) in both orders.

    a = 1/2 [l(y1, y2) - l(y2, y1)],  l = log P(A) - log P(B)
    A constant preference for a seat cancels exactly.

    verdict_logps: (2 orders, 2 tokens, pairs), nats
    """
    # Log-odds for seat A in each order, (pairs,)
    forward, swapped = verdict_logps[:, 0] - verdict_logps[:, 1]
    # Log-odds for first, which has the other seat in the second order: (2, pairs)
    orders = torch.stack([forward, -swapped])
    mass = verdict_logps.exp().sum(1).mean(0)
    return RewardOutput(0.5 * (orders[0] + orders[1]), orders, mass)


def expected_score(score_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Expected additive score, and the probability of all score tokens together.

    score_logps: (scores, ...) of the scores 0, 1, 2 …, nats -> (...), (...)
    """
    values = torch.arange(len(score_logps), dtype=score_logps.dtype, device=score_logps.device)
    expected = torch.einsum("s,s...->...", values, score_logps.softmax(0))
    mass = score_logps.exp().sum(0)
    return expected, mass


def difference(rewards: Tensor, scale: float) -> RewardOutput:
    """Log-odds from one reward per response (Bradley-Terry): scale * (r(y1) - r(y2)).

    rewards: (2, pairs)
    """
    return RewardOutput(scale * (rewards[0] - rewards[1]))
