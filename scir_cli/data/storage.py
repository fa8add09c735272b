"""Where datasets are stored: a local path, or a URL (s3://, gs://, hdfs:// …).

A URL may name any file system that fsspec supports, and has the same methods as a path.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from scir_cli.errors import ConfigError, install_hint

#: Object stores: an uploaded file appears as a whole or not at all.
OBJECTS = (
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "memory",
)


def to_path(spec: str | Path) -> Any:
    """A Path, or a UPath for a URL.

    `~` at the start of a path is the home directory, also where no shell has expanded it.
    hf:// names a data set on the hub, not a file system of ours, and stays text in a Path.
    Raises ConfigError if a package that the URL needs is missing, or no file system has its scheme.
    """
    if isinstance(spec, Path) or "://" not in str(spec) or str(spec).startswith("hf://"):
        return Path(os.path.expanduser(spec))

    try:
        from upath import UPath

        # No cache of listings, because other processes write to the same folders.
        path = UPath(spec, use_listings_cache=False)
        # Reading the attribute imports the package of the file system.
        path.fs  # noqa: B018
    except ImportError as error:
        why = install_hint("remote") if error.name == "upath" else str(error)
        raise ConfigError(f"{spec} needs a package that is missing: {why}") from error
    except ValueError as error:
        raise ConfigError(f"{spec}: {error}") from error
    return path


def real_path(path: Any) -> Any:
    """The path without links, also where a link leads to itself (pathlib raises then)."""
    return path.resolve() if is_remote(path) else Path(os.path.realpath(path))


def is_remote(path: Any) -> bool:
    """Whether a path from `to_path` is on another file system."""
    return not isinstance(path, Path)


def upload_atomically(file: Path, path: Any) -> None:
    """Uploads a local file under a remote name; no reader sees a part of it."""
    if path.protocol in OBJECTS:
        path.fs.put_file(str(file), path.path)
        return

    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    path.fs.makedirs(path.parent.path, exist_ok=True)
    path.fs.put_file(str(file), draft.path)
    # HDFS refuses to rename onto a file that exists.
    path.unlink(missing_ok=True)
    path.fs.mv(draft.path, path.path)


def remove(folder: Any) -> None:
    """Deletes a folder and everything in it, here or on another file system."""
    if is_remote(folder):
        folder.fs.rm(folder.path, recursive=True)
    else:
        shutil.rmtree(folder)


def log_path(folder: Any, name: str) -> Path:
    """A local path for a log of `folder`, for libraries that write to a file descriptor.

    It is in a new temporary folder if `folder` is on another file system.
    """
    if is_remote(folder):
        return Path(tempfile.mkdtemp(prefix="scir-")) / name
    return folder / name
