"""Figures of each reward model on labeled pairs, during training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scir_cli.analysis import statistics
from scir_cli.engine.policy import Policy
from scir_cli.rewards import reward_models
from scir_cli.rewards.log_odds import RewardOutput
from scir_cli.rewards.pairs import Context
from scir_cli.rewards.reward_models import RewardModel
from scir_cli.settings import TrainSettings
from scir_cli.training.objectives import CollapseWarning, Example, Metrics


class ValidationMetrics:
    """Accuracy, size and agreement of the reward models, at the policy's present weights.

    SCIR does not determine which reward model the others follow, so accuracy is measured
    (docs/method.md, guard 5).
    A reward model is left out if it cannot score these pairs: the implicit reward without a reward
    reference, a model that writes text first, external scores.
    examples: labeled pairs. reward_key: weights key of the reward reference, if there is one.
    """

    def __init__(
        self,
        settings: TrainSettings,
        policy: Policy,
        examples: Sequence[Example],
        reward_key: str | None,
    ) -> None:
        """Selects the reward models that can score the examples."""
        self.policy = policy
        self.max_tokens = settings.max_tokens_per_pack
        self.pairs = [example.pair for example in examples]
        # (pairs,) +1 or -1
        self.gold = np.array([example.label for example in examples], dtype=float)
        self.reward_key = reward_key
        self.models: dict[str, RewardModel] = {}
        models = reward_models.make(settings.reward_models, policy.chat, settings)
        for name, model in models.items():
            if self._can_score(name, model):
                self.models[name] = model
        self.collapse_warning = CollapseWarning(1)

    def _can_score(self, name: str, model: RewardModel) -> bool:
        if name == "external" or (model.needs_reference and self.reward_key is None):
            return False
        return not any(model.requests(pair) for pair in self.pairs[:1])

    def __call__(self) -> Metrics:
        """The figures, by their names in metrics.jsonl; log-odds are in nats.

        Empty if no reward model can score the pairs.
        """
        if not self.models:
            return {}
        outputs = self._outputs()
        # (models, pairs)
        log_odds = np.stack([output.log_odds.numpy().astype(float) for output in outputs.values()])
        metrics: Metrics = {}
        for name, values in zip(outputs, log_odds, strict=True):
            metrics |= self._figures(name, values)

        orders = outputs["judge"].orders if "judge" in outputs else None
        if orders is not None:
            flipped = orders[0].sign() == -orders[1].sign()
            flip_rate = float(flipped.float().mean())
            metrics["validation/flip_rate"] = flip_rate
            self.collapse_warning(metrics["validation/abs_log_odds/judge"], flip_rate)

        some_pair_has_all = not np.isnan(log_odds).any(0).all()
        if len(log_odds) > 1 and some_pair_has_all:
            agree = statistics.agreement(log_odds).agree
            metrics["validation/agreement"] = float(np.nanmean(agree))
        return metrics

    def _figures(self, name: str, log_odds: np.ndarray) -> Metrics:
        """Accuracy and mean size of a reward model, over the pairs that have a verdict.

        log_odds: (pairs,), nats, NaN without a verdict. Empty if no pair has one.
        """
        has_verdict = ~np.isnan(log_odds)
        if not has_verdict.any():
            return {}
        values = log_odds[has_verdict]
        # 1, 0, or 1/2 for a tie
        correct = (1 + np.sign(values) * self.gold[has_verdict]) / 2
        return {
            f"validation/accuracy/{name}": float(np.mean(correct)),
            f"validation/abs_log_odds/{name}": float(np.abs(values).mean()),
        }

    def _outputs(self) -> dict[str, RewardOutput]:
        """The outputs of the reward models on all pairs, on the CPU."""
        branches = [reward_models.all_branches(self.models, pair) for pair in self.pairs]
        # (pairs, branches)
        logps = torch.stack(list(self.policy.score(branches, self.max_tokens)))
        context = Context.of(self.pairs, self.reward_key)
        return reward_models.all_outputs(self.models, logps, context)
