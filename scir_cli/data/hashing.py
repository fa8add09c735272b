"""Digests of values, files and texts, and seeds derived from ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from scir_cli.data.files import read_json

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: SplitMix64's step
HASH_BLOCK = (
    1 << 17
)  # bytes of text hashed at a time, so that what is computed on the way stays in a cache
canonical_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def digest_bytes(*chunks: bytes) -> str:
    """32 hex digits of BLAKE2b over the chunks; each chunk's length is hashed too, so boundaries count."""
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(len(chunk).to_bytes(8, "little") + chunk)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """32 hex digits that depend on the value of a JSON document and not on the order of its keys."""
    return digest_bytes(canonical_json(value).encode())


def digest_lists(*columns: Iterable[str]) -> list[str]:
    """`digest_json` of the list that each row makes; the columns hold values `to_json`."""
    return [digest_bytes(f"[{', '.join(row)}]".encode()) for row in zip(*columns, strict=False)]


def sample_seed(seed: int, row_id: str, sample: int) -> int:
    """The seed of one sample, from the run's seed and the row alone.  -> 63 bits"""
    return int(digest_json([seed, row_id, sample])[:16], 16) >> 1


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_part(path: Path) -> str:
    """32 hex digits of XXH3 over a part: another content has others, as with BLAKE2b and ten times as fast, unless somebody means to forge it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest_path(path: Path) -> str:
    """A digest of what a file or folder holds. A dataset folder of ours answers from its manifest without reading the data."""
    if path.is_file():
        return digest_file(path)
    manifest = path / "manifest.json"
    if manifest.is_file():
        return str(read_json(manifest)["digest"])
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest_json([[p.relative_to(path).as_posix(), digest_file(p)] for p in files])


def hash_texts(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A 64-bit hash of each text, column-wise: no defence against who means to collide.  -> (rows,)

    The sum over a text's words of 8 bytes, w_j, the last filled with zeros, of mix(w_j + (j + 1) GOLDEN), and its length, mixed again.
    """
    out = [np.empty(0, np.uint64)]
    for chunk in filter(len, texts.chunks):
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int32)[
            chunk.offset : chunk.offset + len(chunk) + 1
        ].astype(np.int64)
        blocks = np.unique(
            [*np.searchsorted(ends, np.arange(ends[0], ends[-1], HASH_BLOCK)), len(chunk)]
        )
        for low, high in itertools.pairwise([0, *blocks[blocks > 0]]):
            text = np.frombuffer(data or b"", np.uint8)[ends[low] : ends[high]]
            out.append(
                _hash_block(
                    np.append(text, np.zeros(8, np.uint8)), ends[low : high + 1] - ends[low]
                )
            )
    return np.concatenate(out)


def _hash_block(padded: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    length = np.diff(ends)
    n_words = length // 8 + 1
    first = np.cumsum(n_words) - n_words  # (rows,) each text's first word among all
    number = np.arange(n_words.sum()) - np.repeat(first, n_words)  # (words,) j
    anywhere = np.ndarray(
        len(padded) - 7, "<u8", padded, strides=(1,)
    )  # the word that begins at each byte
    words = anywhere[np.repeat(ends[:-1], n_words) + 8 * number]
    words[first + n_words - 1] &= (
        np.uint64(1) << (8 * (length % 8)).astype(np.uint64)
    ) - np.uint64(1)
    sums = np.add.reduceat(splitmix64(words + (number + 1).astype(np.uint64) * GOLDEN), first)
    return splitmix64(sums + length.astype(np.uint64) * GOLDEN)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def later_duplicates(numbers: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The rows of which an earlier one has the same numbers.  numbers: (numbers, rows)"""
    order = np.lexsort(numbers)  # stable: the earliest of equals comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for one in numbers:
        one = one[order]
        same &= one[1:] == one[:-1]
    return order[1:][same]
