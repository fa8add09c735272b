"""Columns and fields that change the meaning of a row are used, refused, or a counted drop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scir_cli.data import readers
from scir_cli.data.messages import more_of, without_nulls
from scir_cli.errors import DataError

Turns = list[dict[str, Any]]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict[str, Any]:
    return turn("user", content)


def bot(content: str) -> dict[str, Any]:
    return turn("assistant", content)


BRIEF = turn("system", "Be brief.")
ASKED = user("Plan a walk.")
STEPS = [bot("How long?"), user("One hour.")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: dict[str, Any]) -> tuple[list[tuple[Turns, str, str]], Counter[str]]:
    """Messages, chosen text and rejected text of each pair, and the drops by reason."""
    table, drops = readers.load_pairs(lines(folder / "pairs.jsonl", *rows))
    pairs = []
    for row in table.to_pylist():
        texts = [row[side]["text"] for side in ("first", "second")]
        chosen, rejected = texts if row["gold_label"] == "first" else texts[::-1]
        pairs.append((without_nulls(row["messages"]), chosen, rejected))
    return pairs, drops


def prompt(folder: Path, row: dict[str, Any]) -> Turns:
    rows, drops = readers.open_prompts(lines(folder / "prompts.jsonl", row))
    assert not drops
    (got,) = rows.slice(0, rows.num_rows).to_pylist()
    return without_nulls(got["messages"])


# ------------------------------------------------------------- a prompt beside whole conversations


@pytest.mark.parametrize(
    ("before", "repeated", "joined"),
    [
        # turns that continue the prompt
        ([ASKED], STEPS, [ASKED, *STEPS]),
        ([BRIEF, ASKED], STEPS, [BRIEF, ASKED, *STEPS]),
        ("Plan a walk.", STEPS, [ASKED, *STEPS]),
        ([ASKED, bot("Where?")], [user("Ulm.")], [ASKED, bot("Where?"), user("Ulm.")]),
        # turns that begin alike
        ([ASKED], [ASKED, *STEPS], [ASKED, *STEPS]),
        ([BRIEF, ASKED], [ASKED, *STEPS], [BRIEF, ASKED, *STEPS]),
        ([ASKED], [BRIEF, ASKED], [BRIEF, ASKED]),
        ([BRIEF, ASKED], [BRIEF, ASKED, *STEPS], [BRIEF, ASKED, *STEPS]),
        (" Plan a walk.\n", [ASKED], [ASKED]),
        ([ASKED, bot("An answer.")], [ASKED], [ASKED]),
        (None, [ASKED, *STEPS], [ASKED, *STEPS]),
    ],
)
def test_a_prompt_is_joined_with_the_turns_of_the_responses(
    tmp_path: Path, before: Any, repeated: Turns, joined: Turns
):
    row = {"prompt": before}
    row |= {"chosen": [*repeated, bot("good")], "rejected": [*repeated, bot("bad")]}
    assert read(tmp_path, row) == ([(joined, "good", "bad")], Counter())


@pytest.mark.parametrize(
    ("before", "repeated"),
    [
        ([ASKED], [user("Sing.")]),
        ([BRIEF, ASKED], [turn("system", "Be long."), ASKED]),
        ([ASKED, bot("Where?"), user("Ulm.")], [ASKED]),
        ([ASKED, bot("Where?")], [bot("How long?"), user("One hour.")]),
        ([ASKED, *STEPS], [ASKED, bot("Why?"), user("So.")]),
    ],
)
def test_a_prompt_that_contradicts_the_turns_of_the_responses_is_a_counted_drop(
    tmp_path: Path, before: Turns, repeated: Turns
):
    row = {"prompt": before}
    row |= {"chosen": [*repeated, bot("good")], "rejected": [*repeated, bot("bad")]}
    good = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    pairs, drops = read(tmp_path, good, row)
    assert [messages for messages, _, _ in pairs] == [[user("Hi.")]]
    assert drops == Counter(different_prompts=1)


def test_transcripts_of_hh_rlhf_are_turns_also_beside_and_in_a_prompt(tmp_path: Path):
    question = "\n\nHuman: How do I boil an egg?\n\nAssistant:"
    boil = [user("How do I boil an egg?")]
    rows = [
        {"prompt": question, "chosen": " Seven minutes.", "rejected": " No idea."},
        {
            "prompt": question,
            "chosen": question + " Six minutes.",
            "rejected": question + " No idea.",
        },
        {
            "prompt": "How do I boil an egg?",
            "chosen": question + " Five minutes.",
            "rejected": question + " No idea.",
        },
        {"prompt": "Sing.", "chosen": question + " Four.", "rejected": question + " No idea."},
    ]
    pairs, drops = read(tmp_path, *rows)
    expected = ["Seven minutes.", "Six minutes.", "Five minutes."]
    assert pairs == [(boil, text, "No idea.") for text in expected]
    assert drops == Counter(different_prompts=1)
    longer = question + " Long.\n\nHuman: How long?\n\nAssistant:"
    turns = [*boil, bot("Long."), user("How long?")]
    assert [
        t | {"content": t["content"].strip()} for t in prompt(tmp_path, {"prompt": longer})
    ] == (turns)


# ---------------------------------------------------------------------------- columns and fields


def test_system_and_history_are_turns_before_the_question(tmp_path: Path):
    earlier = [user("Name a river."), bot("The Elbe.")]
    row = {"system": "Answer in German.", "history": [["Name a river.", "The Elbe."]]}
    row |= {"instruction": "And a second?", "input": ""}
    turns = [turn("system", "Answer in German."), *earlier, user("And a second?")]
    assert prompt(tmp_path, row) == turns
    assert prompt(tmp_path, row | {"history": json.dumps(row["history"])}) == turns
    assert prompt(tmp_path, row | {"history": str(row["history"])}) == turns
    assert prompt(tmp_path, row | {"history": earlier}) == turns
    assert read(tmp_path, row | {"chosen": "a", "rejected": "b"})[0] == [(turns, "a", "b")]
    nothing = {"system": "", "history": [], "system_prompt": None, "prompt": "Hi."}
    assert prompt(tmp_path, nothing) == [user("Hi.")]
    same = {"system_prompt": "Be brief.", "messages": [BRIEF, ASKED]}
    assert prompt(tmp_path, same) == [BRIEF, ASKED]
    again = {"history": [["Hi.", "Hello."]], "prompt": "Hi."}
    assert prompt(tmp_path, again) == [user("Hi."), bot("Hello."), user("Hi.")]
    repeated = {"history": earlier, "messages": [*earlier, ASKED]}
    assert prompt(tmp_path, repeated) == [*earlier, ASKED]


def test_columns_that_became_turns_are_not_carried_along_too(tmp_path: Path):
    row = {"prompt": "Hi.", "system": "Be brief.", "history": [["a", "b"]], "id": 3}
    rows, _ = readers.open_prompts(lines(tmp_path / "p.jsonl", row))
    (got,) = rows.slice(0, 1).to_pylist()
    assert json.loads(got["extra"]) == {"id": 3}


def test_a_system_column_that_contradicts_the_system_turn_is_a_counted_drop(tmp_path: Path):
    row = {"system": "Answer in German.", "prompt": [BRIEF, ASKED], "chosen": "a", "rejected": "b"}
    good = {"prompt": "Hi.", "chosen": "a", "rejected": "b"}
    pairs, drops = read(tmp_path, good, row)
    assert (len(pairs), drops) == (1, Counter(different_prompts=1))


@pytest.mark.parametrize(
    ("column", "value"),
    [("system", 3), ("system", ["x"]), ("history", "in 1789"), ("history", [["a"]])],
)
def test_a_system_or_history_of_another_form_is_refused_by_name(
    tmp_path: Path, column: str, value: Any
):
    spec = lines(tmp_path / "p.jsonl", {"prompt": "Hi.", column: value})
    with pytest.raises(DataError, match=rf"row 1: '{column}' should be .* Rename the column"):
        readers.open_prompts(spec)


def test_two_columns_with_different_system_turns_are_refused(tmp_path: Path):
    spec = lines(tmp_path / "p.jsonl", {"prompt": "Hi.", "system": "a", "system_prompt": "b"})
    with pytest.raises(DataError, match="'system' and 'system_prompt' hold different texts"):
        readers.open_prompts(spec)


@pytest.mark.parametrize("as_text", [json.dumps, str, lambda turns: str(np.array(turns))])
def test_messages_as_text_in_a_cell_are_messages(tmp_path: Path, as_text: Any):
    row = {
        "prompt": as_text([BRIEF, ASKED]),
        "chosen": as_text([bot("good")]),
        "rejected": as_text([bot("bad")]),
    }
    assert read(tmp_path, row) == ([([BRIEF, ASKED], "good", "bad")], Counter())
    whole = {name: as_text([ASKED, *STEPS, bot(name)]) for name in ("chosen", "rejected")}
    assert read(tmp_path, whole)[0] == [([ASKED, *STEPS], "chosen", "rejected")]
    assert prompt(tmp_path, {"messages": as_text([ASKED])}) == [ASKED]


def test_a_message_that_is_no_list_is_one_message(tmp_path: Path):
    row = {"prompt": "Plan a walk.", "chosen": bot("good"), "rejected": bot("bad")}
    assert read(tmp_path, row)[0] == [([ASKED], "good", "bad")]


def test_texts_about_json_stay_texts(tmp_path: Path):
    texts = ['{"a": 1}', "[1, 2]", '[{"role": "user"}] is what?', '{"role": "user", "x": 1'[:9]]
    for text in texts:
        assert prompt(tmp_path, {"prompt": text}) == [user(text)]


def test_messages_as_text_that_nothing_parses_are_refused(tmp_path: Path):
    spec = lines(tmp_path / "p.jsonl", {"prompt": '[{"role": "user", "content": nothing}]'})
    with pytest.raises(DataError, match="row 1: a cell looks like messages as text"):
        readers.open_prompts(spec)


def test_role_names_of_other_data_sets_are_known(tmp_path: Path):
    turns = [turn("human", "a"), turn("gpt", "b"), turn("Observation", "c"), turn("USER", "d")]
    roles = [message["role"] for message in prompt(tmp_path, {"messages": turns})]
    assert roles == ["user", "assistant", "tool", "user"]
    answered = {"messages": [turn("human", "Name a river."), turn("gpt", "The Elbe.")]}
    assert prompt(tmp_path, answered) == [user("Name a river.")]
    row = {"prompt": "Hi.", "chosen": [turn("model", "a")], "rejected": [turn("gpt", "b")]}
    assert read(tmp_path, row)[0] == [([user("Hi.")], "a", "b")]


def test_an_unknown_role_is_refused_by_name(tmp_path: Path):
    spec = lines(tmp_path / "p.jsonl", {"messages": [user("a"), turn("critic", "b")]})
    with pytest.raises(DataError, match="row 1: a message has the role 'critic'; expected one of"):
        readers.open_prompts(spec)


def test_answers_with_tool_calls_or_reasoning_in_a_field_are_counted_drops(tmp_path: Path):
    def row(**more: Any) -> dict[str, Any]:
        return {
            "prompt": "Weather in Ulm?",
            "chosen": [bot("I look.") | more],
            "rejected": "I cannot know.",
        }

    pairs, drops = read(
        tmp_path,
        row(),
        row(tool_calls=[CALL]),
        row(content=None, tool_calls=[CALL]),
        row(function_call={"name": "weather", "arguments": "{}"}),
        row(reasoning_content="It is cold."),
        row(thinking="It is cold."),
    )
    assert len(pairs) == 1
    assert drops == Counter(tool_call_answer=3, reasoning_beside_answer=2)


def test_a_function_call_of_the_older_form_is_a_tool_call(tmp_path: Path):
    old = turn("assistant", "", function_call={"name": "weather", "arguments": '{"city": "Ulm"}'})
    _, called, _ = prompt(tmp_path, {"messages": [ASKED, old, turn("function", "3 degrees")]})
    assert more_of(called)["tool_calls"] == [CALL]
