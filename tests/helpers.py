"""What several test files call.

A stage run in this process on the CPU in fp32, and what a terminal shows of tables.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console
from transformers.utils import logging as transformers_logging

from scir_cli import cli, config, registry, stages
from scir_cli.engine import loading, policy
from scir_cli.settings import ModelSettings

FP32 = {"dtype": "fp32", "device": "cpu"}
PROMPTS = 40


def load_fp32(folder: Path, **settings: object) -> policy.Policy:
    """A fresh policy of a model folder, on the CPU, in fp32 where nothing else is said."""
    values = {
        "model": str(folder),
        "output_dir": "unused",
        "dtype": "fp32",
        "device": "cpu",
    } | settings
    return loading.load(config.build(ModelSettings, values, where="test"))


def run(stage: str, **values: Any) -> dict[str, Any]:
    settings = registry.STAGES[stage].settings
    known = {k: v for k, v in FP32.items() if k in settings.model_fields}
    return stages.load(stage)(config.build(settings, known, values, where="test"))


def train(world: Path, out: Path, **values: Any) -> dict[str, Any]:
    common = {
        "model": str(world / "policy"),
        "reward_reference": str(world / "base"),
        "input": str(world / "preferences"),
        "output_dir": out,
    }
    return run("train", **{**common, "batch_size": 6, "learning_rate": 1e-3, **values})


def generate(
    tiny_llama: Path, prompts: Path, out: Path, backend: str, **values: Any
) -> dict[str, Any]:
    common = {
        "model": str(tiny_llama),
        "input": str(prompts),
        "n": 2,
        "max_new_tokens": 6,
        "rows_per_part": 2,
    }
    return run("generate", **{**common, "output_dir": out, "backend": backend, **values})


def without_backend(table: pa.Table) -> list[Any]:
    """The rows, less the ids that say under which settings they were made."""
    return table.drop_columns(["candidate_id", "duplicate_of"]).to_pylist()


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs `scir WORDS` in this process and returns its exit status.

    What it prints is left to capfd.
    """
    monkeypatch.setattr(sys, "argv", ["scir", *words])
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # as the command line sets it
    handler, verbosity = signal.getsignal(signal.SIGTERM), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
        transformers_logging.set_verbosity(verbosity)
    return int(stop.value.code or 0)


def shown(*tables: Any, width: int = 80) -> str:
    """What a terminal of 80 columns shows of tables."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    console.file.close()
    return console.export_text()
