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
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scir_cli import __version__
from scir_cli.data import dataset_card, folders, hashing, schemas, storage
from scir_cli.data.files import Json, as_store_error, atomic_write, read_json, write_json
from scir_cli.errors import DataError, redact

ACCOUNT_KEY = b"scir.account"


@dataclass
class Part:
    """What one part of the work gave: rows (dicts or a table), how many came in, and why the others were dropped."""

    rows: Sequence[Mapping[str, Any]] | pa.Table
    rows_in: int
    drops: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PartTask:
    """A part that is not on disk yet: where it goes, where it is drafted, and the rows of the input it is made of."""

    path: Path
    drafts: Path | None
    low: int
    high: int


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
    share: Callable[[str, list[PartTask], Callable[[int], None]], None] | None = None,
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
    named = {name: redact(str(value)) for name, value in inputs.items() if value is not None}
    with folders.claim_folder(out, plan, overwrite) as done:
        if done is not None:
            return {**done, "reused": True}
        drafts = _new_drafts(out, plan)
        parts = [
            PartTask(out / f"data-{index:05d}.arrow", drafts, low, high)
            for index, (low, high) in enumerate(bounds)
        ]
        todo = [part for part in parts if not part.path.exists()]
        advance(
            sum(part.high - part.low for part in parts) - sum(part.high - part.low for part in todo)
        )
        if share is not None:
            share(kind, todo, advance)
        else:
            for part in todo:
                write_part(part, kind, make(part.low, part.high))
                advance(part.high - part.low)
        if not bounds:
            write_part(PartTask(out / "data-00000.arrow", drafts, 0, 0), kind, Part([], 0))
        if drafts:
            storage.remove(drafts)
        return _finish(
            out, kind, dropped_before or Counter(), summarise, started, work, plan, named
        )


