"""Claiming an output folder: plan, lock, resume, overwrite.

The same plan resumes; another plan in the same folder is refused. Nothing is locked on a remote
file system (a URL).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from scir_cli.data import schemas, storage
from scir_cli.data.files import Json, disk_error, read_json, write_json
from scir_cli.errors import DataError, PlanMismatch, StoreError

FIRST_VERSION = "1"  # of the columns of plans that do not name one


def version_of(document: Json) -> str:
    """The schema version that a plan or a manifest names; the first one if it names none."""
    return str(document.get("schema_version", FIRST_VERSION))


def outdated_message(path: Path, plan: Json, version: str) -> str:
    return (
        f"{path} was written by 'scir {plan.get('stage')}' with schema version {version}, "
        f"and this scir has version {schemas.VERSION}; run that command again with --overwrite"
    )


def check_version(path: Path, version: str) -> None:
    """Raises DataError if `version`, that of a dataset folder or a part of it, is not ours."""
    if version != schemas.VERSION:
        raise DataError(outdated_message(path, read_json(path / "plan.json"), version))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path} was {json.dumps(old)}, now {json.dumps(new)}"]


@contextlib.contextmanager
def claim_folder(out: Path, plan: Json, overwrite: bool = False) -> Iterator[Json | None]:
    """Takes the folder for this plan; gives the manifest when this plan is already done, else None.

    Raises PlanMismatch naming what differs, and StoreError when another process is writing here or the folder holds other files.
    """
    if out.is_file():
        raise StoreError(f"{out} is a file; --output-dir takes a folder")
    if overwrite and out.exists() and any(out.iterdir()) and not (out / "plan.json").exists():
        raise StoreError(
            f"{out} was not made by scir (no plan.json), so --overwrite does not delete it; choose another folder"
        )
    with nullcontext() if storage.is_remote(out) else _locked(out):
        if overwrite and out.exists():
            _clear(out)
        yield _start(out, plan)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Of this machine's file systems (and NFS 4) alone: an object store has no locks."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise disk_error(error, out) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"another process is writing {out}; wait for it, or choose another --output-dir"
            ) from error
        yield


def _clear(out: Path) -> None:
    for path in out.iterdir():
        if path.is_dir():
            storage.remove(path)
        elif path.name != ".lock":
            path.unlink()


def _start(out: Path, plan: Json) -> Json | None:
    path = out / "plan.json"
    if not path.exists():
        others = (
            [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
        )
        if others:
            raise StoreError(
                f"{out} already holds {others[0]!r} and no plan.json; choose an empty folder"
            )
        write_json(path, plan)
        return None
    old = read_json(path)
    if old.get("stage") != plan.get("stage"):
        raise PlanMismatch(
            f"{out} was made by 'scir {old.get('stage')}', and this is 'scir {plan.get('stage')}'; choose another --output-dir"
        )
    if version_of(old) != version_of(plan):
        raise PlanMismatch(outdated_message(out, old, version_of(old)))
    changes = _differences(old, json.loads(json.dumps(plan)))
    if changes:
        raise PlanMismatch(
            f"{out} was started with other settings: {'; '.join(changes)}. Use --overwrite to replace it, or another --output-dir"
        )
    return _done(out)


def _done(out: Path) -> Json | None:
    """The manifest of a finished folder; None where a part of it was deleted, to be made again."""
    if not (out / "manifest.json").exists():
        return None
    manifest = read_json(out / "manifest.json")
    return (
        manifest
        if all((out / part["file"]).exists() for part in manifest.get("parts", []))
        else None
    )


def is_dataset(path: Path) -> bool:
    """Whether the folder was made by a stage of ours, finished or not."""
    return (path / "plan.json").is_file()
