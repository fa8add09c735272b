"""judge: candidates or labelled pairs -> pairs with the log-odds of every internal reward model asked for.

Pairs are made in pairing.py and scored in scoring.py.
"""

from __future__ import annotations

from scir_cli import backends, workers
from scir_cli.data.files import Json
from scir_cli.settings import JudgeSettings
from scir_cli.stages.pairing import load_pair_input
from scir_cli.stages.scoring import JudgePart, Scorer, write_judged_dataset


def run(settings: JudgeSettings) -> Json:
    """Writes a judged dataset and returns its manifest; counts are in pairs."""
    settings = settings.model_copy(update={"backend": backends.resolve(settings.backend)})
    scorer = Scorer(settings, settings)
    share = workers.distribute_parts(
        "scir_cli.stages.judge:make_part_maker", settings, scorer.meter
    )
    return write_judged_dataset("judge", settings, scorer, load_pair_input(settings), share)


def make_part_maker(settings: JudgeSettings) -> JudgePart:
    """The callable with which a worker makes parts."""
    return JudgePart(Scorer(settings, settings), load_pair_input(settings))
