"""Backends produce text, and verdicts at one position.

All that enters a loss is scored by the engine (policy.py), not by a backend.
A backend is chosen by name, or as "module:Class". It derives from `Backend`, or from
`VerdictBackend` if it can score verdicts too. Each gets the stage's model (lazy_policy.py), whose
weights it loads only if it needs them in this process.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from scir_cli import plugins
from scir_cli.engine.trees import Branch
from scir_cli.errors import ConfigError, suggest
from scir_cli.settings import BackendSettings

if TYPE_CHECKING:
    from torch import Tensor

TABLE = {
    "transformers": "scir_cli.backends.transformers:TransformersBackend",
    "vllm": "scir_cli.backends.vllm:VllmBackend",
    "openai": "scir_cli.backends.openai:OpenAIBackend",
    "fake": "scir_cli.backends.fake:FakeBackend",
}


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    temperature: 0 is greedy. top_p: sample from the smallest set of tokens with this probability.
    max_new_tokens: per request. batch_size: requests at a time.
    top_k: sample from so many of the likeliest tokens; 0: from all.
    min_p: sample from tokens with at least this share of the likeliest token's probability.
    repetition_penalty: logits of tokens in the prompt or the response are divided by it if they
    are positive, and multiplied if they are negative (CTRL, arXiv 1909.05858).

    As in vLLM, the order is repetition_penalty, temperature, min_p, top_k, top_p, each on the
    renormalized rest of the one before.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def limits(self) -> dict[str, float]:
        """The settings of vLLM that are not at their defaults, beside temperature and top_p."""
        limits = {
            "top_k": (self.top_k, 0),
            "min_p": (self.min_p, 0.0),
            "repetition_penalty": (self.repetition_penalty, 1.0),
        }
        return {name: value for name, (value, default) in limits.items() if value != default}


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and its own seed: the answer depends on no other request."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """Sampled token ids, with the end token if it was sampled.

    finish_reason: "stop" or "length".
    """

    token_ids: tuple[int, ...]
    finish_reason: str


class Backend(ABC):
    """The base class of every backend, also of a user's: `--backend my_module:MyBackend`.

    In `judge` it writes rationales; the engine scores the verdicts.
    """

    #: It computes on this machine's GPUs, so each worker gets separate GPUs
    uses_gpus: ClassVar[bool] = True
    #: It scores verdicts itself: see `VerdictBackend`
    reads_verdicts: ClassVar[bool] = False
    #: It returns the likeliest tokens only, so a verdict can be unknown (NaN)
    truncates_logprobs: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, model: Any, sampling: Sampling, settings: Any) -> None:
        """Opens the backend for a model.

        model: has `chat`, `path`, `meter`, and `load()`, which returns the loaded policy.
        """

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests."""

    def close(self) -> None:  # noqa: B027 (most backends hold nothing)
        """Releases its resources beside the model: a process, its memory, connections."""


class VerdictBackend(Backend):
    """A backend that also scores verdicts: tokens at one position, which enter no loss."""

    reads_verdicts = True

    @abstractmethod
    def score(self, branches: Sequence[Branch]) -> Tensor:
        """Log-probability of the single target of each branch, NaN if it is unknown.

        -> (branches,) nats, fp32
        """


def verdict_tokens(branches: Sequence[Branch]) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> the tokens to score after it: one request covers all its verdicts."""
    tokens: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for branch in branches:
        tokens[branch.ids] |= set(branch.target_tokens)
    return {prompt: sorted(targets) for prompt, targets in tokens.items()}


def resolve(name: str) -> str:
    """The backend that `auto` selects on this machine; other names are returned unchanged.

    vllm if it is installed and a GPU is available, else transformers.
    """
    if name != "auto":
        return name
    import torch

    if importlib.util.find_spec("vllm") and torch.cuda.is_available():
        return "vllm"
    return "transformers"


def load(name: str) -> type[Backend]:
    """The class of the backend of this name or "module:Class".

    Raises ConfigError if the backend does not exist or cannot be loaded.
    """
    target = TABLE.get(name, name)
    if not plugins.is_target(target):
        raise ConfigError(f"unknown backend '{name}'.{suggest(name, [*TABLE, 'auto'])}")
    return plugins.load_class(target, Backend, "backend")


def make(
    name: str, model: Any, sampling: Sampling, settings: BackendSettings | None = None
) -> Backend:
    """The backend of this name or "module:Class"; raises ConfigError as `load` does."""
    return load(name)(model, sampling, settings)
