"""The figures of metrics.jsonl for TensorBoard, Weights & Biases, trackio, MLflow and what else accelerate knows, under the names dashboards expect:

    train/rewards/margins, train/loss …   what transformers' and TRL's trainers call them
    eval/accuracy/judge, eval/agreement … on the validation pairs

accelerate's tracker classes are used, and not its Accelerator: that one, on ending, destroys the process group other ranks still need.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from scir_cli.errors import ConfigError, suggest
from scir_cli.training import metrics

PROJECT = "scir"
NAME_AS = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
}  # how a tracker takes the name of a run


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know, or whose package is missing (accelerate would log nowhere, in silence)."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = (
        {str(n) for n in LOGGER_TYPE_TO_CLASS},
        {str(n) for n in get_available_trackers()},
    )
    for name in names:
        if name not in known:
            raise ConfigError(f"--report-to {name}: no such tracker.{suggest(name, known)}")
        if name in BUILT_IN and name not in available:
            raise ConfigError(f"--report-to {name} needs its package: pip install {BUILT_IN[name]}")


#: trackers that come with accelerate -> the package each needs; one that a user registers brings its own
BUILT_IN = {
    **{
        name: name
        for name in (
            "tensorboard",
            "wandb",
            "trackio",
            "mlflow",
            "aim",
            "clearml",
            "dvclive",
            "swanlab",
        )
    },
    "comet_ml": "comet-ml",
}


class Trackers:
    """Started trackers of one run; `log` takes a record's figures by their names in metrics.jsonl."""

    def __init__(self, names: Sequence[str], out: Path, plan: Mapping[str, Any], cpu: bool) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        check(names)
        PartialState(cpu=cpu)  # the trackers' own logging asks for it
        self.trackers = []
        for name in dict.fromkeys(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            folder = [str(out)] if kind.requires_logging_directory else []
            named = {NAME_AS[name]: str(out)} if name in NAME_AS else {}
            self.trackers.append(kind(PROJECT, *folder, **named))
        with redirect_stdout(sys.stderr):  # some greet, and stdout is for results
            for tracker in self.trackers:
                tracker.start()
                tracker.store_init_configuration({key: str(value) for key, value in plan.items()})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(
                {metrics.tracker_name(name): float(value) for name, value in figures.items()},
                step=step,
            )

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            for tracker in self.trackers:
                tracker.finish()
