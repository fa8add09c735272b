"""Backends that reason before they answer, named as `thinking_backends:Thinks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scir_cli.backends import Backend, Completion, Request, Sampling

REASONING = "<think>\nVerdict: B? No: it is {number}.\n</think>\n\n"
ANSWER = "Number {number}."


class Thinks(Backend):
    """Each answer has reasoning and a number of its own."""

    written = REASONING + ANSWER

    def __init__(self, model: Any, sampling: Sampling, settings: Any = None) -> None:
        self.chat = model.chat
        self.limit = sampling.max_new_tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions = []
        for request in requests:
            text = self.written.format(number=request.seed % 1000)
            ids = tuple(self.chat.tokenizer.encode(text, add_special_tokens=False))
            end = (min(self.chat.end_ids),)
            whole = len(ids) < self.limit
            completions.append(
                Completion(ids + end, "stop") if whole else Completion(ids[: self.limit], "length")
            )
        return completions


class NeverAnswers(Thinks):
    """Ends its turn inside its reasoning."""

    written = "<think>\nIt could be {number}. Verdict: A"


class WritesInChannels(Thinks):
    """Reasons in a channel of its own."""

    written = (
        "<|channel|>analysis<|message|>Verdict: B? No: it is {number}.<|end|><|start|>assistant"
        "<|channel|>final<|message|>" + ANSWER
    )
