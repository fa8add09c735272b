"""Where the reasoning of an answer ends.

A chat template writes reasoning between two markers, as <think> and </think>, or in a channel of
its own. The markers are found in what it renders for an answer with reasoning. A template that
renders none, and a tokenizer that knows a common marker, are searched for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Keys of a message under which chat templates look for reasoning
KEYS = ("reasoning_content", "reasoning", "thinking")

#: Markers of today's models: start and end
COMMON = (
    ("<think>", "</think>"),
    ("<|channel>", "<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)

#: A start marker that differs from its end by a slash
CLOSING = re.compile(r"([<\[])/(.+)", re.DOTALL)


@dataclass(frozen=True)
class Markers:
    """The texts around the reasoning of an answer.

    start: "" if it is unknown. opened: the generation prompt ends inside the reasoning.
    """

    start: str
    end: str
    opened: bool = False

    def split(self, text: str, *, sampled: bool) -> tuple[str, str]:
        """The reasoning of an answer up to and with its end marker, and the rest; "" if none.

        The white space between them belongs to the reasoning, so both together are the text.
        sampled: a model wrote it after the generation prompt.
        """
        begins = bool(self.start) and text.lstrip().startswith(self.start)
        may_end = begins or self.opened or not self.start or text.lstrip().startswith(self.end)
        if may_end and self.end in text:
            answer = text.partition(self.end)[2].lstrip()
            return text[: len(text) - len(answer)], answer
        if begins or (sampled and self.opened):
            return text, ""
        return "", text


def from_rendered(
    generation: str, plain: str, reasoned: str, reasoning: str, answer: str
) -> Markers | None:
    """The markers in a rendered conversation; None if it has no reasoning, or nothing after it.

    generation: the generation prompt. plain, reasoned: the conversation with the same answer,
    without and with reasoning.
    """
    before, found, after = reasoned.partition(reasoning)
    between, has_answer, _ = after.partition(answer)
    if not (found and has_answer and between.strip()):
        return None
    header = _shared(generation, before)
    cue = plain[len(_shared(generation, plain)) :].partition(answer)[0]
    # A channel's header stands before an answer without reasoning too, the end of a turn does not.
    reversed_end = _shared(between[::-1], cue[::-1])
    end = reversed_end[::-1].strip() or between.strip()
    start = before[len(header) :].strip() or _start_of(end)
    return Markers(start, end, opened=header == generation and header == before)


def from_spelling(generation: str, template: str, vocabulary: set[str]) -> Markers | None:
    """The first of the common markers that the template or the tokenizer has; None if none."""
    for start, end in COMMON:
        if end in template or end in vocabulary:
            return Markers(start, end, opened=generation.rstrip().endswith(start))
    return None


def with_end(end: str, generation: str) -> Markers:
    """The markers for an end that the user names."""
    start = dict((end, start) for start, end in COMMON).get(end) or _start_of(end)
    opened = bool(start) and generation.rstrip().endswith(start)
    return Markers(start, end, opened)


def _start_of(end: str) -> str:
    """The start marker of an end that has a slash, as </think>; else ""."""
    return CLOSING.sub(r"\1\2", end) if CLOSING.fullmatch(end) else ""


def _shared(first: str, second: str) -> str:
    """The longest common start of two texts."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]
