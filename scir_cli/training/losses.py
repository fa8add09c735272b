"""Log-odds -> losses. Pure functions; each equation stands beside its line.

Shapes: log_odds (models, pairs), nats, positive when the first response is better. Standing of each form: docs/method.md.
Source: SCIR, arXiv 2502.08922 (penalty, dynamic mask); DPO, arXiv 2305.18290 (preference loss); the others beside their functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Nats. Below it the entropy term has no gradient: a verdict at P = 0.991 is sure enough, and is not pushed further. What it
#: does was too small to measure (docs/study.md, experiment ablation), so it is no setting.
ENTROPY_FLOOR = 0.05


def entropy(log_odds: Tensor) -> Tensor:
    """Entropy in nats of the preference sigmoid(a).  H(sigmoid(a)) = softplus(a) - a sigmoid(a); (...) -> (...)"""
    return F.softplus(log_odds) - log_odds * torch.sigmoid(log_odds)


def symmetric_kl(log_odds: Tensor) -> Tensor:
    """Inconsistency of each pair, nats.  L_sym = mean_{i<j} 1/2 [KL(p_i||p_j) + KL(p_j||p_i)] = mean_{i<j} 1/2 (p_i - p_j)(a_i - a_j)

    log_odds: (models, pairs) -> (pairs,)
    """
    p = torch.sigmoid(log_odds)
    terms = [
        0.5 * (p[i] - p[j]) * (log_odds[i] - log_odds[j])
        for i, j in combinations(range(len(log_odds)), 2)
    ]
    return torch.stack(terms).mean(0)


def matching_scale(judge: Tensor, implicit: Tensor) -> float:
    """s with which the implicit log-odds have the judge's median size.  s = median |a_judge| / median |a_implicit|, 1 where undefined

    judge: (any number of models, pairs), implicit: (pairs,), nats; NaN is left out.
    """
    sizes = [float(a.detach().abs().flatten().nanmedian()) for a in (judge, implicit)]
    return sizes[0] / sizes[1] if sizes[0] > 0 and sizes[1] > 0 else 1.0


def confidence(log_odds: Tensor) -> Tensor:
    """Unconfidence of each pair, nats.  L_conf = mean_i max(H(p_i), ENTROPY_FLOOR)

    log_odds: (models, pairs) -> (pairs,)
    """
    return entropy(log_odds).clamp(min=ENTROPY_FLOOR).mean(0)


def consistent(log_odds: Tensor, threshold: float = 0.5) -> Tensor:
    """Which pairs all models agree on.  m = 1[all a_i have one sign] 1[min_i max(p_i, 1-p_i) >= tau]; NaN or 0 never agrees.

    log_odds: (models, pairs) -> (pairs,) bool
    """
    sign = log_odds.sign()
    sure = torch.sigmoid(log_odds.abs()) >= threshold  # max(p, 1-p) = sigmoid(|a|)
    return (sign == sign[0]).all(0) & (sign[0] != 0) & sure.all(0)


# Preference losses.  rewards: (2, pairs) of first and second; label: (pairs,) +1 when the first is the better one, else -1 -> (pairs,)


def dpo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """DPO's loss of each pair.  -log sigmoid( beta [h(y_w) - h(y_l)] ),  h(y) = log pi_theta(y|x) - log pi_ref(y|x)

    log_ratios: (2, pairs) = h of first and second, nats; label: (pairs,) +1 when the first is the better one, else -1 -> (pairs,)
    """
    return -F.logsigmoid(beta * label * (log_ratios[0] - log_ratios[1]))


def ipo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """IPO's loss (arXiv 2310.12036, eq. 17; its tau is beta).  ( h(y_w) - h(y_l) - 1/(2 beta) )^2"""
    return (label * (log_ratios[0] - log_ratios[1]) - 1 / (2 * beta)).square()


def sppo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """SPPO's loss for a sure label (arXiv 2405.00675, eq. 4.7; its eta is 1/beta).  ( h(y_w) - 1/(2 beta) )^2 + ( h(y_l) + 1/(2 beta) )^2

    A label that is right with probability C (`hedged`) has the gradient of SPPO's own target (C - 1/2) / beta.
    """
    target = label / (2 * beta)
    return (log_ratios[0] - target).square() + (log_ratios[1] + target).square()


def simpo(mean_logps: Tensor, label: Tensor, beta: float, target_margin: float = 0.0) -> Tensor:
    """SimPO's loss, without a reference (arXiv 2405.14734, eq. 6; target_margin is gamma).

    -log sigmoid( beta [log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|] - gamma );  mean_logps: (2, pairs), nats a token
    """
    return -F.logsigmoid(beta * label * (mean_logps[0] - mean_logps[1]) - target_margin)


def hedged(loss: Callable[[Tensor], Tensor], label: Tensor, label_probability: Tensor) -> Tensor:
    """A preference loss under labels that are right with probability C.  C l(label) + (1 - C) l(-label): CREAM's loss (arXiv 2410.12735)

    loss: label (pairs,) -> (pairs,); label_probability: (pairs,) C, 1 for a sure label.
    """
    return label_probability * loss(label) + (1 - label_probability) * loss(-label)


@dataclass(frozen=True)
class Scir:
    """The terms of SCIR's objective on one step's pairs; `loss` is what is minimised, the others are (pairs,) or scalars to look at."""

    loss: Tensor
    agreed: Tensor  # its first term: mean preference loss of the pairs in the mask
    inconsistency: Tensor  # its second, before lambda
    preference: Tensor  # (pairs,)
    sym: Tensor  # (pairs,)
    conf: Tensor  # (pairs,)
    mask: Tensor  # (pairs,) bool
    label: Tensor  # (pairs,) +1 or -1: what the mask agrees on, where it does


def scir(
    models: Tensor,  # (K, pairs) log-odds of the internal reward models, with gradient
    voters: Tensor,  # (V, pairs) log-odds of the reward models that must agree
    preference: Callable[
        [Tensor], Tensor
    ],  # loss of each pair under a label of +1 or -1, (pairs,) -> (pairs,)
    *,
    penalty_weight: float,
    entropy_weight: float,
    min_confidence: float = 0.5,
) -> Scir:
    """SCIR's objective.  L = sum(m L_pref) / max(1, sum m) + lambda ( mean L_sym + alpha mean L_conf ), label = the agreed sign, detached."""
    voters = voters.detach()
    mask = consistent(voters, min_confidence)  # m, (pairs,)
    label = voters[0].sign()  # the agreed one, where the mask is on, (pairs,)
    preferred = preference(label)  # L_DPO with it, (pairs,)
    sym = symmetric_kl(models)
    conf = confidence(models)
    agreed = torch.where(mask, preferred, torch.zeros_like(preferred)).sum() / mask.sum().clamp(
        min=1
    )
    inconsistency = sym.mean() + entropy_weight * conf.mean()
    return Scir(
        agreed + penalty_weight * inconsistency,
        agreed,
        inconsistency,
        preferred,
        sym,
        conf,
        mask,
        label,
    )


def one_sided(orders: Tensor, probability: Tensor) -> Tensor:
    """Cross entropy of a judge's verdicts against soft labels, mean of its orders, nats.

    H(t, p) = -t log p - (1 - t) log(1 - p) = softplus(a) - t a,  p = sigmoid(a),  dH/da = p - t

    The label has no gradient: the judge moves towards the consensus, and the consensus towards nobody.

    orders: (orders, pairs) log-odds;  probability: (pairs,) t, that first is better -> (pairs,)
    """
    return (F.softplus(orders) - probability.detach() * orders).mean(0)
