"""Files as people have them: each shape with the rows that come out, the drops, or the one error.

All shapes hold the same pair, so the test compares the texts that come out.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from scir_cli.data import readers
from scir_cli.errors import DataError

Row = dict[str, Any]

# Questions and answers

Q, GOOD, BAD = "Name a fruit.", "An apple.", "A loaf of bread."
PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
USER, RIGHT, WRONG = (
    {"role": "user", "content": Q},
    {"role": "assistant", "content": GOOD},
    {"role": "assistant", "content": BAD},
)
HUMAN, GPT = {"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}
HH = "\n\nHuman: {}\n\nAssistant: {}"
ANSWERS = {"question": Q, "answer_a": GOOD, "answer_b": BAD}
ARENA = {
    "conversation_a": [USER, RIGHT],
    "conversation_b": [USER, WRONG],
    "model_a": "gpt-9",
    "model_b": "llama",
}


def scored(*scores: float | None) -> list[Row]:
    texts = [BAD, GOOD, "Something between."]
    return [
        {"response": text, "overall_score": score, "model": f"m{score}"}
        for text, score in zip(texts, scores, strict=False)
    ]


# Rows of pairs

PAIRS: dict[str, Row] = {
    "prompt, chosen and rejected": PAIR,
    "a prompt of messages": PAIR | {"prompt": [USER]},
    "assistant messages": {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
    "whole conversations": {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    "conversations beside a prompt": PAIR | {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    "instruction": {"instruction": Q, "chosen": GOOD, "rejected": BAD},
    "Alpaca's instruction and empty input": {"instruction": Q, "input": ""} | PAIR,
    "question": {"question": Q, "chosen": GOOD, "rejected": BAD},
    "hh-rlhf": {"chosen": HH.format(Q, GOOD), "rejected": HH.format(Q, BAD)},
    "RewardBench 2": PAIR | {"chosen": [GOOD], "rejected": [BAD], "id": "7"},
    "authors": PAIR | {"chosen_model": "a", "rejected_model": "b"},
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": BAD}},
    "ShareGPT and texts": {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD},
    "two answers, a": ANSWERS | {"winner": "a"},
    "two answers, A": ANSWERS | {"winner": "A"},
    "two answers, b": {"question": Q, "answer_a": BAD, "answer_b": GOOD, "winner": "b"},
    "two answers, the column": ANSWERS | {"winner": "answer_a"},
    "two responses, model_a": {"prompt": Q, "response_a": GOOD, "response_b": BAD}
    | {"winner": "model_a"},
    "AlpacaEval's annotations": {"instruction": Q, "output_1": BAD, "output_2": GOOD}
    | {"preference": 2.0},
    "arena": ARENA | {"winner": "model_a"},
    "arena, the name of a model": ARENA | {"winner": "gpt-9"},
    "UltraFeedback": {"instruction": Q, "completions": scored(1.0, 9.5, 5.0)},
    "UltraFeedback without a score": {"instruction": Q, "completions": scored(1.0, 9.5, None)},
}


def read(path: Path | str) -> tuple[list[Row], dict[str, int]]:
    table, drops = readers.load_pairs(str(path))
    return table.to_pylist(), dict(drops)


def texts(row: Row) -> Row:
    """Prompt, chosen and rejected text of a row of kind "judged"."""
    other = {"first": "second", "second": "first"}[row["gold_label"]]
    return {
        "prompt": row["messages"][-1]["content"],
        "chosen": row[row["gold_label"]]["text"],
        "rejected": row[other]["text"],
    }


def write_lines(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_comes_out_of_every_layout(name: str, tmp_path: Path):
    rows, drops = read(write_lines(tmp_path / "pairs.jsonl", PAIRS[name]))
    assert [texts(row) for row in rows] == [PAIR]
    assert drops == {}
    assert readers.layout_of(PAIRS[name]).startswith("pairs")


def test_the_authors_of_an_arena_and_of_ultrafeedback_are_kept(tmp_path: Path):
    rows = [ARENA | {"winner": "model_b"}, {"instruction": "Q", "completions": scored(1.0, 9.5)}]
    for row, authors in zip(rows, [("llama", "gpt-9"), ("m9.5", "m1.0")], strict=True):
        (made,), _ = read(write_lines(tmp_path / "pairs.jsonl", row))
        other = {"first": "second", "second": "first"}[made["gold_label"]]
        assert (made[made["gold_label"]]["author"], made[other]["author"]) == authors


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ANSWERS | {"winner": "tie"}, "tie"),
        (ARENA | {"winner": "tie (bothbad)"}, "tie"),
        ({"instruction": Q, "output_1": GOOD, "output_2": BAD, "preference": 1.5}, "tie"),
        ({"instruction": Q, "completions": scored(3.0, 3.0)}, "tie"),
        (ANSWERS | {"winner": None}, "no_winner"),
        ({"instruction": Q, "completions": scored(3.0)}, "no_winner"),
        (PAIR | {"rejected": GOOD}, "identical_responses"),
        (PAIR | {"chosen": " "}, "empty_response"),
        (PAIR | {"prompt": ""}, "empty_prompt"),
        ({"chosen": HH.format(Q, GOOD), "rejected": HH.format("Else?", BAD)}, "different_prompts"),
        (PAIRS["two answers, a"] | {"answer_b": "Other"}, "duplicate_pair"),
    ],
)
def test_a_row_without_a_preference_is_dropped_under_its_reason(
    row: Row, reason: str, tmp_path: Path
):
    others = [row] if reason == "duplicate_pair" else []
    rows, drops = read(write_lines(tmp_path / "pairs.jsonl", PAIR, row, *others))
    assert drops == {reason: 1}
    assert len(rows) == 1 + len(others)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": Q, "completion": GOOD, "label": True}, "unpaired feedback (KTO)"),
        ({"prompt": [USER], "completion": [RIGHT], "label": False}, "unpaired feedback (KTO)"),
        (ANSWERS | {"winner": "left"}, "'winner' is 'left'; expected a, b or tie"),
        ({"prompt": Q, "chosen": GOOD}, "no column 'rejected'"),
        ({"text": Q}, "no column 'chosen'"),
        ({"chosen": [USER], "rejected": [USER, WRONG]}, "the last message of 'chosen'"),
        ({"chosen": GOOD, "rejected": BAD}, "no column holds the prompt"),
    ],
)
def test_a_layout_that_holds_no_pair_is_refused_in_one_line(row: Row, message: str, tmp_path: Path):
    with pytest.raises(DataError) as error:
        read(write_lines(tmp_path / "pairs.jsonl", row))
    assert message in str(error.value) and "row 1" in str(error.value)
    assert "\n" not in str(error.value)


# Rows of prompts

PROMPTS: dict[str, Row] = {
    "prompt": {"prompt": Q},
    "a prompt of messages": {"prompt": [USER]},
    "messages": {"messages": [USER]},
    "messages with an answer": {"messages": [USER, RIGHT]},
    "instruction": {"instruction": Q},
    "Alpaca": {"instruction": Q, "input": "", "output": GOOD},
    "question and answer": {"question": Q, "answer": GOOD},
    "ShareGPT": {"conversations": [HUMAN]},
    "ShareGPT with an answer": {"conversations": [HUMAN, GPT]},
    "conversations of roles": {"conversations": [USER, RIGHT]},
    "arena": ARENA | {"winner": "tie"},
    "UltraFeedback": {"instruction": Q, "completions": scored(1.0, 9.5)},
    "KTO": {"prompt": Q, "completion": GOOD, "label": True},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_comes_out_of_every_layout(name: str, tmp_path: Path):
    rows, drops = readers.open_prompts(str(write_lines(tmp_path / "p.jsonl", PROMPTS[name])))
    (row,) = rows.slice(0, 2).to_pylist()
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [("user", Q)]
    assert not drops
    assert "An apple" not in (row["extra"] or "") or name in (
        "Alpaca",
        "question and answer",
        "KTO",
    )


# Formats of files and folders

ROWS = [PAIR, {"prompt": "Name a tool.", "chosen": "A saw.", "rejected": "A cloud."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path: Path, rows: list[Row] = ROWS, separator: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_arrow(path: Path, new: Callable[..., Any]) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def write_parquet(path: Path, rows: list[Row] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_packed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def saved(path: Path, split: str | None = None) -> Path:
    data = datasets.Dataset.from_list(ROWS)
    kept = datasets.Dataset.from_list(ROWS[:1])
    content = data if split is None else datasets.DatasetDict({split: data, "other": kept})
    content.save_to_disk(str(path))
    return path


def shards(path: Path, names: tuple[str, ...]) -> Path:
    for name, row in zip(names, ROWS, strict=True):
        write_parquet(path / name, [row])
    return path


def with_test_split(path: Path) -> Path:
    write_parquet(path / "data" / "train-00000-of-00001.parquet")
    write_parquet(path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "JSON lines": lambda p: write_text(p / "a.jsonl", LINES),
    "JSON lines named json": lambda p: write_text(p / "a.json", LINES),
    "a JSON list": lambda p: write_text(p / "a.json", json.dumps(ROWS, indent=1)),
    "JSON lines named ndjson": lambda p: write_text(p / "a.ndjson", LINES),
    "JSON with rows under a name": lambda p: write_text(
        p / "a.json", json.dumps({"version": 1, "data": ROWS}, indent=2)
    ),
    "the same on one line": lambda p: write_text(p / "a.json", json.dumps({"rows": ROWS})),
    "a byte-order mark": lambda p: write_text(p / "a.jsonl", "\ufeff" + LINES),
    "CSV": lambda p: write_csv(p / "a.csv"),
    "CSV with semicolons": lambda p: write_csv(p / "a.csv", separator=";"),
    "TSV": lambda p: write_csv(p / "a.tsv", separator="\t"),
    "Parquet": lambda p: write_parquet(p / "a.parquet"),
    "Arrow stream": lambda p: write_arrow(p / "a.arrow", pa.ipc.new_stream),
    "Arrow file": lambda p: write_arrow(p / "a.arrow", pa.ipc.new_file),
    "JSON lines, gz": lambda p: write_packed(p / "a.jsonl.gz", LINES.encode()),
    "JSON lines, zst": lambda p: write_packed(p / "a.jsonl.zst", LINES.encode()),
    "CSV, gz": lambda p: write_packed(p / "a.csv.gz", write_csv(p / "a.csv").read_bytes()),
    "Parquet, zst": lambda p: write_packed(
        p / "a.parquet.zst", write_parquet(p / "b.parquet").read_bytes()
    ),
    "a saved Dataset": lambda p: saved(p / "saved"),
    "a saved DatasetDict": lambda p: saved(p / "saved", "train"),
    "shards": lambda p: shards(p / "shards", ("0.parquet", "1.parquet")),
    "shards as on the hub": lambda p: with_test_split(p / "hub"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_come_out_of_every_format(name: str, tmp_path: Path):
    rows, drops = read(FORMATS[name](tmp_path))
    assert [texts(row) for row in rows] == ROWS
    assert drops == {}


def test_a_row_may_have_a_list_called_data_and_an_object_may_be_spread_over_lines(tmp_path: Path):
    row = PAIR | {"data": [{"a": 1}]}
    for indent in (None, 1):
        rows, _ = read(write_text(tmp_path / "a.json", json.dumps(row, indent=indent)))
        assert [texts(found) for found in rows] == [PAIR]
        assert json.loads(rows[0]["extra"]) == {"data": [{"a": 1}]}


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text(tmp_path / "a.jsonl", LINES)
    assert len(read("~/a.jsonl")[0]) == len(ROWS)


def test_a_split_is_named_after_a_folder(tmp_path: Path):
    assert len(read(f"{saved(tmp_path / 'saved', 'train')}:other")[0]) == 1
    assert len(read(f"{with_test_split(tmp_path / 'hub')}:test")[0]) == 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: write_text(p / "a.txt", LINES), "unknown extension '.txt'"),
        (lambda p: write_text(p / "a.arrow", LINES), "truncated or is not Arrow"),
        (lambda p: write_text(p / "a.jsonl.gz", LINES), "cannot be read"),
        (lambda p: write_packed(p / "a.jsonl.gz", b'{"prompt": "\xff"}'), "offset 12 holds 0xff"),
        (lambda p: (write_csv(p / "a.csv"), write_parquet(p / "a.parquet"))[0].parent, "several"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no data files"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_in_one_line(
    write: Callable[[Path], Path], message: str, tmp_path: Path
):
    with pytest.raises(DataError) as error:
        read(write(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Columns of other names


def test_columns_of_other_names_are_read_under_ours(tmp_path: Path):
    own = {"q": Q, "good": GOOD, "bad": BAD, "chosen": "not this", "source": "mine"}
    path = write_lines(tmp_path / "own.jsonl", own)
    (row,), _ = read(f"{path}?prompt=q,chosen=good,rejected=bad")
    assert texts(row) == PAIR
    assert json.loads(row["extra"]) == {"source": "mine"}
    votes = {"q": Q, "left": BAD, "right": GOOD, "vote": "b"}
    path = write_lines(tmp_path / "votes.jsonl", votes)
    (row,), _ = read(f"{path}?prompt=q,answer_a=left,answer_b=right,winner=vote")
    assert texts(row) == PAIR


def test_the_names_of_columns_are_part_of_the_digest(tmp_path: Path):
    path = write_lines(tmp_path / "own.jsonl", {"q": Q, "r": "Other?"})
    digests = {readers.digest(f"{path}{end}") for end in ("", "?prompt=q", "?prompt=r")}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt=nothing", "has no column 'nothing'; the columns are q"),
        ("promt=q", "Did you mean 'prompt'?"),
        ("prompt", "should have the form prompt=question"),
    ],
)
def test_a_mistake_in_the_names_of_columns_is_one_line(columns: str, message: str, tmp_path: Path):
    path = write_lines(tmp_path / "own.jsonl", {"q": Q})
    with pytest.raises(DataError) as error:
        readers.open_prompts(f"{path}?{columns}")
    assert message in str(error.value)


def test_a_hub_id_may_have_a_revision_a_config_and_a_split(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **more: Any) -> datasets.Dataset:
        asked.append((name, config, more["split"], more.get("revision")))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for spec in ("a/b", "a/b:test", "a/b@v1.0", "a/b@main:cfg:test", "hf://datasets/a/b@7f3:test"):
        assert len(read(spec)[0]) == 2
    assert asked == [
        ("a/b", None, "train", None),
        ("a/b", None, "test", None),
        ("a/b", None, "train", "v1.0"),
        ("a/b", "cfg", "test", "main"),
        ("a/b", None, "test", "7f3"),
    ]
