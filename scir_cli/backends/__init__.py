"""Backends produce text; whatever enters a loss comes from the engine (policy.py). One is chosen by name, or as "module:Class"."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scir_cli.errors import ConfigError, suggest

TABLE = {"transformers": "scir_cli.backends.transformers:TransformersBackend", "fake": "scir_cli.backends.fake:FakeBackend"}


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
    def __init__(self, policy: Any, sampling: Sampling) -> None: ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the order of the requests."""


def make(name: str, policy: Any, sampling: Sampling) -> Backend:
    """The backend of this name or "module:Class"; raises ConfigError for an unknown one."""
    target = TABLE.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ConfigError(f"unknown backend '{name}'.{suggest(name, TABLE)}")
    try:
        backend = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the backend '{name}' cannot be imported: {error}") from error
    return backend(policy, sampling)  # type: ignore[no-any-return]
