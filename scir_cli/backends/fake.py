"""A backend that needs no model, for tests and for trying out a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scir_cli.backends import Backend, Completion, Request, Sampling


class FakeBackend(Backend):
    """Completes a prompt with its last 2 to 8 tokens; the seed determines how many."""

    uses_gpus = False

    def __init__(self, model: Any, sampling: Sampling, settings: Any = None) -> None:
        self.end = min(model.chat.end_ids)
        self.limit = sampling.max_new_tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests."""
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        length = 2 + request.seed % 7
        tokens = (*request.prompt_ids[-length:], self.end)
        if len(tokens) <= self.limit:
            return Completion(tokens, "stop")
        return Completion(tokens[: self.limit], "length")
