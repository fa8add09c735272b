"""Tokens that are computed are counted, and a terminal is told how fast they go by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import run

from scir_cli.data import dataset
from scir_cli.engine.throughput import Meter
from scir_cli.report.progress import progress


def test_rates_are_of_the_time_at_work_of_all_processes_and_hits_of_what_was_looked_up():
    meter = Meter(processes=2)
    meter.count(read=100)  # by the engine, which looks nothing up
    meter.count(read=300, sampled=20, cached=150)
    meter.add(Meter(read=400, sampled=60, looked_up=100, cached=50, seconds=8.0))
    assert meter.rates == (
        200.0,
        20.0,
        0.5,
    )  # 800 and 80 tokens in 8 s of two processes at once; 200 of 400
    assert meter.line() == "in 200/s out 20/s cached 50%"
    assert meter.pop() == Meter(800, 80, 400, 200, 8.0)
    assert (meter.rates, meter.line(), meter.figures()["tokens_read"]) == (
        (None, None, None),
        "",
        0,
    )


def test_time_counts_while_a_model_works_and_at_no_other_time(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 11.0, 13.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter()
    meter.count(read=5)
    with meter.timed():
        meter.count(read=5)
        assert meter.seconds == 1.0
    assert meter.seconds == 3.0


def test_a_terminal_shows_the_bar_and_a_pipe_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    meter = Meter(read=200, sampled=10, looked_up=200, cached=50, seconds=1.0)
    for told in (False, True):
        if told:
            monkeypatch.setenv("TTY_COMPATIBLE", "1")
            monkeypatch.setenv("COLUMNS", "80")
        with progress("generate", 4, meter) as advance:
            advance(2)
        shown = capsys.readouterr()
        assert shown.out == ""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.err)
        assert ("2/4 in 200/s out 10/s cached 25% 0:00:0" in plain) == told
        assert told or shown.err == ""


def test_the_manifest_holds_what_was_computed(tiny_llama: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "Tell me of {w}."}}\n' for w in ("cats", "dogs")), encoding="utf-8"
    )
    common: dict[str, Any] = {"model": str(tiny_llama)}
    work = run(
        "generate", **common, input=str(prompts), n=3, max_new_tokens=5, output_dir=tmp_path / "c"
    )["work"]
    rows = dataset.read_dataset(tmp_path / "c").to_pylist()
    assert work["tokens_sampled"] == sum(len(row["token_ids"]) for row in rows)
    assert work["tokens_read"] > 0 and work["tokens_read"] % 3 == 0, "each sample reads its prompt"
    assert work["tokens_read_per_second"] == pytest.approx(
        work["tokens_read"] / work["seconds"], rel=0.1
    )
    assert work["prefix_cache_hit_rate"] is None
    read = [
        run(
            "judge",
            **common,
            input=str(tmp_path / "c"),
            reward_models=["judge"],
            max_tokens_per_pack=n,
            output_dir=tmp_path / f"j{n}",
        )
        for n in (1, 100_000)
    ]
    assert read[1]["work"]["tokens_read"] < read[0]["work"]["tokens_read"], (
        "what pairs share is read once where they lie in one pack"
    )
    assert dataset.read_dataset(tmp_path / "j1").num_rows > 2
