"""Prompts of the generative reward models, and how their fields are filled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scir_cli.engine.chat import Message
from scir_cli.errors import ConfigError

PAIRWISE = """Which answer to the question is better?

Question: {question}

Answer A: {a}

Answer B: {b}

Reply with A or B."""

PAIRWISE_RATIONALE = """Compare two answers to a question.

Question: {question}

Answer A: {a}

Answer B: {b}

First explain in a few sentences which answer is better and why. \
Then write "Verdict:" and A or B."""

#: The additive five-point rubric of Self-Rewarding Language Models (arXiv 2401.10020), reworded.
RUBRIC = """\
Score how well a response answers a question. \
Start at 0 and add a point for each of these that holds:
it is relevant to the question; it answers a good part of it; \
it answers the question usefully and completely; it is well written and clearly
meant for the asker; it could hardly be better.

Question: {question}

Response: {response}

Reply with the score, a single digit from 0 to 5."""


def question_text(messages: Sequence[Message], *, system: bool = False) -> str:
    """A conversation as text: the bare text of a single turn, else each turn with its role.

    system: with its system turns.
    """
    turns = [message for message in messages if system or message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]

    lines = []
    for turn in turns:
        role = turn["role"].capitalize()
        lines.append(f"{role}: {turn['content']}")
    return "\n".join(lines)


def fill(template: str, **values: str) -> list[Message]:
    """A judge prompt as a one-turn conversation.

    Values are inserted verbatim: braces inside them have no meaning.
    """
    text = re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), template)
    return [{"role": "user", "content": text}]


def load_template(path: Path | None, default: str, fields: Sequence[str]) -> str:
    """The judge prompt in a text file, or the default if there is no path.

    Raises ConfigError if the file cannot be read or if a field is missing from it.
    """
    if path is None:
        return default

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the judge prompt {path} cannot be read: {error}") from error

    placeholders = ["{" + name + "}" for name in fields]
    missing = [placeholder for placeholder in placeholders if placeholder not in text]
    if missing:
        raise ConfigError(
            f"the judge prompt {path} has no {missing[0]}; it needs {', '.join(placeholders)}"
        )
    return text
