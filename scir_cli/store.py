"""Dataset folders: plan first, parts one by one, manifest last. The only loop over parts, so that every stage resumes alike.

    OUT/plan.json          all that determines the rows (settings, seed, digests of inputs and weights); nothing that only changes speed
    OUT/data-00000.arrow   an Arrow IPC stream, written in a folder of drafts, fsynced, renamed; its own counts ride in its metadata
    OUT/state.json, dataset_info.json   so that `datasets.load_from_disk` opens the folder
    OUT/README.md          the dataset card: columns, where the rows came from, drops (cards.py)
    OUT/manifest.json      written last: it exists if and only if the dataset is complete

The same plan resumes; another plan in the same folder is refused. On another file system (a URL) parts are put whole, nothing is locked, and what is
read is held in memory. Arrow's *stream* format, because `Dataset.from_file` cannot read the file format.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from scir_cli import __version__, cards, places, schemas
from scir_cli.errors import DataError, PlanMismatch, ScirError, StoreError

ACCOUNT_KEY = b"scir.account"
FIRST_VERSION = "1"  # of the columns of plans that do not name one
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: SplitMix64's step
HASH_BLOCK = 1 << 17  # bytes of text hashed at a time, so that what is computed on the way stays in a cache
Json = dict[str, Any]
to_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


@dataclass
class Part:
    """What one part of the work gave: rows (dicts or a table), how many came in, and why the others were dropped."""

    rows: Sequence[Mapping[str, Any]] | pa.Table
    rows_in: int
    drops: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Todo:
    """A part that is not on disk yet: where it goes, where it is drafted, and the rows of the input it is made of."""

    path: Path
    drafts: Path | None
    low: int
    high: int


def digest_bytes(*chunks: bytes) -> str:
    """32 hex digits of BLAKE2b over the chunks; each chunk's length is hashed too, so boundaries count."""
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(len(chunk).to_bytes(8, "little") + chunk)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """32 hex digits that depend on the value of a JSON document and not on the order of its keys."""
    return digest_bytes(to_json(value).encode())


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
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
        blocks = np.unique([*np.searchsorted(ends, np.arange(ends[0], ends[-1], HASH_BLOCK)), len(chunk)])
        for low, high in itertools.pairwise([0, *blocks[blocks > 0]]):
            text = np.frombuffer(data or b"", np.uint8)[ends[low] : ends[high]]
            out.append(_hash_block(np.append(text, np.zeros(8, np.uint8)), ends[low : high + 1] - ends[low]))
    return np.concatenate(out)


