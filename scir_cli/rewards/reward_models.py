"""The internal reward models: what each asks of the policy about a pair, and how the answer becomes log-odds.

Each derives from `RewardModel`, as a user's own does, which `--reward-models module:Class` names: it then works in
judging, training, evaluation, validation figures and reports.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from scir_cli import plugins
from scir_cli.engine.chat import Chat, Message
from scir_cli.engine.trees import Branch, continuation, verdict
from scir_cli.errors import ConfigError, DataError, ModelError, suggest
from scir_cli.rewards import log_odds
from scir_cli.rewards.log_odds import RewardOutput
from scir_cli.rewards.pairs import Context, Pair
from scir_cli.rewards.prompts import (
    PAIRWISE,
    PAIRWISE_RATIONALE,
    RUBRIC,
    fill,
    load_template,
    question_text,
)
from scir_cli.settings import RewardSettings

#: Where a word of a class name begins, but for the first: brevity|Score, HTTP|Score
WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class RewardModel(ABC):
    """The base class of every reward model, and of a user's own: `--reward-models judge,implicit,my_module:Brevity`.

    A reward model names the token paths to score for a pair (`branches`), and turns their summed log-probabilities
    under the policy into log-odds that the first response is better (`odds`, a pure function). In training the same two
    methods are called, and gradients flow through `odds`. The smallest one needs no path at all:

        from scir_cli.rewards.reward_models import RewardModel, RewardOutput


        class Brevity(RewardModel):
            n_branches = 0

            def branches(self, pair):
                return []

            def odds(self, logps, context):
                return RewardOutput(context.n_tokens[1] - context.n_tokens[0])

    Exchanging first and second must negate the log-odds. NaN is no verdict; in training each pair needs a number.
    """

    #: Name of its verdicts in datasets, figures and `--rule`; by default the class name in snake case
    name: ClassVar[str] = ""
    #: Number of token paths that `branches` returns, the same for each pair
    n_branches: ClassVar[int]
    #: Each path ends in one target token; such a path enters no loss in `judge`, so a backend may score it
    reads_verdicts: ClassVar[bool] = False
    #: `odds` returns `orders`: the responses are compared in both orders, as A and B
    has_seats: ClassVar[bool] = False
    #: The first two paths are the two answers after their prompt; their log-probabilities are kept for the next iteration
    scores_answers: ClassVar[bool] = False
    #: `odds` reads `context.reference_logps`, so --reward-reference has to be given
    needs_reference: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = WORD_START.sub("_", cls.__name__).lower()

    def __init__(self, chat: Chat, settings: RewardSettings) -> None:
        self.chat = chat
        self.settings = settings

    def requests(self, pair: Pair) -> list[list[int]]:
        """Prompts (token ids) that have to be answered in text before `branches` is called; usually none."""
        return []

    @abstractmethod
    def branches(self, pair: Pair) -> list[Branch]:
        """Token paths to score; if there are `requests`, their answers are in `pair.rationale_token_ids`."""

    @abstractmethod
    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        """Log-odds from summed log-probabilities.  logps: (branches, pairs), nats -> log_odds: (pairs,), nats"""


class Judge(RewardModel):
    """Pairwise verdict A or B at the first token of the answer, in both orders."""

    n_branches = 4
    reads_verdicts = True
    has_seats = True

    @cached_property
    def template(self) -> str:
        return load_template(*self._prompt(), ("question", "a", "b"))

    def _prompt(self) -> tuple[Path | None, str]:
        """The user's file, and ours."""
        return self.settings.judge_prompt, PAIRWISE

    def _prompts(self, pair: Pair) -> list[list[int]]:
        first, second = pair.texts
        orders = ((first, second), (second, first))
        return [
            self.chat.prompt_ids(
                fill(self.template, question=question_text(pair.messages), a=a, b=b)
            )
            for a, b in orders
        ]

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        ask: list[Message] = [{"role": "user", "content": "Reply with A or B."}]
        tokens = tuple(self.chat.answer_token(ask, word) for word in self.settings.verdict_tokens)
        if len(set(tokens)) == 1:
            raise ConfigError(
                f"the verdicts {self.settings.verdict_tokens} are the same token; choose two with --verdict-tokens"
            )
        return tokens

    def branches(self, pair: Pair) -> list[Branch]:
        return [verdict(prompt, token) for prompt in self._prompts(pair) for token in self.tokens]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return log_odds.average_orders(logps.unflatten(0, (2, 2)))


