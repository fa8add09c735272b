"""Log-odds -> losses. Pure functions; each equation stands beside its line.

Symbols, as in docs/method.md:

    a_i    log-odds of reward model i that the first response is better, nats
    p_i    sigmoid(a_i), the probability that the first response is better
    m      1 if all masking models agree on the pair, else 0
    h(y)   log pi_theta(y|x) - log pi_ref(y|x), the log-ratio of a response, nats
    y_w    the chosen response; y_l the rejected one
    tau, alpha, lambda   min_confidence, entropy_weight, penalty_weight

Shapes:

    log_odds     (models, pairs)  a_i, nats
    log_ratios   (2, pairs)       h of the first and of the second response, nats
    label        (pairs,)         +1 if the first response is better, -1 if the second is

Sources: SCIR, arXiv 2502.08922 (penalty, dynamic mask); the others beside their functions.
Which forms are the paper's and which are ours: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Nats. Below this entropy L_conf has no gradient: a verdict at P = 0.991 is not pushed further.
#: Its effect was too small to measure (docs/study.md, experiment ablation), so it is no setting.
ENTROPY_FLOOR = 0.05


# -- the inconsistency penalty


def entropy(log_odds: Tensor) -> Tensor:
    """Entropy of the preference p = sigmoid(a), nats.

        H(p) = softplus(a) - a sigmoid(a)

    log_odds: (...) -> (...)
    """
    return F.softplus(log_odds) - log_odds * torch.sigmoid(log_odds)


def symmetric_kl(log_odds: Tensor) -> Tensor:
    """Inconsistency of each pair: the mean symmetric KL divergence of two models, nats.

        L_sym = mean_{i<j} 1/2 [KL(p_i || p_j) + KL(p_j || p_i)]
              = mean_{i<j} 1/2 (p_i - p_j)(a_i - a_j)

    log_odds: (models, pairs) -> (pairs,)
    """
    a = log_odds
    p = torch.sigmoid(a)
    divergences = []
    for i, j in combinations(range(len(a)), 2):
        # 1/2 (p_i - p_j)(a_i - a_j), (pairs,)
        divergence = 0.5 * (p[i] - p[j]) * (a[i] - a[j])
        divergences.append(divergence)
    return torch.stack(divergences).mean(0)


def confidence(log_odds: Tensor) -> Tensor:
    """Lack of confidence of each pair: the mean entropy of the models, nats.

        L_conf = mean_i max(H(p_i), ENTROPY_FLOOR)

    log_odds: (models, pairs) -> (pairs,)
    """
    return entropy(log_odds).clamp(min=ENTROPY_FLOOR).mean(0)


def matching_scale(judge: Tensor, implicit: Tensor) -> float:
    """The factor that gives the implicit log-odds the judge's median size.

        s = median |a_judge| / median |a_implicit|,  1 if either median is 0 or undefined

    judge: (pairs,) or (models, pairs), implicit: (pairs,), nats; NaN is left out.
    """
    judge_size = _median_size(judge)
    implicit_size = _median_size(implicit)
    if judge_size > 0 and implicit_size > 0:
        return judge_size / implicit_size
    return 1.0


def _median_size(log_odds: Tensor) -> float:
    """median |a|, nats; NaN is left out.  log_odds: any shape"""
    sizes = log_odds.detach().abs()
    return float(sizes.flatten().nanmedian())


# -- the dynamic mask


def consistent(log_odds: Tensor, threshold: float = 0.5) -> Tensor:
    """Whether all models agree on each pair, each with at least this confidence.

        m = 1[all a_i have one sign] 1[min_i max(p_i, 1 - p_i) >= tau]

    A log-odds of NaN or 0 agrees with nothing.
    log_odds: (models, pairs); threshold: tau, a probability -> (pairs,) bool
    """
    sign = log_odds.sign()
    same_sign = (sign == sign[0]).all(0) & (sign[0] != 0)
    # max(p, 1 - p) = sigmoid(|a|)
    confident = torch.sigmoid(log_odds.abs()) >= threshold
    return same_sign & confident.all(0)


# -- preference losses, of each pair


def dpo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """DPO's loss (arXiv 2305.18290, eq. 7).

        L_DPO = -log sigmoid( beta [h(y_w) - h(y_l)] )

    log_ratios: (2, pairs), nats; label: (pairs,) +1 or -1 -> (pairs,)
    """
    # beta [h(y_w) - h(y_l)], (pairs,)
    margin = beta * label * (log_ratios[0] - log_ratios[1])
    return -F.logsigmoid(margin)


def ipo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """IPO's loss (arXiv 2310.12036, eq. 17; its tau is beta).

        L_IPO = ( h(y_w) - h(y_l) - 1/(2 beta) )^2

    log_ratios: (2, pairs), nats; label: (pairs,) +1 or -1 -> (pairs,)
    """
    # h(y_w) - h(y_l), (pairs,)
    margin = label * (log_ratios[0] - log_ratios[1])
    return (margin - 1 / (2 * beta)).square()


def sppo(log_ratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """SPPO's loss for a certain label (arXiv 2405.00675, eq. 4.7; its eta is 1/beta).

        L_SPPO = ( h(y_w) - 1/(2 beta) )^2 + ( h(y_l) + 1/(2 beta) )^2

    Under a label that is correct with probability C (`hedged`), its gradient is that of SPPO's
    soft target (C - 1/2) / beta.
    log_ratios: (2, pairs), nats; label: (pairs,) +1 or -1 -> (pairs,)
    """
    # 1/(2 beta) for the chosen response, its negative for the rejected one; of the first response
    target = label / (2 * beta)
    return (log_ratios[0] - target).square() + (log_ratios[1] + target).square()


def simpo(mean_logps: Tensor, label: Tensor, beta: float, target_margin: float = 0.0) -> Tensor:
    """SimPO's loss, which needs no reference (arXiv 2405.14734, eq. 6).

        L_SimPO = -log sigmoid( beta [log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|] - gamma )

    mean_logps: (2, pairs), nats per token; label: (pairs,) +1 or -1 -> (pairs,)
    target_margin: gamma.
    """
    # beta [log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|], (pairs,)
    margin = beta * label * (mean_logps[0] - mean_logps[1])
    return -F.logsigmoid(margin - target_margin)


def hedged(loss: Callable[[Tensor], Tensor], label: Tensor, label_probability: Tensor) -> Tensor:
    """CREAM's loss: a preference loss under labels that are correct with probability C.

        C l(label) + (1 - C) l(-label)          (arXiv 2410.12735)

    loss: label (pairs,) -> (pairs,); label_probability: (pairs,) C, 1 for a certain label.
    """
    return label_probability * loss(label) + (1 - label_probability) * loss(-label)


def with_answer_nll(
    loss: Callable[[Tensor], Tensor], mean_logps: Tensor, label: Tensor, weight: float
) -> Tensor:
    """A preference loss and the token loss of the preferred response.

        l(label) - weight log pi(y_w|x)/|y_w|       (Iterative RPO, arXiv 2404.19733, eq. 1)

    Theirs divides by the tokens of the prompt as well; with label_probability, `hedged` takes the
    expectation of both terms.
    loss: label (pairs,) -> (pairs,); mean_logps: (2, pairs), nats per token -> (pairs,)
    """
    preferred = torch.where(label > 0, mean_logps[0], mean_logps[1])
    return loss(label) - weight * preferred


# -- the objective


@dataclass(frozen=True)
class Scir:
    """SCIR's objective on the pairs of one step, and its terms.

    loss: the scalar that is minimized, preference_loss + lambda penalty.
    preference_loss: scalar, sum(m L_pref) / max(1, sum m).
    penalty: scalar, mean L_sym + alpha mean L_conf.
    pair_preference_loss, pair_inconsistency, pair_entropy: (pairs,) L_pref, L_sym, L_conf.
    mask: (pairs,) bool, m. label: (pairs,) the agreed sign, +1 or -1, if the mask is on.
    """

    loss: Tensor
    preference_loss: Tensor
    penalty: Tensor
    pair_preference_loss: Tensor
    pair_inconsistency: Tensor
    pair_entropy: Tensor
    mask: Tensor
    label: Tensor


def scir(
    models: Tensor,
    voters: Tensor,
    preference: Callable[[Tensor], Tensor],
    *,
    penalty_weight: float,
    entropy_weight: float,
    min_confidence: float = 0.5,
) -> Scir:
    """SCIR's objective (arXiv 2502.08922), as reconstructed in docs/method.md section 3.

        m = 1[all voters have one sign] 1[min_i max(p_i, 1 - p_i) >= tau]
        L = sum(m L_pref) / max(1, sum m) + lambda ( mean L_sym + alpha mean L_conf )

    The label of L_pref is the agreed sign; neither it nor m passes a gradient.

    models: (models, pairs) log-odds of the internal reward models, with gradient, nats.
    voters: (voters, pairs) log-odds of the reward models that must agree, nats.
    preference: L_pref under a label, (pairs,) +1 or -1 -> (pairs,).
    """
    voters = voters.detach()
    # m, (pairs,)
    mask = consistent(voters, min_confidence)
    # The agreed sign if the mask is on; of no effect elsewhere, (pairs,)
    label = voters[0].sign()

    # L_pref, (pairs,)
    pair_preference_loss = preference(label)
    # L_sym, (pairs,)
    pair_inconsistency = symmetric_kl(models)
    # L_conf, (pairs,)
    pair_entropy = confidence(models)

    # sum(m L_pref) / max(1, sum m); `where` and not a product, because 0 * NaN is NaN
    nothing = torch.zeros_like(pair_preference_loss)
    masked = torch.where(mask, pair_preference_loss, nothing)
    preference_loss = masked.sum() / mask.sum().clamp(min=1)
    # mean L_sym + alpha mean L_conf
    penalty = pair_inconsistency.mean() + entropy_weight * pair_entropy.mean()
    # L
    loss = preference_loss + penalty_weight * penalty

    return Scir(
        loss=loss,
        preference_loss=preference_loss,
        penalty=penalty,
        pair_preference_loss=pair_preference_loss,
        pair_inconsistency=pair_inconsistency,
        pair_entropy=pair_entropy,
        mask=mask,
        label=label,
    )


def one_sided(orders: Tensor, probability: Tensor) -> Tensor:
    """Cross entropy of a judge's verdicts against soft labels, mean of its orders, nats.

    H(t, p) = -t log p - (1 - t) log(1 - p) = softplus(a) - t a,  p = sigmoid(a),  dH/da = p - t

    The label has no gradient: the judge moves towards the consensus, which stays as it is.

    orders: (orders, pairs) log-odds;  probability: (pairs,) t, that first is better -> (pairs,)
    """
    return (F.softplus(orders) - probability.detach() * orders).mean(0)
