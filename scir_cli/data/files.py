"""Atomic writes, JSON files, and errors of the operating system as one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scir_cli.data import storage
from scir_cli.errors import DataError, ScirError, StoreError

Json = dict[str, Any]


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not readable JSON ({error}); remove its folder or write it again with --overwrite"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object and holds a {type(value).__name__}")
    return value


@contextlib.contextmanager
def atomic_write(path: Path, drafts: Path | None = None) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on leaving, its content is on disk and has `path` as its name, or nothing changed.

    drafts: a folder for it, where several processes may write the same `path`. What goes to another file system is first written on this machine.
    Raises StoreError where the disk is full or the folder cannot be written.
    """
    if storage.is_remote(path):
        with as_store_error(path), tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            storage.upload_atomically(temporary, path)
        return
    temporary = (
        drafts / f"{path.name}.{uuid.uuid4().hex}"
        if drafts
        else path.with_name(f".{path.name}.tmp")
    )
    with as_store_error(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is written, by us or by a library, into a StoreError that names it."""
    try:
        yield
    except ScirError:
        raise
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise disk_error(cause, path) from error


def _os_error(error: Exception) -> OSError | None:
    """The operating system's error behind a library's own: torch raises its own from it, Rust (safetensors) puts its number in the text."""
    for one in (error, error.__cause__, error.__context__):
        if isinstance(one, OSError):
            return one
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def disk_error(error: OSError, path: Path) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"no space left on the disk while writing {path}; finished parts are kept: free some space and run the same command again"
        )
    return StoreError(f"cannot write {path}: {error.strerror or error}")


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
