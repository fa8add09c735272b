"""Where datasets lie: a path of this machine, or a URL (s3://, gs://, hdfs:// …) of any file system that fsspec knows, with the same methods."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from scir_cli.errors import ConfigError, install_hint

OBJECTS = (
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "memory",
)  # where a file that is put is there as a whole or not at all


def to_path(spec: str | Path) -> Any:
    """A Path, or for a URL a UPath; raises ConfigError where a package for it is missing. hf:// is the hub's and not ours."""
    if isinstance(spec, Path) or "://" not in str(spec) or str(spec).startswith("hf://"):
        return Path(spec)
    try:
        from upath import UPath

        path = UPath(spec, use_listings_cache=False)  # others write there too
        path.fs  # noqa: B018  # whose package is imported here
    except ImportError as error:
        why = install_hint("remote") if error.name == "upath" else str(error)
        raise ConfigError(f"{spec} needs a package that is missing: {why}") from error
    except ValueError as error:
        raise ConfigError(f"{spec}: {error}") from error
    return path


def is_remote(path: Any) -> bool:
    return not isinstance(path, Path)


def upload_atomically(file: Path, path: Any) -> None:
    """A local file under a remote name: nobody sees a part of it."""
    if path.protocol in OBJECTS:
        path.fs.put_file(str(file), path.path)
        return
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    path.fs.makedirs(path.parent.path, exist_ok=True)
    path.fs.put_file(str(file), draft.path)
    path.unlink(missing_ok=True)  # HDFS renames onto no file
    path.fs.mv(draft.path, path.path)


def remove(folder: Any) -> None:
    if is_remote(folder):
        folder.fs.rm(folder.path, recursive=True)
    else:
        shutil.rmtree(folder)


def log_path(folder: Any, name: str) -> Path:
    """Where a library that writes to a descriptor may write what belongs to `folder`."""
    return Path(tempfile.mkdtemp(prefix="scir-")) / name if is_remote(folder) else folder / name
