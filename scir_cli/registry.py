"""Every stage, once: the command line, recipes, tables and pages are built from this list.

A stage is a function of its settings. A record names functions as "module:function", so torch and
transformers are imported only when a stage runs. This module does not import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scir_cli.settings import (
    CheckConsistencySettings,
    EvalMtBenchSettings,
    EvalResponsesSettings,
    EvalRewardsSettings,
    EvalWinrateSettings,
    FilterSettings,
    GenerateSettings,
    JudgeSettings,
    StageSettings,
    TrainSettings,
)


@dataclass(frozen=True)
class Stage:
    """One stage; a target has the form "module:function"."""

    #: As on the command line and in recipes: "judge", "eval rewards".
    name: str
    #: One line of help.
    about: str
    settings: type[StageSettings]
    #: Target: settings -> manifest.
    run: str
    #: Target: manifest -> the tables in the terminal; None: only the summary line.
    tables: str | None = None
    #: Target: output folder -> the page of --report.
    page: str | None = None
    #: Target: folder's name, manifest -> sections of the page of a whole run.
    story: str | None = None
    #: Whether its summary is a row of the table at the end of `scir run`.
    shows_agreement: bool = False

    @property
    def words(self) -> Sequence[str]:
        """The words after `scir`: ("eval", "rewards")."""
        return tuple(self.name.split())


_ALL = [
    Stage(
        "generate",
        "Sample N responses per prompt.",
        GenerateSettings,
        run="scir_cli.stages.generate:run",
    ),
    Stage(
        "judge",
        "Pair candidates and score each pair with every internal reward model.",
        JudgeSettings,
        run="scir_cli.stages.judge:run",
    ),
    Stage(
        "check-consistency",
        "Measure how far the internal reward models agree.",
        CheckConsistencySettings,
        run="scir_cli.stages.check_consistency:run",
        tables="scir_cli.report.tables:verdict_tables",
        page="scir_cli.report.html:consistency_page",
        shows_agreement=True,
    ),
    Stage(
        "filter",
        "Label and select pairs for preference optimization.",
        FilterSettings,
        run="scir_cli.stages.filter:run",
    ),
    Stage(
        "train",
        "Train a policy: sft, dpo, or scir.",
        TrainSettings,
        run="scir_cli.stages.train:run",
        page="scir_cli.report.html:training_page",
    ),
    Stage(
        "eval rewards",
        "Measure the accuracy of each reward model, and of their agreed label, on labeled pairs.",
        EvalRewardsSettings,
        run="scir_cli.stages.eval_rewards:run",
        tables="scir_cli.report.tables:verdict_tables",
        page="scir_cli.report.html:rewards_page",
        shows_agreement=True,
    ),
    Stage(
        "eval winrate",
        "Win rates of responses over others, judged in both orders or by existing annotations.",
        EvalWinrateSettings,
        run="scir_cli.stages.eval_winrate:run",
        tables="scir_cli.report.tables:match_tables",
        page="scir_cli.report.html:win_rate_page",
        story="scir_cli.report.html:win_rate_sections",
    ),
    Stage(
        "eval responses",
        "Answer a prompt set in AlpacaEval's format.",
        EvalResponsesSettings,
        run="scir_cli.stages.eval_responses:run",
    ),
    Stage(
        "eval mt-bench",
        "Answer questions of several turns, and grade each answer alone from 1 to 10.",
        EvalMtBenchSettings,
        run="scir_cli.stages.eval_mt_bench:run",
        tables="scir_cli.report.tables:grade_tables",
        page="scir_cli.report.html:grades_page",
    ),
]
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}


def load(target: str) -> Any:
    """The function that "module:function" names; this call imports its module."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
