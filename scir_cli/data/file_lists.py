"""The files of a model folder with their sizes and digests, as its manifest lists them.

An entry is {"file": name in the folder, "bytes": size, "digest": BLAKE2b of the content}.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from scir_cli.data import hashing
from scir_cli.data.files import Json


def describe(folder: Path, files: Iterable[Path]) -> list[Json]:
    """The entries of these files of a folder, by name."""
    entries = []
    for file in sorted(files):
        entry = {
            "file": file.relative_to(folder).as_posix(),
            "bytes": file.stat().st_size,
            "digest": hashing.digest_file(file),
        }
        entries.append(entry)
    return entries


def size_damage(folder: Path, entries: Sequence[Json]) -> str | None:
    """What is wrong with the first file that is missing or has another size; None if none is."""
    for entry in entries:
        file = folder / entry["file"]
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file} is damaged: it has {size} bytes and its manifest has {entry['bytes']}"
    return None


def content_damage(folder: Path, entries: Sequence[Json]) -> str | None:
    """What is wrong with the first file that has another digest; None if none has.

    It reads all of these files.
    """
    for entry in entries:
        file = folder / entry["file"]
        digest = hashing.digest_file(file)
        if digest != entry["digest"]:
            return digest_message(file, digest, entry["digest"])
    return None


def damage(folder: Path, entries: Sequence[Json]) -> str | None:
    """`size_damage`, and if there is none, `content_damage`."""
    return size_damage(folder, entries) or content_damage(folder, entries)


def digest_message(file: Path, digest: str, expected: str) -> str:
    """The words for a file whose digest is not that of the manifest."""
    return f"{file} is damaged: its digest is {digest} and its manifest has {expected}"
