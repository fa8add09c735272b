"""JSON files with a checksum of their own content, manifest.json of an output folder among them."""

from __future__ import annotations

import json
from pathlib import Path

from scir_cli.data import hashing
from scir_cli.data.files import Json, read_json, write_json
from scir_cli.errors import DataError

NAME = "manifest.json"
CHECKSUM = "checksum"

#: What every manifest holds.
REQUIRED = {"kind", "digest", "rows_in", "rows_out", "drops"}


def write(out: Path, manifest: Json) -> None:
    """Writes the manifest of a folder; raises StoreError as `files.write_json` does."""
    write_checked(out / NAME, manifest)


def write_checked(path: Path, content: Json) -> None:
    """Writes a JSON object and its checksum; raises StoreError as `files.write_json` does."""
    # As it is after a round trip through JSON: tuples become lists, keys text.
    checksum = hashing.digest_json(json.loads(json.dumps(content)))
    write_json(path, {**content, CHECKSUM: checksum})


def read(out: Path) -> Json:
    """The manifest of a folder, without its checksum; raises DataError as `read_checked` does."""
    return read_checked(out / NAME, REQUIRED, "manifest")


def read_checked(path: Path, required: set[str], what: str) -> Json:
    """The object that `write_checked` wrote, without its checksum.

    required: keys of every such object. what: its name in a message.
    Raises DataError if it cannot be read or is damaged. One that somebody wrote by hand has no
    checksum: of that only the keys are checked.
    """
    content = read_json(path)
    checksum = content.pop(CHECKSUM, None)
    problem = None
    if checksum is not None and checksum != hashing.digest_json(content):
        problem = "its checksum is not that of its content"
    elif not set(content) >= required:
        problem = f"it is no {what}"
    if problem:
        raise DataError(
            f"{path} is damaged: {problem}; run the command that wrote its folder again"
        )
    return content