class Rationale(Judge):
    """The judge writes its reasons first; the verdict is then read as the judge's is."""

    def _prompt(self) -> tuple[Path | None, str]:
        return self.settings.rationale_prompt, PAIRWISE_RATIONALE

    def requests(self, pair: Pair) -> list[list[int]]:
        return self._prompts(pair)

    def branches(self, pair: Pair) -> list[Branch]:
        cue = self._verdicts[0][:-1]
        if not (reasons := pair.rationale_token_ids.get("rationale")):
            raise DataError(
                "these pairs hold no rationales: have `scir judge --reward-models …,rationale` write them first"
            )
        prompts = [
            [*p, *self._reasons(w), *cue] for p, w in zip(self._prompts(pair), reasons, strict=True)
        ]
        return [verdict(prompt, token) for prompt in prompts for token in self.tokens]

    @cached_property
    def _verdicts(self) -> list[list[int]]:
        """What is read after the reasons, ending in each verdict: the same ids but for the last one."""
        ends = [
            list(self.chat.tokenizer(f"\n\nVerdict: {w}", add_special_tokens=False)["input_ids"])
            for w in self.settings.verdict_tokens
        ]
        if ends[0] == ends[1]:
            raise ConfigError(
                f"the verdicts {self.settings.verdict_tokens} are the same token; choose two with --verdict-tokens"
            )
        if ends[0][:-1] != ends[1][:-1]:
            words = " and ".join(map(repr, self.settings.verdict_tokens))
            raise ModelError(
                f"the verdicts {words} are not one token each for this tokenizer; choose others with --verdict-tokens"
            )
        return ends

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return tuple(end[-1] for end in self._verdicts)

    def _reasons(self, written: Sequence[int]) -> list[int]:
        """What was written up to the verdict it may have given itself, which is read from probabilities instead."""
        text = self.chat.tokenizer.decode([t for t in written if t not in self.chat.end_ids])
        return list(
            self.chat.tokenizer(text.split("Verdict:")[0].rstrip(), add_special_tokens=False)[
                "input_ids"
            ]
        )


class Rubric(RewardModel):
    """Additive score 0-5 of each response, as its expectation over the score tokens (arXiv 2401.10020)."""

    n_branches = 12
    reads_verdicts = True

    @cached_property
    def template(self) -> str:
        return load_template(self.settings.rubric_prompt, RUBRIC, ("question", "response"))

    def branches(self, pair: Pair) -> list[Branch]:
        question = question_text(pair.messages)
        asks = [fill(self.template, question=question, response=text) for text in pair.texts]
        tokens = [self.chat.answer_token(asks[0], str(score)) for score in range(6)]
        prompts = [self.chat.prompt_ids(ask) for ask in asks]
        return [verdict(prompt, token) for prompt in prompts for token in tokens]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        scores, mass = log_odds.expected_score(
            logps.unflatten(0, (2, 6)).transpose(0, 1)
        )  # (2, pairs)
        return RewardOutput(
            log_odds.difference(scores, self.settings.rubric_scale).log_odds,
            verdict_mass=mass.mean(0),
        )


class Implicit(RewardModel):
    """The DPO reward: log-ratio of the policy against `reward_reference` (arXiv 2305.18290)."""

    n_branches = 2
    scores_answers = True
    needs_reference = True

    def branches(self, pair: Pair) -> list[Branch]:
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        s = self.settings
        return log_odds.difference(
            logps - context.reference_logps, s.implicit_scale * s.implicit_beta
        )


class Likelihood(RewardModel):
    """Mean log-probability per token, without a reference (SimPO's reward, arXiv 2405.14734)."""

    n_branches = 2
    scores_answers = True

    def branches(self, pair: Pair) -> list[Branch]:
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return log_odds.difference(logps / context.n_tokens, self.settings.likelihood_scale)


class Pmi(RewardModel):
    """Mean log-ratio per token of the answer with and without its prompt: pointwise mutual information (ours)."""

    n_branches = 4
    scores_answers = True

    def branches(self, pair: Pair) -> list[Branch]:
        nothing = self.chat.prompt_ids([{"role": "user", "content": ""}])
        return [
            continuation(prompt, ids)
            for prompt in (pair.prompt_ids, nothing)
            for ids in pair.response_ids
        ]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        with_prompt, without = logps.unflatten(0, (2, 2))  # (2, pairs) each
        return log_odds.difference(
            (with_prompt - without) / context.n_tokens, self.settings.likelihood_scale
        )


class External(RewardModel):
    """Log-odds that came with the data."""

    n_branches = 0

    def branches(self, pair: Pair) -> list[Branch]:
        return []

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return RewardOutput(context.external)


BUILT_IN = (Judge, Implicit, Rubric, Rationale, Likelihood, Pmi, External)
TABLE: dict[str, type[RewardModel]] = {model.name: model for model in BUILT_IN}
#: Words that a rule of `filter` or a table uses beside the names of reward models
RESERVED = {
    *TABLE,
    "agree",
    "agreed",
    "all",
    "average",
    "consensus",
    "gold",
    "majority",
    "none",
    "random",
}
#: In the penalty a model with seats is two, under these endings
ORDERS = ("_forward", "_swapped")


