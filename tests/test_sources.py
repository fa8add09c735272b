"""What users bring, read from files made here.

The hub is a stand-in, for no test touches the network.
"""

from __future__ import annotations

import datetime
import decimal
import json
import tempfile
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from scir_cli import registry, settings, stages
from scir_cli.config import build
from scir_cli.data import dataset, hashing, readers, schemas
from scir_cli.data.messages import without_nulls
from scir_cli.errors import DataError

USER = {"role": "user", "content": "Why is the sky blue?"}
SYSTEM = {"role": "system", "content": "Be brief."}
Rows = list[dict[str, Any]]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def kind_of(table: pa.Table) -> str:
    """The kind that a table's metadata names."""
    return table.schema.metadata[schemas.KIND_KEY].decode()


def own(path: Path, table: pa.Table) -> str:
    """A finished dataset folder of ours that holds `table`."""
    kind = kind_of(table)
    dataset.write_dataset(
        path,
        kind,
        {"made": "here"},
        [(0, table.num_rows)],
        lambda lo, hi: dataset.Part(table, table.num_rows),
    )
    return str(path)


def load_prompts(spec: str, limit: int | None = None) -> tuple[pa.Table, Counter[str]]:
    """The prompts of `spec` as one table, and the rows dropped by reason."""
    rows, drops = readers.open_prompts(spec, limit)
    return rows.slice(0, rows.num_rows), drops


def pair(table: pa.Table) -> tuple[list[dict[str, str]], str, str]:
    """Messages, chosen text and rejected text of a table with one pair."""
    (row,) = table.to_pylist()
    other = {"first": "second", "second": "first"}[row["gold_label"]]
    return without_nulls(row["messages"]), row[row["gold_label"]]["text"], row[other]["text"]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, answer("Scattering.")]}, [USER]),
        ({"messages": [USER, answer("Why?"), USER]}, [USER, answer("Why?"), USER]),
        ({"messages": [{**USER, "name": "Ann"}]}, [USER]),
        ({"prompt": "Why is the sky blue?", "unrelated": 1}, [USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "Why is the sky blue?", "messages": None}, [USER]),
        ({"instruction": "Why is the sky blue?"}, [USER]),
        ({"instruction": "Why is the sky blue?", "input": ""}, [USER]),
        (
            {"instruction": "Translate.", "input": "bleu"},
            [{"role": "user", "content": "Translate.\n\nbleu"}],
        ),
    ],
)
def test_each_prompt_layout_gives_its_messages(
    tmp_path: Path, row: dict[str, Any], messages: Rows
) -> None:
    table, drops = load_prompts(jsonl(tmp_path / "p.jsonl", [row]))
    (got,) = table.to_pylist()
    extra = '{"unrelated": 1}' if "unrelated" in row else None
    assert got == {
        "prompt_id": hashing.digest_json(messages)[:16],
        "messages": [{**message, "more": None} for message in messages],
        "subset": None,
        "extra": extra,
    }
    assert kind_of(table) == "prompts"
    assert not drops


def test_prompts_that_are_blank_or_repeated_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a"},
        {"prompt": " \n"},
        {"prompt": None},
        {"prompt": [SYSTEM]},
        {"prompt": "b"},
        {"prompt": "a", "subset": "x"},
    ]
    table, drops = load_prompts(jsonl(tmp_path / "p.jsonl", rows))
    assert [row["messages"][0]["content"] for row in table.to_pylist()] == ["a", "b"]
    assert drops == Counter(empty_prompt=3, duplicate_prompt=1)
    assert table.num_rows + sum(drops.values()) == len(rows)


