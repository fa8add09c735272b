"""The internal reward models: which token paths each scores for a pair, and its log-odds.

Each derives from `RewardModel`. So does a user's class, which `--reward-models module:Class` names:
it then works in judging, training, evaluation, validation figures and reports.
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
from scir_cli.engine.chat import AnswerOptions, Chat, n_shared
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

#: Boundaries between the words of a class name: brevity|Score, HTTP|Score
WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class RewardModel(ABC):
    """The base class of every reward model: `--reward-models judge,implicit,my_module:Brevity`.

    A reward model names the token paths to score for a pair (`branches`), and turns their summed
    log-probabilities under the policy into log-odds that the first response is better (`odds`, a
    pure function). Training calls the same two methods, and gradients flow through `odds`.
    The smallest reward model needs no path at all:

        from scir_cli.rewards.reward_models import RewardModel, RewardOutput


        class Brevity(RewardModel):
            n_branches = 0

            def branches(self, pair):
                return []

            def odds(self, logps, context):
                return RewardOutput(context.n_tokens[1] - context.n_tokens[0])

    Exchanging first and second must negate the log-odds.
    NaN means no verdict; in training each pair needs a number.
    """

    #: Name of its verdicts in datasets, figures and label rules; default: class name in snake case
    name: ClassVar[str] = ""
    #: Number of token paths that `branches` returns, the same for each pair
    n_branches: ClassVar[int]
    #: Each path ends in one target token, so a backend may score it in `judge`, which has no loss
    reads_verdicts: ClassVar[bool] = False
    #: `odds` returns `orders`: the responses are compared in both orders, as A and B
    has_seats: ClassVar[bool] = False
    #: The first two paths are the two answers after their prompt; the next iteration reuses their
    #: log-probabilities
    scores_answers: ClassVar[bool] = False
    #: `odds` reads `context.reference_logps`, so --reward-reference is required
    needs_reference: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = WORD_START.sub("_", cls.__name__).lower()

    def __init__(self, chat: Chat, settings: RewardSettings) -> None:
        self.chat = chat
        self.settings = settings

    def requests(self, pair: Pair) -> list[list[int]]:
        """Prompts (token ids) to answer in text before `branches` is called; usually none."""
        return []

    def decides(self, pair: Pair) -> bool:
        """Whether the model has a verdict on the pair, given the answers to its `requests`."""
        return True

    @abstractmethod
    def branches(self, pair: Pair) -> list[Branch]:
        """Token paths to score.

        The answers to `requests`, if any, are in `pair.rationale_token_ids`.
        """

    @abstractmethod
    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        """Log-odds from summed log-probabilities.

        logps: (branches, pairs), nats -> log_odds: (pairs,), nats
        """

    def _question(self, pair: Pair) -> str:
        """The pair's conversation as text, without the reasoning in earlier answers."""
        turns = []
        for turn in pair.messages:
            content = turn["content"]
            if turn["role"] == "assistant":
                _, content = self.chat.split(content, sampled=False)
            turns.append({**turn, "content": content})
        return question_text(turns, system=not self.settings.hide_system, quoted=True)


def _verdict_branches(prompts: Sequence[list[int]], tokens: Sequence[int]) -> list[Branch]:
    """Every verdict token after the first prompt, then after the next."""
    return [verdict(prompt, token) for prompt in prompts for token in tokens]


