"""A model whose weights are loaded on demand.

A plan needs a model's weights key, and a prompt its tokenizer; neither needs the weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from scir_cli.engine import loading, model_files, policy
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.policy import Policy
from scir_cli.engine.throughput import Meter
from scir_cli.settings import ModelSettings


class LazyPolicy:
    """A model spec with its path, tokenizer and weights key, and its weights after `load`.

    Weights are hashed once and the tokenizer is loaded once: `load` passes both to the policy.
    adapt: adds adapters to the model.
    ranks, cpu_offload: how the weights are sharded, as in `loading.load`.
    meter: counts what the model computes; several models may share one.
    Raises ModelError for a model that is missing or damaged.
    """

    def __init__(
        self,
        settings: ModelSettings,
        spec: str,
        *,
        adapt: Callable[[Any], Any] | None = None,
        ranks: DistributedContext | None = None,
        cpu_offload: bool = False,
        meter: Meter | None = None,
    ) -> None:
        """Loads the tokenizer and hashes the weights."""
        self.settings = settings
        self.adapt = adapt
        self.ranks = ranks
        self.cpu_offload = cpu_offload
        self.meter = meter or Meter()
        self.path = model_files.resolve(spec)
        self.chat = loading.load_chat(self.path, settings)
        self.weights_digest = model_files.digest(self.path)
        self.weights_key = loading.weights_key(self.weights_digest, settings, self.chat)
        self._policy: Policy | None = None

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over ranks, which must then score at the same time."""
        return self.ranks is not None

    @cached_property
    def encoding(self) -> str:
        """Digest of tokenizer and chat template, which datasets keep beside token ids."""
        return self.chat.encoding_digest()

    @cached_property
    def context_length(self) -> int:
        """The number of positions of the model, from its config."""
        base = model_files.base_model_path(self.path)
        return policy.context_length(loading.load_config(base, self.settings))

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._policy is not None

    def load(self) -> Policy:
        """The model with its weights, which the first call loads.

        Raises ModelError if they cannot be loaded.
        """
        if self._policy is None:
            self._policy = loading.load(
                self.settings,
                str(self.path),
                chat=self.chat,
                key=self.weights_key,
                meter=self.meter,
                adapt=self.adapt,
                ranks=self.ranks,
                cpu_offload=self.cpu_offload,
            )
        return self._policy

    def unload(self) -> None:
        """Frees the weights, unless another object refers to the policy; `load` reloads them."""
        self._policy = None

    def load_unsharded(self) -> Policy:
        """A second copy of the model with its adapters, on the CPU of this process alone."""
        return loading.load(
            self.settings,
            str(self.path),
            "cpu",
            chat=self.chat,
            key=self.weights_key,
            adapt=self.adapt,
        )