def _new_drafts(out: Path, plan: Json) -> Path | None:
    """An empty folder of this plan alone: a worker that outlived its run finds no place for what it made, and leaves nothing behind.

    None where parts are put on another file system.
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
    """Writes a part under its name, whole or not at all; its counts ride in its metadata."""
    table = part.rows if isinstance(part.rows, pa.Table) else schemas.to_table(kind, part.rows)
    schemas.check_nulls(table, kind)
    assert part.rows_in == table.num_rows + sum(part.drops.values()), (
        f"{todo.path}: {part.rows_in} in, {table.num_rows} out, {part.drops} dropped"
    )
    account = json.dumps({"rows_in": part.rows_in, "drops": dict(part.drops)}).encode()
    table = table.replace_schema_metadata(
        {**schemas.schema(kind).metadata, **(table.schema.metadata or {}), ACCOUNT_KEY: account}
    )
    with (
        atomic_write(todo.path, todo.drafts) as temporary,
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
    paths = sorted(
        out.glob("data-*.arrow"), key=lambda path: (len(path.name), path.name)
    )  # six digits come after five
    parts, drops, nulls, rows_in = [], before, Counter[str](), before.total()
    for path in paths:
        table = read_part(path)
        account = json.loads(table.schema.metadata[ACCOUNT_KEY])
        drops, rows_in = drops + Counter(account["drops"]), rows_in + account["rows_in"]
        nulls += count_nulls(table)
        parts.append(
            {"file": path.name, "rows": table.num_rows, "digest": hashing.digest_part(path)}
        )
    made = Dataset(kind, paths, list(itertools.accumulate(part["rows"] for part in parts)))
    columns = schemas.schema(kind).names
    manifest = {
        "kind": kind,
        "schema_version": schemas.VERSION,
        "digest": hashing.digest_json([part["digest"] for part in parts]),
        "rows_in": rows_in,
        "rows_out": made.num_rows,
        "drops": dict(drops),
        "inputs": dict(inputs),
        "nulls": dict(
            sorted(
                nulls.items(),
                key=lambda item: columns.index(item[0]) if item[0] in columns else len(columns),
            )
        ),
        "parts": parts,
        "seconds": round(time.monotonic() - started, 3),
        **({"work": work()} if work else {}),
        "versions": versions(),
        "summary": summarise(made),
    }
    state = {
        "_data_files": [{"filename": p.name} for p in paths],
        "_fingerprint": manifest["digest"],
        "_format_columns": None,
    }
    state |= {
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(out / "state.json", state)
    write_json(
        out / "dataset_info.json",
        {"description": f"scir {kind} dataset", "citation": "", "homepage": "", "license": ""},
    )
    with atomic_write(out / "README.md") as temporary:
        temporary.write_text(dataset_card.render(plan, manifest), encoding="utf-8")
    write_json(out / "manifest.json", manifest)
    return manifest


def count_nulls(table: pa.Table) -> Counter[str]:
    """Nulls per column that has any, and missing verdicts per reward model as `rewards.NAME`."""
    nulls = Counter(
        {
            name: table.column(name).null_count
            for name in table.column_names
            if table.column(name).null_count
        }
    )
    for chunk in table.column("rewards").chunks if "rewards" in table.column_names else ():
        rewards = chunk.flatten()
        silent = pc.value_counts(
            rewards.field("reward_model").filter(rewards.field("log_odds").is_null())
        )
        nulls += {f"rewards.{one['values']}": one["counts"] for one in silent.to_pylist()}
    return nulls


def versions() -> dict[str, str]:
    return {"scir": __version__} | {
        name: metadata.version(name) for name in ("torch", "transformers", "pyarrow")
    }


def read_part(path: Path) -> pa.Table:
    """The table of one data file; a local file is mapped and not loaded. Raises DataError."""
    try:
        data = (
            pa.BufferReader(path.read_bytes())
            if storage.is_remote(path)
            else pa.memory_map(str(path))
        )
        return pa.ipc.open_stream(data).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is truncated or is not an Arrow stream ({error}); delete it and run the stage that made it again"
        ) from error


def write_columns(path: Path, values: Mapping[str, tuple[float, float]]) -> None:
    """Two numbers by id, beside a dataset and no part of it (not in its manifest or digest): what can be computed again."""
    pairs = list(values.values())
    table = pa.table(
        {"pair_id": list(values), "first": [a for a, _ in pairs], "second": [b for _, b in pairs]}
    )
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_columns(path: Path) -> dict[str, tuple[float, float]]:
    table = read_part(path)
    both = zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True)
    return dict(zip(table["pair_id"].to_pylist(), both, strict=True))


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

    def with_kind(self, kind: str) -> Dataset:
        """A dataset of another kind, whose columns this one has as well."""
        return replace(self, kind=kind, columns=schemas.schema(kind).names)

    def read(self) -> pa.Table:
        return self.slice(0, self.num_rows)

    def slice(self, low: int, length: int) -> pa.Table:
        """Rows low to low + length, as a table has it, of the parts that hold them."""
        high = min(low + length, self.num_rows)
        tables = [self.schema.empty_table()]
        for index in range(
            bisect.bisect_right(self.ends, low),
            bisect.bisect_left(self.ends, high) + 1 if low < high else 0,
        ):
            start = self.ends[index - 1] if index else 0
            part = read_part(self.paths[index]).slice(max(low - start, 0), high - max(low, start))
            tables.append(
                (part.select(self.columns) if self.columns else part).replace_schema_metadata(
                    self.schema.metadata
                )
            )
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


def read_dataset(path: Path, *kinds: str) -> pa.Table:
    """A finished dataset folder as one table, memory-mapped where it lies on this machine; raises as `open_dataset` does."""
    return open_dataset(path, *kinds).read()


def open_dataset(path: Path, *kinds: str) -> Dataset:
    """A finished dataset folder; raises DataError if it is unfinished, damaged, or of none of `kinds`."""
    needed = " or ".join(repr(k) for k in kinds)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; this command needs the folder of a {needed} dataset"
        )
    if not folders.is_dataset(path):
        raise DataError(
            f"{path} is not a dataset folder that scir made; this command needs a {needed} dataset"
        )
    if not (path / "manifest.json").is_file():
        raise DataError(
            f"{path} is not a finished dataset (no manifest.json); run the stage that writes it again: it resumes where it stopped"
        )
    manifest = read_json(path / "manifest.json")
    kind = manifest.get("kind", "unknown")
    if kinds and kind not in kinds:
        raise DataError(_wrong_kind(path, manifest, needed))
    folders.check_version(path, folders.version_of(manifest))
    for part in manifest["parts"]:
        table = read_part(path / part["file"])
        folders.check_version(path, schemas.version_of(table))
        if table.num_rows != part["rows"]:
            raise DataError(
                f"{path / part['file']} holds {table.num_rows} rows and the manifest says {part['rows']}; delete it and run the stage that made it again"
            )
        schemas.check_nulls(table, kind)
    paths = [path / part["file"] for part in manifest["parts"]]
    return Dataset(
        kind, paths, list(itertools.accumulate(part["rows"] for part in manifest["parts"]))
    )


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
