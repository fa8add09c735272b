"""Figures of each reward model on labelled pairs while training goes on."""

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
    """Accuracy, size and agreement of the reward models on labelled pairs, at the weights of the moment.

    SCIR does not decide which side wins an agreement, so it is measured (METHOD 4.5).
    A reward model of the settings is left out if these pairs cannot be scored by it: the implicit reward without a
    reward reference, a model that writes text first, scores from elsewhere.
    """

    def __init__(
        self,
        settings: TrainSettings,
        policy: Policy,
        examples: Sequence[Example],
        reward_key: str | None,
    ) -> None:
        self.policy = policy
        self.max_tokens = settings.max_tokens_per_pack
        self.pairs = [example.pair for example in examples]
        self.gold = np.array([example.label for example in examples], dtype=float)
        self.reward_key = reward_key
        models = reward_models.make(settings.reward_models, policy.chat, settings)
        self.models = {
            name: model for name, model in models.items() if self._can_score(name, model)
        }
        self.guard = CollapseWarning(1)

    def _can_score(self, name: str, model: RewardModel) -> bool:
        if name == "external" or (model.needs_reference and self.reward_key is None):
            return False
        return not any(model.requests(pair) for pair in self.pairs[:1])

    def __call__(self) -> Metrics:
        """The figures, by their names in metrics.jsonl; log-odds are in nats. Empty if no reward model can score the pairs."""
        if not self.models:
            return {}
        answers = self._answers()
        log_odds = np.stack(
            [answer.log_odds.numpy().astype(float) for answer in answers.values()]
        )  # (models, pairs)
        metrics: Metrics = {}
        for name, values in zip(answers, log_odds, strict=True):
            known = ~np.isnan(values)
            if known.any():
                # 1, 0, or 1/2 for a tie
                correct = (1 + np.sign(values[known]) * self.gold[known]) / 2
                metrics[f"validation/accuracy/{name}"] = float(np.mean(correct))
                metrics[f"validation/abs_log_odds/{name}"] = float(np.abs(values[known]).mean())
        if "judge" in answers and (orders := answers["judge"].orders) is not None:
            metrics["validation/flip_rate"] = float(
                (orders[0].sign() == -orders[1].sign()).float().mean()
            )
            self.guard(metrics["validation/abs_log_odds/judge"], metrics["validation/flip_rate"])
        if len(log_odds) > 1 and not np.isnan(log_odds).any(0).all():
            metrics["validation/agreement"] = float(
                np.nanmean(statistics.agreement(log_odds).agree)
            )
        return metrics

    def _answers(self) -> dict[str, RewardOutput]:
        branches = [reward_models.all_branches(self.models, pair) for pair in self.pairs]
        logps = torch.stack(list(self.policy.score(branches, self.max_tokens)))
        return reward_models.all_outputs(
            self.models, logps, Context.of(self.pairs, self.reward_key)
        )
