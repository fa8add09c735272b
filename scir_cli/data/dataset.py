"""Dataset folders: the plan first, then parts one by one, the manifest last.

This is the only loop over parts, so every stage resumes in the same way.

    OUT/plan.json          all that determines the rows (settings, seed, digests of inputs and
                           weights), and nothing that changes only the speed
    OUT/data-00000.arrow   an Arrow IPC stream, written in a folder of drafts, fsynced, renamed;
                           its metadata hold its counts of rows read and dropped
    OUT/state.json, dataset_info.json   so that `datasets.load_from_disk` opens the folder
    OUT/README.md          the dataset card: columns, origin of the rows, drops (dataset_card.py)
    OUT/manifest.json      written last: it exists if and only if the dataset is complete

The same plan resumes; another plan in the same folder is refused.
On another file system (a URL) a part is uploaded as a whole, nothing is locked, and a part that is
read is held in memory.
The format is Arrow's *stream*, because `Dataset.from_file` cannot read Arrow's file format.
"""

from __future__ import annotations

import bisect
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scir_cli import __version__
from scir_cli.data import dataset_card, folders, hashing, manifests, schemas, storage
from scir_cli.data.files import Json, as_store_error, atomic_write, write_json
from scir_cli.errors import DataError, redact

#: Key of a part's counts, as JSON, in its Arrow metadata.
ACCOUNT_KEY = b"scir.account"


@dataclass
class Part:
    """One part of a dataset before it is written.

    rows: dicts, or a table.
    rows_in: number of input rows.
    drops: number of input rows that were dropped, by reason.
    encoded_again: number of rows whose token ids another tokenizer or chat template made.
    """

    rows: Sequence[Mapping[str, Any]] | pa.Table
    rows_in: int
    drops: Counter[str] = field(default_factory=Counter)
    encoded_again: int = 0


@dataclass(frozen=True)
class PartTask:
    """A part that is not on disk yet.

    path: of its file.
    drafts: folder in which it is drafted; None on another file system.
    low, high: its rows of the input, high exclusive.
    """

    path: Path
    drafts: Path | None
    low: int
    high: int

    @property
    def n_rows(self) -> int:
        """Number of its input rows."""
        return self.high - self.low


def write_dataset(
    out: Path,
    kind: str,
    plan: Json,
    bounds: Sequence[tuple[int, int]],
    make: Callable[[int, int], Part],
    *,
    overwrite: bool = False,
    dropped_before: Counter[str] | None = None,
    summarize: Callable[[Dataset], Json] = lambda made: {},
    advance: Callable[[int], None] = lambda rows: None,
    share: Callable[[str, list[PartTask], Callable[[int], None]], None] | None = None,
    work: Callable[[], Json] | None = None,
    inputs: Mapping[str, Any] = MappingProxyType({}),
    encoding: str | None = None,
) -> Json:
    """Writes a dataset of `kind` part by part; returns its manifest.

    If the plan is finished already, the manifest is returned with "reused": true.

    bounds: row ranges of the input, one per part.
    make(low, high): the part; it must depend on the plan and the range only.
    dropped_before: input rows that reached no part, by reason.
    summarize: figures of the whole dataset, for the manifest's "summary".
    advance: called with the number of input rows whenever a part is on disk.
    share: writes the parts elsewhere (workers), in place of `make`.
    work: figures about the computation of this run, for the manifest's "work".
    inputs: setting -> path or model as the user named it, for the manifest; None is left out.
    encoding: digest of tokenizer and chat template of the token ids, for the manifest.
    Raises PlanMismatch or StoreError as `folders.claim_folder` and `files.atomic_write` do.
    """
    started = time.monotonic()
    plan = {**plan, "schema_version": schemas.VERSION}
    named = {name: redact(str(value)) for name, value in inputs.items() if value is not None}

    with folders.claim_folder(out, plan, overwrite) as finished:
        if finished is not None:
            return {**finished, "reused": True}

        drafts = _new_drafts(out, plan)
        todo = _missing_parts(out, drafts, bounds, advance)
        # A dataset has at least one part, which holds its schema.
        if not bounds:
            write_part(PartTask(_part_path(out, 0), drafts, 0, 0), kind, Part([], 0))
        write = share or partial(_write_parts, make)
        write(kind, todo, advance)
        if drafts:
            storage.remove(drafts)

        paths = [_part_path(out, index) for index in range(max(len(bounds), 1))]
        manifest, written = _account(paths, kind, dropped_before or Counter(), named)
        manifest |= {"seconds": round(time.monotonic() - started, 3), "encoding": encoding}
        if work:
            manifest["work"] = work()
        manifest["versions"] = versions()
        manifest["summary"] = summarize(written)
        _write_documents(out, plan, manifest, written)
        for path in paths:
            folders.forget_digest(path)
        return manifest


