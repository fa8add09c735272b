"""The objectives of `train`: which branches are scored, and the loss of their scores.

    sft    labeled pairs: negative log-likelihood of the chosen response and of the judge's verdict
    dpo    labeled pairs: a preference loss against the model that training starts from
    scir   unlabeled pairs: SCIR's penalty; the preference loss of pairs on which the models agree

An objective gets all pairs of an optimizer step at once, because SCIR's mask normalizes over the
step. `separable` means that the loss is a plain mean over pairs, so the parts of a step can be
computed one after the other, each without the rest.

Log-odds come from the same reward models that `judge` uses: training and judging cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from scir_cli.engine.chat import Chat
from scir_cli.engine.trees import Branch, continuation
from scir_cli.errors import ConfigError, suggest, warn
from scir_cli.rewards import log_odds, reward_models
from scir_cli.rewards.log_odds import RewardOutput
from scir_cli.rewards.pairs import Context, Pair
from scir_cli.rewards.reward_models import RewardModel
from scir_cli.settings import TrainSettings, entropy_ceiling
from scir_cli.training import losses

Metrics = dict[str, float]

#: A preference loss as a function of the label.  (pairs,) -> (pairs,)
PreferenceLoss = Callable[[Tensor], Tensor]

#: Preference losses on log-ratios, which need a reference.
WITH_REFERENCE = {
    "dpo": losses.dpo,
    "ipo": losses.ipo,
    "sppo": losses.sppo,
}

#: Steps whose mean the collapse warning compares: the first of a run and the latest.
COLLAPSE_WINDOW = 20


@dataclass(frozen=True)
class Example:
    """A pair to train on.

    label: +1 if the first response is better, -1 if the second is, 0 if the pair is unlabeled.
    label_probability: probability that the label is correct.
    """

    pair: Pair
    label: int = 0
    label_probability: float = 1.0


class Objective(Protocol):
    """What `train` minimizes.

    separable: the loss is a mean over pairs, so parts of a step can be computed one by one.
    models: the reward models of the settings, by name.
    branch_slices: reward model -> its branches among those of a pair.
    """

    separable: bool
    models: dict[str, RewardModel]
    branch_slices: dict[str, slice]

    def branches(self, example: Example) -> list[Branch]:
        """The token paths to score, the same number for each example."""

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The step's loss, a scalar, and its figures, detached.

        logps: (pairs, branches) summed log-probabilities, nats.
        """

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The terms that the loss weighs against each other, before their weights.

        Empty if the loss has one term. logps: (pairs, branches), nats.
        """


class _Base:
    """Shared by the objectives: labels, log-ratios, the choice of preference loss.

    dpo_reference: weights key of the model that training starts from.
    reward_reference: weights key of the implicit reward's reference, if it has one.
    """

    separable = True

    def __init__(
        self, settings: TrainSettings, chat: Chat, dpo_reference: str, reward_reference: str | None
    ) -> None:
        self.settings = settings
        self.dpo_reference = dpo_reference
        self.reward_reference = reward_reference
        self.models = reward_models.make(settings.reward_models, chat, settings)
        self.branch_slices = reward_models.branch_slices(self.models)

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """No terms: the loss is one term."""
        return {}

    def labels(self, examples: Sequence[Example], like: Tensor) -> Tensor:
        """+1, -1 or 0 of each pair, on the device of `like`.  -> (pairs,)"""
        labels = [example.label for example in examples]
        return torch.tensor(labels, dtype=torch.float32, device=like.device)

    def log_ratios(self, logps: Tensor, examples: Sequence[Example]) -> Tensor:
        """h(y) = log pi_theta(y|x) - log pi_ref(y|x) of both responses, nats.

        logps: (pairs, 2) -> (2, pairs)
        """
        references = [example.pair.reference_logps[self.dpo_reference] for example in examples]
        # (pairs, 2)
        reference = torch.tensor(references, dtype=torch.float32, device=logps.device)
        return logps.T - reference.T

    def preference_loss(
        self, logps: Tensor, ratios: Tensor, examples: Sequence[Example]
    ) -> PreferenceLoss:
        """The preference loss of the settings, of each pair, as a function of its label.

        With --sft-weight it includes the chosen response's token loss, as in RPO
        (arXiv 2404.19733).
        logps: (pairs, 2) of both responses, nats; ratios: (2, pairs), as `log_ratios`.
        """
        settings = self.settings
        lengths = [[len(ids) for ids in example.pair.response_ids] for example in examples]
        # nats per token, (2, pairs)
        mean_logps = (logps / torch.tensor(lengths, device=logps.device)).T
        if settings.preference_loss == "simpo":
            preference: PreferenceLoss = partial(
                losses.simpo,
                mean_logps,
                beta=settings.beta,
                target_margin=settings.target_margin,
            )
        else:
            loss = WITH_REFERENCE[settings.preference_loss]
            preference = partial(loss, ratios, beta=settings.beta)
        if not settings.response_weight:
            return preference
        return partial(
            losses.with_answer_nll, preference, mean_logps, weight=settings.response_weight
        )

    def answer_metrics(self, logps: Tensor, examples: Sequence[Example]) -> Metrics:
        """The mean token loss of the labeled responses, if the loss includes it.

        logps: (pairs, 2) of both responses, nats
        """
        if not self.settings.response_weight:
            return {}
        chosen = [0 if example.label > 0 else 1 for example in examples]
        lengths = [len(_chosen_ids(example)) for example in examples]
        nll = -logps.detach().cpu()[range(len(chosen)), chosen] / torch.tensor(lengths)
        return {"sft/answer_nll": float(nll.mean())}


class Sft(_Base):
    """Supervised: the chosen response, and the judge's correct verdict in both orders.

    As the EFT data of Self-Rewarding Language Models (arXiv 2401.10020) teach both.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.judge = self.models.get("judge")
        self.branch_slices = {}
        #: Branches of the chosen response: one, or none if its loss has no weight
        self.n_answer_branches = 1 if self.settings.response_weight else 0
        if self.n_answer_branches:
            self.branch_slices["answer"] = slice(0, self.n_answer_branches)
        if self.judge:
            # 2 orders x tokens A and B
            end = self.n_answer_branches + 4
            self.branch_slices["judge"] = slice(self.n_answer_branches, end)

    def branches(self, example: Example) -> list[Branch]:
        """The chosen response, then the judge's verdicts."""
        pair = example.pair
        branches = []
        if self.n_answer_branches:
            branches.append(continuation(pair.prompt_ids, _chosen_ids(example)))
        if self.judge:
            branches += self.judge.branches(pair)
        return branches

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The weighted loss per response token, plus the loss of the verdict.

        logps: (pairs, branches), nats.
        """
        loss = logps.new_zeros(())
        metrics: Metrics = {}
        if "answer" in self.branch_slices:
            lengths = [len(_chosen_ids(example)) for example in examples]
            # nats per token, (pairs,)
            answer_nll = -logps[:, 0] / torch.tensor(lengths, device=logps.device)
            loss = loss + self.settings.response_weight * answer_nll.mean()
            metrics["sft/answer_nll"] = float(answer_nll.detach().mean())
        if "judge" in self.branch_slices:
            label = self.labels(examples, logps)
            # (pairs, 2 orders x 2 tokens)
            verdicts = logps[:, self.branch_slices["judge"]]
            nll = verdict_nll(verdicts, label)
            loss = loss + nll
            metrics["sft/verdict_nll"] = float(nll.detach())
            metrics["accuracy/judge"] = _judge_accuracy(verdicts.detach(), label)
        return loss, metrics


def _chosen_ids(example: Example) -> tuple[int, ...]:
    """The token ids of the response that the label prefers."""
    first, second = example.pair.response_ids
    return first if example.label > 0 else second


def _judge_accuracy(verdicts: Tensor, label: Tensor) -> float:
    """The share of pairs on which the order-averaged judge has the label's sign.

    verdicts: (pairs, 2 orders x tokens A and B), nats; label: (pairs,) +1 or -1.
    """
    # (2 orders, 2 tokens, pairs)
    by_order = verdicts.T.unflatten(0, (2, 2))
    judge = log_odds.average_orders(by_order).log_odds
    correct = judge * label > 0
    return float(correct.float().mean())


def verdict_nll(verdicts: Tensor, label: Tensor) -> Tensor:
    """Mean of -log P(correct verdict) over pairs and both orders, nats, a scalar.

    verdicts: (pairs, 2 orders x tokens A and B), nats; label: (pairs,) +1 or -1.
    """
    # If the first response is better, A (0) is correct in the first order and B (1) in the second.
    correct = torch.stack([label < 0, label > 0], dim=1).long()
    # (pairs, 2 orders, 2 tokens)
    by_order = verdicts.unflatten(1, (2, 2))
    return -by_order.gather(2, correct[:, :, None]).mean()


class Dpo(_Base):
    """Labeled pairs: DPO (arXiv 2305.18290) or another preference loss.

    The reference of the log-ratios is the model that training starts from.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.branch_slices = {"implicit": slice(0, 2)}

    def branches(self, example: Example) -> list[Branch]:
        """Both responses after their prompt."""
        pair = example.pair
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The mean preference loss, a scalar, and its figures.  logps: (pairs, 2), nats"""
        label = self.labels(examples, logps)
        ratios = self.log_ratios(logps, examples)
        probabilities = [example.label_probability for example in examples]
        probability = torch.tensor(probabilities, device=logps.device)
        preference_loss = self.preference_loss(logps, ratios, examples)
        loss = losses.hedged(preference_loss, label, probability).mean()
        metrics = dpo_metrics(logps, ratios, label, self.settings.beta)
        return loss, metrics | self.answer_metrics(logps, examples)


def check_scir(settings: TrainSettings, models: Mapping[str, RewardModel]) -> None:
    """Raises ConfigError for settings that do not fit these reward models.

    The settings alone cannot check them: the limits depend on the reward models' classes.
    """
    stopped = settings.stop_gradient
    if stopped not in ("none", *models):
        raise ConfigError(
            f"stop_gradient is '{stopped}'; expected none or a reward model of this run."
            f"{suggest(stopped, models)}"
        )
    separate = settings.judge_orders == "separate"
    n_verdicts = sum(2 if model.has_seats and separate else 1 for model in models.values())
    weight = settings.entropy_weight
    ceiling = entropy_ceiling(n_verdicts)
    if weight >= ceiling:
        raise ConfigError(
            f"entropy_weight is {weight}; from {ceiling:g} on, with {n_verdicts} verdicts per pair"
            " (a model that compares in both orders has two), the penalty rewards confident"
            f" disagreement. Use less than {ceiling:g}; the default is 0.1"
        )


class Scir(_Base):
    """SCIR (arXiv 2502.08922): a penalty on all pairs, a preference loss on agreed ones.

    The label of an agreed pair is the sign that the reward models share in this step.
    Pairs with a gold label are anchors: they train the judge's verdict and enter nothing else.
    penalty_weight: lambda, 1 until it is fitted.
    """

    separable = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        weight = self.settings.penalty_weight
        self.penalty_weight = 1.0 if weight is None else weight
        self.collapse_warning = CollapseWarning(COLLAPSE_WINDOW)

    def branches(self, example: Example) -> list[Branch]:
        """The branches of all reward models, one after the other."""
        return reward_models.all_branches(self.models, example.pair)

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """SCIR's loss on the unlabeled pairs, plus the verdict loss on the anchors.

        logps: (pairs, branches), nats.
        """
        label = self.labels(examples, logps)
        is_anchor = label != 0
        loss = logps.sum() * 0
        metrics: Metrics = {}
        if not bool(is_anchor.all()):
            unlabeled = [example for example in examples if not example.label]
            terms, metrics = self._scir(logps[~is_anchor], unlabeled)
            loss = terms.loss
            self.collapse_warning(metrics["abs_log_odds/judge"], metrics["scir/flip_rate"])
        if bool(is_anchor.any()):
            # (anchors, 2 orders x 2 tokens)
            verdicts = logps[is_anchor][:, self.branch_slices["judge"]]
            nll = verdict_nll(verdicts, label[is_anchor])
            loss = loss + self.settings.anchor_weight * nll
            metrics["anchors/verdict_nll"] = float(nll.detach())
        return loss, metrics

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The preference loss, and the penalty before lambda, of the unlabeled pairs.

        logps: (pairs, branches), nats -> scalars.
        """
        indices = [i for i, example in enumerate(examples) if not example.label]
        if not indices:
            zero = logps.sum() * 0
            return {"preference": zero, "penalty": zero}
        unlabeled = [examples[i] for i in indices]
        terms, _ = self._scir(logps[indices], unlabeled)
        return {"preference": terms.preference_loss, "penalty": terms.penalty}

    def _scir(self, logps: Tensor, examples: Sequence[Example]) -> tuple[losses.Scir, Metrics]:
        """The terms of SCIR's objective and their figures.

        logps: (pairs, branches), nats; examples: unlabeled.
        """
        settings = self.settings
        pairs = [example.pair for example in examples]
        context = Context.of(pairs, self.reward_reference, logps.device)
        outputs = reward_models.all_outputs(self.models, logps, context)

        penalized = self._penalized(outputs)
        # (K, pairs)
        models = torch.stack(list(penalized.values()))
        # (reward models, pairs)
        averaged = torch.stack([output.log_odds for output in outputs.values()])
        voters = self._voters(outputs, averaged)

        answers = logps[:, self.branch_slices["implicit"]]
        ratios = self.log_ratios(answers, examples)
        terms = losses.scir(
            models,
            voters,
            self.preference_loss(answers, ratios, examples),
            penalty_weight=self.penalty_weight,
            entropy_weight=settings.entropy_weight,
            min_confidence=settings.min_confidence,
        )
        metrics = self._agreed_metrics(terms, answers, ratios)
        metrics |= _scir_metrics(terms, penalized, averaged, outputs["judge"])
        metrics["scir/scale"] = float(settings.implicit_scale)
        metrics["scir/penalty_weight"] = self.penalty_weight
        return terms, metrics

    def _penalized(self, outputs: Mapping[str, RewardOutput]) -> dict[str, Tensor]:
        """The log-odds that the penalty makes consistent, by name, (pairs,) each.

        A reward model that compares in both orders enters as its two orders or as their average.
        The gradient of --stop-gradient's reward model is stopped.
        """
        separate = self.settings.judge_orders == "separate"
        penalized: dict[str, Tensor] = {}
        for name, output in outputs.items():
            if separate and output.orders is not None:
                views = {
                    f"{name}_forward": output.orders[0],
                    f"{name}_swapped": output.orders[1],
                }
            else:
                views = {name: output.log_odds}
            for view, a in views.items():
                stopped = name == self.settings.stop_gradient
                penalized[view] = a.detach() if stopped else a
        return penalized

    def _voters(self, outputs: Mapping[str, RewardOutput], averaged: Tensor) -> Tensor:
        """The log-odds that must agree, detached; NaN if the verdict mass is too small.

        averaged: (reward models, pairs) -> (voters, pairs), nats
        """
        masses = [
            output.verdict_mass for output in outputs.values() if output.verdict_mass is not None
        ]
        mass = torch.stack(masses).detach()
        no_verdict = (mass < self.settings.min_verdict_mass).any(0)
        voters = averaged
        if self.settings.target != "agreed":
            voters = outputs["judge"].log_odds[None]
        return voters.detach().masked_fill(no_verdict, float("nan"))

    def _agreed_metrics(self, terms: losses.Scir, answers: Tensor, ratios: Tensor) -> Metrics:
        """DPO's figures on the agreed pairs; none if there is no such pair.

        answers: (pairs, 2) log-probabilities of both responses, nats; ratios: (2, pairs).
        """
        mask = terms.mask
        if not mask.any():
            return {}
        label = terms.label[mask]
        return dpo_metrics(answers[mask], ratios[:, mask], label, self.settings.beta)


