"""generate: prompts -> N sampled candidates per prompt."""

from __future__ import annotations

from scir_cli.data.files import Json
from scir_cli.settings import GenerateSettings
from scir_cli.stages.sampling import write_candidates


def run(settings: GenerateSettings) -> Json:
    """Writes a candidates dataset and returns its manifest.

    Counts are in candidates (prompts times n). Raises DataError if there is no prompt.
    """
    return write_candidates(settings)
