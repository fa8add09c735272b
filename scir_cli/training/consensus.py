"""SCIR with the consensus as its target: `objective: scir`, `target: consensus`.

No mask, and no reward model is pulled towards the student.

    L = mean_i [ C_i l(label_i) + (1 - C_i) l(-label_i) ]  +  lambda mean_i mean_k H(t_i, p_ik)

    l     preference loss of the policy (dpo, ipo, simpo, sppo)
    C_i   probability that the label of pair i is correct
    t_i   probability that its first response is better: C_i or 1 - C_i
    p_ik  probability of the judge in order k that the first response is better
    H     cross entropy: the judge learns the soft label in both orders; labels have no gradient

Both terms are means over pairs, so a step can be taken pack by pack.
Standing [ours]; docs/method.md, section 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scir_cli.engine.trees import Branch
from scir_cli.errors import warn
from scir_cli.rewards.log_odds import RewardOutput, average_orders
from scir_cli.training import losses
from scir_cli.training.objectives import CollapseWarning, Dpo, Example, Metrics, dpo_metrics

#: Branches of a pair: its two responses, then verdicts A and B in both orders.
RESPONSES, VERDICTS = slice(0, 2), slice(2, 6)


def warn_of_hard_labels(examples: Sequence[Example]) -> None:
    """Warns if every label counts as certain, so that the judge is pulled without bound."""
    if all(example.label_probability == 1.0 for example in examples):
        warn(
            "target consensus: every label of the input counts as certain; "
            "write soft labels with `scir filter --rule consensus`"
        )


class Consensus(Dpo):
    """The soft labels of the data as the target of the policy and of its judge."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        given = self.settings.penalty_weight
        self.penalty_weight = 1.0 if given is None else given  # 1 until it is fitted
        self.judge = self.models["judge"]
        self.branch_slices = {"implicit": RESPONSES, "judge": VERDICTS}
        self.guard = CollapseWarning(20)

    def branches(self, example: Example) -> list[Branch]:
        return [*super().branches(example), *self.judge.branches(example.pair)]

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        terms = self.loss_terms(logps, examples)
        loss = terms["preference"] + self.penalty_weight * terms["penalty"]
        return loss, self._metrics(logps, examples, terms)

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The preference loss and the judge's cross entropy, before lambda.

        logps: (pairs, 6), nats
        """
        label = self.labels(examples, logps)
        certainty = torch.tensor([e.label_probability for e in examples], device=logps.device)
        responses = logps[:, RESPONSES]
        ratios = self.log_ratios(responses, examples)
        loss = self.preference_loss(responses, ratios, examples)
        orders = self._verdicts(logps).orders
        assert orders is not None
        first_better = torch.where(label > 0, certainty, 1 - certainty)  # t, (pairs,)
        return {
            "preference": losses.hedged(loss, label, certainty).mean(),
            "penalty": losses.one_sided(orders, first_better).mean(),
        }

    def _verdicts(self, logps: Tensor) -> RewardOutput:
        """The judge's log-odds of each pair and in each order.  logps: (pairs, 6), nats"""
        return average_orders(logps[:, VERDICTS].T.unflatten(0, (2, 2)))

    def _metrics(
        self, logps: Tensor, examples: Sequence[Example], terms: dict[str, Tensor]
    ) -> Metrics:
        """Figures of the pairs under the names of SCIR's; warns if the judge collapses."""
        logps = logps.detach()
        label, judge = self.labels(examples, logps), self._verdicts(logps)
        assert judge.orders is not None and judge.verdict_mass is not None
        responses = logps[:, RESPONSES]
        ratios = self.log_ratios(responses, examples)
        size = float(judge.log_odds.abs().mean())
        flips = float((judge.orders[0].sign() == -judge.orders[1].sign()).float().mean())
        self.guard(size, flips)
        return dpo_metrics(responses, ratios, label, self.settings.beta) | {
            "scir/preference_loss": float(terms["preference"].detach()),
            "scir/inconsistency": float(terms["penalty"].detach()),
            "scir/penalty_weight": self.penalty_weight,
            "scir/flip_rate": flips,
            "scir/verdict_mass": float(judge.verdict_mass.mean()),
            "accuracy/judge": float((judge.log_odds * label > 0).float().mean()),
            "abs_log_odds/judge": size,
        }
