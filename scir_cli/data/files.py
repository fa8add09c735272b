"""Atomic writes, JSON files, and errors of the operating system in one line."""

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
    """The object in a JSON file; raises DataError if it is unreadable or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not readable JSON ({error}); "
            "remove its folder or write it again with --overwrite"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object and holds a {type(value).__name__}")
    return value


@contextlib.contextmanager
def atomic_write(path: Path, drafts: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path; on leaving, its content is on disk under the name `path`.

    If the block raises, `path` is unchanged and the temporary file is deleted.
    drafts: folder of the temporary file, needed if several processes may write the same `path`;
    None: beside `path`. A file for another file system is first written on this machine.
    Raises StoreError if the disk is full or the folder cannot be written.
    """
    if storage.is_remote(path):
        with as_store_error(path), tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            storage.upload_atomically(temporary, path)
        return

    # The name is new, so that two processes do not share a file, and nobody can plant a link.
    if drafts:
        temporary = drafts / f"{path.name}.{uuid.uuid4().hex}"
    else:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")

    with as_store_error(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk.

    Raises OSError; a file system that cannot sync folders is accepted.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Raises a StoreError that names `path` for an error of the operating system in its block.

    Errors of libraries count too, if an error of the operating system caused them.
    Other exceptions pass unchanged.
    """
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
    """The operating system's error that caused a library's error; None if there is none.

    torch raises its error from it; Rust (safetensors) writes its number into the message.
    """
    for candidate in (error, error.__cause__, error.__context__):
        if isinstance(candidate, OSError):
            return candidate
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match is None:
        return None
    number = int(match[1])
    return OSError(number, os.strerror(number))


def disk_error(error: OSError, path: Path) -> StoreError:
    """The StoreError for an error of the operating system while `path` was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"no space left on the disk while writing {path}; "
            "finished parts are kept: free some space and run the same command again to continue"
        )
    return StoreError(f"cannot write {path}: {error.strerror or error}")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented by 2; raises StoreError as `atomic_write` does."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
