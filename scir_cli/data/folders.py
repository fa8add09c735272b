"""Claiming an output folder: plan, lock, resume, overwrite.

The same plan resumes; another plan in the same folder is refused. Nothing is locked on a remote
file system (a URL).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from scir_cli.data import file_lists, hashing, manifests, schemas, storage
from scir_cli.data.files import Json, atomic_write, disk_error, read_json, write_json
from scir_cli.errors import DataError, PlanMismatch, StoreError, warn

#: Errors of a file system that offers no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

#: Schema version of plans that name none.
FIRST_VERSION = "1"


def version_of(document: Json) -> str:
    """The schema version in a plan or a manifest; the first one if it names none."""
    return str(document.get("schema_version", FIRST_VERSION))


def outdated_message(path: Path, plan: Json, version: str) -> str:
    """The message for a dataset folder whose schema version is not ours.

    plan: of the folder. version: of the folder, or of a part of it.
    """
    return (
        f"{path} was written by 'scir {plan.get('stage')}' with schema version {version}, "
        f"and this scir has version {schemas.VERSION}; run that command again with --overwrite"
    )


def check_version(path: Path, version: str) -> None:
    """Raises DataError if `version`, that of a dataset folder or a part of it, is not ours."""
    if version != schemas.VERSION:
        raise DataError(outdated_message(path, read_json(path / "plan.json"), version))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One text per value that differs between two JSON values, with its dotted path."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(set(old) | set(new)):
            inner_path = f"{path}.{key}" if path else key
            lines += _differences(old.get(key), new.get(key), inner_path)
        return lines
    if old == new:
        return []
    return [f"{path} was {json.dumps(old)}, now {json.dumps(new)}"]


@contextlib.contextmanager
def claim_folder(out: Path, plan: Json, overwrite: bool = False) -> Iterator[Json | None]:
    """Locks a folder for a plan; yields the manifest if this plan is finished, else None.

    overwrite: deletes the dataset that the folder holds.
    Raises PlanMismatch, with the difference, if the folder holds another plan; StoreError if
    another process is writing the folder, or if it holds files but no plan.
    """
    if out.is_file():
        raise StoreError(f"{out} is a file; --output-dir needs a folder")
    if overwrite and out.exists() and any(out.iterdir()) and not (out / "plan.json").exists():
        raise StoreError(
            f"{out} was not written by scir (no plan.json), so --overwrite does not delete it; "
            "choose another folder"
        )

    # An object store has no locks.
    lock = nullcontext() if storage.is_remote(out) else _locked(out)
    with lock:
        if overwrite and out.exists():
            _clear(out)
        yield _start(out, plan)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is created if missing.

    Works on file systems of this machine and on NFS 4.
    Raises StoreError if another process holds the lock or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A link is not followed: it could name a file of the user.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.fdopen(os.open(out / ".lock", flags, 0o666), "rb+")
    except OSError as error:
        raise disk_error(error, out) from error

    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"another process is writing {out}; wait for it, or choose another --output-dir"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise disk_error(error, out) from error
            warn(
                f"the file system of {out} offers no locks ({error.strerror}); "
                "do not start two commands on this folder at the same time"
            )
        yield


def _clear(out: Path) -> None:
    """Deletes everything in a folder but its lock.

    The manifest goes first and the plan last: whenever this is killed, the folder is an unfinished
    folder of scir, which the same command continues and --overwrite deletes.
    """
    for path in sorted(out.iterdir(), key=_clearing_order):
        if path.is_dir() and (storage.is_remote(path) or not path.is_symlink()):
            storage.remove(path)
        elif path.name != ".lock":
            path.unlink()


def _clearing_order(path: Path) -> int:
    """0 for the manifest, 2 for the plan, 1 for all else."""
    return {"manifest.json": 0, "plan.json": 2}.get(path.name, 1)


def _start(out: Path, plan: Json) -> Json | None:
    """Writes the plan if the folder has none; returns the manifest if the plan is finished.

    Raises PlanMismatch if the folder holds another plan; StoreError if it holds other files.
    """
    path = out / "plan.json"
    if not storage.is_remote(out) and not (out / "manifest.json").exists():
        # What a process that was killed left behind. We hold the lock.
        for draft in out.glob(".*.tmp"):
            draft.unlink()
    if not path.exists():
        _check_empty(out)
        write_json(path, plan)
        return None
    _check_same_plan(out, read_json(path), plan)
    return _finished_manifest(out)


def _check_empty(out: Path) -> None:
    """Raises StoreError if the folder holds a file that is not hidden."""
    if not out.exists():
        return
    others = [child.name for child in out.iterdir() if not child.name.startswith(".")]
    if others:
        raise StoreError(
            f"{out} already holds {others[0]!r} and no plan.json; choose an empty folder"
        )


def _check_same_plan(out: Path, old: Json, plan: Json) -> None:
    """Raises PlanMismatch if the plan in the folder differs in stage, version or settings."""
    if old.get("stage") != plan.get("stage"):
        raise PlanMismatch(
            f"{out} was written by 'scir {old.get('stage')}', "
            f"and this is 'scir {plan.get('stage')}'; choose another --output-dir"
        )
    if version_of(old) != version_of(plan):
        raise PlanMismatch(outdated_message(out, old, version_of(old)))

    # As it is after a round trip through JSON: tuples become lists.
    as_read = json.loads(json.dumps(plan))
    changes = _differences(old, as_read)
    if changes:
        raise PlanMismatch(
            f"{out} was started with other settings: {'; '.join(changes)}. "
            "Use --overwrite to replace it, or another --output-dir"
        )


def _finished_manifest(out: Path) -> Json | None:
    """The manifest of a finished folder; None if there is none, or if a file is damaged.

    In that case the folder becomes an unfinished one, of which the other parts are kept.
    Parts on another file system only have to exist. A model's files are in the list "files".
    """
    path = out / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = manifests.read(out)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise
        warn(f"{error}. It is written again")
        path.unlink()
        return None
    parts = {out / part["file"]: part["digest"] for part in manifest.get("parts", [])}
    intact = [part for part, digest in parts.items() if is_intact(part, digest)]
    damaged = [part.name for part in parts if part not in intact]
    problem = f"{out}: {', '.join(damaged[:3])} is damaged or missing" if damaged else None
    problem = problem or file_lists.damage(out, manifest.get("files", []))
    if problem is None:
        return manifest

    warn(f"{problem}; it is written again")
    for part in intact:
        record_digest(part, parts[part])
    path.unlink()
    return None


def is_intact(part: Path, digest: str) -> bool:
    """Whether a part exists and, on this machine, has this digest.

    Raises StoreError if it may not be read.
    """
    if not part.exists():
        return False
    if storage.is_remote(part):
        return True
    try:
        return hashing.digest_part(part) == digest
    except PermissionError as error:
        raise disk_error(error, part) from error
    except OSError:
        # A folder in its place, or a disk that cannot read it.
        return False


def _digest_path(part: Path) -> Path:
    """The hidden file that holds the digest of a part until the manifest does."""
    return part.parent / f".{part.name}.xxh3"


def record_digest(part: Path, digest: str) -> None:
    """Keeps the digest of a finished part until the manifest is written."""
    with atomic_write(_digest_path(part)) as temporary:
        temporary.write_text(digest, encoding="ascii")


def recorded_digest(part: Path) -> str | None:
    """The digest that was kept of a part; None if there is none that can be read."""
    try:
        return _digest_path(part).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def forget_digest(part: Path) -> None:
    """Removes the digest that was kept of a part."""
    path = _digest_path(part)
    if path.is_dir():
        storage.remove(path)
    elif path.exists():
        path.unlink()


def is_dataset(path: Path) -> bool:
    """Whether a stage wrote this folder, finished or not, even if its plan has been lost since."""
    if (path / "plan.json").exists():
        return True
    return (path / "manifest.json").exists() and any(path.glob("data-*.arrow"))