def test_the_limit_counts_input_rows_and_not_kept_ones(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [{"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}])
    table, drops = load_prompts(spec, limit=2)
    assert (table.num_rows, drops) == (1, Counter(empty_prompt=1))


def test_the_subset_is_kept_as_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "subset": "math"},
        {"prompt": "b", "subset": 3},
        {"prompt": "c", "subset": ""},
        {"prompt": "d"},
    ]
    table, _ = load_prompts(jsonl(tmp_path / "p.jsonl", rows))
    assert table.column("subset").to_pylist() == ["math", "3", None, None]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": USER["content"], "chosen": "good", "rejected": "bad"}, [USER]),
        (
            {"prompt": [SYSTEM, USER], "chosen": [answer("good")], "rejected": [answer("bad")]},
            [SYSTEM, USER],
        ),
        (
            {"chosen": [SYSTEM, USER, answer("good")], "rejected": [SYSTEM, USER, answer("bad")]},
            [SYSTEM, USER],
        ),
        (
            {
                "prompt": USER["content"] + "\n",
                "chosen": [USER, answer("good")],
                "rejected": [USER, answer("bad")],
            },
            [USER],
        ),
        ({"messages": [USER], "chosen": "good", "rejected": "bad"}, [USER]),
    ],
)
def test_each_pair_layout_gives_its_prompt_and_its_two_texts(
    tmp_path: Path, row: dict[str, Any], messages: Rows
) -> None:
    table, drops = readers.load_pairs(jsonl(tmp_path / "p.jsonl", [{**row, "subset": "s"}]))
    assert pair(table) == (messages, "good", "bad")
    assert not drops
    (got,) = table.to_pylist()
    first, second = got["first"], got["second"]
    assert got["pair_id"] == hashing.digest_json([messages, first["text"], second["text"]])[:16]
    assert got["prompt_id"] == hashing.digest_json(messages)[:16]
    assert first == {
        "candidate_id": None,
        "reasoning": None,
        "text": first["text"],
        "token_ids": [],
        "finish_reason": "stop",
        "author": None,
    }
    assert (got["subset"], got["rewards"], got["reference_logps"]) == ("s", [], [])
    assert table.schema.equals(schemas.schema("judged"), check_metadata=True)


def test_each_unusable_pair_is_dropped_for_its_reason(tmp_path: Path) -> None:
    rows: Rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "\n"},
        {"prompt": "p", "chosen": None, "rejected": "b"},
        {"prompt": "p", "chosen": [], "rejected": [answer("b")]},
        {
            "prompt": "p",
            "chosen": "b",
            "rejected": "a",
        },  # the first pair again, labeled the other way round
        {"prompt": "p", "chosen": "c", "rejected": "d"},
        {"prompt": "p", "chosen": "c", "rejected": "d"},
    ]
    table, drops = readers.load_pairs(jsonl(tmp_path / "p.jsonl", rows))
    assert pair(table)[1:] == ("c", "d")
    assert drops == Counter(
        identical_responses=1,
        empty_prompt=1,
        empty_response=3,
        duplicate_pair=1,
        contradictory_label=2,
    )


def test_the_side_follows_from_the_pair_and_gold_follows_the_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(400)]
    swapped = [{"prompt": row["prompt"], "chosen": "b", "rejected": "a"} for row in rows]
    table = readers.load_pairs(jsonl(tmp_path / "p.jsonl", rows))[0].to_pylist()
    other = readers.load_pairs(jsonl(tmp_path / "q.jsonl", swapped))[0].to_pylist()
    assert all(row[row["gold_label"]]["text"] == "a" for row in table)
    assert all(row[row["gold_label"]]["text"] == "b" for row in other)
    assert [row["pair_id"] for row in table] == [
        row["pair_id"] for row in other
    ]  # so the label has no say in the side
    # 400 fair coins: mean 200, standard deviation 10; the hash is fixed, so this cannot flicker
    assert 160 < sum(row["gold_label"] == "first" for row in table) < 240


@pytest.mark.parametrize("external", ["odds", "good,bad", "good, bad"])
def test_external_scores_become_log_odds_for_the_first_response(
    tmp_path: Path, external: str
) -> None:
    scores = {"odds": 1.5, "good": 2.0, "bad": 0.5}  # 2.0 - 0.5 = 1.5 nats that chosen is better
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", **scores} for i in range(20)]
    table, _ = readers.load_pairs(jsonl(tmp_path / "p.jsonl", rows), external=external)
    assert set(table.column("gold_label").to_pylist()) == {"first", "second"}
    others = {
        "forward_log_odds": None,
        "swapped_log_odds": None,
        "verdict_mass": None,
        "rationale_token_ids": None,
    }
    for row in table.to_pylist():
        log_odds = 1.5 if row["gold_label"] == "first" else -1.5
        assert row["rewards"] == [{"reward_model": "external", "log_odds": log_odds, **others}]