def _scir_metrics(
    terms: losses.Scir, penalized: Mapping[str, Tensor], averaged: Tensor, judge: RewardOutput
) -> Metrics:
    """SCIR's figures of a step.

    penalized: (pairs,) log-odds by name, nats; averaged: (reward models, pairs), nats.
    """
    assert judge.orders is not None and judge.verdict_mass is not None
    n_agreed = terms.mask.sum().clamp(min=1)
    masked_loss = (terms.pair_preference_loss.detach() * terms.mask).sum()
    agree = (averaged.sign() == averaged[0].sign()).all(0)
    flipped = judge.orders[0].sign() == -judge.orders[1].sign()
    metrics = {
        "scir/preference_loss": float(masked_loss / n_agreed),
        "scir/inconsistency": float(terms.pair_inconsistency.detach().mean()),
        "scir/entropy": float(terms.pair_entropy.detach().mean()),
        "scir/mask_rate": float(terms.mask.float().mean()),
        "scir/agreement": float(agree.float().mean()),
        "scir/flip_rate": float(flipped.float().mean()),
        "scir/verdict_mass": float(judge.verdict_mass.detach().mean()),
    }
    for name, a in penalized.items():
        metrics[f"abs_log_odds/{name}"] = float(a.detach().abs().mean())
    # The average of its orders, also if the penalty reads the orders
    metrics["abs_log_odds/judge"] = float(judge.log_odds.detach().abs().mean())
    return metrics


