"""Files of random content: the rows that are in them, or one line, soon."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scir_cli.data import readers
from scir_cli.errors import DataError, shown

Row = dict[str, Any]
FEW = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

#: Texts with what formats treat in their own ways, but no half of a surrogate pair.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from('",;\n\t\\'),
    min_size=1,
    max_size=12,
).filter(str.strip)


# ------------------------------------------------------------------ pairs, in any layout and format


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


#: Layout -> a row of it, of a prompt, the chosen and the rejected answer
LAYOUTS: dict[str, Callable[[str, str, str], Row]] = {
    "texts": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "messages": lambda p, c, r: {
        "prompt": [user(p)],
        "chosen": [assistant(c)],
        "rejected": [assistant(r)],
    },
    "conversations": lambda p, c, r: {
        "chosen": [user(p), assistant(c)],
        "rejected": [user(p), assistant(r)],
    },
    "sharegpt": lambda p, c, r: {
        "conversations": [{"from": "human", "value": p}],
        "chosen": {"from": "gpt", "value": c},
        "rejected": {"from": "gpt", "value": r},
    },
    "two answers": lambda p, c, r: {
        "question": p,
        "answer_a": r,
        "answer_b": c,
        "winner": "b",
    },
}
FLAT = ("texts", "two answers")


def as_jsonl(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_jsonl_of_plain_letters(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".jsonl.gz")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


def as_json(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def as_parquet(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_arrow(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".arrow")
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def as_csv(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


FORMATS = [as_jsonl, as_jsonl_of_plain_letters, as_json, as_parquet, as_arrow, as_csv]


@FEW
@given(
    st.lists(
        st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=5, unique_by=lambda pair: pair[0]
    ),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(FORMATS),
)
def test_pairs_come_out_as_they_went_in(
    tmp_path: Path,
    pairs: list[tuple[str, str, str]],
    layout: str,
    write: Callable[[Path, list[Row]], Path],
):
    assume(layout in FLAT or write is not as_csv)
    path = write(tmp_path / "pairs", [LAYOUTS[layout](*pair) for pair in pairs])
    table, drops = readers.load_pairs(str(path))
    expected = [pair for pair in pairs if pair[1] != pair[2]]
    assert drops.total() == len(pairs) - len(expected)
    found = []
    for row in table.to_pylist():
        (message,) = row["messages"]
        sides = [row["first"]["text"], row["second"]["text"]]
        if row["gold_label"] == "second":
            sides.reverse()
        found.append((message["content"], *sides))
    assert found == expected


# ------------------------------------------------------------------ anything

NAMES = [
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "question",
    "system",
    "history",
    "tools",
    "chosen",
    "rejected",
    "answer_a",
    "answer_b",
    "winner",
    "completions",
    "completion",
    "label",
    "id",
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
]
WORDS = [
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
    "a",
    "tie",
    "[]",
    "null",
    HH := "\n\nHuman:",
]
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=8,
)


def read_soon(path: Path) -> None:
    """Reads a file as prompts and as pairs: rows, or one visible line, in five seconds."""
    for read in (readers.open_prompts, readers.open_pairs):
        started, message = time.monotonic(), "none"
        try:
            rows, drops = read(str(path))
            assert rows.num_rows + drops.total() >= 1
            for row in rows.slice(0, rows.num_rows).to_pylist():
                assert row["messages"]
                for turn in row["messages"]:
                    assert turn["role"] and isinstance(turn["content"], str | None)
        except DataError as error:
            message = shown(str(error))
        assert message
        assert "\n" not in message
        assert time.monotonic() - started < 5


@FEW
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), max_size=4))
def test_any_rows_are_read_or_refused_in_one_line(tmp_path: Path, rows: list[Row]):
    read_soon(as_jsonl(tmp_path / "rows", rows))


@FEW
@given(
    st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt", "jsonl.gz"]),
    st.binary(max_size=60) | st.text('{}[]",:;\n\t promt1', max_size=60).map(str.encode),
)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, ending: str, content: bytes):
    path = tmp_path / f"any.{ending}"
    path.write_bytes(content)
    read_soon(path)


@pytest.mark.parametrize("write", FORMATS)
def test_a_damaged_file_is_read_or_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path, list[Row]], Path]
):
    """Bits flipped, pieces cut out or doubled.  What has no checksum may also be read."""
    pairs = [(f"Say {n}.", f"It is {n}.", "No.") for n in range(40)]
    path = write(tmp_path / "pairs", [LAYOUTS["texts"](*pair) for pair in pairs])
    whole = path.read_bytes()
    for seed in range(60):
        draw = random.Random(seed)
        content = io.BytesIO(whole)
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(len(whole))
            content.seek(at)
            content.write(bytes([draw.randrange(256)]))
        damaged = content.getvalue()
        if seed % 3 == 1:
            damaged = damaged[: draw.randrange(len(damaged))]
        elif seed % 3 == 2:
            low, high = sorted(draw.sample(range(len(damaged)), 2))
            damaged = damaged[:high] + damaged[low:]
        path.write_bytes(damaged)
        read_soon(path)
