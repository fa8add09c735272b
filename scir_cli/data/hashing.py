"""Digests of values, files and texts, and seeds derived from ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from scir_cli.data.files import read_json

#: 2^64 divided by the golden ratio, made odd: SplitMix64's step.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: Bytes of text that are hashed at a time, so that intermediate arrays fit in the CPU's cache.
HASH_BLOCK = 1 << 17
#: A word of `hash_texts`, in bytes.
WORD = 8

canonical_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def digest_bytes(*chunks: bytes) -> str:
    """32 hex digits of BLAKE2b over the chunks.

    The length of each chunk is hashed too, so the boundaries between chunks count.
    """
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(len(chunk).to_bytes(8, "little") + chunk)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """32 hex digits of a JSON value; they do not depend on the order of its keys."""
    return digest_bytes(canonical_json(value).encode())


def digest_lists(*columns: Iterable[str]) -> list[str]:
    """`digest_json` of the list in each row, from values that are JSON text already.

    columns: each (rows,), of texts as `canonical_json` returns them.  -> (rows,)
    """
    digests = []
    for row in zip(*columns, strict=False):
        text = f"[{', '.join(row)}]"
        digests.append(digest_bytes(text.encode()))
    return digests


def sample_seed(seed: int, row_id: str, sample: int) -> int:
    """The seed of one sample, 63 bits, from the run's seed and the row alone."""
    return int(digest_json([seed, row_id, sample])[:16], 16) >> 1


def digest_file(path: Path) -> str:
    """32 hex digits of BLAKE2b over the content of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return digest.hexdigest()


def digest_part(path: Path) -> str:
    """32 hex digits of XXH3 over the content of a part of a dataset.

    Ten times as fast as BLAKE2b, but no protection against forged content.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest_content(content: bytes) -> str:
    """`digest_part` of a part that is in memory."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_path(path: Path) -> str:
    """32 hex digits of the content of a file or folder.

    A finished dataset folder has its digest in the manifest, so its data are not read.
    """
    if path.is_file():
        return digest_file(path)
    manifest = path / "manifest.json"
    if manifest.is_file():
        return str(read_json(manifest)["digest"])

    files = []
    for child in path.rglob("*"):
        if child.is_file() and not child.name.startswith("."):
            files.append(child)
    files.sort()
    return digest_json([[file.relative_to(path).as_posix(), digest_file(file)] for file in files])


def hash_texts(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A 64-bit hash of each text, computed for whole columns.  -> (rows,)

    mix(length GOLDEN + sum over j of mix(w_j + (j + 1) GOLDEN)), with w_j the j-th word of 8 bytes,
    the last one filled with zeros, and mix SplitMix64's finalizer.
    It is no protection against texts that are built to collide.
    """
    hashes = [np.empty(0, np.uint64)]
    for chunk in filter(len, texts.chunks):
        _, offset_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, np.int32)
        # First byte of each text, and the end of the last: (rows + 1,)
        bounds = offsets[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
        text = np.frombuffer(data or b"", np.uint8)

        for low, high in _row_blocks(bounds):
            block = text[bounds[low] : bounds[high]]
            padded = np.append(block, np.zeros(WORD, np.uint8))
            hashes.append(_hash_block(padded, bounds[low : high + 1] - bounds[low]))
    return np.concatenate(hashes)


def _row_blocks(bounds: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about HASH_BLOCK bytes of text each, which cover all rows.

    bounds: first byte of each text, and the end of the last.  (rows + 1,)
    """
    n_rows = len(bounds) - 1
    byte_steps = np.arange(bounds[0], bounds[-1], HASH_BLOCK)
    ends = np.unique([*np.searchsorted(bounds, byte_steps), n_rows])
    return itertools.pairwise([0, *ends[ends > 0]])


def _hash_block(padded: NDArray[np.uint8], bounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hashes of the texts in one block, as `hash_texts` defines them.  -> (rows,)

    padded: the bytes of all texts, and WORD zeros.  (bytes + WORD,)
    bounds: first byte of each text, and the end of the last.  (rows + 1,)
    """
    length = np.diff(bounds)
    n_words = length // WORD + 1

    # (rows,) index of each text's first word among the words of all texts
    first = np.cumsum(n_words) - n_words
    # (words,) j, the index of each word in its text
    j = np.arange(n_words.sum()) - np.repeat(first, n_words)

    # A view of the word that begins at each byte, aligned or not.
    word_at = np.ndarray(len(padded) - WORD + 1, "<u8", padded, strides=(1,))
    words = word_at[np.repeat(bounds[:-1], n_words) + WORD * j]

    # The last word of a text keeps only the bytes of that text.
    n_last_bits = (8 * (length % WORD)).astype(np.uint64)
    words[first + n_words - 1] &= (np.uint64(1) << n_last_bits) - np.uint64(1)

    mixed = splitmix64(words + (j + 1).astype(np.uint64) * GOLDEN)
    sums = np.add.reduceat(mixed, first)
    return splitmix64(sums + length.astype(np.uint64) * GOLDEN)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, elementwise (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def later_duplicates(numbers: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The rows whose numbers all equal those of an earlier row.  -> (duplicates,)

    numbers: (numbers per row, rows)
    """
    # The sort is stable, so the earliest of equal rows is the first of them.
    order = np.lexsort(numbers)
    equals_previous = np.ones(max(len(order) - 1, 0), bool)
    for column in numbers:
        ordered = column[order]
        equals_previous &= ordered[1:] == ordered[:-1]
    return order[1:][equals_previous]
