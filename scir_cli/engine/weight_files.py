"""The files with the weights of a model folder: which they are, whether they are whole, digests.

A folder that `scir train` wrote lists its files with their digests: in manifest.json, and in
base.json for an adapter. Of other folders the index and the headers are checked.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from scir_cli.data import file_lists, folders, hashing, manifests
from scir_cli.data.files import Json, read_json
from scir_cli.errors import DataError, ModelError

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: Written by this package beside an adapter: the digest of its base model, and its own files.
BASE_DIGEST_FILE = "base.json"

#: Files with all weights, in the order in which transformers looks for them. A model in several
#: files has an index beside them, NAME.index.json.
WHOLE = ("model.safetensors", "pytorch_model.bin")

#: The first bytes of an archive, as torch writes them.
ARCHIVE = b"PK\x03\x04"


def weight_files(path: Path) -> list[Path]:
    """The files that are loaded as the weights of a model or adapter folder, sorted.

    Empty if there are none. Files that the index names and that are missing are among them.
    Raises ModelError if the index cannot be read.
    """
    if (path / ADAPTER).is_file():
        return [file for file in [path / ADAPTER_WEIGHTS] if file.is_file()]
    for name in WHOLE:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
    return []


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names. Raises ModelError if it cannot be read."""
    try:
        names = set(read_json(index)["weight_map"].values())
        return sorted(index.parent / name for name in names)
    except (DataError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{index} is damaged: it does not say which file holds which tensor; "
            "download or write the model again"
        ) from error


def check(path: Path) -> None:
    """Raises ModelError if a file of a model or adapter folder is missing or visibly damaged.

    It reads small files and the headers of large ones, so it takes milliseconds; `digests` reads
    the weights.
    """
    weights = weight_files(path)
    names = {file.name for file in weights}
    entries = _listed_files(path)
    small = [entry for entry in entries if entry["file"] not in names]
    problem = file_lists.size_damage(path, entries) or file_lists.content_damage(path, small)
    if problem:
        raise ModelError(_what_to_do(path, problem))

    for file in weights:
        if not file.is_file():
            raise ModelError(
                f"the model folder {path} lacks {file.name}, which its index names; "
                "download or write the model again"
            )
        _check_header(file)
    if len(weights) > 1:
        _check_index(path, weights)


def _check_header(file: Path) -> None:
    """Raises ModelError if the header of a file with weights is damaged, or the file truncated."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "np"):
                return
        with file.open("rb") as content:
            is_archive = content.read(len(ARCHIVE)) == ARCHIVE
        # What torch wrote before 2020 is no archive; torch tells if it is damaged.
        if is_archive:
            zipfile.ZipFile(file).close()
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        raise ModelError(
            f"{file} is damaged or truncated ({error}); download or write the model again"
        ) from error


def _check_index(path: Path, weights: list[Path]) -> None:
    """Raises ModelError if a tensor is not in the file that the index names.

    As when two files were swapped, or one is of another model.
    """
    index = path / f"{WHOLE[0]}.index.json"
    if not index.is_file() or weights[0].suffix != ".safetensors":
        return
    held = {}
    for file in weights:
        with safe_open(file, "np") as tensors:
            held[file.name] = set(tensors.keys())
    for tensor, name in read_json(index)["weight_map"].items():
        if tensor not in held[name]:
            raise ModelError(
                f"{path / name} does not hold {tensor}, as {index.name} says; "
                "download or write the model again"
            )


def digests(path: Path) -> list[str]:
    """The digest of each file with weights.

    Raises ModelError if the folder lists another one.
    """
    expected = {entry["file"]: entry["digest"] for entry in _listed_files(path)}
    actual = []
    for file in weight_files(path):
        digest = hashing.digest_file(file)
        if digest != expected.get(file.name, digest):
            problem = file_lists.digest_message(file, digest, expected[file.name])
            raise ModelError(_what_to_do(path, problem))
        actual.append(digest)
    return actual


def adapter_record(path: Path) -> Json | None:
    """base.json of an adapter that this package wrote; None in other folders.

    digest: of the weights of the base model. files: those of the adapter.
    Raises DataError if it is damaged.
    """
    file = path / BASE_DIGEST_FILE
    return (
        manifests.read_checked(file, {"digest"}, "record of an adapter") if file.is_file() else None
    )


def _listed_files(path: Path) -> list[Json]:
    """The entries of the files in a folder that this package wrote; none for other folders."""
    record = adapter_record(path)
    if record:
        entries = record.get("files", [])
    elif folders.is_dataset(path) and (path / "manifest.json").is_file():
        entries = manifests.read(path).get("files", [])
    else:
        entries = []
    # An adapter in a folder of its own is not a part of the model beside it.
    return [entry for entry in entries if "/" not in entry["file"]]


def _what_to_do(path: Path, problem: str) -> str:
    """The message about a damaged file of a model that this package wrote."""
    is_adapter = (path / ADAPTER).is_file()
    lists = BASE_DIGEST_FILE if is_adapter else "plan.json and manifest.json"
    return (
        f"{problem}; run the train command that wrote {path} again, or copy the file back "
        f"(if you changed it on purpose, remove {lists} from the folder)"
    )
