"""Every stage, once: the command line, recipes, the terminal and pages are made from this list.

A stage is a function of its settings; what it needs (torch, transformers) is imported when it runs,
because a record names functions as "module:function". This module does not import torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scir_cli import config


@dataclass(frozen=True)
class Stage:
    """One stage; a target is written "module:function"."""

    name: str  # as on the command line and in recipes: "judge", "eval rewards"
    about: str  # one line of help
    settings: type[config.StageSettings]
    run: str  # settings -> manifest
    tables: str | None = None  # manifest -> what the terminal shows; None: only the one line
    page: str | None = None  # output folder -> the page of --report
    story: str | None = None  # folder's name, manifest -> sections of the page of a whole run
    shows_agreement: bool = False  # its summary is a row of the table that `scir run` ends with

    @property
    def words(self) -> Sequence[str]:
        """The words after `scir`: ("eval", "rewards")."""
        return tuple(self.name.split())


_ALL = [
    Stage(
        "generate",
        "Sample N responses per prompt.",
        config.GenerateSettings,
        run="scir_cli.stages.generate:run",
    ),
    Stage(
        "judge",
        "Pair candidates and score each pair with every internal reward model.",
        config.JudgeSettings,
        run="scir_cli.stages.judge:run",
    ),
    Stage(
        "check-consistency",
        "Measure how far the internal reward models agree.",
        config.CheckConsistencySettings,
        run="scir_cli.stages.check_consistency:run",
        tables="scir_cli.report:verdict_tables",
        page="scir_cli.pages:consistency_page",
        shows_agreement=True,
    ),
    Stage(
        "filter",
        "Label and select pairs for preference optimization.",
        config.FilterSettings,
        run="scir_cli.stages.filter:run",
    ),
    Stage(
        "train",
        "Train a policy: sft, dpo, or scir.",
        config.TrainSettings,
        run="scir_cli.stages.train:run",
        page="scir_cli.pages:training",
    ),
    Stage(
        "eval rewards",
        "Measure the accuracy of each reward model, and of their agreed label, on labelled pairs.",
        config.EvalRewardsSettings,
        run="scir_cli.stages.evaluate:rewards",
        tables="scir_cli.report:verdict_tables",
        page="scir_cli.pages:rewards_page",
        shows_agreement=True,
    ),
    Stage(
        "eval winrate",
        "Win rates of responses over others, judged in both orders or by existing annotations.",
        config.EvalWinrateSettings,
        run="scir_cli.stages.winrate:run",
        tables="scir_cli.report:match_tables",
        page="scir_cli.pages:winrate",
        story="scir_cli.pages:winrate_story",
    ),
    Stage(
        "eval responses",
        "Answer a prompt set in AlpacaEval's format.",
        config.EvalResponsesSettings,
        run="scir_cli.stages.evaluate:responses",
    ),
    Stage(
        "eval mt-bench",
        "Answer questions of several turns, and grade each answer alone from 1 to 10.",
        config.EvalMtBenchSettings,
        run="scir_cli.stages.mt_bench:run",
        tables="scir_cli.report:grade_tables",
        page="scir_cli.pages:grades",
    ),
]
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}


def load(target: str) -> Any:
    """The function that "module:function" names; its module is imported only now."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)