class Judge(RewardModel):
    """Pairwise verdict A or B, in both orders.

    It is read at the first token in which the two answers differ: what the chat template writes
    before both, such as an empty think block, belongs to the prompt.
    """

    n_branches = 4
    reads_verdicts = True
    has_seats = True
    #: Starts of lines that no text in the prompt may have, beside the template's own
    reserved: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def template(self) -> str:
        return load_template(*self._prompt(), ("question", "a", "b"))

    def _prompt(self) -> tuple[Path | None, str]:
        """The user's template file, if any, and the default template."""
        return self.settings.judge_prompt, PAIRWISE

    def _prompts(self, pair: Pair) -> list[list[int]]:
        """Token ids of the judge's prompt in both orders."""
        first, second = pair.texts
        question = self._question(pair)
        prompts = []
        for a, b in ((first, second), (second, first)):
            messages = fill(self.template, self.reserved, question=question, a=a, b=b)
            prompts.append(self.chat.prompt_ids(messages))
        return prompts

    @cached_property
    def _answers(self) -> AnswerOptions:
        """The two verdicts; raises ModelError if they do not differ in one token."""
        return self.chat.verdicts(self.settings.verdict_tokens)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the two verdicts."""
        return tuple(ending[0] for ending in self._answers.endings)

    def branches(self, pair: Pair) -> list[Branch]:
        prompts = [self._answers.prompt_ids(prompt) for prompt in self._prompts(pair)]
        return _verdict_branches(prompts, self.tokens)

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return log_odds.average_orders(logps.unflatten(0, (2, 2)))


class Rationale(Judge):
    """The judge with a rationale, which the model writes before its verdict is read."""

    reserved = ("Verdict:",)

    def _prompt(self) -> tuple[Path | None, str]:
        return self.settings.rationale_prompt, PAIRWISE_RATIONALE

    def requests(self, pair: Pair) -> list[list[int]]:
        return self._prompts(pair)

    def branches(self, pair: Pair) -> list[Branch]:
        """Both verdicts after prompt and rationale, in both orders.

        Raises DataError if the pair holds no rationales.
        """
        cue, _ = self._verdicts
        rationales = pair.rationale_token_ids.get("rationale")
        if not rationales:
            raise DataError(
                "these pairs hold no rationales: "
                "write them first with `scir judge --reward-models …,rationale`"
            )

        prompts = []
        for prompt, rationale in zip(self._prompts(pair), rationales, strict=True):
            prompts.append([*prompt, *self._without_verdict(rationale), *cue])
        return _verdict_branches(prompts, self.tokens)

    @cached_property
    def _verdicts(self) -> tuple[list[int], tuple[int, ...]]:
        """Token ids of the text between a rationale and its verdict, and of each verdict.

        Raises ModelError if the verdicts do not differ in one token.
        """
        words = self.settings.verdict_tokens
        endings = [self._encode(f"\n\nVerdict: {word}") for word in words]
        length = n_shared(endings)
        if any(len(ending) != length + 1 for ending in endings):
            quoted = " and ".join(map(repr, words))
            raise ModelError(
                f"the verdicts {quoted} are not one token each for this tokenizer; "
                "choose others with --verdict-tokens"
            )
        return endings[0][:length], tuple(ending[-1] for ending in endings)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return self._verdicts[1]

    def _encode(self, text: str) -> list[int]:
        return self.chat.encoder.encode_content(text)

    def decides(self, pair: Pair) -> bool:
        """False if a rationale ends inside its reasoning."""
        rationales = pair.rationale_token_ids.get("rationale", ())
        return all(self.chat.n_reasoning_tokens(ids) is not None for ids in rationales)

    def _without_verdict(self, rationale: Sequence[int]) -> list[int]:
        """The rationale up to its own verdict, which is read from probabilities instead.

        Its reasoning, and special tokens that the model wrote, such as a channel header, are kept
        as they are.
        """
        content = [token for token in rationale if token not in self.chat.end_ids]
        specials = set(self.chat.encoder.special_ids.values())
        positions = [index for index, token in enumerate(content) if token in specials]
        start = positions[-1] + 1 if positions else 0
        start = max(start, self.chat.n_reasoning_tokens(content) or 0)
        text = self.chat.tokenizer.decode(content[start:])
        return [*content[:start], *self._encode(text.split("Verdict:")[0].rstrip())]


class Rubric(RewardModel):
    """Additive score 0-5 of each response: its expectation over the score tokens (2401.10020)."""

    n_branches = 12
    reads_verdicts = True

    @cached_property
    def template(self) -> str:
        return load_template(self.settings.rubric_prompt, RUBRIC, ("question", "response"))

    @cached_property
    def _answers(self) -> AnswerOptions:
        """The six scores."""
        return self.chat.verdicts([str(score) for score in range(6)])

    def branches(self, pair: Pair) -> list[Branch]:
        question = self._question(pair)
        prompts = []
        for text in pair.texts:
            request = fill(self.template, question=question, response=text)
            prompts.append(self._answers.prompt_ids(self.chat.prompt_ids(request)))
        tokens = [ending[0] for ending in self._answers.endings]
        return _verdict_branches(prompts, tokens)

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        # (6 scores, 2 responses, pairs)
        score_logps = logps.unflatten(0, (2, 6)).transpose(0, 1)
        # (2, pairs) each
        scores, mass = log_odds.expected_score(score_logps)
        output = log_odds.difference(scores)
        return RewardOutput(output.log_odds, verdict_mass=mass.mean(0))


def _answer_branches(prompt_ids: Sequence[int], pair: Pair) -> list[Branch]:
    """Both responses after this prompt."""
    return [continuation(prompt_ids, ids) for ids in pair.response_ids]


class Implicit(RewardModel):
    """The DPO reward: log-ratio of the policy against `reward_reference` (arXiv 2305.18290)."""

    n_branches = 2
    scores_answers = True
    needs_reference = True

    def branches(self, pair: Pair) -> list[Branch]:
        return _answer_branches(pair.prompt_ids, pair)

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        settings = self.settings
        scale = settings.implicit_scale * settings.implicit_beta
        return log_odds.difference(logps - context.reference_logps, scale)


class Likelihood(RewardModel):
    """Mean log-probability per token, without a reference (SimPO's reward, arXiv 2405.14734)."""

    n_branches = 2
    scores_answers = True

    def branches(self, pair: Pair) -> list[Branch]:
        return _answer_branches(pair.prompt_ids, pair)

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        per_token = logps / context.n_tokens
        return log_odds.difference(per_token, self.settings.likelihood_scale)


class Pmi(RewardModel):
    """Pointwise mutual information of prompt and answer, per token of the answer (ours).

    The mean log-ratio of the answer with and without its prompt.
    """

    n_branches = 4
    scores_answers = True

    def branches(self, pair: Pair) -> list[Branch]:
        empty_prompt = self.chat.prompt_ids([{"role": "user", "content": ""}])
        opening = self.chat.opening
        if opening and opening.cue and pair.prompt_ids[-len(opening.cue) :] == opening.cue:
            empty_prompt = opening.prompt_ids(empty_prompt)
        return [
            *_answer_branches(pair.prompt_ids, pair),
            *_answer_branches(empty_prompt, pair),
        ]

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        # (2, pairs) each
        with_prompt, without = logps.unflatten(0, (2, 2))
        per_token = (with_prompt - without) / context.n_tokens
        return log_odds.difference(per_token, self.settings.likelihood_scale)


class External(RewardModel):
    """Log-odds that are part of the data."""

    n_branches = 0

    def branches(self, pair: Pair) -> list[Branch]:
        return []

    def odds(self, logps: Tensor, context: Context) -> RewardOutput:
        return RewardOutput(context.external)


BUILT_IN = (Judge, Implicit, Rubric, Rationale, Likelihood, Pmi, External)
TABLE: dict[str, type[RewardModel]] = {model.name: model for model in BUILT_IN}
#: Words that a rule of `filter` or a table uses besides the names of reward models
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
#: In the penalty a model with seats counts as two, with these suffixes
ORDERS = ("_forward", "_swapped")


def load(name: str) -> type[RewardModel]:
    """The class of a built-in name or "module:Class".

    Raises ConfigError if the name is unknown or if the class cannot be used.
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
    if not _is_usable_name(model.name):
        reserved = ", ".join(sorted(RESERVED))
        suffixes = " or ".join(ORDERS)
        raise ConfigError(
            f"reward model '{name}' cannot be called '{model.name}': "
            "set its attribute `name` to another one, of letters, digits and _ "
            f"(reserved: {reserved}, and names that end in {suffixes})"
        )
    return model


def _is_usable_name(name: str) -> bool:
    if name in RESERVED or name.endswith(ORDERS):
        return False
    return re.fullmatch(r"[a-z]\w*", name) is not None


def load_all(names: Sequence[str]) -> dict[str, type[RewardModel]]:
    """The classes of these names under the name of their verdicts, in this order.

    Raises ConfigError as `load` does, and if two classes have the same name.
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
    """The reward models of these names, under the name of their verdicts, in this order.

    Raises ConfigError as `load_all` does.
    """
    return {name: model(chat, settings) for name, model in load_all(names).items()}


def all_branches(models: dict[str, RewardModel], pair: Pair) -> list[Branch]:
    """The branches of all models for a pair, one model after the other.

    Raises ConfigError if a user's model contradicts its attributes.
    """
    collected = []
    for name, model in models.items():
        branches = model.branches(pair)
        if name not in TABLE:
            _check(model, pair, branches)
        collected += branches
    return collected


def _check(model: RewardModel, pair: Pair, branches: list[Branch]) -> None:
    """Raises ConfigError if a user's model returns other branches than its attributes promise."""
    if len(branches) != model.n_branches:
        raise ConfigError(
            f"reward model '{model.name}' returned {len(branches)} branches for a pair; "
            f"its n_branches is {model.n_branches}"
        )
    if model.reads_verdicts and any(len(branch.target_tokens) != 1 for branch in branches):
        raise ConfigError(
            f"reward model '{model.name}' sets reads_verdicts, "
            "but one of its branches does not have exactly one target token"
        )
    answers = _answer_branches(pair.prompt_ids, pair)
    if model.scores_answers and branches[:2] != answers:
        raise ConfigError(
            f"reward model '{model.name}' sets scores_answers, but its first two branches are "
            "not continuation(pair.prompt_ids, ids) for ids in pair.response_ids"
        )


def undecided(models: dict[str, RewardModel], pair: Pair) -> list[str]:
    """The models without a verdict on the pair."""
    return [name for name, model in models.items() if not model.decides(pair)]


def answer_logps(models: dict[str, RewardModel], logps: Tensor) -> Tensor | None:
    """The policy's log-probabilities of both answers, None if no model scores them.

    logps: (pairs, branches), nats -> (pairs, 2)
    """
    parts = branch_slices(models)
    for name, model in models.items():
        if model.scores_answers:
            return logps[:, parts[name]][:, :2]
    return None


def branch_slices(models: dict[str, RewardModel]) -> dict[str, slice]:
    """The positions of each model's branches among those of `all_branches`."""
    slices = {}
    start = 0
    for name, model in models.items():
        end = start + model.n_branches
        slices[name] = slice(start, end)
        start = end
    return slices


def all_outputs(
    models: dict[str, RewardModel], logps: Tensor, context: Context
) -> dict[str, RewardOutput]:
    """Each model's output, with log-odds (pairs,) in nats.

    logps: (pairs, branches), the summed log-probabilities of `all_branches`, nats.
    Raises ConfigError if a user's model returns an output of another shape than promised.
    """
    outputs = {}
    for name, part in branch_slices(models).items():
        outputs[name] = models[name].odds(logps[:, part].T, context)

    shape = context.external.shape
    for name, output in outputs.items():
        if not isinstance(output, RewardOutput) or output.log_odds.shape != shape:
            raise ConfigError(
                f"reward model '{name}' must return a RewardOutput with one log-odds per pair, "
                f"a tensor of {len(context.external)}"
            )
        if models[name].has_seats != (output.orders is not None):
            raise ConfigError(
                f"reward model '{name}': its RewardOutput must have `orders` if, and only if, "
                "its attribute has_seats is True"
            )
    return outputs
