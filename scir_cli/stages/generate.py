"""generate: prompts -> N sampled candidates each."""

from __future__ import annotations

from scir_cli.data.files import Json
from scir_cli.settings import GenerateSettings
from scir_cli.stages.sampling import write_candidates


def run(settings: GenerateSettings) -> Json:
    """Writes a candidates dataset and returns its manifest; counts are in candidates (prompts times n)."""
    return write_candidates(settings)