class CollapseWarning:
    """Warns once if a judge collapses into choosing by seat (docs/method.md, guard 5).

    That is: mean |log-odds| halved and the order-flip rate a tenth higher, in the last `window`
    measurements against the first. Means over a window, so that one odd batch is no collapse.
    """

    def __init__(self, window: int) -> None:
        #: 0 once the warning is out
        self.window = window
        #: (mean |log-odds|, order-flip rate) of each measurement
        self.history: list[tuple[float, float]] = []

    def __call__(self, size: float, flip_rate: float) -> None:
        """Adds a measurement.  size: mean |log-odds|, nats; flip_rate: between 0 and 1"""
        self.history.append((size, flip_rate))
        if not self.window or len(self.history) <= self.window:
            return
        first_size, first_flips = self._means(self.history[: self.window])
        last_size, last_flips = self._means(self.history[-self.window :])
        if last_size < 0.5 * first_size and last_flips > first_flips + 0.1:
            self.window = 0
            warn(
                f"the judge is collapsing: mean |log-odds| {first_size:.2f} -> {last_size:.2f},"
                f" flip rate {first_flips:.0%} -> {last_flips:.0%}."
                " Lower --penalty-weight or --implicit-scale, or set --stop-gradient judge"
            )

    def _means(self, measurements: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The mean size and the mean order-flip rate of a window."""
        size = sum(size for size, _ in measurements) / self.window
        flip_rate = sum(flip_rate for _, flip_rate in measurements) / self.window
        return size, flip_rate


def dpo_metrics(logps: Tensor, ratios: Tensor, label: Tensor, beta: float) -> Metrics:
    """DPO's usual figures under the names that other trainers log.

    logps: (pairs, 2), ratios: (2, pairs), of first and second, nats; label: (pairs,) +1 or -1.
    """
    first_is_better = label > 0
    margins = beta * label * (ratios[0] - ratios[1]).detach()
    chosen = torch.where(first_is_better, logps[:, 0], logps[:, 1]).detach()
    rejected = torch.where(first_is_better, logps[:, 1], logps[:, 0]).detach()
    # Of the chosen and of the rejected response, (2, pairs)
    rewards = beta * torch.where(first_is_better, ratios, ratios.flip(0)).detach()
    return {
        "rewards/chosen": float(rewards[0].mean()),
        "rewards/rejected": float(rewards[1].mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).float().mean()),
        "logps/chosen": float(chosen.mean()),
        "logps/rejected": float(rejected.mean()),
    }


#: --objective -> its class
TABLE: dict[str, type[Any]] = {"sft": Sft, "dpo": Dpo, "scir": Scir}