def load(name: str) -> type[RewardModel]:
    """The class of a built-in name or "module:Class"; raises ConfigError for one that cannot be used."""
    if name in TABLE:
        return TABLE[name]
    if not plugins.is_target(name):
        raise ConfigError(f"unknown reward model '{name}'.{suggest(name, TABLE)}")
    model = plugins.load_class(name, RewardModel, "reward model")
    if not isinstance(getattr(model, "n_branches", None), int):
        raise ConfigError(
            f"reward model '{name}' lacks n_branches, the number of token paths that `branches` returns"
        )
    if (
        model.name in RESERVED
        or model.name.endswith(ORDERS)
        or not re.fullmatch(r"[a-z]\w*", model.name)
    ):
        raise ConfigError(
            f"reward model '{name}' cannot be called '{model.name}': set its attribute `name` to another one, of letters, "
            f"digits and _ (reserved: {', '.join(sorted(RESERVED))}, and what ends in {' or '.join(ORDERS)})"
        )
    return model


def load_all(names: Sequence[str]) -> dict[str, type[RewardModel]]:
    """The classes of these names under the name of their verdicts, in this order; raises as `load` does, and for a repeated name."""
    models: dict[str, type[RewardModel]] = {}
    for name in names:
        model = load(name)
        if model.name in models:
            raise ConfigError(
                f"two of the reward models {', '.join(names)} are called '{model.name}'; set the attribute `name` of one"
            )
        models[model.name] = model
    return models


def make(names: Sequence[str], chat: Chat, settings: RewardSettings) -> dict[str, RewardModel]:
    """The reward models of these names, under the name of their verdicts, in this order; raises as `load_all` does."""
    return {name: model(chat, settings) for name, model in load_all(names).items()}


def all_branches(models: dict[str, RewardModel], pair: Pair) -> list[Branch]:
    """All branches the models ask about a pair, one model after the other; raises ConfigError for one that breaks its promises."""
    asked = []
    for name, model in models.items():
        branches = model.branches(pair)
        if name not in TABLE:
            _check(model, pair, branches)
        asked += branches
    return asked


def _check(model: RewardModel, pair: Pair, branches: list[Branch]) -> None:
    """Raises ConfigError if a user's model does not return the branches that its attributes promise."""
    if len(branches) != model.n_branches:
        raise ConfigError(
            f"reward model '{model.name}' returned {len(branches)} branches for a pair; its n_branches is {model.n_branches}"
        )
    if model.reads_verdicts and any(len(branch.target_tokens) != 1 for branch in branches):
        raise ConfigError(
            f"reward model '{model.name}' sets reads_verdicts, but one of its branches has not one target token"
        )
    answers = [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]
    if model.scores_answers and branches[:2] != answers:
        raise ConfigError(
            f"reward model '{model.name}' sets scores_answers, but its first two branches are not continuation(pair.prompt_ids, "
            "ids) for ids in pair.response_ids"
        )


def answer_logps(models: dict[str, RewardModel], logps: Tensor) -> Tensor | None:
    """The policy's log-probabilities of both answers, if a model scores them.  logps: (pairs, branches) -> (pairs, 2)"""
    parts = branch_slices(models)
    return next(
        (logps[:, parts[name]][:, :2] for name, model in models.items() if model.scores_answers),
        None,
    )


def branch_slices(models: dict[str, RewardModel]) -> dict[str, slice]:
    """Where each model's branches are among those of `ask`."""
    ends = list(itertools.accumulate(model.n_branches for model in models.values()))
    return {
        name: slice(end - model.n_branches, end)
        for (name, model), end in zip(models.items(), ends, strict=True)
    }


def all_outputs(
    models: dict[str, RewardModel], logps: Tensor, context: Context
) -> dict[str, RewardOutput]:
    """Each model's log-odds.  logps: (pairs, branches), as scored from `ask`"""
    answers = {
        name: models[name].odds(logps[:, part].T, context)
        for name, part in branch_slices(models).items()
    }
    for name, answer in answers.items():
        if not isinstance(answer, RewardOutput) or answer.log_odds.shape != context.external.shape:
            raise ConfigError(
                f"reward model '{name}' has to return RewardOutput with one log-odds per pair, a tensor of {len(context.external)}"
            )
        if models[name].has_seats != (answer.orders is not None):
            raise ConfigError(
                f"reward model '{name}': its RewardOutput have `orders` if, and only if, its attribute has_seats is True"
            )
    return answers
