"""Experiment trackers: the figures of metrics.jsonl, under dashboards' usual names.

    train/rewards/margins, train/loss, …    as transformers' and TRL's trainers log them
    eval/accuracy/judge, eval/agreement, …  on the validation pairs

TensorBoard, Weights & Biases, trackio, MLflow and all others that accelerate supports.
Only accelerate's tracker classes are used, not its Accelerator: when that ends, it destroys the
process group that other ranks still need.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from scir_cli.errors import ConfigError, suggest
from scir_cli.training import metrics

PROJECT = "scir"

#: Tracker -> its own variables for the project and for the name of a run, which come first
VARIABLES = {
    "wandb": ("WANDB_PROJECT", "WANDB_NAME"),
    "trackio": ("TRACKIO_PROJECT", "TRACKIO_NAME"),
    "mlflow": ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME"),
    "comet_ml": ("COMET_PROJECT_NAME", ""),
}

#: Tracker -> its argument for the name of a run
NAME_AS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
}

#: accelerate's trackers -> the package each needs; a user's registered tracker is not listed
BUILT_IN = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "comet_ml": "comet-ml",
}


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for an unknown tracker, or if its package is missing.

    accelerate itself would log nothing, without a message.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    registered = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in registered:
            raise ConfigError(f"--report-to {name}: unknown tracker.{suggest(name, registered)}")
        if name in BUILT_IN and name not in available:
            raise ConfigError(f"--report-to {name} needs its package: pip install {BUILT_IN[name]}")


class Trackers:
    """The started trackers of one run.

    names: as --report-to. out: the output folder, which names the run unless a variable of the
        tracker (WANDB_NAME) does.
    plan: settings to store with the run. cpu: whether the run uses no GPU.
    """

    def __init__(self, names: Sequence[str], out: Path, plan: Mapping[str, Any], cpu: bool) -> None:
        """Starts the trackers. Raises ConfigError as `check` does."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        check(names)
        # The trackers' logging needs accelerate's state.
        PartialState(cpu=cpu)
        self.trackers = []
        for name in dict.fromkeys(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            folder = [str(out)] if kind.requires_logging_directory else []
            project_variable, name_variable = VARIABLES.get(name, ("", ""))
            project = os.environ.get(project_variable) or PROJECT
            run_name = os.environ.get(name_variable) or str(out)
            options = {NAME_AS[name]: run_name} if name in NAME_AS else {}
            self.trackers.append(kind(project, *folder, **options))

        config = {key: str(value) for key, value in plan.items()}
        # Some trackers print at the start, and stdout is for results.
        with redirect_stdout(sys.stderr):
            for tracker in self.trackers:
                tracker.start()
                tracker.store_init_configuration(config)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Logs figures of a step.  figures: by their names in metrics.jsonl"""
        values = {metrics.tracker_name(name): float(value) for name, value in figures.items()}
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Ends the run in each tracker."""
        with redirect_stdout(sys.stderr):
            for tracker in self.trackers:
                tracker.finish()
