"""The internal reward models: what each asks of the policy about a pair, and how the answer becomes log-odds.

Add one here and it is there in judging, training and evaluation. A reward model has three methods: `requests` (prompts it needs answered in
text first; usually none), `branches` (token paths to score, `n_branches` of them) and `odds` (their log-probabilities -> log-odds, pure).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from scir_cli import chat, odds
from scir_cli.chat import Chat, Message
from scir_cli.config import RewardSettings
from scir_cli.errors import ConfigError, DataError, ModelError
from scir_cli.odds import Odds
from scir_cli.trees import Branch, continuation, verdict


@dataclass(frozen=True)
class Pair:
    """A pair as the engine sees it: token ids for what is scored, text for what a judge reads."""

    pair_id: str
    messages: Sequence[Message]
    prompt_ids: tuple[int, ...]
    response_ids: tuple[tuple[int, ...], tuple[int, ...]]  # first, second
    texts: tuple[str, str]
    external: float | None = None  # log-odds somebody else gave, nats
    reference_logps: dict[str, tuple[float, float]] = field(default_factory=dict)  # weights key -> summed logps of first, second
    written: dict[str, Sequence[Sequence[int]]] = field(
        default_factory=dict
    )  # reward model -> its answers to `requests`, token ids


@dataclass(frozen=True)
class Context:
    """What `odds` needs beside the policy's log-probabilities; pairs along the last axis."""

    n_tokens: Tensor  # (2, pairs) tokens of first and second
    reference_logps: Tensor  # (2, pairs) under reward_reference, nats; NaN where unknown
    external: Tensor  # (pairs,) NaN: no verdict

    @classmethod
    def of(cls, pairs: Sequence[Pair], reward_reference: str | None, device: Any = "cpu") -> Context:
        unknown = (float("nan"), float("nan"))
        reference = [p.reference_logps.get(reward_reference or "", unknown) for p in pairs]
        external = [float("nan") if p.external is None else p.external for p in pairs]
        lengths = [[len(ids) for ids in p.response_ids] for p in pairs]
        return cls(
            torch.tensor(lengths, dtype=torch.float32, device=device).T,
            torch.tensor(reference, dtype=torch.float32, device=device).T,
            torch.tensor(external, dtype=torch.float32, device=device),
        )


class RewardModel(Protocol):
    n_branches: ClassVar[int]
    reads_verdicts: ClassVar[bool]

    def requests(self, pair: Pair) -> list[list[int]]:
        """Prompts that have to be answered in text before `branches` can be asked."""

    def branches(self, pair: Pair) -> list[Branch]:
        """Token paths to score; where there are `requests`, their answers are in `pair.written`."""

    def odds(self, logps: Tensor, context: Context) -> Odds:
        """Log-odds from summed branch log-probabilities.  logps: (branches, pairs), nats"""


@dataclass(frozen=True)
class _Base:
    n_branches: ClassVar[int]
    reads_verdicts: ClassVar[bool] = False  # each branch is one token at one position: it enters no loss, so a backend may score it

    chat: Chat
    settings: RewardSettings

    def requests(self, pair: Pair) -> list[list[int]]:
        return []


class Judge(_Base):
    """Pairwise verdict A or B at the first token of the answer, in both orders."""

    n_branches = 4
    reads_verdicts = True

    @cached_property
    def template(self) -> str:
        return chat.load_template(*self._prompt(), ("question", "a", "b"))

    def _prompt(self) -> tuple[Path | None, str]:
        """The user's file, and ours."""
        return self.settings.judge_prompt, chat.PAIRWISE

    def _prompts(self, pair: Pair) -> list[list[int]]:
        first, second = pair.texts
        orders = ((first, second), (second, first))
        return [
            self.chat.prompt_ids(chat.fill(self.template, question=chat.question_text(pair.messages), a=a, b=b)) for a, b in orders
        ]

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        ask: list[Message] = [{"role": "user", "content": "Reply with A or B."}]
        tokens = tuple(self.chat.answer_token(ask, word) for word in self.settings.verdict_tokens)
        if len(set(tokens)) == 1:
            raise ConfigError(f"the verdicts {self.settings.verdict_tokens} are the same token; choose two with --verdict-tokens")
        return tokens

    def branches(self, pair: Pair) -> list[Branch]:
        return [verdict(prompt, token) for prompt in self._prompts(pair) for token in self.tokens]

    def odds(self, logps: Tensor, context: Context) -> Odds:
        return odds.two_orders(logps.unflatten(0, (2, 2)))


