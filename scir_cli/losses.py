"""Log-odds -> losses. Pure functions; each equation stands beside its line.

Shapes: log_odds (models, pairs), nats, positive when the first response is better. Standing of each form: docs/method.md.
Source: SCIR, arXiv 2502.08922 (penalty, dynamic mask); DPO, arXiv 2305.18290 (preference loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(log_odds: Tensor) -> Tensor:
    """Entropy in nats of the preference sigmoid(a).  H(sigmoid(a)) = softplus(a) - a sigmoid(a); (...) -> (...)"""
    return F.softplus(log_odds) - log_odds * torch.sigmoid(log_odds)


def symmetric_kl(log_odds: Tensor) -> Tensor:
    """Inconsistency of each pair, nats.  L_sym = mean_{i<j} 1/2 [KL(p_i||p_j) + KL(p_j||p_i)] = mean_{i<j} 1/2 (p_i - p_j)(a_i - a_j)

    log_odds: (models, pairs) -> (pairs,)
    """
    p = torch.sigmoid(log_odds)
    terms = [0.5 * (p[i] - p[j]) * (log_odds[i] - log_odds[j]) for i, j in combinations(range(len(log_odds)), 2)]
    return torch.stack(terms).mean(0)


def confidence(log_odds: Tensor, entropy_floor: float = 0.0) -> Tensor:
    """Unconfidence of each pair, nats.  L_conf = mean_i max(H(p_i), floor): no gradient once a verdict is surer than the floor.

    log_odds: (models, pairs) -> (pairs,)
    """
    return entropy(log_odds).clamp(min=entropy_floor).mean(0)


def consistent(log_odds: Tensor, threshold: float = 0.5) -> Tensor:
    """Which pairs all models agree on.  m = 1[all a_i have one sign] 1[min_i max(p_i, 1-p_i) >= tau]; NaN or 0 never agrees.

    log_odds: (models, pairs) -> (pairs,) bool
    """
    sign = log_odds.sign()
    sure = torch.sigmoid(log_odds.abs()) >= threshold  # max(p, 1-p) = sigmoid(|a|)
    return (sign == sign[0]).all(0) & (sign[0] != 0) & sure.all(0)


def dpo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """DPO's loss of each pair.  -log sigmoid( beta [h(y_w) - h(y_l)] ),  h(y) = log pi_theta(y|x) - log pi_ref(y|x)

    log_ratios: (2, pairs) = h of first and second, nats; label: (pairs,) +1 when the first is the better one, else -1 -> (pairs,)
    """
    return -F.logsigmoid(beta * label * (log_ratios[0] - log_ratios[1]))


@dataclass(frozen=True)
class Scir:
    """The terms of SCIR's objective on one step's pairs; `loss` is what is minimised, the others are (pairs,) or scalars to look at."""

    loss: Tensor
    dpo: Tensor  # (pairs,)
    sym: Tensor  # (pairs,)
    conf: Tensor  # (pairs,)
    mask: Tensor  # (pairs,) bool


def scir(
    models: Tensor,  # (K, pairs) log-odds of the internal reward models, with gradient
    voters: Tensor,  # (V, pairs) log-odds that decide agreement
    log_ratios: Tensor,  # (2, pairs) h(first), h(second) against dpo_reference
    *,
    beta: float,
    penalty_weight: float,
    entropy_weight: float,
    confidence_threshold: float = 0.5,
    entropy_floor: float = 0.0,
) -> Scir:
    """SCIR's objective.  L = sum(m L_DPO) / max(1, sum m) + lambda ( mean L_sym + alpha mean L_conf ), label = the agreed sign, detached."""
    voters = voters.detach()
    mask = consistent(voters, confidence_threshold)  # m, (pairs,)
    preference = dpo(log_ratios, voters[0].sign(), beta)  # L_DPO with the agreed label, (pairs,)
    sym, conf = symmetric_kl(models), confidence(models, entropy_floor)
    chosen = torch.where(mask, preference, torch.zeros_like(preference)).sum() / mask.sum().clamp(min=1)
    return Scir(chosen + penalty_weight * (sym.mean() + entropy_weight * conf.mean()), preference, sym, conf, mask)
