"""The internal reward models: token paths to score per pair, and log-odds from their scores.

Each one derives from `RewardModel`. So does a user's own, named by `--reward-models module:Class`;
it works in judging, training, evaluation, validation figures and reports.
"""

from __future__ import annotations

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

#: The start of each further word in a class name: Brevity|Score, HTTP|Score
WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class RewardModel(ABC):
    """Base class of every reward model, also of a user's own.

    A reward model names the token paths to score for a pair (`branches`), and turns their summed
    log-probabilities under the policy into log-odds that the first response is better (`odds`, a
    pure function). Training calls the same two methods, and gradients flow through `odds`.
    The smallest one needs no path at all:

        from scir_cli.rewards.reward_models import RewardModel, RewardOutput


        class Brevity(RewardModel):
            n_branches = 0

            def branches(self, pair):
                return []

            def odds(self, logps, context):
                return RewardOutput(context.n_tokens[1] - context.n_tokens[0])

    Exchanging the responses must negate the log-odds.
    NaN means no verdict; training needs a number for every pair.
    """

    #: Name of its verdicts in datasets, figures and `--rule`; default: class name in snake case
    name: ClassVar[str] = ""
    #: Number of token paths that `branches` returns, the same for each pair
    n_branches: ClassVar[int]
    #: Each path ends in one target token and enters no loss in `judge`, so a backend may score it
    reads_verdicts: ClassVar[bool] = False
    #: `odds` returns `orders`: the responses are compared in both orders, as A and B
    has_seats: ClassVar[bool] = False
    #: The first two paths are the answers after their prompt; the next iteration reuses their
    #: log-probabilities
    scores_answers: ClassVar[bool] = False
    #: `odds` reads `context.reference_logps`, so --reward-reference is required
    needs_reference: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Set the default name: the class name in snake case."""
        if "name" not in vars(cls):
            cls.name = WORD_START.sub("_", cls.__name__).lower()

    def __init__(self, chat: Chat, settings: RewardSettings) -> None:
        self.chat = chat
        self.settings = settings

    def requests(self, pair: Pair) -> list[list[int]]:
        """Prompts (token ids) that need a written answer before `branches`; usually none."""
        return []

    @abstractmethod
    def branches(self, pair: Pair) -> list[Branch]:
        """Token paths to score; answers to `requests` are in `pair.rationale_token_ids`."""

    @abstractmethod
    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        """Log-odds from summed log-probabilities.

        logps: (branches, pairs), nats -> log_odds: (pairs,), nats
        """


class Judge(RewardModel):
    """Pairwise verdict A or B at the first token of the answer, in both orders.

    Branches: [first as A: "A", "B"; second as A: "A", "B"].
    """

    n_branches = 4
    reads_verdicts = True
    has_seats = True

    @cached_property
    def template(self) -> str:
        """The judge's prompt with the placeholders {question}, {a} and {b}."""
        return load_template(*self._prompt(), ("question", "a", "b"))

    def _prompt(self) -> tuple[Path | None, str]:
        """The user's prompt file, if any, and the built-in prompt."""
        return self.settings.judge_prompt, PAIRWISE

    def _prompts(self, pair: Pair) -> list[list[int]]:
        """Token ids of the judge's prompt in both orders."""
        first, second = pair.texts
        question = question_text(pair.messages)
        prompts = []
        for a, b in ((first, second), (second, first)):
            text = fill(self.template, question=question, a=a, b=b)
            prompts.append(self.chat.prompt_ids(text))
        return prompts

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the two verdicts. Raises ConfigError if they are the same token."""
        example: list[Message] = [{"role": "user", "content": "Reply with A or B."}]
        words = self.settings.verdict_tokens
        tokens = tuple(self.chat.answer_token(example, word) for word in words)
        if len(set(tokens)) == 1:
            raise _same_verdicts(words)
        return tokens

    def branches(self, pair: Pair) -> list[Branch]:
        return [verdict(prompt, token) for prompt in self._prompts(pair) for token in self.tokens]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return log_odds.average_orders(logps.unflatten(0, (2, 2)))


def _same_verdicts(words: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"the verdicts {words} are the same token; choose two others with --verdict-tokens"
    )


class Rationale(Judge):
    """The judge writes its reasons first; then its verdict is read as the judge's is."""

    def _prompt(self) -> tuple[Path | None, str]:
        return self.settings.rationale_prompt, PAIRWISE_RATIONALE

    def requests(self, pair: Pair) -> list[list[int]]:
        return self._prompts(pair)

    def branches(self, pair: Pair) -> list[Branch]:
        reasons = pair.rationale_token_ids.get("rationale")
        if not reasons:
            raise DataError(
                "these pairs hold no rationales; write them first with "
                "`scir judge --reward-models …,rationale`"
            )
        cue = self._verdicts[0][:-1]
        branches = []
        for prompt, written in zip(self._prompts(pair), reasons, strict=True):
            path = [*prompt, *self._reasons(written), *cue]
            branches += [verdict(path, token) for token in self.tokens]
        return branches

    @cached_property
    def _verdicts(self) -> list[list[int]]:
        """Token ids after the reasons, per verdict; only the last id differs.

        Raises ConfigError if both are the same, ModelError if a verdict takes several tokens.
        """
        words = self.settings.verdict_tokens
        ends = []
        for word in words:
            encoded = self.chat.tokenizer(f"\n\nVerdict: {word}", add_special_tokens=False)
            ends.append(list(encoded["input_ids"]))
        if ends[0] == ends[1]:
            raise _same_verdicts(words)
        if ends[0][:-1] != ends[1][:-1]:
            quoted = " and ".join(map(repr, words))
            raise ModelError(
                f"this tokenizer splits the verdicts {quoted} into several tokens; "
                "choose others with --verdict-tokens"
            )
        return ends

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return tuple(end[-1] for end in self._verdicts)

    def _reasons(self, written: Sequence[int]) -> list[int]:
        """Token ids of the reasons without the verdict that the model may have written.

        The verdict is read from probabilities instead.
        """
        tokenizer = self.chat.tokenizer
        text = tokenizer.decode([token for token in written if token not in self.chat.end_ids])
        reasons = text.split("Verdict:")[0].rstrip()
        return list(tokenizer(reasons, add_special_tokens=False)["input_ids"])


