"""The view of a training run.

All of it within 80 columns on a terminal, a line now and then in a pipe.
"""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from toy import make_model

from scir_cli.report.training_view import LINE_SECONDS, View, sparkline, watching

FIGURES = {
    "loss": 1.25,
    "scir/preference_loss": 0.69,
    "scir/inconsistency": 0.5,
    "scir/entropy": 0.1,
    "scir/mask_rate": 0.75,
    "scir/agreement": 0.8,
    "abs_log_odds/judge_forward": 2.0,
    "abs_log_odds/implicit": 1.0,
    "tokens_per_second": 1234.0,
    "grad_norm": 3.0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_view_is_whole_at_80_columns():
    clock = Clock()
    view = View("train scir", 200, clock)
    view.see(20, {})  # a resumed run
    for step in range(21, 31):
        clock.now += 2.0
        view.see(step, {**FIGURES, "loss": float(step), "validation/accuracy/judge": 0.5})
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(view)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    for said in (
        "30/200",
        "inconsistency",
        "|log-odds| judge_forward",
        "validation accuracy judge",
        "75.0%",
        "▁▁▂▃▄▅▆▇██",
    ):
        assert said in text
    assert "1,234 tokens/s" in text
    assert (
        "5 min 40 s left" in text
    )  # 170 steps left of 2 s; the steps of the run before do not count


def test_a_pipe_gets_a_line_every_half_minute_and_no_control_characters():
    clock, out = Clock(), io.StringIO()
    view = View("train scir", 100, clock)
    with watching(view, Console(file=out)) as see:
        for step in range(1, 8):
            clock.now += LINE_SECONDS / 3
            see(step, FIGURES)
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [
        "train scir: step 3/100",
        "train scir: step 6/100",
    ]
    assert "loss 1.25, pairs kept by mask 75.0%, agreement 80.0%, 1,234 tokens/s" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_sparkline_spans_its_values_and_is_flat_where_they_are_equal():
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▄▄"


def test_training_on_a_terminal_draws_and_leaves_one_line(tmp_path: Path):
    make_model(tmp_path / "policy")
    rows = [
        {"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "No."}
        for w in ("cat", "dog", "sun")
    ]
    (tmp_path / "gold.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "scir_cli",
        "train",
        "-m",
        str(tmp_path / "policy"),
        "-i",
        str(tmp_path / "gold.jsonl"),
    ]
    command += [
        "--objective",
        "dpo",
        "-o",
        str(tmp_path / "m"),
        "--batch-size",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # Linux says so when the other end has closed
            pass
        assert process.stdout is not None
        assert (process.wait(), process.stdout.read()) == (0, b"")
    text = shown.decode()
    assert "preference accuracy" in text
    assert "tokens/s" in text
    assert "3 in = 3 out" in text.splitlines()[-1]
    os.close(ours)


@pytest.mark.parametrize("step", [0, 7])
def test_before_the_first_step_no_time_left_is_shown(step: int):
    view = View("train scir", 10, Clock())
    view.see(step, {})
    assert "left" not in view.machine()
