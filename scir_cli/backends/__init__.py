"""Backends produce text, and verdicts at one position; whatever enters a loss comes from the engine (policy.py).

One is chosen by name, or as "module:Class". Each is given the model as a stage holds it, whose weights it reads only if it needs them in this process.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scir_cli.config import BackendSettings
from scir_cli.errors import ConfigError, suggest
from scir_cli.trees import Branch

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


class Backend(Protocol):
    def __init__(self, model: Any, sampling: Sampling, settings: Any) -> None:
        """model: with `chat`, `path`, `meter`, and `load()`, which returns it with its weights (lazy_policy.py)."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the order of the requests."""

    def close(self) -> None:
        """Gives back what it holds beside the model: a process, its memory, connections."""


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

    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"


def make(name: str, model: Any, sampling: Sampling, settings: BackendSettings | None = None) -> Backend:
    """The backend of this name or "module:Class"; raises ConfigError for an unknown one."""
    target = TABLE.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ConfigError(f"unknown backend '{name}'.{suggest(name, [*TABLE, 'auto'])}")
    try:
        backend = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the backend '{name}' cannot be imported: {error}") from error
    return backend(model, sampling, settings)  # type: ignore[no-any-return]
