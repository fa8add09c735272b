"""Messages as data sets write them -> messages as datasets here hold them.

A message has a role, a text, and the other fields that chat templates read (`more`): tool calls,
the id of the call that a tool answers, and the reasoning of an earlier answer.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from scir_cli.errors import DataError

Message = dict[str, str]

#: Other fields of a message that chat templates read
KEPT = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")

ROLES = ("system", "user", "assistant", "tool", "developer")

#: Names of roles in other data sets (ShareGPT, Gemma, Llama) -> ours
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}

#: The start of messages as JSON or as Python prints them
MESSAGES_AS_TEXT = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|content)['\"]\s*:")

#: Turns before the first question
SYSTEM_ROLES = ("system", "developer")

#: The start of a turn in transcripts of hh-rlhf
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def read_message(value: Any) -> Message:
    """A message of an input file; `more` is left out if it has no other field.

    Content may be a list of texts, which are joined, and null beside tool calls.
    Raises DataError for content that is no text, TypeError or KeyError for what is no message.
    """
    role, content = _role(value["role"]), value["content"]
    kept = (*KEPT, "name") if role == "tool" else KEPT
    more = {name: value[name] for name in kept if value.get(name) is not None}
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(map(_text_of_part, content))
    call = value.get("function_call")
    if call and "tool_calls" not in more:
        more["tool_calls"] = [{"type": "function", "function": call}]
    if "tool_calls" in more:
        more["tool_calls"] = [_tool_call(call) for call in more["tool_calls"]]
        if content is None:
            more["content"] = None
            content = ""
    message = {"role": role, "content": content}
    if more:
        message["more"] = _json(more)
    return message


def _role(name: Any) -> Any:
    """A role by its name here; raises DataError for a name that no chat template knows."""
    if not isinstance(name, str):
        return name
    role = OTHER_ROLES.get(name.lower(), name.lower())
    if role not in ROLES:
        raise DataError(f"a message has the role {name!r:.40}; expected one of {', '.join(ROLES)}")
    return role


def parse_messages(text: str) -> list[Any] | None:
    """The messages in a cell that holds them as JSON or as Python prints them; None for others.

    Raises DataError for a cell that starts and ends like such messages and is neither.
    """
    stripped = text.strip()
    if not MESSAGES_AS_TEXT.match(stripped) or stripped[-1] not in "]}":
        return None
    # The text of an array of numpy has no commas between its messages.
    for source in (stripped, re.sub(r"\}\s*\n\s*\{", "}, {", stripped)):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(source)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(value, dict | list):
                return [value] if isinstance(value, dict) else value
    raise DataError(
        f"a cell looks like messages as text and is neither JSON nor Python: {text!r:.80}; "
        "write messages as a list"
    )


def hh_turns(text: str) -> list[Message]:
    """The turns of a transcript of hh-rlhf; [] for a text that is none."""
    if not HH_TURN.match(text):
        return []
    # The text before the first marker is empty; then markers and contents alternate.
    _, *parts = HH_TURN.split(text)
    turns = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if name == "Human" else "assistant"
        turns.append({"role": role, "content": content})
    return turns


def read_history(value: Any) -> list[Message]:
    """The earlier turns in a cell of `history`: messages, or pairs of a question and its answer.

    Raises DataError for a cell that holds anything else.
    """
    if isinstance(value, str):
        value = parse_messages(value) or _parsed(value)
    turns: list[Message] = []
    try:
        for item in value:
            if isinstance(item, Mapping):
                turns.append(read_message(item))
                continue
            question, answer = item
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        are_texts = all(isinstance(turn["content"], str) for turn in turns)
    except (TypeError, ValueError, KeyError):
        are_texts = False
    if not are_texts:
        raise DataError(
            f"'history' should be a list of [question, answer]; it holds {value!r:.80}. "
            "Rename the column if it has another meaning"
        )
    return turns


def _parsed(text: str) -> Any:
    """The value that a text spells in JSON or Python; the text itself if it spells none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def join(before: Sequence[Message], after: Sequence[Message]) -> list[Message] | None:
    """One conversation of a prompt and of turns that repeat or continue it.

    A system turn of one of them is kept. Turns that begin alike are the same turns; other turns
    follow if the roles alternate. An answer at the end of `before` that `after` lacks is left out.
    None if they contradict each other.
    """
    system, start = _split_system(before)
    other_system, rest = _split_system(after)
    if system and other_system and not _alike(system[0], other_system[0]):
        return None
    system = system or other_system
    if not rest:
        return [*system, *start]

    n = 0
    while n < min(len(start), len(rest)) and _alike(start[n], rest[n]):
        n += 1
    left = start[n:]
    is_answer = [turn["role"] for turn in left] == ["assistant"] and n == len(rest)
    if not left or is_answer:
        # Of two turns the one with more fields is kept.
        same = [max(pair, key=len) for pair in zip(rest[:n], start[:n], strict=True)]
        return [*system, *same, *rest[n:]]
    is_question = rest[0]["role"] == "user"
    follows = n == 0 and is_question == (start[-1]["role"] == "assistant")
    return [*system, *start, *rest] if follows else None


def with_history(messages: Sequence[Message], history: Sequence[Message]) -> list[Message] | None:
    """The messages after earlier turns, if they do not start with them; None if systems differ."""
    earlier_system, earlier = _split_system(history)
    joined = join(earlier_system, messages)
    if joined is None:
        return None
    system, rest = _split_system(joined)
    starts = zip(earlier, rest, strict=False)
    if len(earlier) <= len(rest) and all(_alike(*both) for both in starts):
        return joined
    return [*system, *earlier, *rest]


def _split_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system turn at the start, if there is one, and the other turns."""
    n = int(bool(messages) and messages[0]["role"] in SYSTEM_ROLES)
    return list(messages[:n]), list(messages[n:])


def _alike(one: Message, other: Message) -> bool:
    """Whether two turns have the same role and text, up to white space around it."""
    same_role = one["role"] == other["role"]
    return same_role and one["content"].strip() == other["content"].strip()


def with_tools(messages: Sequence[Message], tools: Any) -> list[Message]:
    """The messages with the tools that their author may call, in `more` of the first.

    tools: a cell with a list of descriptions, or that as JSON; the messages stay as they are if it
    holds anything else.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = None
    is_list = isinstance(tools, list) and all(map(_is_tool, tools))
    if not (is_list and tools and messages):
        return list(messages)
    first, *others = messages
    more = {**more_of(first), "tools": _without_nulls(tools)}
    return [{**first, "more": _json(more)}, *others]


def _is_tool(value: Any) -> bool:
    """Whether a value describes a function with a name."""
    if not isinstance(value, Mapping):
        return False
    function = value.get("function") or value
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def more_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """The other fields of a message: those of `more`."""
    text = message.get("more")
    return dict(json.loads(text)) if text else {}


def without_nulls(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages of a dataset as `read_message` returned them: `more` is left out if null."""
    return _without_nulls(list(messages))  # type: ignore[no-any-return]


def _text_of_part(part: Any) -> str:
    """The text of a part of a content; raises DataError for an image or another kind."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"a message holds a part of type '{kind}'; only text is supported, "
            "so remove rows with images, audio or video"
        )
    return str(part["text"])


def _tool_call(call: Any) -> Any:
    """A tool call whose arguments are an object, as chat templates expect them."""
    if not isinstance(call, Mapping):
        raise DataError(f"'tool_calls' should hold objects; it holds {call!r:.80}")
    call = _without_nulls(call)
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return call


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null: Parquet adds them to objects of several shapes."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"a message holds a value that is not JSON: {error}") from error
