"""What `train` minimises: which branches of a pair are scored, and how their log-probabilities become a loss and figures to look at.

An objective sees all pairs of an optimiser step at once, because SCIR's mask normalises over the step. `separable` says that the loss is a plain
mean over pairs, so that parts of a step may be taken one after the other without knowing the rest. Log-odds come from the reward models that
`judge` uses: what is trained is what is judged.
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
WITH_REFERENCE = {
    "dpo": losses.dpo,
    "ipo": losses.ipo,
    "sppo": losses.sppo,
}  # preference losses on log-ratios


@dataclass(frozen=True)
class Example:
    """A pair to train on; label +1 first better, -1 second better, 0 unlabelled."""

    pair: Pair
    label: int = 0
    label_probability: float = 1.0  # that the label is correct
    n_tokens: int = 0  # of the forest of its branches; 0: not counted yet


class Objective(Protocol):
    separable: bool
    branch_slices: dict[str, slice]  # reward model -> its branches of a pair

    def branches(self, example: Example) -> list[Branch]:
        """Token paths to score, always the same number."""

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The step's loss and detached figures.  logps: (pairs, branches), nats"""

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """What the loss weighs against each other, before its weights; none where it is one term."""


class _Base:
    separable = True

    def __init__(
        self, settings: TrainSettings, chat: Chat, dpo_reference: str, reward_reference: str | None
    ) -> None:
        self.settings, self.dpo_reference, self.reward_reference = (
            settings,
            dpo_reference,
            reward_reference,
        )
        self.models = reward_models.make(settings.reward_models, chat, settings)
        self.branch_slices = reward_models.branch_slices(self.models)

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {}

    def labels(self, examples: Sequence[Example], like: Tensor) -> Tensor:
        return torch.tensor(
            [e.label for e in examples], dtype=torch.float32, device=like.device
        )  # (pairs,)

    def log_ratios(self, logps: Tensor, examples: Sequence[Example]) -> Tensor:
        """h(y) = log pi_theta(y|x) - log pi_ref(y|x) of both responses.  logps: (pairs, 2) -> (2, pairs)"""
        reference = [e.pair.reference_logps[self.dpo_reference] for e in examples]
        return logps.T - torch.tensor(reference, dtype=torch.float32, device=logps.device).T

    def preference(
        self, logps: Tensor, ratios: Tensor, examples: Sequence[Example]
    ) -> Callable[[Tensor], Tensor]:
        """The preference loss of each pair as a function of its label.  logps: (pairs, 2), ratios: (2, pairs)"""
        s = self.settings
        if s.preference_loss == "simpo":
            lengths = torch.tensor(
                [[len(ids) for ids in e.pair.response_ids] for e in examples], device=logps.device
            )
            return partial(
                losses.simpo, (logps / lengths).T, beta=s.beta, target_margin=s.target_margin
            )
        return partial(WITH_REFERENCE[s.preference_loss], ratios, beta=s.beta)


class Sft(_Base):
    """Teaches to answer (chosen response) and to judge (the right verdict in both orders), as EFT data do (arXiv 2401.10020)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.judge = self.models.get("judge")
        self.answers = (
            1 if self.settings.sft_response_weight else 0
        )  # branches of the chosen response
        parts = {"answer": slice(0, self.answers), "judge": slice(self.answers, self.answers + 4)}
        self.branch_slices = {
            name: part
            for name, part in parts.items()
            if (self.answers if name == "answer" else self.judge)
        }

    def branches(self, example: Example) -> list[Branch]:
        chosen = example.pair.response_ids[0 if example.label > 0 else 1]
        answer = [continuation(example.pair.prompt_ids, chosen)] * self.answers
        return [*answer, *(self.judge.branches(example.pair) if self.judge else [])]

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        loss, metrics = logps.new_zeros(()), Metrics()
        if "answer" in self.branch_slices:
            lengths = [len(e.pair.response_ids[0 if e.label > 0 else 1]) for e in examples]
            nll = -logps[:, 0] / torch.tensor(
                lengths, device=logps.device
            )  # mean over tokens, (pairs,)
            loss = loss + self.settings.sft_response_weight * nll.mean()
            metrics["sft/answer_nll"] = float(nll.detach().mean())
        if "judge" in self.branch_slices:
            label, verdicts = self.labels(examples, logps), logps[:, self.branch_slices["judge"]]
            nll = verdict_nll(verdicts, label)
            loss = loss + nll
            judged = log_odds.average_orders(verdicts.detach().T.unflatten(0, (2, 2))).log_odds
            metrics |= {
                "sft/verdict_nll": float(nll.detach()),
                "accuracy/judge": float((judged * label > 0).float().mean()),
            }
        return loss, metrics


def verdict_nll(verdicts: Tensor, label: Tensor) -> Tensor:
    """Mean of -log P(the right verdict) over pairs and both orders, nats.  verdicts: (pairs, 2 orders x tokens A and B); label: (pairs,)"""
    right = torch.stack(
        [label < 0, label > 0], dim=1
    ).long()  # first better: A in the first order, B in the second
    return -verdicts.unflatten(1, (2, 2)).gather(2, right[:, :, None]).mean()


class Dpo(_Base):
    """Labelled pairs, DPO (arXiv 2305.18290) or another preference loss against the model training started from."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.branch_slices = {"implicit": slice(0, 2)}

    def branches(self, example: Example) -> list[Branch]:
        return [continuation(example.pair.prompt_ids, ids) for ids in example.pair.response_ids]

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        label, ratios = self.labels(examples, logps), self.log_ratios(logps, examples)
        probability = torch.tensor([e.label_probability for e in examples], device=logps.device)
        loss = losses.hedged(self.preference(logps, ratios, examples), label, probability).mean()
        return loss, dpo_metrics(logps, ratios, label, self.settings.beta)


