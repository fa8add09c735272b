"""The benchmarks run, say what they promise to say, and repeat themselves.

What they measure is not looked at.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import common
from families import DEPENDS_ON_PROMPT, FAMILIES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--prompt-tokens", "12", "20", "--response-tokens", "6", "12"]


def run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes as JSON; its Markdown table has to hold every row."""
    out = folder / "out.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| ")
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_runs_of_a_training_step_have_the_same_losses(tmp_path: Path):
    found = run(
        "train_step.py",
        tmp_path,
        "--shape",
        "tiny",
        "--steps",
        "2",
        "--runs",
        "2",
        "--batch-size",
        "2",
        "--only",
        "scir-scir",
        *SMALL,
    )
    first, second = found["runs"]
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 4  # two steps of warm-up
    assert first["seconds"] != second["seconds"]
    assert all(
        count["rows"] < count["tokens"] < count["sequence_tokens"] for count in first["counts"]
    )
    (row,) = found["table"]
    counted = [run["seconds"][2:] for run in (first, second)]
    seconds = statistics.median(map(statistics.median, counted))  # of two runs of two counted steps
    assert row["s a step"] == pytest.approx(seconds)
    assert row["pairs/s"] == pytest.approx(2 / seconds)
    assert row["tokens needed"] == statistics.fmean(
        count["tokens"] for count in first["counts"][2:]
    )
    weights = 2 * 500 * 32 + 2 * (
        4 * 32 * 32 + 3 * 32 * 48
    )  # embedding and head; attention and MLP of two layers
    assert row["peak MB"] == statistics.fmean(run["peak_mb"] for run in (first, second))
    assert row["peak MB"] > 3 * 4 * weights / 2**20  # the gradients and AdamW's two moments, fp32
    assert row["MFU"] is None  # fp32 has none


@pytest.mark.soak
def test_every_way_of_scoring_gives_the_same_log_probabilities(tmp_path: Path):
    found = run(
        "score.py",
        tmp_path,
        "--shape",
        "tiny",
        "--prompts",
        "2",
        "--answers",
        "3",
        "--packs",
        "4096",
        *SMALL,
    )
    plain, script, padded, trees = found["table"]
    assert [row["method"] for row in found["table"]] == [
        "one by one",
        "script",
        "padded 8",
        "trees 4096",
    ]
    assert (
        trees["tokens computed"]
        < plain["tokens computed"]
        == script["tokens computed"]
        <= padded["tokens computed"]
    )
    assert max(row["largest relative difference"] for row in found["table"]) < 1e-3


@pytest.mark.soak
def test_scaling_fits_an_exponent_to_each_factor(tmp_path: Path):
    settings = [
        "--shape",
        "tiny",
        "--factor",
        "pairs",
        "--points",
        "2",
        "--steps",
        "1",
        "--response-tokens",
        "6",
    ]
    found = run("scaling.py", tmp_path, *settings)
    assert [point["value"] for point in found["points"]] == [1, 2]
    (fit,) = found["exponents"]
    assert fit["exponent of tokens needed"] == pytest.approx(
        1, abs=0.02
    )  # twice the pairs, twice the tokens
    one, two = (point["s a step"] for point in found["points"])
    assert fit["exponent of s a step"] == pytest.approx(
        math.log2(two / one)
    )  # a line through two points


@pytest.mark.soak
def test_length_controlled_rates_are_set_beside_another_environments(tmp_path: Path):
    """A stand-in for alpaca-eval's environment.

    It knows plain win rates, and calls every length-controlled one 50.
    """
    peer = tmp_path / "python"
    script = (
        "import json, sys; files = sys.argv[4:]\n"
        "rates = [sum(r['preference'] - 1 for r in rows) / len(rows) for rows in "
        "map(json.load, map(open, files))]\n"
        "print(json.dumps([[100 * rate, 0, 50, 0] for rate in rates for _ in range(3)]))\n"
    )
    (tmp_path / "peer.py").write_text(script)
    peer.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "peer.py"} "$@"\n')
    peer.chmod(0o755)
    found = run("lc_winrate.py", tmp_path, "--alpaca-python", str(peer))
    assert [row["glm"] for row in found["table"]] == ["v1", "noreg", "minimal"]
    assert all(row["difference"] == pytest.approx(row["ours"] - 50) for row in found["table"])
    assert len({row["ours"] for row in found["table"]}) == 3