class Rationale(Judge):
    """The judge writes its reasons first; the verdict is then read as the judge's is."""

    def _prompt(self) -> tuple[Path | None, str]:
        return self.settings.rationale_prompt, chat.PAIRWISE_RATIONALE

    def requests(self, pair: Pair) -> list[list[int]]:
        return self._prompts(pair)

    def branches(self, pair: Pair) -> list[Branch]:
        cue = self._verdicts[0][:-1]
        if not (reasons := pair.written.get("rationale")):
            raise DataError("these pairs hold no rationales: have `scir judge --reward-models …,rationale` write them first")
        prompts = [[*p, *self._reasons(w), *cue] for p, w in zip(self._prompts(pair), reasons, strict=True)]
        return [verdict(prompt, token) for prompt in prompts for token in self.tokens]

    @cached_property
    def _verdicts(self) -> list[list[int]]:
        """What is read after the reasons, ending in each verdict: the same ids but for the last one."""
        ends = [
            list(self.chat.tokenizer(f"\n\nVerdict: {w}", add_special_tokens=False)["input_ids"])
            for w in self.settings.verdict_tokens
        ]
        if ends[0] == ends[1]:
            raise ConfigError(f"the verdicts {self.settings.verdict_tokens} are the same token; choose two with --verdict-tokens")
        if ends[0][:-1] != ends[1][:-1]:
            words = " and ".join(map(repr, self.settings.verdict_tokens))
            raise ModelError(f"the verdicts {words} are not one token each for this tokenizer; choose others with --verdict-tokens")
        return ends

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return tuple(end[-1] for end in self._verdicts)

    def _reasons(self, written: Sequence[int]) -> list[int]:
        """What was written up to the verdict it may have given itself, which is read from probabilities instead."""
        text = self.chat.tokenizer.decode([t for t in written if t not in self.chat.end_ids])
        return list(self.chat.tokenizer(text.split("Verdict:")[0].rstrip(), add_special_tokens=False)["input_ids"])


class Rubric(_Base):
    """Additive score 0-5 of each response, as its expectation over the score tokens (arXiv 2401.10020)."""

    n_branches = 12
    reads_verdicts = True

    @cached_property
    def template(self) -> str:
        return chat.load_template(self.settings.rubric_prompt, chat.RUBRIC, ("question", "response"))

    def branches(self, pair: Pair) -> list[Branch]:
        question = chat.question_text(pair.messages)
        asks = [chat.fill(self.template, question=question, response=text) for text in pair.texts]
        tokens = [self.chat.answer_token(asks[0], str(score)) for score in range(6)]
        prompts = [self.chat.prompt_ids(ask) for ask in asks]
        return [verdict(prompt, token) for prompt in prompts for token in tokens]

    def odds(self, logps: Tensor, context: Context) -> Odds:
        scores, mass = odds.expected_score(logps.unflatten(0, (2, 6)).transpose(0, 1))  # (2, pairs)
        return Odds(odds.difference(scores, self.settings.rubric_scale).log_odds, verdict_mass=mass.mean(0))


class Implicit(_Base):
    """The DPO reward: log-ratio of the policy against `reward_reference` (arXiv 2305.18290)."""

    n_branches = 2

    def branches(self, pair: Pair) -> list[Branch]:
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> Odds:
        s = self.settings
        return odds.difference(logps - context.reference_logps, s.implicit_scale * s.implicit_beta)


class Likelihood(_Base):
    """Mean log-probability per token, without a reference (SimPO's reward, arXiv 2405.14734)."""

    n_branches = 2

    def branches(self, pair: Pair) -> list[Branch]:
        return [continuation(pair.prompt_ids, ids) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> Odds:
        return odds.difference(logps / context.n_tokens, self.settings.likelihood_scale)


class Pmi(_Base):
    """Mean log-ratio per token of the answer with and without its prompt: pointwise mutual information (ours)."""

    n_branches = 4

    def branches(self, pair: Pair) -> list[Branch]:
        nothing = self.chat.prompt_ids([{"role": "user", "content": ""}])
        return [continuation(prompt, ids) for prompt in (pair.prompt_ids, nothing) for ids in pair.response_ids]

    def odds(self, logps: Tensor, context: Context) -> Odds:
        with_prompt, without = logps.unflatten(0, (2, 2))  # (2, pairs) each
        return odds.difference((with_prompt - without) / context.n_tokens, self.settings.likelihood_scale)


class External(_Base):
    """Log-odds that came with the data."""

    n_branches = 0

    def branches(self, pair: Pair) -> list[Branch]:
        return []

    def odds(self, logps: Tensor, context: Context) -> Odds:
        return Odds(context.external)


TABLE: dict[str, type[Any]] = {
    "judge": Judge, "implicit": Implicit, "rubric": Rubric, "rationale": Rationale, "likelihood": Likelihood, "pmi": Pmi, "external": External,
}  # fmt: skip


def make(names: Sequence[str], chat: Chat, settings: RewardSettings) -> dict[str, RewardModel]:
    """The reward models of these names, in this order."""
    return {name: TABLE[name](chat, settings) for name in names}


def ask(models: dict[str, RewardModel], pair: Pair) -> list[Branch]:
    """All branches the models ask about a pair, one model after the other."""
    return [branch for model in models.values() for branch in model.branches(pair)]


def columns(models: dict[str, RewardModel]) -> dict[str, slice]:
    """Where each model's branches are among those of `ask`."""
    ends = list(itertools.accumulate(model.n_branches for model in models.values()))
    return {name: slice(end - model.n_branches, end) for (name, model), end in zip(models.items(), ends, strict=True)}


def answer(models: dict[str, RewardModel], logps: Tensor, context: Context) -> dict[str, Odds]:
    """Each model's log-odds.  logps: (pairs, branches), as scored from `ask`"""
    return {name: models[name].odds(logps[:, part].T, context) for name, part in columns(models).items()}
