"""One module per stage: a function of the settings reads a dataset and writes a dataset.

The function returns the manifest of the output. registry.py lists the stages.
"""

from __future__ import annotations

from typing import Any

from scir_cli import registry


def load(stage: str) -> Any:
    """Returns the function that runs the stage of this name.

    Imports the libraries of the stage (torch, transformers) only now.
    """
    target = registry.STAGES[stage].run
    return registry.load(target)