@pytest.mark.slow
def test_the_data_stages_account_for_every_row(tmp_path: Path):
    small, _, _, large, copied, picked = run("data_stages.py", tmp_path, "--rows", "200", "2000")[
        "table"
    ]
    assert (small["rows"], large["rows"]) == (200, 2000)
    assert (
        0 < small["rows out"] < large["rows out"] == copied["rows out"] == picked["rows out"] < 2000
    )
    inputs = [row["MB in"] for row in (small, large)]
    assert inputs[1] == pytest.approx(
        10 * inputs[0], abs=6
    )  # whole MB, of which the smaller may be half a one off
    assert copied["MB in"] == picked["MB in"] == large["MB in"]


def test_the_clock_and_the_peaks_hold_what_a_piece_of_work_takes():
    def work() -> int:
        block = b"x" * (64 << 20)
        until = time.process_time() + 0.2
        while time.process_time() < until:  # long enough to be looked at
            pass
        return len(block)

    returned, figures = common.measured(work)
    assert returned == 64 << 20
    # The process may meanwhile give back a little of what it held before.
    assert 62 <= figures["peak_mb"] < 80
    assert 62 <= figures["anonymous_mb"] < 80
    assert 0.2 <= figures["cpu_seconds"][0] + 0.02 < 0.5
    assert figures["wall_seconds"][0] >= 0.2


@pytest.mark.soak
def test_backends_are_measured_on_the_same_rows(tmp_path: Path):
    found = run(
        "backends.py",
        tmp_path,
        "--shape",
        "tiny",
        "--prompts",
        "3",
        "--answers",
        "3",
        "--max-new-tokens",
        "8",
        *SMALL,
    )
    sampled, judged = found["table"]
    assert (sampled["task"], sampled["rows"], judged["task"], judged["rows"]) == (
        "generate",
        6,
        "judge",
        6,
    )  # the first prompt is warm-up
    assert (
        6 <= sampled["tokens_sampled"] <= 6 * 8
        and judged["tokens_sampled"] == 0 < judged["tokens_read"]
    )
    for task in (sampled, judged):
        assert 1e-4 < task["cpu_seconds"] < 1.2 * task["wall_seconds"] + 0.1  # one thread


def test_the_table_of_chat_templates_has_a_row_per_template(tmp_path: Path):
    for name, family in FAMILIES.items():
        (tmp_path / f"{name}.jinja").write_text(family.template, encoding="utf-8")
    (tmp_path / "depends.jinja").write_text(DEPENDS_ON_PROMPT, encoding="utf-8")
    (tmp_path / "left_out_training.jinja").write_text("", encoding="utf-8")
    document = tmp_path / "models.md"
    rows = run("models.py", tmp_path, "--templates", str(tmp_path), "--write", str(document))
    plain = {row["template"]: row for row in rows if not row["kwargs"]}
    assert sorted(plain) == sorted([*FAMILIES, "depends"])
    assert [name for name, row in plain.items() if row["verdict"] is None] == ["depends"]
    assert {row["boundary"] for row in plain.values()} == {"sound", "prompt_boundary"}
    assert all(row["planted"] for name, row in plain.items() if name != "depends")
    text = document.read_text(encoding="utf-8")
    assert f"at one token: {len(FAMILIES)} of {len(FAMILIES) + 1}." in text
    assert "- depends: the chat template of depends renders the answer 'A' differently" in text


@pytest.mark.soak
def test_planted_texts_are_measured_for_each_lesson(tmp_path: Path):
    found = run("planted.py", tmp_path, "--steps", "2", "--pairs", "8", "--seeds", "0")
    assert sorted(found) == ["long", "short"]
    for (figures,) in found.values():
        assert "second answer" in figures
        for shares in figures.values():
            assert sorted(shares) == ["as read", "as written"]