class Rubric(RewardModel):
    """Expected score (0 to 5) of each response over the score tokens (arXiv 2401.10020)."""

    n_branches = 12
    reads_verdicts = True

    @cached_property
    def template(self) -> str:
        """The rubric's prompt with the placeholders {question} and {response}."""
        return load_template(self.settings.rubric_prompt, RUBRIC, ("question", "response"))

    def branches(self, pair: Pair) -> list[Branch]:
        question = question_text(pair.messages)
        filled = [fill(self.template, question=question, response=text) for text in pair.texts]
        tokens = [self.chat.answer_token(filled[0], str(score)) for score in range(6)]
        prompts = [self.chat.prompt_ids(text) for text in filled]
        return [verdict(prompt, token) for prompt in prompts for token in tokens]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        # Scores first, as expected_score expects: (6, 2, pairs) -> (2, pairs)
        by_score = logps.unflatten(0, (2, 6)).transpose(0, 1)
        scores, mass = log_odds.expected_score(by_score)
        difference = log_odds.difference(scores, self.settings.rubric_scale)
        return RewardOutput(difference.log_odds, verdict_mass=mass.mean(0))


class Implicit(RewardModel):
    """The DPO reward: log-ratio of the policy against `reward_reference` (arXiv 2305.18290)."""

    n_branches = 2
    scores_answers = True
    needs_reference = True

    def branches(self, pair: Pair) -> list[Branch]:
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        scale = self.settings.implicit_scale * self.settings.implicit_beta
        return log_odds.difference(logps - context.reference_logps, scale)


class Likelihood(RewardModel):
    """Mean log-probability per token, without a reference (SimPO's reward, arXiv 2405.14734)."""

    n_branches = 2
    scores_answers = True

    def branches(self, pair: Pair) -> list[Branch]:
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return log_odds.difference(logps / context.n_tokens, self.settings.likelihood_scale)


class Pmi(RewardModel):
    """Pointwise mutual information of prompt and answer per token (ours).

    The mean over the answer's tokens of log p(token | prompt) - log p(token | empty prompt).
    """

    n_branches = 4
    scores_answers = True

    def branches(self, pair: Pair) -> list[Branch]:
        nothing = self.chat.prompt_ids([{"role": "user", "content": ""}])
        branches = []
        for prompt in (pair.prompt_ids, nothing):
            branches += [continuation(prompt, ids) for ids in pair.response_ids]
        return branches

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        # (2, pairs) each
        with_prompt, without = logps.unflatten(0, (2, 2))
        per_token = (with_prompt - without) / context.n_tokens
        return log_odds.difference(per_token, self.settings.likelihood_scale)


class External(RewardModel):
    """Log-odds or scores given in the input dataset."""

    n_branches = 0

    def branches(self, pair: Pair) -> list[Branch]:
        return []

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return RewardOutput(context.external)


BUILT_IN = (Judge, Implicit, Rubric, Rationale, Likelihood, Pmi, External)
TABLE: dict[str, type[RewardModel]] = {model.name: model for model in BUILT_IN}
#: Words with another meaning in `filter --rule` or in tables
RESERVED = {*TABLE, "agree", "agreed", "all", "average", "gold", "majority", "none", "random"}
#: Endings of the two orders' names, if the penalty compares the orders of a model with seats
ORDERS = ("_forward", "_swapped")