@pytest.mark.parametrize("score", [None, float("nan"), ""])
def test_a_missing_external_score_is_no_verdict(tmp_path: Path, score: object) -> None:
    spec = jsonl(
        tmp_path / "p.jsonl",
        [{"prompt": "p", "chosen": "a", "rejected": "b", "good": 1.0, "bad": score}],
    )
    for external in ("bad", "good,bad", "bad,good"):
        table, _ = readers.load_pairs(spec, external=external)
        assert table.column("rewards").to_pylist()[0][0]["log_odds"] is None


@pytest.mark.parametrize(
    ("external", "words"),
    [
        ("scor", ["no column 'scor'", "prompt, chosen, rejected, score", "Did you mean 'score'?"]),
        ("score,loser", ["no column 'loser'", "prompt, chosen, rejected, score"]),
        ("a,b,c", ["names 3 columns"]),
        ("prompt", ["row 1", "'prompt' should be a finite number", "'p'"]),
    ],
)
def test_an_external_column_that_cannot_be_used_is_named(
    tmp_path: Path, external: str, words: list[str]
) -> None:
    spec = jsonl(
        tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b", "score": 1}]
    )
    with pytest.raises(DataError) as caught:
        readers.load_pairs(spec, external=external)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("score", [True, float("inf"), 10**400, [1.0]])
def test_an_external_score_that_is_no_finite_number_is_refused(
    tmp_path: Path, score: object
) -> None:
    spec = jsonl(
        tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b", "score": score}]
    )
    with pytest.raises(DataError, match="row 1: 'score' should be a finite number"):
        readers.load_pairs(spec, external="score")


def test_a_missing_prompt_column_is_an_error_that_names_the_ones_present(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [{"text": "a", "chosen": "b", "rejected": "c"}])
    for load in (load_prompts, readers.load_pairs):
        with pytest.raises(
            DataError,
            match=(
                r"p\.jsonl, row 1: .*'messages', 'prompt' or 'instruction'.* text, chosen, "
                r"rejected$"
            ),
        ):
            load(spec)


def test_a_missing_response_column_is_an_error_that_names_the_ones_present(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "loser": "c"}])
    with pytest.raises(DataError, match=r"no column 'rejected'.* prompt, chosen, loser"):
        readers.load_pairs(spec)


@pytest.mark.parametrize(
    "value",
    [
        "text",
        5,
        {"role": "user"},
        ["text"],
        [{"from": "human", "value": "a"}],
        [{"role": "user", "content": None}],
        [[1, 2]],
    ],
)
def test_messages_of_the_wrong_shape_are_an_error_that_names_the_row(
    tmp_path: Path, value: object
) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [{"messages": [USER]}, {"messages": value}])
    with pytest.raises(
        DataError, match=r"p\.jsonl, row 2: 'messages' should be a list of \{role, content\}"
    ):
        load_prompts(spec)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"chosen": [USER, answer("a")], "rejected": [SYSTEM, answer("b")]},
            "'chosen' and 'rejected' repeat different prompts",
        ),
        (
            {"prompt": "p", "chosen": [USER], "rejected": "b"},
            "the last message of 'chosen' .* its role is 'user'",
        ),
        (
            {"instruction": ["a"], "chosen": "a", "rejected": "b"},
            "'instruction' and 'input' should be text",
        ),
        (
            {"prompt": "half a pair \ud83d", "chosen": "a", "rejected": "b"},
            r"'\\ud83d' is half of a surrogate pair",
        ),
    ],
)
def test_a_pair_of_the_wrong_shape_is_an_error_that_names_the_row(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [row])
    with pytest.raises(DataError, match=f"row 1: {words}"):
        readers.load_pairs(spec)


