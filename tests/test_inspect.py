"""`scir inspect`: what an input or a dataset holds, and judged pairs in the order asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import run_command

from scir_cli.data import dataset

#: Log-odds for first, nats, of judge and implicit, and the label. Row 2 has the surest
#: disagreement, min(3, 4); row 1 the surest mistake, 5; row 0 is right and agreed.
PAIRS = [
    ("agreed", 2.0, 1.0, "first"),
    ("wrong", 5.0, 0.5, "second"),
    ("split", 3.0, -4.0, "first"),
    ("unjudged", None, None, None),
]


def response(text: str) -> dict[str, Any]:
    return {
        "candidate_id": None,
        "reasoning": None,
        "text": text,
        "token_ids": [],
        "finish_reason": "stop",
        "author": None,
    }


def reward(name: str, value: float | None) -> dict[str, Any]:
    return {
        "reward_model": name,
        "log_odds": value,
        "forward_log_odds": None,
        "swapped_log_odds": None,
        "verdict_mass": None,
        "rationale_token_ids": None,
    }


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four judged pairs; the text of one holds a control sequence and two lines."""
    out = tmp_path_factory.mktemp("inspected") / "judged"
    rows = []
    for name, judge, implicit, gold in PAIRS:
        rows.append(
            {
                "pair_id": name,
                "prompt_id": name,
                "messages": [
                    {"role": "system", "content": "Be kind.", "more": None},
                    {"role": "user", "content": f"Question {name}?", "more": None},
                ],
                "subset": None,
                "extra": None,
                "first": response(f"One {name}\x1b[31m red\u202e\nand a second line"),
                "second": response("Two " + "long words " * 30),
                "gold_label": gold,
                "rewards": [reward("judge", judge), reward("implicit", implicit)],
                "reference_logps": [],
            }
        )
    part = dataset.Part(rows, len(rows))
    dataset.write_dataset(
        out, "judged", {"stage": "judge"}, [(0, len(rows))], lambda *_: part, inputs={"input": "x"}
    )
    return out


def inspect(
    words: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    width: int = 80,
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `scir inspect`."""
    monkeypatch.setenv("COLUMNS", str(width))
    capfd.readouterr()
    status = run_command(["inspect", *map(str, words)], monkeypatch)
    out, err = capfd.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("order", "numbers"),
    [("disagreement", [3]), ("confident-mistakes", [2, 3])],
)
def test_pairs_are_sorted_and_only_those_that_disagree_or_are_wrong_are_shown(
    order: str, numbers: list[int], judged: Path, monkeypatch: Any, capfd: Any
):
    status, out, _ = inspect([judged, "--sort", order], monkeypatch, capfd)
    headings = [line for line in out.splitlines() if line.startswith("pair ")]
    assert status == 0
    assert [int(line.split("row ")[1].split(",")[0]) for line in headings] == numbers
    status, out, _ = inspect([judged, "--sort", order, "--limit", 1], monkeypatch, capfd)
    assert sum(line.startswith("pair ") for line in out.splitlines()) == 1
    assert f"pair 1 of {len(numbers)}" in out


@pytest.mark.parametrize("width", [80, 200])
def test_two_responses_are_side_by_side_within_the_width(
    width: int, judged: Path, monkeypatch: Any, capfd: Any
):
    words = [judged, "--sort", "confident-mistakes", "--limit", 1]
    _, out, _ = inspect(words, monkeypatch, capfd, width)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    (line,) = [line for line in lines if "One wrong" in line]
    # The second response begins on the same line, in the right half.
    assert abs(line.index("Two long words") - width / 2) < 3
    assert "Question wrong?" in out and "system: Be kind." in out
    assert "second (chosen)" in out
    (verdict,) = [line for line in lines if line.strip().startswith("judge")]
    assert verdict.split() == ["judge", "first", "(wrong)", "5.00", "–", "–"]


def test_every_character_is_visible(judged: Path, monkeypatch: Any, capfd: Any):
    _, out, _ = inspect([judged, "--limit", 4], monkeypatch, capfd)
    assert "\x1b" not in out and "\u202e" not in out
    assert r"\x1b[31m red\u202e" in out


def test_an_overview_of_a_dataset_names_kind_rows_drops_digest_and_nulls(
    judged: Path, monkeypatch: Any, capfd: Any
):
    status, out, _ = inspect([judged], monkeypatch, capfd)
    digest = json.loads((judged / "manifest.json").read_text())["digest"]
    assert status == 0
    for text in ("judged", "4 in = 4 out + 0 dropped", digest, "scir judge", "1 in gold_label"):
        assert text in out
    _, printed, _ = inspect([judged, "--json"], monkeypatch, capfd)
    assert json.loads(printed)["manifest"]["rows_out"] == 4


def test_an_input_shows_its_layout_columns_first_row_and_drops(
    tmp_path: Path, monkeypatch: Any, capfd: Any
):
    rows = [
        {"prompt": "Name a fruit.", "chosen": "Apple.", "rejected": "Bread.", "id": 7},
        {"prompt": "Name a fruit.", "chosen": "Pear.", "rejected": "Pear.", "id": 8},
        {"prompt": " ", "chosen": "Yes.", "rejected": "No.", "id": 9},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    status, out, _ = inspect([path], monkeypatch, capfd)
    assert status == 0
    assert "pairs: prompt and texts" in out and "whole number" in out and "Apple." in out
    assert "as pairs (scir judge, scir train): 1 rows + 1 empty_prompt, 1 identical_responses" in (
        " ".join(out.split())
    )
    assert "as prompts (scir generate): 1 rows + 1 duplicate_prompt, 1 empty_prompt" in (
        " ".join(out.split())
    )


def test_other_kinds_and_unfinished_folders_and_models_are_shown(
    world: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
):
    for name, kind in (("candidates", "candidates"), ("preferences", "preferences")):
        status, out, _ = inspect([world / name], monkeypatch, capfd)
        assert (status, f"kind {kind}" in " ".join(out.split())) == (0, True)
        assert "Tell me of" in out
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "plan.json").write_text('{"stage": "generate", "schema_version": "1"}')
    status, out, _ = inspect([tmp_path / "part"], monkeypatch, capfd)
    assert status == 0 and "not finished" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{judged}", "--sort", "disagrement"], "Did you mean 'disagreement'?"),
        (["{world}/candidates", "--sort", "disagreement"], "of kind 'candidates'"),
        (["{world}/prompts.jsonl", "--sort", "disagreement"], "an input without verdicts"),
        (["{world}/nothing.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    words: list[str], message: str, judged: Path, world: Path, monkeypatch: Any, capfd: Any
):
    filled = [word.format(judged=judged, world=world) for word in words]
    status, out, err = inspect(filled, monkeypatch, capfd)
    assert status != 0 and out == ""
    assert err.startswith("scir: error: ") and err.count("\n") == 1 and message in err


def test_a_reader_that_stops_reading_ends_it_without_a_traceback(judged: Path, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    rows = ({"prompt": f"{i} " + "word " * 50, "chosen": "A", "rejected": "B"} for i in range(3000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [sys.executable, "-m", "scir_cli", "inspect", str(path), "--limit", "3000"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("path")
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_dataset_without_pairs_is_an_empty_overview(tmp_path: Path, monkeypatch: Any, capfd: Any):
    empty = dataset.Part(pa.Table.from_pylist([], pa.schema([])), 0)
    out = tmp_path / "empty"
    dataset.write_dataset(out, "judged", {"stage": "judge"}, [], lambda *_: empty)
    status, printed, _ = inspect([out], monkeypatch, capfd)
    assert status == 0 and "0 in = 0 out" in printed