def _write_parts(
    make: Callable[[int, int], Part],
    kind: str,
    todo: Sequence[PartTask],
    advance: Callable[[int], None],
) -> None:
    """Makes and writes the parts in this process, one after the other."""
    for part in todo:
        write_part(part, kind, make(part.low, part.high))
        advance(part.n_rows)


def _part_path(out: Path, index: int) -> Path:
    """The file of a part."""
    return out / f"data-{index:05d}.arrow"


def _missing_parts(
    out: Path,
    drafts: Path | None,
    bounds: Sequence[tuple[int, int]],
    advance: Callable[[int], None],
) -> list[PartTask]:
    """The parts that are not on disk or damaged; `advance` gets the rows of the others once."""
    todo = []
    rows_on_disk = 0
    for index, (low, high) in enumerate(bounds):
        part = PartTask(_part_path(out, index), drafts, low, high)
        digest = folders.recorded_digest(part.path)
        if digest is not None and folders.is_intact(part.path, digest):
            rows_on_disk += part.n_rows
        else:
            todo.append(part)
    advance(rows_on_disk)
    return todo


def _new_drafts(out: Path, plan: Json) -> Path | None:
    """An empty folder for the drafts of this plan; None on another file system.

    A worker that outlives its run no longer has a folder for its draft, and leaves nothing behind.
    """
    if storage.is_remote(out):
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        return None
    drafts = out / f".drafts-{hashing.digest_json(plan)[:16]}"
    with as_store_error(drafts):
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir(exist_ok=True)
    return drafts


def write_part(todo: PartTask, kind: str, part: Part) -> None:
    """Writes a part under its name, as a whole or not at all, with its counts as metadata.

    Raises DataError if the rows do not fit the kind; StoreError as `files.atomic_write` does.
    """
    table = part.rows if isinstance(part.rows, pa.Table) else schemas.to_table(kind, part.rows)
    schemas.check_nulls(table, kind)
    assert part.rows_in == table.num_rows + sum(part.drops.values()), (
        f"{todo.path}: {part.rows_in} in, {table.num_rows} out, {part.drops} dropped"
    )

    counts = {"rows_in": part.rows_in, "drops": dict(part.drops)}
    account = json.dumps(counts | {"encoded_again": part.encoded_again})
    metadata_of_part = {
        **schemas.schema(kind).metadata,
        **(table.schema.metadata or {}),
        ACCOUNT_KEY: account.encode(),
    }
    with atomic_write(todo.path, todo.drafts) as temporary:
        _write_stream(temporary, table.replace_schema_metadata(metadata_of_part))
        digest = hashing.digest_part(temporary)
    folders.record_digest(todo.path, digest)


