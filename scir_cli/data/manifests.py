"""manifest.json of an output folder, with a checksum of its own content."""

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
    # As it is after a round trip through JSON: tuples become lists, keys text.
    checksum = hashing.digest_json(json.loads(json.dumps(manifest)))
    write_json(out / NAME, {**manifest, CHECKSUM: checksum})


def read(out: Path) -> Json:
    """The manifest of a folder, without its checksum.

    Raises DataError if it cannot be read or is damaged. One that somebody wrote by hand has no
    checksum, and is not checked.
    """
    manifest = read_json(out / NAME)
    checksum = manifest.pop(CHECKSUM, None)
    if checksum is not None and checksum != hashing.digest_json(manifest):
        raise DataError(
            f"{out / NAME} is damaged: its checksum is not that of its content; "
            "run the command that wrote its folder again"
        )
    if not set(manifest) >= REQUIRED:
        raise DataError(
            f"{out / NAME} is damaged: it is no manifest; "
            "run the command that wrote its folder again"
        )
    return manifest
