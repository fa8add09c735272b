"""Trackers get the numbers of metrics.jsonl under the names that transformers' and TRL's dashboards
know.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy import make_model

from scir_cli import config, stages
from scir_cli.errors import ConfigError
from scir_cli.settings import TrainSettings
from scir_cli.training import metrics, trackers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trackers")
    make_model(root / "base", seed=1)
    make_model(root / "policy", seed=2)
    pairs = [
        {"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "No."}
        for w in ("cat", "dog", "sun", "sea")
    ]
    (root / "gold.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8"
    )
    return root


def arguments(world: Path, out: Path, **more: Any) -> dict[str, Any]:
    common = {
        "model": str(world / "policy"),
        "reward_reference": str(world / "base"),
        "input": str(world / "gold.jsonl"),
    }
    return common | {
        "validation": str(world / "gold.jsonl"),
        "output_dir": str(out),
        "batch_size": 2,
        "dtype": "fp32",
        "device": "cpu",
        **more,
    }


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {
        tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
@pytest.mark.parametrize("objective", ["scir", "dpo"])
def test_tensorboard_holds_what_metrics_jsonl_holds_under_the_fields_names(
    world: Path, tmp_path: Path, objective: str
):
    settings = arguments(world, tmp_path / "m", objective=objective, report_to=["tensorboard"])
    stages.load("train")(config.build(TrainSettings, settings, where="test"))
    found = read_events(tmp_path / "m" / "scir")
    logged: dict[str, list[tuple[int, float]]] = {}
    for line in (tmp_path / "m" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step", "kind"}:
            logged.setdefault(metrics.tracker_name(name), []).append((record["step"], record[name]))
    assert {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "eval/accuracy/judge",
        "eval/flip_rate",
    } <= set(found)
    if objective == "dpo":
        theirs = (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        )
        assert {f"train/{name}" for name in theirs} <= set(found)
        first = {
            name: dict(found[f"train/rewards/{name}"])[2]
            for name in ("chosen", "rejected", "margins")
        }
        assert first["margins"] == pytest.approx(first["chosen"] - first["rejected"], abs=1e-6)
    assert set(found) == set(logged)
    for name, values in logged.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values]
        assert [value for _, value in found[name]] == pytest.approx(
            [value for _, value in values], rel=1e-5, abs=1e-6
        )


@pytest.mark.slow
def test_two_processes_report_once_and_both_end_well(world: Path, tmp_path: Path):
    settings = arguments(
        world, tmp_path / "m", objective="dpo", report_to="tensorboard", num_processes=2
    )
    command = [
        sys.executable,
        "-m",
        "scir_cli",
        "train",
        *(word for k, v in settings.items() for word in ("--" + k.replace("_", "-"), str(v))),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "m" / "scir").glob("events.*"))) == 1
    assert [step for step, _ in read_events(tmp_path / "m" / "scir")["train/loss"]] == [1, 2]


def test_a_tracker_that_is_unknown_or_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        trackers.check(["tensorbord"])
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match="pip install comet-ml"):
        trackers.check(["comet_ml"])


def test_a_tracker_of_ones_own_is_taken_by_name_and_leaves_stdout_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from accelerate import tracking

    class Remember(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "remember", False, True
        tracker = None
        said: ClassVar[list[Any]] = []

        def __init__(self, run_name: str) -> None:
            super().__init__()
            self.said.append(run_name)

        def start(self) -> None:
            print("greetings")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.said.append(values["objective"])

        def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
            self.said.append((step, "train/loss" in values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "remember", Remember)
    settings = arguments(
        world, tmp_path / "m", objective="dpo", report_to=["remember"], validation=None
    )
    stages.load("train")(config.build(TrainSettings, settings, where="test"))
    assert capsys.readouterr().out == ""
    assert Remember.said == ["scir", "dpo", (1, True), (2, True)]