def test_a_file_that_is_not_utf8_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')  # 15 bytes come before 0xe9
    with pytest.raises(DataError, match="not UTF-8: byte offset 15 holds 0xe9"):
        load_prompts(str(path))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl:3: malformed JSON"),
        ("p.json", '[{"prompt": "a"},\n {"prompt"}]', r"p\.json:2: malformed JSON"),
        (
            "p.json",
            '{\n "prompt": "a"\n',
            r"p\.json:3: malformed JSON .* a list of objects, or one object per line",
        ),
        ("p.json", "[" * 100_000, r"p\.json:1: unreadable JSON \(maximum recursion"),
        ("p.json", '{"a":' * 100_000, r"p\.json:1: unreadable JSON \(maximum recursion"),
        ("p.jsonl", '{"prompt": "a"}\n{"n": ' + "9" * 5000 + "}", r"p\.jsonl:2: unreadable JSON"),
        ("p.json", '["a"]', r"p\.json:1: found 'a'; expected a list of objects"),
        ("p.jsonl", '{"prompt": "a"}\n7\n', r"p\.jsonl:2: found 7; expected a list of objects"),
        ("p.csv", 'prompt,subset\n"a",b\nx,y,z\n', r"p\.csv:3: not as many fields"),
        ("p.csv", "prompt,subset\na\n", r"p\.csv:2: not as many fields"),
        ("p.csv", 'prompt\n"a" b\n', r"p\.csv:2: malformed CSV"),
        ("p.jsonl", "", r"p\.jsonl is empty"),
        ("p.json", "[]", r"p\.json is empty"),
        ("p.csv", "prompt\n", r"p\.csv is empty"),
        ("p.parquet", "", r"p\.parquet is empty"),
        ("p.parquet", "PAR1 and then nothing", r"p\.parquet is truncated or is not Parquet"),
        (
            "p.txt",
            "a",
            r"unknown extension '\.txt'; expected one of \.jsonl, \.json, \.ndjson, \.parquet",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_of_one_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_json_list_a_byte_order_mark_and_a_line_separator_in_a_string_are_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "p.json").write_text('\n[{"prompt": "a"}, {"prompt": "b"}]', encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.json"))[0].num_rows == 2
    (tmp_path / "p.jsonl").write_text('\ufeff{"prompt": "a\u2028b"}\r\n', encoding="utf-8")
    assert (
        load_prompts(str(tmp_path / "p.jsonl"))[0].to_pylist()[0]["messages"][0]["content"]
        == "a\u2028b"
    )


def test_a_csv_file_is_read_with_long_cells_line_breaks_and_scores(tmp_path: Path) -> None:
    long = "x" * 200_000  # over the csv module's own limit of 131,072
    (tmp_path / "p.csv").write_text(
        f'prompt,chosen,rejected,odds\n"a, b",{long},"two\nlines",-2\np,good,bad,\n',
        encoding="utf-8",
    )
    table, drops = readers.load_pairs(str(tmp_path / "p.csv"), external="odds")
    assert pair(table.slice(0, 1)) == ([{"role": "user", "content": "a, b"}], long, "two\nlines")
    rows = table.to_pylist()
    assert rows[0]["rewards"][0]["log_odds"] == (-2.0 if rows[0]["gold_label"] == "first" else 2.0)
    assert rows[1]["rewards"][0]["log_odds"] is None
    assert not drops


def test_a_parquet_file_is_read_with_nested_messages(tmp_path: Path) -> None:
    rows = [{"chosen": [USER, answer("good")], "rejected": [USER, answer("bad")]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert pair(readers.load_pairs(str(tmp_path / "p.parquet"))[0]) == ([USER], "good", "bad")


def test_a_parquet_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="truncated"):
        load_prompts(str(path))


def test_a_save_to_disk_folder_is_read_whatever_its_format(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": text} for text in "abc"]).with_format("numpy")
    data.select([2, 0]).save_to_disk(tmp_path / "saved")
    table, _ = load_prompts(str(tmp_path / "saved"))
    assert [row["messages"][0]["content"] for row in table.to_pylist()] == ["c", "a"]
    assert load_prompts(str(tmp_path / "saved"), limit=1)[0].num_rows == 1


def test_a_save_to_disk_folder_with_splits_gives_the_one_that_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    ).save_to_disk(folder)
    for spec, text in ((f"{folder}", "train"), (f"{folder}:test", "test")):
        assert load_prompts(spec)[0].to_pylist()[0]["messages"][0]["content"] == text
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_prompts(f"{folder}:dev")
    assert readers.digest(f"{folder}:test") != readers.digest(str(folder))


def test_a_save_to_disk_folder_that_is_damaged_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(DataError, match="saved cannot be read"):
        load_prompts(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_any_flipped_bit_in_the_records_of_a_save_to_disk_folder_is_refused_or_harmless(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).save_to_disk(folder)
    expected = load_prompts(str(folder))
    content = (folder / name).read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        (folder / name).write_bytes(flipped)
        try:
            assert load_prompts(str(folder)) == expected
        except DataError:
            continue


def test_any_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the data file inside it"):
        load_prompts(str(tmp_path))


def forms(folder: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same rows of text as each thing a user may bring."""
    table = pa.Table.from_pylist(rows)
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(folder / "saved")
    pq.write_table(table, folder / "p.parquet")
    pyarrow.csv.write_csv(table, folder / "p.csv")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: data)
    files = {
        "jsonl": jsonl(folder / "p.jsonl", rows),
        **{form: str(folder / f"p.{form}") for form in ("parquet", "csv")},
    }
    return files | {"saved": str(folder / "saved"), "hub": "org/name"}


def test_rows_that_are_read_some_at_a_time_are_those_of_one_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        f"{i % 17} of {i % 23}" if i % 5 else " " for i in range(230)
    ]  # every fifth is blank, and some come again much later
    rows = [
        {"prompt": text, "chosen": f"good {text}", "rejected": "bad", "odds": "1.5"}
        for text in texts
    ]
    once = list(dict.fromkeys(text for text in texts if text.strip()))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for at_a_time in (7, 1000):
        monkeypatch.setattr(readers, "ROWS_AT_A_TIME", at_a_time)
        for form, spec in forms(tmp_path, rows, monkeypatch).items():
            prompts, drops = readers.open_prompts(spec)
            assert drops == Counter(empty_prompt=46, duplicate_prompt=184 - len(once)), form
            read = [
                m[0]["content"]
                for low in range(0, len(once), 11)
                for m in prompts.slice(low, 11)["messages"].to_pylist()
            ]
            assert read == once, form
            pairs, drops = readers.open_pairs(spec, limit=200, external="odds")
            whole = readers.load_pairs(spec, limit=200, external="odds")[0]
            assert pa.concat_tables(
                pairs.slice(low, 3) for low in range(0, pairs.num_rows, 3)
            ).equals(whole), form
            assert pairs.slice(pairs.num_rows, 3).num_rows == 0
            assert pairs.num_rows + drops.total() == 200, form
            with pytest.raises(DataError, match="no column 'odd'.*Did you mean 'odds'"):
                readers.open_pairs(spec, external="odd")
        assert not list((tmp_path / "temporary").iterdir())  # what is kept there has no name


def test_memory_does_not_grow_with_the_texts_that_are_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows: each of them adds its id and its place, and of its 3,000 letters nothing."""
    monkeypatch.setattr(readers, "ROWS_AT_A_TIME", 100)
    peaks: dict[str, list[int]] = defaultdict(list)
    for n in (2000, 5000):
        folder = tmp_path / str(n)
        folder.mkdir()
        for form, spec in forms(
            folder, [{"prompt": f"{i}" + "x" * 3000} for i in range(n)], monkeypatch
        ).items():
            peaks[form].append(peak(spec, n))
    for form, (small, large) in peaks.items():
        assert (large - small) / 3000 < 500, form  # bytes a row


def peak(spec: str, n: int) -> int:
    """The most bytes that Arrow, Python and numpy held at once."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        prompts, _ = readers.open_prompts(spec)
        assert sum(prompts.slice(low, 200).num_rows for low in range(0, n, 200)) == n
        return pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_our_own_prompts_folder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table, _ = load_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))
    folder = own(tmp_path / "prompts", table)
    back, drops = load_prompts(folder)
    assert back.equals(table)
    assert kind_of(back) == "prompts"
    assert not drops
    assert load_prompts(folder, limit=1)[0].num_rows == 1


@pytest.mark.parametrize("kind", ["judged", "preferences"])
def test_pairs_that_scir_wrote_are_read_as_judged_whatever_their_kind(
    tmp_path: Path, kind: str
) -> None:
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "odds": 1} for i in range(3)]
    table, _ = readers.load_pairs(jsonl(tmp_path / "p.jsonl", pairs), external="odds")
    more = {"judged": {}, "preferences": {"prompt": [USER], "margin": 0.5}}[kind]
    folder = own(
        tmp_path / kind, schemas.to_table(kind, [{**row, **more} for row in table.to_pylist()])
    )
    back, drops = readers.load_pairs(folder)
    assert back.equals(table)
    assert back.schema.equals(schemas.schema("judged"), check_metadata=True)
    assert not drops
    assert readers.load_pairs(folder, limit=2)[0].num_rows == 2
    with pytest.raises(DataError, match="which has rewards already"):
        readers.load_pairs(folder, external="odds")


def extra(table: pa.Table) -> dict[str, Any]:
    """The carried columns of a table with one row."""
    (text,) = table["extra"].to_pylist()
    return json.loads(text or "{}")


def test_columns_that_nothing_uses_are_carried_along_and_those_that_are_stored_are_not_repeated(
    tmp_path: Path,
) -> None:
    source = {
        "id": 7,
        "source": {"url": "x", "tags": ["a", "b"]},
        "rewards": "ours has this name too",
        "extra": "and this",
        "empty": None,
    }
    left = {name: value for name, value in source.items() if value is not None}
    prompt = {"prompt": "Why?", "subset": "math", "dataset": "gsm", **source}
    table, _ = load_prompts(jsonl(tmp_path / "prompts.jsonl", [prompt]))
    assert extra(table) == {"dataset": "gsm", **left}  # `subset` is the subset, so `dataset` is not
    scored = {
        "prompt": "Why?",
        "chosen": "a",
        "rejected": "b",
        "chosen_model": "m",
        "dataset": "gsm",
        "good": 2,
        "bad": 1,
        **source,
    }
    table, _ = readers.load_pairs(jsonl(tmp_path / "pairs.jsonl", [scored]), external="good,bad")
    assert extra(table) == left
    assert (table["subset"].to_pylist(), table["rewards"].to_pylist()[0][0]["reward_model"]) == (
        ["gsm"],
        "external",
    )
    table, _ = readers.load_pairs(jsonl(tmp_path / "pairs.jsonl", [scored]))
    assert extra(table) == {
        "good": 2,
        "bad": 1,
        **left,
    }  # without --external nobody has used the scores
    instruction = {"instruction": "Translate.", "input": "bleu", "output": "blue"}
    assert extra(load_prompts(jsonl(tmp_path / "i.jsonl", [instruction]))[0]) == {"output": "blue"}


def test_values_that_json_lacks_are_carried_along_as_text_and_nan_as_null(tmp_path: Path) -> None:
    values = {
        "day": pa.array([datetime.date(2026, 11, 25)]),
        "moment": pa.array([datetime.datetime(2026, 11, 25, 8, 30)], pa.timestamp("us", "UTC")),
        "price": pa.array([decimal.Decimal("1.50")]),
        "image": pa.array([b"\x00\xff"]),
        "score": pa.array([float("nan")]),
        "nested": pa.array([[{"x": float("inf"), "y": 1.5}]]),
        "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    pq.write_table(pa.table({"prompt": ["Why?"], **values}), tmp_path / "p.parquet")
    assert extra(load_prompts(str(tmp_path / "p.parquet"))[0]) == {
        "day": "2026-11-25",
        "moment": "2026-11-25T08:30:00+00:00",
        "price": "1.50",
        "image": "AP8=",  # base64
        "score": None,
        "nested": [{"x": None, "y": 1.5}],
        "pairs": [["k", 1]],
    }


def test_half_a_character_in_a_carried_column_stays_as_it_was_escaped(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "p.jsonl", [{"prompt": "Zürich", "note": "\ud83d", "city": "Zürich"}])
    table, _ = load_prompts(spec)
    assert extra(table) == {"note": "\ud83d", "city": "Zürich"}
    table["extra"][0].as_py().encode()  # the column itself is UTF-8


def test_a_dataset_of_ours_that_another_tool_has_saved_keeps_the_columns_it_carries(
    tmp_path: Path,
) -> None:
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b", "id": 3}]
    table, _ = readers.load_pairs(jsonl(tmp_path / "p.jsonl", pairs))
    more = {"label": "first", "prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]}
    own(
        tmp_path / "preferences",
        schemas.to_table("preferences", [{**row, **more} for row in table.to_pylist()]),
    )
    saved = datasets.load_from_disk(str(tmp_path / "preferences")).add_column("checked_by", ["Ann"])
    saved.to_parquet(str(tmp_path / "saved.parquet"))
    again, _ = readers.load_pairs(str(tmp_path / "saved.parquet"))
    assert extra(again) == {"id": 3, "checked_by": "Ann"}


def test_a_consistency_folder_is_refused_and_the_judged_dataset_is_named(tmp_path: Path) -> None:
    table, _ = readers.load_pairs(
        jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b", "odds": 1}]),
        external="odds",
    )
    judged, out = own(tmp_path / "judged", table), tmp_path / "consistency"
    stages.load("check-consistency")(
        build(settings.CheckConsistencySettings, {"input": judged, "output_dir": out}, where="test")
    )
    assert dataset.read_dataset(out).column_names == [
        "pair_id",
        "agree",
        "margin",
        "mean_log_odds",
        "spread",
    ]
    assert dataset.read_dataset(out)["pair_id"].to_pylist() == table["pair_id"].to_pylist()
    with pytest.raises(
        DataError,
        match=(
            r"consistency holds a 'consistency' dataset.*pass the judged dataset .* from, "
            rf"{judged}$"
        ),
    ):
        readers.load_pairs(str(out))
    for stage, values in (
        ("filter", {}),
        ("eval rewards", {}),
        ("check-consistency", {"compare_to": [str(out)]}),
    ):
        given = {
            "input": judged if values else str(out),
            "output_dir": tmp_path / "refused",
            **values,
        }
        with pytest.raises(DataError, match="pass the judged dataset"):
            stages.load(stage)(build(registry.STAGES[stage].settings, given, where="test"))


def test_our_own_folder_of_another_kind_or_unfinished_is_refused(tmp_path: Path) -> None:
    table, _ = load_prompts(jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}]))
    folder = own(tmp_path / "prompts", table)
    with pytest.raises(DataError, match="holds a 'prompts' dataset"):
        readers.load_pairs(folder)
    (tmp_path / "prompts" / "manifest.json").unlink()
    with pytest.raises(DataError, match="not a finished dataset"):
        load_prompts(folder)


@pytest.mark.parametrize(
    "spec",
    ["", "absent.jsonl", "data/absent.jsonl", "../absent/folder", "/absent/folder", "hf://absent"],
)
def test_a_path_that_does_not_exist_and_cannot_be_on_the_hub_is_refused(spec: str) -> None:
    for use in (load_prompts, readers.digest):
        with pytest.raises(DataError, match="does not exist; expected a file"):
            use(spec)


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("hf://org/na-me.2:main:test", ("org/na-me.2", "main", "test")),
        ("hf://datasets/org/name:main:test", ("org/name", "main", "test")),
    ],
)
def test_a_hub_spec_loads_its_config_and_split(
    monkeypatch: pytest.MonkeyPatch, spec: str, asked: tuple[str, ...]
) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": json.dumps([name, config, split])}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table, _ = load_prompts(spec)
    assert json.loads(table.to_pylist()[0]["messages"][0]["content"]) == list(asked)


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_the_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach it\n(no network)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        DataError,
        match=(
            r"'org/name' is not a local path, and loading it from the hub failed: Couldn't "
            r"reach it \(no network\)$"
        ),
    ):
        readers.load_pairs("org/name")
    assert readers.digest("hf://org/name") == "hub:org/name"
    assert readers.digest("org/name:test") == "hub:org/name:test"


def test_the_digest_follows_content_and_hub_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (jsonl(tmp_path / name, [{"prompt": "a"}]) for name in ("one.jsonl", "two.jsonl"))
    three = jsonl(tmp_path / "three.jsonl", [{"prompt": "b"}])
    assert readers.digest(one) == readers.digest(two) != readers.digest(three)
    builder = type("Builder", (), {"hash": "abc123"})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
    assert readers.digest("org/name") == "hub:org/name@abc123"
    assert readers.digest("org/name:test") == "hub:org/name@abc123:test"
