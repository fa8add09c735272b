"""The flags and variables of transformers, TRL and trackers: accepted, or answered in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from accelerate import tracking
from flags import commands
from helpers import run_command

from scir_cli import config
from scir_cli.cli import app
from scir_cli.training import trackers

FLAGS = {
    name: {flag for option in command.params for flag in option.opts}
    for name, command in commands(typer.main.get_command(app))
}
OURS = set().union(*FLAGS.values())


def test_every_alias_is_of_a_flag_and_is_none_itself():
    assert {f"--{name}" for name in config.ALIASES.values()} <= OURS
    others = {f"--{name}" for name in (*config.ALIASES, *config.OTHER_FLAGS)}
    assert others & OURS == set()
    assert set(config.ALIASES) & set(config.OTHER_FLAGS) == set()


def test_every_flag_that_an_answer_names_exists():
    for name, answer in config.OTHER_FLAGS.items():
        words = answer.replace(";", " ").replace(",", " ").split()
        named = {word for word in words if word.startswith("--")}
        assert named <= OURS, name


def test_an_alias_sets_our_setting(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    words = ["train", "--model_name_or_path", str(world / "policy"), "--dataset-name"]
    words += [str(world / "gold.jsonl"), "--objective", "dpo", "-o", str(tmp_path / "m")]
    words += ["--num_train_epochs", "2", "--lr", "1e-4", "--lora_r", "4", "--loss-type", "ipo"]
    words += ["--dtype", "fp32", "--device", "cpu", "--dry-run", "--json"]
    assert run_command(words, monkeypatch) == 0
    printed = capfd.readouterr().out
    for text in ('"num_epochs": 2', '"learning_rate": 0.0001', '"rank": 4', '"ipo"'):
        assert text in printed


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("train --per_device_train_batch_size 4", "Here: --batch-size is the number of pairs"),
        ("train --bf16", "Here: --dtype bf16."),
        ("train --hub-model-id a/b", "Here: --push-to-hub ORG/NAME."),
        ("train --batchsize 4", "Did you mean '--batch-size'?"),
        ("generate --max-tokens 4", "Did you mean '--max-new-tokens'?"),
        ("filter --zzz", "there is no --zzz. (scir --help)"),
    ],
)
def test_an_unknown_flag_is_answered_with_what_to_write(
    words: str, answer: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    assert run_command(words.split(), monkeypatch) == 2
    printed = capfd.readouterr().err
    assert answer in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("wandb", {}, ("scir", "OUT")),
        ("wandb", {"WANDB_PROJECT": "mine", "WANDB_NAME": "first"}, ("mine", "first")),
        ("trackio", {"TRACKIO_PROJECT": "mine"}, ("mine", "OUT")),
        ("mlflow", {"MLFLOW_EXPERIMENT_NAME": "mine", "MLFLOW_RUN_NAME": "r"}, ("mine", "r")),
    ],
)
def test_a_trackers_own_variables_name_project_and_run(
    name: str, variables: dict[str, str], expected: tuple[str, str], monkeypatch: Any
):
    class Recorder:
        requires_logging_directory = False
        started: ClassVar[list[tuple[str, Any]]] = []

        def __init__(self, project: str, **options: str) -> None:
            self.started.append((project, *options.values()))

        def start(self) -> None: ...
        def store_init_configuration(self, values: Any) -> None: ...

    for variable in ("WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT", "MLFLOW_RUN_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    trackers.Trackers([name], Path("OUT"), {}, cpu=True)
    assert Recorder.started == [expected]