def _hash_block(padded: NDArray[np.uint8], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    length = np.diff(ends)
    n_words = length // 8 + 1
    first = np.cumsum(n_words) - n_words  # (rows,) each text's first word among all
    number = np.arange(n_words.sum()) - np.repeat(first, n_words)  # (words,) j
    anywhere = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # the word that begins at each byte
    words = anywhere[np.repeat(ends[:-1], n_words) + 8 * number]
    words[first + n_words - 1] &= (np.uint64(1) << (8 * (length % 8)).astype(np.uint64)) - np.uint64(1)
    sums = np.add.reduceat(mix(words + (number + 1).astype(np.uint64) * GOLDEN), first)
    return mix(sums + length.astype(np.uint64) * GOLDEN)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def repeated(numbers: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The rows of which an earlier one has the same numbers.  numbers: (numbers, rows)"""
    order = np.lexsort(numbers)  # stable: the earliest of equals comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for one in numbers:
        one = one[order]
        same &= one[1:] == one[:-1]
    return order[1:][same]


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); remove its folder or write it again with --overwrite") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object and holds a {type(value).__name__}")
    return value


@contextlib.contextmanager
def writing(path: Path, drafts: Path | None = None) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on leaving, its content is on disk and has `path` as its name, or nothing changed.

    drafts: a folder for it, where several processes may write the same `path`. What goes to another file system is first written on this machine.
    Raises StoreError where the disk is full or the folder cannot be written.
    """
    if places.is_remote(path):
        with disk_errors(path), tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            places.put(temporary, path)
        return
    temporary = drafts / f"{path.name}.{uuid.uuid4().hex}" if drafts else path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
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
def disk_errors(path: Path) -> Iterator[None]:
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
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------- claiming a folder


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {json.dumps(old)}, now {json.dumps(new)}"]


@contextlib.contextmanager
def claim(out: Path, plan: Json, overwrite: bool = False) -> Iterator[Json | None]:
    """Takes the folder for this plan; gives the manifest when this plan is already done, else None.

    Raises PlanMismatch naming what differs, and StoreError when another process is writing here or the folder holds other files.
    """
    if out.is_file():
        raise StoreError(f"{out} is a file; --output-dir takes a folder")
    if overwrite and out.exists() and any(out.iterdir()) and not (out / "plan.json").exists():
        raise StoreError(f"{out} was not made by scir (no plan.json), so --overwrite does not delete it; choose another folder")
    with nullcontext() if places.is_remote(out) else _locked(out):
        if overwrite and out.exists():
            _clear(out)
        yield _start(out, plan)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Of this machine's file systems (and NFS 4) alone: an object store has no locks."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise disk_error(error, out) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"another process is writing {out}; wait for it, or choose another --output-dir") from error
        yield


def _clear(out: Path) -> None:
    for path in out.iterdir():
        if path.is_dir():
            places.remove(path)
        elif path.name != ".lock":
            path.unlink()


def _start(out: Path, plan: Json) -> Json | None:
    path = out / "plan.json"
    if not path.exists():
        others = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
        if others:
            raise StoreError(f"{out} already holds {others[0]!r} and no plan.json; choose an empty folder")
        write_json(path, plan)
        return None
    old = read_json(path)
    if old.get("stage") != plan.get("stage"):
        raise PlanMismatch(
            f"{out} was made by 'scir {old.get('stage')}', and this is 'scir {plan.get('stage')}'; choose another --output-dir"
        )
    if version_of(old) != version_of(plan):
        raise PlanMismatch(_outdated(out, old, version_of(old)))
    changes = _differences(old, json.loads(json.dumps(plan)))
    if changes:
        raise PlanMismatch(
            f"{out} was started with other settings: {'; '.join(changes)}. Use --overwrite to replace it, or another --output-dir"
        )
    return _done(out)


def version_of(document: Json) -> str:
    """The schema version that a plan or a manifest names; the first one if it names none."""
    return str(document.get("schema_version", FIRST_VERSION))


def _outdated(path: Path, plan: Json, version: str) -> str:
    return (
        f"{path} was written by 'scir {plan.get('stage')}' with schema version {version}, "
        f"and this scir has version {schemas.VERSION}; run that command again with --overwrite"
    )


def check_version(path: Path, version: str) -> None:
    """Raises DataError if `version`, that of a dataset folder or a part of it, is not ours."""
    if version != schemas.VERSION:
        raise DataError(_outdated(path, read_json(path / "plan.json"), version))


def _done(out: Path) -> Json | None:
    """The manifest of a finished folder; None where a part of it was deleted, to be made again."""
    if not (out / "manifest.json").exists():
        return None
    manifest = read_json(out / "manifest.json")
    return manifest if all((out / part["file"]).exists() for part in manifest.get("parts", [])) else None


# ---------------------------------------------------------------------------------------------------------------------- writing a dataset


def write_dataset(
    out: Path,
    kind: str,
    plan: Json,
    bounds: Sequence[tuple[int, int]],
    make: Callable[[int, int], Part],
    *,
    overwrite: bool = False,
    dropped_before: Counter[str] | None = None,
    summarise: Callable[[Dataset], Json] = lambda made: {},
    advance: Callable[[int], None] = lambda rows: None,
    share: Callable[[str, list[Todo], Callable[[int], None]], None] | None = None,
    work: Callable[[], Json] | None = None,
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Json:
    """Writes a dataset of `kind` part by part and returns its manifest; does nothing but return it when the plan is already done.

    bounds: row ranges of the input, one a part. make(lo, hi): the part; it must depend on the plan and the range only.
    dropped_before: input rows that never reached a part, by reason. summarise: figures of the whole dataset, kept in the manifest under
    "summary". advance: told of input rows whose part is on disk. share: has the parts made elsewhere (workers.py), in place of `make`.
    work: figures of what this run computed, kept under "work".
    inputs: setting -> path or model as the user named it, kept under "inputs"; None is left out.
    """
    started = time.monotonic()
    plan = {**plan, "schema_version": schemas.VERSION}
    named = {name: str(value) for name, value in inputs.items() if value is not None}
    with claim(out, plan, overwrite) as done:
        if done is not None:
            return {**done, "reused": True}
        drafts = _new_drafts(out, plan)
        parts = [Todo(out / f"data-{index:05d}.arrow", drafts, low, high) for index, (low, high) in enumerate(bounds)]
        todo = [part for part in parts if not part.path.exists()]
        advance(sum(part.high - part.low for part in parts) - sum(part.high - part.low for part in todo))
        if share is not None:
            share(kind, todo, advance)
        else:
            for part in todo:
                write_part(part, kind, make(part.low, part.high))
                advance(part.high - part.low)
        if not bounds:
            write_part(Todo(out / "data-00000.arrow", drafts, 0, 0), kind, Part([], 0))
        if drafts:
            places.remove(drafts)
        return _finish(out, kind, dropped_before or Counter(), summarise, started, work, plan, named)


def _new_drafts(out: Path, plan: Json) -> Path | None:
    """An empty folder of this plan alone: a worker that outlived its run finds no place for what it made, and leaves nothing behind.

    None where parts are put on another file system.
    """
    if places.is_remote(out):
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        return None
    drafts = out / f".drafts-{digest_json(plan)[:16]}"
    with disk_errors(drafts):
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir(exist_ok=True)
    return drafts


def write_part(todo: Todo, kind: str, part: Part) -> None:
    """Writes a part under its name, whole or not at all; its counts ride in its metadata."""
    table = part.rows if isinstance(part.rows, pa.Table) else schemas.to_table(kind, part.rows)
    schemas.check_nulls(table, kind)
    assert part.rows_in == table.num_rows + sum(part.drops.values()), (
        f"{todo.path}: {part.rows_in} in, {table.num_rows} out, {part.drops} dropped"
    )
    account = json.dumps({"rows_in": part.rows_in, "drops": dict(part.drops)}).encode()
    table = table.replace_schema_metadata({**schemas.schema(kind).metadata, **(table.schema.metadata or {}), ACCOUNT_KEY: account})
    with (
        writing(todo.path, todo.drafts) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def _finish(
    out: Path,
    kind: str,
    before: Counter[str],
    summarise: Callable[[Dataset], Json],
    started: float,
    work: Callable[[], Json] | None,
    plan: Json,
    inputs: Mapping[str, str],
) -> Json:
    paths = sorted(out.glob("data-*.arrow"), key=lambda path: (len(path.name), path.name))  # six digits come after five
    parts, drops, nulls, rows_in = [], before, Counter[str](), before.total()
    for path in paths:
        table = read_part(path)
        account = json.loads(table.schema.metadata[ACCOUNT_KEY])
        drops, rows_in = drops + Counter(account["drops"]), rows_in + account["rows_in"]
        nulls += count_nulls(table)
        parts.append({"file": path.name, "rows": table.num_rows, "digest": digest_part(path)})
    made = Dataset(kind, paths, list(itertools.accumulate(part["rows"] for part in parts)))
    columns = schemas.schema(kind).names
    manifest = {
        "kind": kind,
        "schema_version": schemas.VERSION,
        "digest": digest_json([part["digest"] for part in parts]),
        "rows_in": rows_in,
        "rows_out": made.num_rows,
        "drops": dict(drops),
        "inputs": dict(inputs),
        "nulls": dict(sorted(nulls.items(), key=lambda item: columns.index(item[0]) if item[0] in columns else len(columns))),
        "parts": parts,
        "seconds": round(time.monotonic() - started, 3),
        **({"work": work()} if work else {}),
        "versions": versions(),
        "summary": summarise(made),
    }
    state = {"_data_files": [{"filename": p.name} for p in paths], "_fingerprint": manifest["digest"], "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    write_json(out / "state.json", state)
    write_json(out / "dataset_info.json", {"description": f"scir {kind} dataset", "citation": "", "homepage": "", "license": ""})
    with writing(out / "README.md") as temporary:
        temporary.write_text(cards.render(plan, manifest), encoding="utf-8")
    write_json(out / "manifest.json", manifest)
    return manifest


def count_nulls(table: pa.Table) -> Counter[str]:
    """Nulls per column that has any, and missing verdicts per reward model as `rewards.NAME`."""
    nulls = Counter({name: table.column(name).null_count for name in table.column_names if table.column(name).null_count})
    for chunk in table.column("rewards").chunks if "rewards" in table.column_names else ():
        rewards = chunk.flatten()
        silent = pc.value_counts(rewards.field("reward_model").filter(rewards.field("log_odds").is_null()))
        nulls += {f"rewards.{one['values']}": one["counts"] for one in silent.to_pylist()}
    return nulls


def versions() -> dict[str, str]:
    return {"scir": __version__} | {name: metadata.version(name) for name in ("torch", "transformers", "pyarrow")}


# ---------------------------------------------------------------------------------------------------------------------- reading a dataset


def read_part(path: Path) -> pa.Table:
    """The table of one data file; a local file is mapped and not loaded. Raises DataError."""
    try:
        data = pa.BufferReader(path.read_bytes()) if places.is_remote(path) else pa.memory_map(str(path))
        return pa.ipc.open_stream(data).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is truncated or is not an Arrow stream ({error}); delete it and run the stage that made it again"
        ) from error


def write_columns(path: Path, values: Mapping[str, tuple[float, float]]) -> None:
    """Two numbers by id, beside a dataset and no part of it (not in its manifest or digest): what can be computed again."""
    pairs = list(values.values())
    table = pa.table({"pair_id": list(values), "first": [a for a, _ in pairs], "second": [b for _, b in pairs]})
    with writing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def read_columns(path: Path) -> dict[str, tuple[float, float]]:
    table = read_part(path)
    both = zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True)
    return dict(zip(table["pair_id"].to_pylist(), both, strict=True))


def is_dataset(path: Path) -> bool:
    """Whether the folder was made by a stage of ours, finished or not."""
    return (path / "plan.json").is_file()


@dataclass(frozen=True)
class Dataset:
    """A finished dataset folder. A part is mapped while somebody reads it and no longer, so memory is that of the parts in use."""

    kind: str
    paths: list[Path]
    ends: list[int]  # rows up to the end of each part
    limit: int | None = None  # rows that are read
    columns: list[str] | None = None  # columns that are read

    @property
    def num_rows(self) -> int:
        rows = self.ends[-1] if self.ends else 0
        return rows if self.limit is None else min(rows, self.limit)

    def head(self, limit: int | None) -> Dataset:
        return replace(self, limit=limit)

    def select(self, columns: list[str]) -> Dataset:
        return replace(self, columns=columns)

    def seen_as(self, kind: str) -> Dataset:
        """A dataset of another kind, whose columns this one has as well."""
        return replace(self, kind=kind, columns=schemas.schema(kind).names)

    def read(self) -> pa.Table:
        return self.slice(0, self.num_rows)

    def slice(self, low: int, length: int) -> pa.Table:
        """Rows low to low + length, as a table has it, of the parts that hold them."""
        high = min(low + length, self.num_rows)
        tables = [self.schema.empty_table()]
        for index in range(bisect.bisect_right(self.ends, low), bisect.bisect_left(self.ends, high) + 1 if low < high else 0):
            start = self.ends[index - 1] if index else 0
            part = read_part(self.paths[index]).slice(max(low - start, 0), high - max(low, start))
            tables.append((part.select(self.columns) if self.columns else part).replace_schema_metadata(self.schema.metadata))
        return pa.concat_tables(tables[1:] or tables)

    def tables(self) -> Iterator[pa.Table]:
        """The rows, one part at a time; an empty table where there are none."""
        if not self.num_rows:
            yield self.schema.empty_table()
        for start, end in itertools.pairwise([0, *self.ends]):
            if start < self.num_rows:
                yield self.slice(start, end - start)

    @property
    def schema(self) -> pa.Schema:
        return schemas.schema(self.kind)


class Rows(Protocol):
    """What can be read a slice at a time: a Dataset, a Scratch, a table."""

    @property
    def num_rows(self) -> int: ...

    def slice(self, low: int, length: int) -> pa.Table: ...


class Scratch:
    """Rows on disk under no name, which are gone with the process however it ends. A batch is mapped while somebody reads it and no longer."""

    def __init__(self, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        lengths = [0]
        with disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, schema) as writer:
                for table in tables:
                    for batch in table.to_batches():
                        writer.write_batch(batch)
                        lengths.append(batch.num_rows)
            file.flush()
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        self.schema, self.path = schema, f"/dev/fd/{descriptor}"
        self.starts = np.cumsum(lengths)
        self.gone = self.kept_before = np.empty(0, np.int64)

    def without(self, rows: NDArray[np.int64]) -> Scratch:
        """All rows but these."""
        self.gone = np.sort(rows)
        self.kept_before = self.gone - np.arange(len(rows))
        return self

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1]) - len(self.gone)

    def slice(self, low: int, length: int) -> pa.Table:
        rows = np.arange(low, min(low + length, self.num_rows))
        if not len(rows):
            return self.schema.empty_table()
        rows += np.searchsorted(self.kept_before, rows, side="right")
        first, last = np.searchsorted(self.starts, [rows[0], rows[-1]], side="right") - 1
        file = pa.ipc.open_file(pa.memory_map(self.path))
        table = pa.Table.from_batches([file.get_batch(int(i)) for i in range(first, last + 1)])
        kept = np.zeros(rows[-1] - rows[0] + 1, bool)
        kept[rows - rows[0]] = True
        return table.slice(rows[0] - self.starts[first], len(kept)).filter(pa.array(kept))


def read_dataset(path: Path, *kinds: str) -> pa.Table:
    """A finished dataset folder as one table, memory-mapped where it lies on this machine; raises as `open_dataset` does."""
    return open_dataset(path, *kinds).read()


def open_dataset(path: Path, *kinds: str) -> Dataset:
    """A finished dataset folder; raises DataError if it is unfinished, damaged, or of none of `kinds`."""
    needed = " or ".join(repr(k) for k in kinds)
    if not path.exists():
        raise DataError(f"{path} does not exist; this command needs the folder of a {needed} dataset")
    if not is_dataset(path):
        raise DataError(f"{path} is not a dataset folder that scir made; this command needs a {needed} dataset")
    if not (path / "manifest.json").is_file():
        raise DataError(
            f"{path} is not a finished dataset (no manifest.json); run the stage that writes it again: it resumes where it stopped"
        )
    manifest = read_json(path / "manifest.json")
    kind = manifest.get("kind", "unknown")
    if kinds and kind not in kinds:
        raise DataError(_wrong_kind(path, manifest, needed))
    check_version(path, version_of(manifest))
    for part in manifest["parts"]:
        table = read_part(path / part["file"])
        check_version(path, schemas.version_of(table))
        if table.num_rows != part["rows"]:
            raise DataError(
                f"{path / part['file']} holds {table.num_rows} rows and the manifest says {part['rows']}; delete it and run the stage that made it again"
            )
        schemas.check_nulls(table, kind)
    paths = [path / part["file"] for part in manifest["parts"]]
    return Dataset(kind, paths, list(itertools.accumulate(part["rows"] for part in manifest["parts"])))


def _wrong_kind(path: Path, manifest: Json, needed: str) -> str:
    kind = manifest.get("kind", "unknown")
    if kind == "consistency":
        source = manifest.get("inputs", {}).get("input")
        return (
            f"{path} holds a 'consistency' dataset: figures about pairs, without their verdicts; "
            f"pass the judged dataset that it was made from{f', {source}' if source else ''}"
        )
    holds = "a model" if kind == "model" else f"a '{kind}' dataset"
    return f"{path} holds {holds}; this command needs a {needed} dataset"


def part_bounds(n_rows: int, rows_per_part: int) -> list[tuple[int, int]]:
    """Row ranges of at most `rows_per_part` that cover 0..n_rows in order."""
    return [(low, min(low + rows_per_part, n_rows)) for low in range(0, n_rows, rows_per_part)]


def group_bounds(data: Dataset, key: str, rows_per_part: int) -> list[tuple[int, int]]:
    """The same for the rows of a dataset, never cutting a run of neighbours with equal `key` in two."""
    starts, before, row = [], pa.scalar(None, pa.string()), 0
    for table in data.tables():
        keys = pa.concat_arrays([pa.array([before]), *table[key].chunks])
        starts.append(row + np.flatnonzero(pc.not_equal(keys[1:], keys[:-1]).fill_null(True)))
        before, row = keys[-1], row + table.num_rows
    ends = np.append(np.concatenate(starts)[1:], row) if row else np.empty(0, int)
    bounds, low = [], 0
    while low < row:
        high = int(ends[np.searchsorted(ends, min(low + rows_per_part, row))])
        bounds.append((low, high))
        low = high
    return bounds
