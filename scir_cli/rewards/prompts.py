"""Prompts of the generative reward models, and how their fields are filled.

A response is data. A line of it that reads like a delimiter of the prompt, as "Answer B:", would be
taken for the start of another field, so such a line is quoted: "> Answer B:". Other texts are
inserted as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from scir_cli.data.messages import more_of
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


#: What starts a line: all that str.splitlines regards as a line break
LINE_BREAKS = "\n\r\v\f\x1c-\x1e\x85\u2028\u2029"

#: Characters that may surround the words of a delimiter: spaces, emphasis and headings of Markdown
DECORATION = r"[ \t*_#]*"

#: Fewest characters of a delimiter inside a line; a shorter one may be a part of ordinary text
MIN_INLINE = 3

FIELD = re.compile(r"\{(\w+)\}")


def question_text(
    messages: Sequence[Message], *, system: bool = False, quoted: bool = False
) -> str:
    """A conversation as text: the bare text of a single turn, else each turn with its role.

    system: with its system turns. quoted: lines that read like the start of a turn are quoted.
    """
    turns = [message for message in messages if system or message["role"] != "system"]
    if len(turns) == 1:
        return _turn_text(turns[0])

    names = [turn["role"].capitalize() for turn in turns]
    starts = tuple(f"{name}:" for name in {"System", "User", "Assistant", *names})
    lines = []
    for name, turn in zip(names, turns, strict=True):
        content = _turn_text(turn)
        if quoted:
            content = _quote_lines(content, starts)
        lines.append(f"{name}: {content}")
    return "\n".join(lines)


def _turn_text(turn: Message) -> str:
    """The content of a turn, and its tool calls as JSON."""
    calls = more_of(turn).get("tool_calls")
    if not calls:
        return str(turn["content"])
    return "\n".join(filter(None, [turn["content"], json.dumps(calls, ensure_ascii=False)]))


def fill(template: str, reserved: Sequence[str] = (), /, **values: str) -> list[Message]:
    """A judge prompt as a one-turn conversation.

    Braces inside values have no meaning, and no value contains a delimiter of the template.
    reserved: further starts of lines that no value may have.
    """
    lines, inline = _delimiters(template, tuple(values))
    starts = (*lines, *reserved)
    quoted = {}
    for name, value in values.items():
        whole = re.search(r"^\{" + re.escape(name) + r"\}", template, re.MULTILINE) is not None
        text = _quote_lines(value, starts, first=whole)
        quoted[name] = _split_marks(text, inline)
    text = FIELD.sub(lambda field: quoted.get(field[1], field[0]), template)
    return [{"role": "user", "content": text}]


@cache
def _delimiters(template: str, fields: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts between the fields of a template: starts of lines, and texts inside a line.

    Of the text before the first field only its last line, which is the field's name.
    """
    # Texts and names of fields alternate; an unknown field is a part of the text.
    pattern = "|".join(re.escape("{" + name + "}") for name in fields)
    texts = re.split(pattern, template)
    lines: list[str] = []
    inline: list[str] = []
    for index, text in enumerate(texts):
        first, *others = text.split("\n")
        if index == 0:
            lines += [first, *others][-1:]
            continue
        lines += others
        if len(first.strip()) >= MIN_INLINE:
            inline.append(first.strip())
    words = [line.strip() for line in lines if re.search(r"\w", line)]
    return tuple(words), tuple(inline)


def _quote_lines(text: str, starts: Iterable[str], *, first: bool = False) -> str:
    """The text with "> " before each line that begins with one of `starts`.

    Case, spaces and the marks of emphasis do not matter.
    first: also of the first line, which else stands behind the name of its field.
    """
    pattern = _line_pattern(tuple(sorted(starts)))
    break_before = "\n" if first else ""
    marked = pattern.sub(lambda found: f"{found[1]}> {found[2]}", break_before + text)
    return marked.removeprefix(break_before)


@cache
def _line_pattern(starts: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = []
    for start in starts:
        words = re.findall(r"\w+|[^\w\s]", start)
        alternative = DECORATION.join(map(re.escape, words))
        alternatives.append(alternative + (r"\b" if words[-1][-1].isalnum() else ""))
    joined = "|".join(alternatives) or "(?!)"
    return re.compile(f"([{LINE_BREAKS}])({DECORATION}(?:{joined}))", re.IGNORECASE)


def _split_marks(text: str, marks: Iterable[str]) -> str:
    """The text without these marks: a character is put into each, behind its first one."""
    for mark in marks:
        separator = next(letter for letter in "\\·_|" if letter not in mark)
        while mark in text:
            text = text.replace(mark, mark[0] + separator + mark[1:])
    return text


def load_template(path: Path | None, default: str, fields: Sequence[str]) -> str:
    """The judge prompt in a text file, or the default if there is no path.

    Raises ConfigError if the file cannot be read or if a field is missing from it.
    """
    if path is None:
        return default

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the judge prompt {path} cannot be read: {error}") from error

    placeholders = ["{" + name + "}" for name in fields]
    missing = [placeholder for placeholder in placeholders if placeholder not in text]
    if missing:
        raise ConfigError(
            f"the judge prompt {path} has no {missing[0]}; it needs {', '.join(placeholders)}"
        )
    return text
