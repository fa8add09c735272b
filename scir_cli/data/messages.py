"""Messages as data sets write them -> messages as datasets here hold them.

A message has a role, a text, and the other fields that chat templates read (`more`): tool calls,
the id of the call that a tool answers, and the reasoning of an earlier answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scir_cli.errors import DataError

Message = dict[str, str]

#: Other fields of a message that chat templates read
KEPT = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")


def read_message(value: Any) -> Message:
    """A message of an input file; `more` is left out if it has no other field.

    Content may be a list of texts, which are joined, and null beside tool calls.
    Raises DataError for content that is no text, TypeError or KeyError for what is no message.
    """
    role, content = value["role"], value["content"]
    kept = (*KEPT, "name") if role == "tool" else KEPT
    more = {name: value[name] for name in kept if value.get(name) is not None}
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(map(_text_of_part, content))
    if "tool_calls" in more:
        more["tool_calls"] = [_tool_call(call) for call in more["tool_calls"]]
        if content is None:
            more["content"] = None
            content = ""
    message = {"role": role, "content": content}
    if more:
        message["more"] = _json(more)
    return message


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