def _write_stream(path: Path, table: pa.Table) -> None:
    """Writes a table as an Arrow IPC stream."""
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def _account(
    paths: list[Path], kind: str, dropped_before: Counter[str], inputs: Mapping[str, str]
) -> tuple[Json, Dataset]:
    """The manifest's entries that follow from the parts on disk, and their dataset.

    dropped_before: input rows that reached no part, by reason.
    """
    parts = []
    drops = dropped_before
    nulls = Counter[str]()
    rows_in = dropped_before.total()
    encoded_again = 0
    for path in paths:
        table = read_part(path)
        account = json.loads(table.schema.metadata[ACCOUNT_KEY])
        drops = drops + Counter(account["drops"])
        rows_in += account["rows_in"]
        encoded_again += account.get("encoded_again", 0)
        nulls += count_nulls(table)
        digest = folders.recorded_digest(path) or hashing.digest_part(path)
        parts.append({"file": path.name, "rows": table.num_rows, "digest": digest})

    written = Dataset(kind, paths, _part_ends(parts))
    manifest = {
        "kind": kind,
        "schema_version": schemas.VERSION,
        "digest": hashing.digest_json([part["digest"] for part in parts]),
        "rows_in": rows_in,
        "rows_out": written.num_rows,
        "drops": dict(drops),
        "inputs": dict(inputs),
        "nulls": _in_column_order(nulls, schemas.schema(kind).names),
        "parts": parts,
    }
    if encoded_again:
        manifest["encoded_again"] = encoded_again
    return manifest, written


