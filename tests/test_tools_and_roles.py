"""Tools, tool calls, parts of a content and images in the messages of input files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import run
from toy import make_model
from transformers import AutoTokenizer

from scir_cli import config
from scir_cli.data import dataset, readers
from scir_cli.data.messages import more_of, without_nulls
from scir_cli.engine import loading
from scir_cli.engine.chat import Chat, Unrenderable
from scir_cli.errors import DataError
from scir_cli.rewards.prompts import question_text
from scir_cli.settings import ModelSettings

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is not none %}{{ m['content'] }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "text"}}}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Ulm<|im_end|>"}'},
}
CALLED = [
    {"role": "user", "content": "Is it cold in Ulm?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3 degrees", "tool_call_id": "c1", "name": "weather"},
    {"role": "user", "content": "So?"},
]


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(spec: str) -> list[dict[str, Any]]:
    rows, _ = readers.open_prompts(spec)
    return rows.slice(0, rows.num_rows).to_pylist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose template renders tools and tool calls."""
    folder = make_model(tmp_path_factory.mktemp("tools") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = WITH_TOOLS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(model: Path) -> Chat:
    values = {"model": str(model), "output_dir": "x"}
    return loading.load_chat(model, config.build(ModelSettings, values, where="test"))


# ------------------------------------------------------------------------ reading


def test_tool_calls_tools_and_null_content_are_kept(tmp_path: Path):
    (row,) = prompts(lines(tmp_path / "p.jsonl", {"messages": CALLED, "tools": [TOOL], "id": 7}))
    user, call, answer, last = row["messages"]
    assert more_of(user) == {"tools": [TOOL]}
    assert call["content"] == ""
    function = {"name": "weather", "arguments": {"city": "Ulm<|im_end|>"}}
    assert more_of(call) == {"tool_calls": [CALL | {"function": function}], "content": None}
    assert more_of(answer) == {"tool_call_id": "c1", "name": "weather"}
    assert last == {"role": "user", "content": "So?", "more": None}
    assert json.loads(row["extra"]) == {"id": 7}


def test_tools_may_be_json_and_parquet_adds_no_nulls(tmp_path: Path):
    other = {"type": "function", "function": {"name": "clock", "parameters": {"zone": "text"}}}
    row = {"messages": CALLED[:1], "tools": json.dumps([TOOL, other])}
    (read,) = prompts(lines(tmp_path / "p.jsonl", row))
    assert more_of(read["messages"][0]) == {"tools": [TOOL, other]}
    table = pa.Table.from_pylist([{"messages": CALLED[:3], "tools": [TOOL, other]}])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    (again,) = prompts(str(tmp_path / "p.parquet"))
    assert again["messages"][0] == read["messages"][0]
    assert "name" not in more_of(again["messages"][1])


@pytest.mark.parametrize("value", ["search, clock", ["search"], [], {"search": 1}, [{"name": 1}]])
def test_a_column_that_describes_no_tools_is_another_column(tmp_path: Path, value: Any):
    (row,) = prompts(lines(tmp_path / "p.jsonl", {"prompt": "Hi.", "tools": value}))
    assert row["messages"][0]["more"] is None
    assert json.loads(row["extra"]) == {"tools": value}


def test_a_list_of_text_parts_is_joined(tmp_path: Path):
    parts = ["Is it ", {"type": "text", "text": "cold?", "image": None}]
    (row,) = prompts(
        lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": parts}]})
    )
    assert without_nulls(row["messages"]) == [{"role": "user", "content": "Is it cold?"}]


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio"])
def test_an_image_is_refused_in_one_line(tmp_path: Path, kind: str):
    message = {"role": "user", "content": [{"type": kind, kind: "x.png"}]}
    spec = lines(tmp_path / "p.jsonl", {"prompt": "Hi."}, {"messages": [message]})
    with pytest.raises(DataError) as error:
        readers.open_prompts(spec)
    assert str(error.value) == (
        f"{tmp_path / 'p.jsonl'}, row 2: a message holds a part of type '{kind}'; only text is "
        "supported, so remove rows with images, audio or video"
    )


def test_null_content_without_tool_calls_is_refused(tmp_path: Path):
    spec = lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": None}]})
    with pytest.raises(DataError, match="row 1: 'messages' should be a list of"):
        readers.open_prompts(spec)


# ------------------------------------------------------------------------ rendering


def test_tools_and_calls_are_rendered_and_their_special_tokens_are_text(chat: Chat, tmp_path: Path):
    (row,) = prompts(lines(tmp_path / "p.jsonl", {"messages": CALLED, "tools": [TOOL]}))
    ids = chat.prompt_ids(row["messages"])
    text = chat.tokenizer.decode(ids)
    assert json.dumps([TOOL], ensure_ascii=False) in text
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Ulm<|im_end|>"}}' in text
    assert "<|im_start|>tool\n3 degrees<|im_end|>" in text
    # of the tools, four turns, and the open one
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    assert ids.count(chat.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 6
    plain = without_nulls(row["messages"])[-1:]
    assert chat.prompt_ids(plain) != ids


def test_a_template_without_tools_drops_those_rows_and_answers_the_others(
    tiny_llama: Path, model: Path, tmp_path: Path
):
    spec = lines(
        tmp_path / "p.jsonl",
        {"prompt": "Hi."},
        {"prompt": "Is it cold?", "tools": [TOOL]},
        {"messages": CALLED},
    )
    common = {"input": spec, "n": 1, "max_new_tokens": 3, "backend": "fake"}
    manifest = run("generate", model=str(tiny_llama), output_dir=tmp_path / "plain", **common)
    assert manifest["drops"] == {"tools_not_rendered": 1, "template_refused": 1}
    manifest = run("generate", model=str(model), output_dir=tmp_path / "tools", **common)
    assert (manifest["rows_out"], manifest["drops"]) == (3, {})


def test_a_call_that_a_template_leaves_out_is_refused_by_name(chat: Chat, tmp_path: Path):
    (row,) = prompts(lines(tmp_path / "p.jsonl", {"messages": CALLED}))
    silent = Chat(AutoTokenizer.from_pretrained(chat.tokenizer.name_or_path), chat.end_ids)
    silent.tokenizer.chat_template = WITH_TOOLS.replace("m['tool_calls'] or []", "[]")
    with pytest.raises(Unrenderable, match=r"does not render tool_calls \(weather\)") as error:
        silent.prompt_ids(row["messages"])
    assert error.value.reason == "tools_not_rendered"
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------ further on


def test_the_judge_reads_calls_and_what_tools_answered(tmp_path: Path):
    (row,) = prompts(lines(tmp_path / "p.jsonl", {"messages": CALLED}))
    first, call, answer, last = question_text(row["messages"]).split("\n")
    assert (first, answer, last) == ("User: Is it cold in Ulm?", "Tool: 3 degrees", "User: So?")
    assert json.loads(call.removeprefix("Assistant: "))[0]["function"]["name"] == "weather"


def test_pairs_keep_their_tools_up_to_the_preferences(model: Path, tmp_path: Path):
    pair = {"chosen": "Yes.", "rejected": "No."}
    transcript = {name: [*CALLED, {"role": "assistant", "content": t}] for name, t in pair.items()}
    spec = lines(
        tmp_path / "p.jsonl",
        {"messages": CALLED, "tools": [TOOL], **pair},
        {"tools": [TOOL], **transcript, "id": 1},
        {"prompt": "Hi.", **pair},
    )
    manifest = run(
        "judge",
        model=str(model),
        input=spec,
        reward_models=["judge"],
        output_dir=tmp_path / "judged",
    )
    # the second is the first in another layout
    assert (manifest["rows_out"], manifest["drops"]) == (2, {"duplicate_pair": 1})
    run(
        "filter", input=str(tmp_path / "judged"), rule="judge", trl_jsonl=True,
        output_dir=tmp_path / "preferences",
    )  # fmt: skip
    rows = dataset.read_dataset(tmp_path / "preferences").to_pylist()
    assert "tools" in more_of(rows[0]["prompt"][0])
    written = (tmp_path / "preferences" / "trl.jsonl").read_text(encoding="utf-8").splitlines()
    with_tools, plain = map(json.loads, written)
    function = {"name": "weather", "arguments": {"city": "Ulm<|im_end|>"}}
    assert with_tools["prompt"] == [
        CALLED[0],
        {**CALLED[1], "tool_calls": [CALL | {"function": function}]},
        *CALLED[2:],
    ]
    assert plain["prompt"] == [{"role": "user", "content": "Hi."}]
