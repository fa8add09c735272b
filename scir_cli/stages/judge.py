"""judge: candidates or labeled pairs -> pairs with the log-odds of each internal reward model.

pairing.py makes the pairs; scoring.py scores them.
"""

from __future__ import annotations

from scir_cli import backends, workers
from scir_cli.data.files import Json
from scir_cli.settings import JudgeSettings
from scir_cli.stages.pairing import load_pair_input
from scir_cli.stages.scoring import JudgePart, Scorer, write_judged_dataset


def run(settings: JudgeSettings) -> Json:
    """Writes a judged dataset and returns its manifest.

    Counts are in pairs. Raises DataError if there is no pair.
    """
    backend = backends.resolve(settings.backend)
    settings = settings.model_copy(update={"backend": backend})
    scorer = Scorer(settings, settings)
    share = workers.distribute_parts(
        "scir_cli.stages.judge:make_part_maker",
        settings,
        scorer.meter,
    )
    pair_input = load_pair_input(settings)
    return write_judged_dataset("judge", settings, scorer, pair_input, share)


def make_part_maker(settings: JudgeSettings) -> JudgePart:
    """Returns the function with which a worker process computes parts."""
    scorer = Scorer(settings, settings)
    return JudgePart(scorer, load_pair_input(settings))