def _part_ends(parts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Rows up to the end of each part of a manifest."""
    return list(itertools.accumulate(part["rows"] for part in parts))


def _in_column_order(nulls: Counter[str], columns: list[str]) -> dict[str, int]:
    """The counts in the order of the columns, with those of reward models at the end."""

    def position(name: str) -> int:
        return columns.index(name) if name in columns else len(columns)

    return {name: nulls[name] for name in sorted(nulls, key=position)}


def _write_documents(out: Path, plan: Json, manifest: Json, written: Dataset) -> None:
    """Writes the files for `datasets.load_from_disk`, the card, and last the manifest."""
    state = {
        "_data_files": [{"filename": path.name} for path in written.paths],
        "_fingerprint": manifest["digest"],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(out / "state.json", state)

    info = {
        "description": f"scir {written.kind} dataset",
        "citation": "",
        "homepage": "",
        "license": "",
    }
    write_json(out / "dataset_info.json", info)

    with atomic_write(out / "README.md") as temporary:
        temporary.write_text(dataset_card.render(plan, manifest), encoding="utf-8")
    manifests.write(out, manifest)


def count_nulls(table: pa.Table) -> Counter[str]:
    """Nulls per column that has any, and missing verdicts per reward model as `rewards.NAME`."""
    nulls = Counter[str]()
    for name in table.column_names:
        n_nulls = table.column(name).null_count
        if n_nulls:
            nulls[name] = n_nulls
    if "rewards" not in table.column_names:
        return nulls

    for chunk in table.column("rewards").chunks:
        rewards = chunk.flatten()
        is_missing = rewards.field("log_odds").is_null()
        names = rewards.field("reward_model").filter(is_missing)
        for entry in pc.value_counts(names).to_pylist():
            nulls[f"rewards.{entry['values']}"] += entry["counts"]
    return nulls


def versions() -> dict[str, str]:
    """The versions of this package and of the packages that determine results."""
    packages = ("torch", "transformers", "pyarrow")
    return {"scir": __version__} | {name: metadata.version(name) for name in packages}


def read_part(path: Path, digest: str | None = None) -> pa.Table:
    """The table of one data file; a local file is mapped into memory and not loaded.

    digest: the file's, compared before anything of it is used; None: not compared.
    Raises DataError if the file cannot be read, has another digest, is truncated, or is not an
    Arrow stream.
    """
    try:
        if storage.is_remote(path):
            content = path.read_bytes()
            actual = hashing.digest_content(content) if digest else None
            data = pa.BufferReader(content)
        else:
            actual = hashing.digest_part(path) if digest else None
            data = pa.memory_map(str(path))
        if actual != digest:
            raise DataError(
                f"{path} is damaged: its digest is {actual} and its manifest has {digest}; "
                "run the command that wrote its folder again: it writes damaged parts again"
            )
        return pa.ipc.open_stream(data).read_all()
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is truncated or is not an Arrow stream ({error}); "
            "delete it and run the stage that wrote it again"
        ) from error


def write_columns(path: Path, values: Mapping[str, tuple[float, float]]) -> None:
    """Writes two numbers per pair id to a file beside a dataset.

    The file holds values that can be computed again: it is not in the manifest, and its digest is
    in a hidden file beside it.
    """
    pairs = list(values.values())
    columns = {
        "pair_id": list(values),
        "first": [first for first, _ in pairs],
        "second": [second for _, second in pairs],
    }
    table = pa.table(columns)
    with atomic_write(path) as temporary:
        _write_stream(temporary, table)
        folders.record_digest(path, hashing.digest_part(temporary))


def read_columns(path: Path) -> dict[str, tuple[float, float]]:
    """Two numbers per pair id, as `write_columns` wrote them.

    Empty if there is no such file, or if it is damaged.
    """
    digest = folders.recorded_digest(path)
    if digest is None or not folders.is_intact(path, digest):
        return {}
    table = read_part(path)
    ids = table["pair_id"].to_pylist()
    numbers = zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True)
    return dict(zip(ids, numbers, strict=True))


@dataclass(frozen=True)
class Dataset:
    """A finished dataset folder.

    A part is mapped only while a reader uses it, so memory is that of the parts in use.

    ends: rows up to the end of each part.
    limit: number of rows that are read; None: all.
    columns: names of the columns that are read; None: all.
    encoding: digest of tokenizer and chat template of its token ids; None: unknown.
    """

    kind: str
    paths: list[Path]
    ends: list[int]
    limit: int | None = None
    columns: list[str] | None = None
    encoding: str | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows that are read."""
        rows = self.ends[-1] if self.ends else 0
        return rows if self.limit is None else min(rows, self.limit)

    def head(self, limit: int | None) -> Dataset:
        """The dataset with only its first `limit` rows; None: all rows."""
        return replace(self, limit=limit)

    def select(self, columns: list[str]) -> Dataset:
        """The dataset with only these columns."""
        return replace(self, columns=columns)

    def with_kind(self, kind: str) -> Dataset:
        """The rows as a dataset of another kind, whose columns must be among the present ones."""
        return replace(self, kind=kind, columns=schemas.schema(kind).names)

    def read(self) -> pa.Table:
        """All rows as one table."""
        return self.slice(0, self.num_rows)

    def slice(self, low: int, length: int) -> pa.Table:
        """Rows low to low + length, fewer at the end, from the parts that hold them."""
        high = min(low + length, self.num_rows)
        if low >= high:
            return self.schema.empty_table()

        tables = []
        first = bisect.bisect_right(self.ends, low)
        last = bisect.bisect_left(self.ends, high)
        for index in range(first, last + 1):
            start = self.ends[index - 1] if index else 0
            part = read_part(self.paths[index])
            part = part.slice(max(low - start, 0), high - max(low, start))
            if self.columns:
                part = part.select(self.columns)
            # Counts in a part's metadata differ, and tables with other metadata do not concatenate.
            tables.append(part.replace_schema_metadata(self.schema.metadata))
        return pa.concat_tables(tables)

    def tables(self) -> Iterator[pa.Table]:
        """The rows, one part at a time; one empty table if there are none."""
        if not self.num_rows:
            yield self.schema.empty_table()
        for start, end in itertools.pairwise([0, *self.ends]):
            if start < self.num_rows:
                yield self.slice(start, end - start)

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the kind."""
        return schemas.schema(self.kind)


class Rows(Protocol):
    """Rows that can be read in slices: a Dataset, a Spool, a table."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    def slice(self, low: int, length: int) -> pa.Table:
        """Rows low to low + length, fewer at the end."""
        ...


def read_dataset(path: Path, *kinds: str) -> pa.Table:
    """A finished dataset folder as one table, mapped into memory if it is local.

    Raises DataError as `open_dataset` does.
    """
    return open_dataset(path, *kinds).read()


def open_dataset(path: Path, *kinds: str) -> Dataset:
    """A finished dataset folder.

    kinds: the kinds that are accepted; none: every kind.
    Raises DataError if it is missing, unfinished, damaged, or of another kind or schema version.
    """
    needed = " or ".join(repr(kind) for kind in kinds)
    _check_finished(path, needed)

    manifest = manifests.read(path)
    kind = manifest.get("kind", "unknown")
    if kinds and kind not in kinds:
        raise DataError(_wrong_kind(path, manifest, needed))
    folders.check_version(path, folders.version_of(manifest))

    parts = manifest["parts"]
    if manifest["digest"] != hashing.digest_json([part["digest"] for part in parts]):
        raise DataError(
            f"{path / 'manifest.json'} is damaged: its digest does not follow from its parts; "
            "remove it and run the command that wrote it again"
        )
    for part in parts:
        file = path / part["file"]
        table = read_part(file, part["digest"])
        folders.check_version(path, schemas.version_of(table))
        if table.num_rows != part["rows"]:
            raise DataError(
                f"{file} holds {table.num_rows} rows, and the manifest lists {part['rows']}; "
                "delete it and run the stage that wrote it again"
            )
        schemas.check_nulls(table, kind)

    paths = [path / part["file"] for part in parts]
    return Dataset(kind, paths, _part_ends(parts), encoding=manifest.get("encoding"))


def encoding_of(rows: Rows) -> str | None:
    """Digest of tokenizer and chat template of the token ids of rows; None: unknown, or no ids."""
    return rows.encoding if isinstance(rows, Dataset) else None


def _check_finished(path: Path, needed: str) -> None:
    """Raises DataError if the folder is missing, is no dataset folder, or is unfinished.

    needed: the kinds that are accepted, for the message.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist; this command needs the folder of a {needed} dataset"
        )
    if not folders.is_dataset(path):
        raise DataError(
            f"{path} is not a dataset folder that scir wrote; this command needs a {needed} dataset"
        )
    if not (path / "manifest.json").is_file():
        raise DataError(
            f"{path} is not a finished dataset (no manifest.json); "
            "run the stage that writes it again: it resumes where it stopped"
        )


def _wrong_kind(path: Path, manifest: Json, needed: str) -> str:
    """The message for a dataset of a kind that is not accepted.

    needed: the kinds that are accepted.
    """
    kind = manifest.get("kind", "unknown")
    if kind == "consistency":
        source = manifest.get("inputs", {}).get("input")
        ending = f", {source}" if source else ""
        return (
            f"{path} holds a 'consistency' dataset: figures about pairs, without their verdicts; "
            f"pass the judged dataset that it was computed from{ending}"
        )
    content = "a model" if kind == "model" else f"a '{kind}' dataset"
    return f"{path} holds {content}; this command needs a {needed} dataset"


def part_bounds(n_rows: int, rows_per_part: int) -> list[tuple[int, int]]:
    """Row ranges of at most `rows_per_part` that cover 0 to n_rows in order, ends exclusive."""
    bounds = []
    for low in range(0, n_rows, rows_per_part):
        bounds.append((low, min(low + rows_per_part, n_rows)))
    return bounds


def group_bounds(data: Dataset, key: str, rows_per_part: int) -> list[tuple[int, int]]:
    """Row ranges as `part_bounds` returns them, which never split a group of rows.

    A group is a run of adjacent rows with equal values in the column `key`.
    A range has at least `rows_per_part` rows, except the last, and ends where a group ends.
    """
    starts = []
    previous_key = pa.scalar(None, pa.string())
    n_rows = 0
    for table in data.tables():
        keys = pa.concat_arrays([pa.array([previous_key]), *table[key].chunks])
        # Null, before the first row, differs from every key.
        is_new = pc.not_equal(keys[1:], keys[:-1]).fill_null(True)
        starts.append(n_rows + np.flatnonzero(is_new))
        previous_key = keys[-1]
        n_rows += table.num_rows
    if not n_rows:
        return []

    # End of each group, exclusive: (groups,)
    ends = np.append(np.concatenate(starts)[1:], n_rows)
    bounds = []
    low = 0
    while low < n_rows:
        target = min(low + rows_per_part, n_rows)
        high = int(ends[np.searchsorted(ends, target)])
        bounds.append((low, high))
        low = high
    return bounds