def check_scir(settings: TrainSettings, models: Mapping[str, RewardModel]) -> None:
    """Raises ConfigError for what the settings alone cannot check: it takes the reward models' classes."""
    held, weight = settings.stop_gradient, settings.entropy_weight
    if held not in ("none", *models):
        raise ConfigError(
            f"stop_gradient is '{held}', which is not among the reward models.{suggest(held, models)}"
        )
    separate = settings.judge_orders == "separate"
    n_verdicts = sum(2 if model.has_seats and separate else 1 for model in models.values())
    ceiling = entropy_ceiling(n_verdicts)
    if weight >= ceiling:
        raise ConfigError(
            f"entropy_weight is {weight}; from {ceiling:g} on, with {n_verdicts} verdicts per pair (a model with seats has "
            f"two), the penalty rewards confident disagreement. Use less than {ceiling:g}, 0.1 is the default"
        )


class Scir(_Base):
    """SCIR (arXiv 2502.08922): inconsistency penalty on every pair, DPO on those the reward models agree about in this step.

    Pairs with a label are anchors: they teach the judge its verdict and take no part in anything else.
    """

    separable = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        given = self.settings.penalty_weight
        self.penalty_weight = 1.0 if given is None else given  # 1 until it is fitted
        self.guard = CollapseWarning(20)

    def branches(self, example: Example) -> list[Branch]:
        return reward_models.all_branches(self.models, example.pair)

    def loss(self, logps: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Metrics]:
        """The step's loss: SCIR's on its unlabelled pairs, and the verdict's on its anchors."""
        label = self.labels(examples, logps)
        anchored = label != 0
        loss, metrics = logps.sum() * 0, Metrics()
        if not bool(anchored.all()):
            terms, metrics = self._scir(logps[~anchored], [e for e in examples if not e.label])
            loss = terms.loss
            self.guard(metrics["abs_log_odds/judge"], metrics["scir/flip_rate"])
        if bool(anchored.any()):
            nll = verdict_nll(logps[anchored][:, self.branch_slices["judge"]], label[anchored])
            loss = loss + self.settings.anchor_weight * nll
            metrics["anchors/verdict_nll"] = float(nll.detach())
        return loss, metrics

    def loss_terms(self, logps: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The preference loss and the penalty, before lambda, of a step's unlabelled pairs."""
        own = [place for place, example in enumerate(examples) if not example.label]
        if not own:
            return dict.fromkeys(("preference", "penalty"), logps.sum() * 0)
        terms, _ = self._scir(logps[own], [examples[place] for place in own])
        return {"preference": terms.agreed, "penalty": terms.inconsistency}

    def _scir(self, logps: Tensor, examples: Sequence[Example]) -> tuple[losses.Scir, Metrics]:
        s = self.settings
        said = reward_models.all_outputs(
            self.models,
            logps,
            Context.of([e.pair for e in examples], self.reward_reference, logps.device),
        )
        judge = said["judge"]
        trained = {
            view: a.detach() if name == s.stop_gradient else a
            for name, answer in said.items()
            for view, a in self._orders(name, answer).items()
        }
        models, averaged = (
            torch.stack(odds)
            for odds in (list(trained.values()), [a.log_odds for a in said.values()])
        )  # (K, pairs)
        masses = torch.stack([a.verdict_mass for a in said.values() if a.verdict_mass is not None])
        silent = (masses.detach() < s.min_verdict_mass).any(0)
        masking = averaged if s.target == "agreed" else judge.log_odds[None]
        voters = masking.detach().masked_fill(silent, float("nan"))
        own = logps[:, self.branch_slices["implicit"]]
        ratios = self.log_ratios(own, examples)
        terms = losses.scir(
            models, voters, self.preference(own, ratios, examples), penalty_weight=self.penalty_weight,
            entropy_weight=s.entropy_weight, min_confidence=s.min_confidence,
        )  # fmt: skip
        metrics = self._metrics(terms, trained, averaged, judge, ratios, logps)
        return terms, metrics | {
            "scir/scale": float(s.implicit_scale),
            "scir/penalty_weight": self.penalty_weight,
        }

    def _orders(self, name: str, answer: RewardOutput) -> dict[str, Tensor]:
        """A reward model as the penalty sees it: one that compares in both orders as its two orders, or their average."""
        if answer.orders is None or self.settings.judge_orders == "averaged":
            return {name: answer.log_odds}
        return {f"{name}_forward": answer.orders[0], f"{name}_swapped": answer.orders[1]}

    def _metrics(
        self,
        t: losses.Scir,
        models: dict[str, Tensor],
        averaged: Tensor,
        judge: RewardOutput,
        ratios: Tensor,
        logps: Tensor,
    ) -> Metrics:
        assert judge.orders is not None and judge.verdict_mass is not None
        n = t.mask.sum().clamp(min=1)
        label = t.label * t.mask  # 0 where the mask is off
        kept = (
            dpo_metrics(
                logps[t.mask][:, self.branch_slices["implicit"]],
                ratios[:, t.mask],
                label[t.mask],
                self.settings.beta,
            )
            if t.mask.any()
            else {}
        )
        return kept | {
            "scir/preference_loss": float((t.preference.detach() * t.mask).sum() / n),
            "scir/inconsistency": float(t.sym.detach().mean()),
            "scir/entropy": float(t.conf.detach().mean()),
            "scir/mask_rate": float(t.mask.float().mean()),
            "scir/agreement": float((averaged.sign() == averaged[0].sign()).all(0).float().mean()),
            "scir/flip_rate": float(
                (judge.orders[0].sign() == -judge.orders[1].sign()).float().mean()
            ),
            "scir/verdict_mass": float(judge.verdict_mass.detach().mean()),
            **{
                f"abs_log_odds/{name}": float(a.detach().abs().mean()) for name, a in models.items()
            },
            "abs_log_odds/judge": float(
                judge.log_odds.detach().abs().mean()
            ),  # of the averaged orders
        }


class CollapseWarning:
    """Warns once when a judge collapses into answering by seat: |a| halved, and flips up by a tenth, since the first looks (METHOD 4.3, 4.5).

    Both are means over `window` looks, so that one odd batch is no collapse.
    """

    def __init__(self, window: int) -> None:
        self.window, self.seen = (
            window,
            list[tuple[float, float]](),
        )  # (mean |a|, flip rate) of each look

    def __call__(self, size: float, flips: float) -> None:
        self.seen.append((size, flips))
        if self.window and len(self.seen) > self.window:
            (size0, flips0), (size1, flips1) = (
                [sum(x) / self.window for x in zip(*part, strict=True)] for part in self._ends()
            )
            if size1 < 0.5 * size0 and flips1 > flips0 + 0.1:
                self.window = 0
                warn(
                    f"the judge is collapsing: mean |log-odds| {size0:.2f} -> {size1:.2f}, flip rate {flips0:.0%} -> {flips1:.0%}. "
                    "Lower --penalty-weight or --implicit-scale, or set --stop-gradient judge"
                )

    def _ends(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        return self.seen[: self.window], self.seen[-self.window :]


def dpo_metrics(logps: Tensor, ratios: Tensor, label: Tensor, beta: float) -> Metrics:
    """DPO's usual figures under their usual names.  logps: (pairs, 2); ratios: (2, pairs); label: (pairs,) +1 or -1"""
    margins = beta * label * (ratios[0] - ratios[1]).detach()
    chosen = torch.where(label > 0, logps[:, 0], logps[:, 1]).detach()
    rejected = torch.where(label > 0, logps[:, 1], logps[:, 0]).detach()
    rewards = (
        beta * torch.where(label > 0, ratios, ratios.flip(0)).detach()
    )  # (2, pairs): of the chosen and of the rejected
    return {
        "rewards/chosen": float(rewards[0].mean()),
        "rewards/rejected": float(rewards[1].mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).float().mean()),
        "logps/chosen": float(chosen.mean()),
        "logps/rejected": float(rejected.mean()),
    }


TABLE: dict[str, type[Any]] = {"sft": Sft, "dpo": Dpo, "scir": Scir}
