"""Checkpoints of a training run on disk: the newest two, each beside its digest.

    OUT/checkpoints/step-00000500.pt          the state after 500 steps
    OUT/checkpoints/.step-00000500.pt.xxh3    its digest

A damaged checkpoint is left out, and the one before is used.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from scir_cli.data import files, folders, hashing
from scir_cli.errors import warn

FOLDER = "checkpoints"

#: Number of checkpoints that are kept: a damaged one has an older one to fall back to.
N_KEPT = 2


def _paths(out: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted((out / FOLDER).glob("step-*.pt"), reverse=True)


def save(out: Path, step: int, state: dict[str, Any]) -> None:
    """Writes the state after `step` steps, and removes all but the newest checkpoints.

    Raises StoreError if the folder cannot be written.
    """
    path = out / FOLDER / f"step-{step:08d}.pt"
    with files.as_store_error(path):
        path.parent.mkdir(exist_ok=True)
        # What a run that was killed left behind has the size of a checkpoint.
        for draft in path.parent.glob(".*.tmp"):
            draft.unlink()
    with files.atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
        folders.record_digest(path, hashing.digest_part(temporary))
    for old in _paths(out)[N_KEPT:]:
        _remove(old)


def newest(out: Path) -> Path | None:
    """The newest checkpoint that is not damaged; None if there is none.

    Damaged ones are removed, each with a warning.
    """
    for path in _paths(out):
        digest = folders.recorded_digest(path)
        if digest is not None and folders.is_intact(path, digest):
            return path
        warn(f"the checkpoint {path} is damaged; training continues from an earlier step")
        _remove(path)
    return None


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, mapped into memory."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def remove(out: Path) -> None:
    """Removes all checkpoints of a run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint with its digest."""
    with files.as_store_error(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    folders.forget_digest(path)