def load(name: str) -> type[RewardModel]:
    """The class of a built-in name or of "module:Class".

    Raises ConfigError if there is none, or if it lacks what a reward model needs.
    """
    if name in TABLE:
        return TABLE[name]
    if not plugins.is_target(name):
        raise ConfigError(f"unknown reward model '{name}'.{suggest(name, TABLE)}")
    model = plugins.load_class(name, RewardModel, "reward model")
    if not isinstance(getattr(model, "n_branches", None), int):
        raise ConfigError(
            f"reward model '{name}' lacks n_branches, "
            "the number of token paths that `branches` returns"
        )
    is_word = re.fullmatch(r"[a-z]\w*", model.name)
    if not is_word or model.name in RESERVED or model.name.endswith(ORDERS):
        raise ConfigError(
            f"reward model '{name}' cannot be called '{model.name}': set its attribute `name` to "
            f"letters, digits and _ (reserved: {', '.join(sorted(RESERVED))}, and names that end "
            f"in {' or '.join(ORDERS)})"
        )
    return model


def load_all(names: Sequence[str]) -> dict[str, type[RewardModel]]:
    """The classes of these names by the name of their verdicts, in this order.

    Raises ConfigError as `load` does, and if two classes have one name.
    """
    models: dict[str, type[RewardModel]] = {}
    for name in names:
        model = load(name)
        if model.name in models:
            raise ConfigError(
                f"two of the reward models {', '.join(names)} are called '{model.name}'; "
                "set the attribute `name` of one"
            )
        models[model.name] = model
    return models


def make(names: Sequence[str], chat: Chat, settings: RewardSettings) -> dict[str, RewardModel]:
    """The reward models by the name of their verdicts; raises as `load_all` does."""
    return {name: model(chat, settings) for name, model in load_all(names).items()}


def all_branches(models: dict[str, RewardModel], pair: Pair) -> list[Branch]:
    """The branches of all models for a pair, one model after the other.

    Raises ConfigError if a user's model does not return what its attributes promise.
    """
    every = []
    for name, model in models.items():
        branches = model.branches(pair)
        if name not in TABLE:
            _check(model, pair, branches)
        every += branches
    return every


def _check(model: RewardModel, pair: Pair, branches: list[Branch]) -> None:
    """Raises ConfigError if a user's model does not return what its attributes promise."""
    if len(branches) != model.n_branches:
        raise ConfigError(
            f"reward model '{model.name}' returned {len(branches)} branches for a pair; "
            f"its n_branches is {model.n_branches}"
        )
    if model.reads_verdicts and any(len(branch.target_tokens) != 1 for branch in branches):
        raise ConfigError(
            f"reward model '{model.name}' sets reads_verdicts, "
            "but one of its branches has not one target token"
        )
    answers = [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]
    if model.scores_answers and branches[:2] != answers:
        raise ConfigError(
            f"reward model '{model.name}' sets scores_answers, but its first two branches are not "
            "continuation(pair.prompt_ids, ids) for ids in pair.response_ids"
        )


def answer_logps(models: dict[str, RewardModel], logps: Tensor) -> Tensor | None:
    """The policy's log-probabilities of both answers; None if no model scores them.

    logps: (pairs, branches), nats -> (pairs, 2), nats
    """
    parts = branch_slices(models)
    for name, model in models.items():
        if model.scores_answers:
            return logps[:, parts[name]][:, :2]
    return None


def branch_slices(models: dict[str, RewardModel]) -> dict[str, slice]:
    """The positions of each model's branches in the result of `all_branches`."""
    slices = {}
    start = 0
    for name, model in models.items():
        slices[name] = slice(start, start + model.n_branches)
        start += model.n_branches
    return slices


def all_outputs(
    models: dict[str, RewardModel], logps: Tensor, context: Context
) -> dict[str, RewardOutput]:
    """The output of each model by name.

    logps: (pairs, branches), nats, in the order of `all_branches`.
    Raises ConfigError if an output lacks a log-odds per pair, or has `orders` without seats.
    """
    outputs = {}
    for name, part in branch_slices(models).items():
        outputs[name] = models[name].odds(logps[:, part].T, context)
    for name, output in outputs.items():
        is_output = isinstance(output, RewardOutput)
        if not is_output or output.log_odds.shape != context.external.shape:
            raise ConfigError(
                f"reward model '{name}' has to return RewardOutput with one log-odds per pair, "
                f"a tensor of {len(context.external)}"
            )
        if models[name].has_seats != (output.orders is not None):
            raise ConfigError(
                f"reward model '{name}': its RewardOutput must have `orders` if, and only if, "
                "its attribute has_seats is True"
            )
    return outputs
