"""Backends produce text, and verdicts at one position; whatever enters a loss comes from the engine (policy.py).

One is chosen by name, or as "module:Class", and derives from `Backend`, or from `VerdictBackend` if it can score
verdicts too. Each is given the model as a stage holds it, whose weights it reads only if it needs them in this process.
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
    """How to sample: temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability."""

    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the seed of its own randomness: the answer depends on no other request."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """Sampled token ids, end token included if it was sampled; finish_reason "stop" or "length"."""

    token_ids: tuple[int, ...]
    finish_reason: str


class Backend(ABC):
    """The base class of every backend, and of a user's own: `--backend my_module:MyBackend`.

    In `judge` it writes rationales; the engine scores the verdicts.
    """

    #: It computes on this machine's GPUs, so each worker gets its own
    uses_gpus: ClassVar[bool] = True
    #: It scores verdicts by itself: see `VerdictBackend`
    reads_verdicts: ClassVar[bool] = False
    #: It returns the likeliest tokens only, so a verdict may be unknown (NaN)
    truncates_logprobs: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, model: Any, sampling: Sampling, settings: Any) -> None:
        """model: with `chat`, `path`, `meter`, and `load()`, which returns it with its weights (lazy_policy.py)."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests."""

    def close(self) -> None:  # noqa: B027 (most backends hold nothing)
        """Releases what it holds beside the model: a process, its memory, connections."""


class VerdictBackend(Backend):
    """A backend that also scores verdicts: tokens at one position, which enter no loss."""

    reads_verdicts = True

    @abstractmethod
    def score(self, branches: Sequence[Branch]) -> Tensor:
        """Log-probability of the one target of each branch; NaN if it is unknown.  -> (branches,) nats, fp32"""


def verdict_tokens(branches: Sequence[Branch]) -> dict[tuple[int, ...], list[int]]:
    """The tokens whose log-probabilities are wanted at the end of each prompt: it is asked once for all of its verdicts."""
    wanted: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for branch in branches:
        wanted[branch.ids] |= set(branch.target_tokens)
    return {ids: sorted(tokens) for ids, tokens in wanted.items()}


def resolve(name: str) -> str:
    """The backend that `auto` means on this machine: vLLM where it is installed and a GPU is there. Other names are left as they are."""
    if name != "auto":
        return name
    import torch

    return (
        "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"
    )


def load(name: str) -> type[Backend]:
    """The class of the backend of this name or "module:Class"; raises ConfigError for one that cannot be used."""
    target = TABLE.get(name, name)
    if not plugins.is_target(target):
        raise ConfigError(f"unknown backend '{name}'.{suggest(name, [*TABLE, 'auto'])}")
    return plugins.load_class(target, Backend, "backend")


def make(
    name: str, model: Any, sampling: Sampling, settings: BackendSettings | None = None
) -> Backend:
    """The backend of this name or "module:Class"; raises as `load` does."""
    return load(name)(model, sampling, settings)
