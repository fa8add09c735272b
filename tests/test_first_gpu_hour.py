"""A GPU's first hour, rehearsed on a CPU: parts that end, fail or are late, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import first_gpu_hour as hour
import gpu_parts

from scir_cli.engine import trees


def records(tmp_path: Path, part: str) -> list[dict[str, Any]]:
    """What a part records at tiny shapes, in this process."""
    path = tmp_path / "records.jsonl"
    gpu_parts.PARTS[part](gpu_parts.Part(path, {"tiny": True, "seconds": 600}))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tiny_judge_part_finds_the_same_log_probabilities_every_way(tmp_path: Path):
    rows = [r for r in records(tmp_path, "judge") if not hour.state(r)]
    assert [r["name"] for r in rows] == ["trees", "trees", "padded", "padded", "one by one"]
    for row in rows[1:]:
        np.testing.assert_allclose(row["logps"], rows[0]["logps"], rtol=0.02)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*", "ignore:.*checkpointing")
def test_all_ways_of_a_dpo_step_have_the_same_losses(tmp_path: Path):
    rows = [r for r in records(tmp_path, "train") if "checkpointing" in r]
    assert not [r["error"] for r in rows if "error" in r]
    steps = [r for r in rows if r["length"] == "medium" and "SCIR" not in r["name"]]
    # Trees, packs, two padded ways, two of them with recomputation, and compiled trees.
    assert len(steps) == 7
    for step in steps[1:]:
        np.testing.assert_allclose(step["losses"], steps[0]["losses"], atol=0.01)
    trees_, packed = steps[0], next(r for r in steps if r["name"].startswith("packed"))
    assert trees_["tokens_computed"] < packed["tokens_computed"]


def test_joined_forests_share_nothing_and_keep_their_own_targets():
    branches = [trees.continuation([5, 6], [7]), trees.continuation([5, 6], [8, 9])]
    forest = gpu_parts.joined([trees.build([branch]) for branch in branches])
    # A target's own token needs no position: two tokens, then three.
    assert forest.tokens.tolist() == [5, 6, 5, 6, 8]
    assert forest.positions.tolist() == [0, 1, 0, 1, 2]
    assert forest.subtree_end.tolist() == [2, 2, 5, 5, 5]
    assert forest.target_hidden.tolist() == [1, 3, 4]
    assert forest.target_token.tolist() == [7, 8, 9]
    assert forest.target_branch.tolist() == [0, 1, 1]


def test_a_part_that_fails_or_is_late_leaves_its_records_and_the_end_of_its_output(tmp_path: Path):
    log = tmp_path / "log.txt"
    failed = hour.run_part("no such part", {"tiny": True}, 60, log)
    assert failed["status"] == "failed with status 1"
    assert "KeyError: 'no such part'" in failed["end_of_output"]
    late = hour.run_part("train", {"tiny": True}, 0.2, log)
    assert late["status"] == "out of time"
    assert late["records"] == []
    assert "===== train: out of time" in log.read_text()


def test_an_attempt_that_breaks_is_recorded_and_the_next_one_runs(tmp_path: Path):
    part = gpu_parts.Part(tmp_path / "records.jsonl", {"seconds": 600})
    part.attempt("divide", lambda: {"value": 1 // 0})
    part.attempt("add", lambda: {"value": 1 + 1})
    broken, whole = map(json.loads, part.path.read_text().splitlines())
    assert broken["error"].endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert whole["value"] == 2


@pytest.fixture
def result() -> dict[str, Any]:
    """Two training steps on an H100 as they would be recorded, and one that had no memory."""
    step = {"checkpointing": False, "length": "medium", "device": "NVIDIA H100", "flops": 989e11}
    step |= {"tokens_computed": 6000.0, "sequence_tokens_per_second": 20_000.0, "peak_gb": 40.0}
    ours = {**step, "name": "scir train, DPO", "seconds": 0.2, "packs": [1.0, 2.0]}
    padded = {**step, "name": "padded, all logits", "seconds": 0.5}
    full = {"name": "scir train, SCIR", "checkpointing": False, "error": "CUDA out of memory."}
    steps = {"status": "done", "seconds": 60.0, "records": [ours, padded, full]}
    late = {"status": "out of time", "seconds": 9.0, "records": []}
    return {"command": "c", "date": "d", "parts": {"train": steps, "judge": late}}


def test_the_tables_hold_utilization_and_ratios_worked_by_hand(result: dict[str, Any]):
    ours, padded = hour.training_rows(result["parts"]["train"]["records"])
    # A tenth of the peak's operations of one second, in a fifth and in a half of a second.
    assert ours["MFU %"] == pytest.approx(50)
    assert padded["MFU %"] == pytest.approx(20)
    assert ours["times scir's DPO"] == 1
    assert padded["times scir's DPO"] == pytest.approx(2.5)
    assert ours["packs"] == "2.0"
    assert hour.failures(result) == [
        {"part": "train", "what": "scir train, SCIR", "how": "CUDA out of memory."},
        {"part": "judge", "what": "the whole part", "how": "out of time"},
    ]


def test_the_tables_replace_what_stands_between_the_marks_of_the_page(
    tmp_path: Path, result: dict[str, Any]
):
    page = tmp_path / "page.md"
    before = (Path(hour.HERE).parent / "docs" / "performance.md").read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    hour.write_page(hour.page(result), page)
    hour.write_page(hour.page(result), page)  # again: nothing is doubled
    after = page.read_text(encoding="utf-8")
    tables = after.partition(hour.START)[2].partition(hour.END)[0]
    assert "Not yet measured" not in tables
    assert after.count("| padded, all logits | medium |") == 1
    assert after.partition(hour.START)[0] == before.partition(hour.START)[0]
    assert after.partition(hour.END)[2] == before.partition(hour.END)[2]
