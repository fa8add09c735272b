"""One module a stage: a function of the settings reads a dataset, writes a dataset and returns its manifest. registry.py names them."""

from __future__ import annotations

from typing import Any

from scir_cli import registry


def load(stage: str) -> Any:
    """The function that runs the stage of this name; what it needs (torch, transformers) is imported only now."""
    return registry.load(registry.STAGES[stage].run)
