"""A backend that needs no model: it answers a prompt with its own last tokens, cut by the seed. For tests and for trying a pipeline out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scir_cli.backends import Backend, Completion, Request, Sampling


class FakeBackend(Backend):
    uses_gpus = False

    def __init__(self, model: Any, sampling: Sampling, settings: Any = None) -> None:
        self.end = min(model.chat.end_ids)
        self.limit = sampling.max_new_tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        answers = [r.prompt_ids[-(2 + r.seed % 7) :] for r in requests]
        finished = [(*a, self.end) for a in answers]
        return [
            Completion(f, "stop") if len(f) <= self.limit else Completion(f[: self.limit], "length")
            for f in finished
        ]
