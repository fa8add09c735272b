"""Dataset folders: plan first, parts one by one, manifest last. The only loop over parts, so that every stage resumes alike.

    OUT/plan.json          all that determines the rows (settings, seed, digests of inputs and weights); nothing that only changes speed
    OUT/data-00000.arrow   an Arrow IPC stream, written to a temporary name, fsynced, renamed; its own counts ride in its metadata
    OUT/state.json, dataset_info.json   so that `datasets.load_from_disk` opens the folder
    OUT/manifest.json      written last: it exists if and only if the dataset is complete

The same plan resumes; another plan in the same folder is refused. Arrow's *stream* format, because `Dataset.from_file` cannot read the file format.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from scir_cli import __version__, schemas
from scir_cli.errors import DataError, PlanMismatch, ScirError, StoreError

ACCOUNT_KEY = b"scir.account"
Json = dict[str, Any]


@dataclass
class Part:
    """What one part of the work gave: rows (dicts or a table), how many came in, and why the others were dropped."""

    rows: Sequence[Mapping[str, Any]] | pa.Table
    rows_in: int
    drops: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Todo:
    """A part that is not on disk yet: where it goes, and the rows of the input it is made of."""

    path: Path
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
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_path(path: Path) -> str:
    """A digest of what a file or folder holds. A dataset folder of ours answers from its manifest without reading the data."""
    if path.is_file():
        return digest_file(path)
    manifest = path / "manifest.json"
    if manifest.is_file():
        return str(read_json(manifest)["digest"])
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest_json([[p.relative_to(path).as_posix(), digest_file(p)] for p in files])


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); remove its folder or write it again with --overwrite") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object and holds a {type(value).__name__}")
    return value


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on leaving, its content is on disk and has `path` as its name, or nothing changed.

    Raises StoreError where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; --output-dir takes a folder")
    if overwrite and out.exists() and any(out.iterdir()) and not (out / "plan.json").exists():
        raise StoreError(f"{out} was not made by scir (no plan.json), so --overwrite does not delete it; choose another folder")
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
        if overwrite:
            _clear(out)
        yield _start(out, plan)


def _clear(out: Path) -> None:
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _start(out: Path, plan: Json) -> Json | None:
    path = out / "plan.json"
    if not path.exists():
        others = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if others:
            raise StoreError(f"{out} already holds {others[0]!r} and no plan.json; choose an empty folder")
        write_json(path, plan)
        return None
    old = read_json(path)
    if old.get("stage") != plan.get("stage"):
        raise PlanMismatch(
            f"{out} was made by 'scir {old.get('stage')}', and this is 'scir {plan.get('stage')}'; choose another --output-dir"
        )
    changes = _differences(old, json.loads(json.dumps(plan)))
    if changes:
        raise PlanMismatch(
            f"{out} was started with other settings: {'; '.join(changes)}. Use --overwrite to replace it, or another --output-dir"
        )
    return _done(out)


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
    summarise: Callable[[pa.Table], Json] = lambda table: {},
    advance: Callable[[int], None] = lambda rows: None,
    share: Callable[[str, list[Todo], Callable[[int], None]], None] | None = None,
    work: Callable[[], Json] | None = None,
) -> Json:
    """Writes a dataset of `kind` part by part and returns its manifest; does nothing but return it when the plan is already done.

    bounds: row ranges of the input, one a part. make(lo, hi): the part; it must depend on the plan and the range only.
    dropped_before: input rows that never reached a part, by reason. summarise: figures of the whole dataset, kept in the manifest under
    "summary". advance: told of input rows whose part is on disk. share: has the parts made elsewhere (workers.py), in place of `make`.
    work: figures of what this run computed, kept under "work".
    """
    started = time.monotonic()
    with claim(out, plan, overwrite) as done:
        if done is not None:
            return {**done, "reused": True}
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        parts = [Todo(out / f"data-{index:05d}.arrow", low, high) for index, (low, high) in enumerate(bounds)]
        todo = [part for part in parts if not part.path.exists()]
        advance(sum(part.high - part.low for part in parts) - sum(part.high - part.low for part in todo))
        if share is not None:
            share(kind, todo, advance)
        else:
            for part in todo:
                write_part(part.path, kind, make(part.low, part.high))
                advance(part.high - part.low)
        if not bounds:
            write_part(out / "data-00000.arrow", kind, Part([], 0))
        return _finish(out, kind, dropped_before or Counter(), summarise, started, work)


def write_part(path: Path, kind: str, part: Part) -> None:
    """Writes a part under its name, whole or not at all; its counts ride in its metadata."""
    table = part.rows if isinstance(part.rows, pa.Table) else schemas.to_table(kind, part.rows)
    schemas.check_nulls(table, kind)
    assert part.rows_in == table.num_rows + sum(part.drops.values()), (
        f"{path}: {part.rows_in} in, {table.num_rows} out, {part.drops} dropped"
    )
    account = json.dumps({"rows_in": part.rows_in, "drops": dict(part.drops)}).encode()
    table = table.replace_schema_metadata({**schemas.schema(kind).metadata, **(table.schema.metadata or {}), ACCOUNT_KEY: account})
    with writing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _finish(
    out: Path,
    kind: str,
    before: Counter[str],
    summarise: Callable[[pa.Table], Json],
    started: float,
    work: Callable[[], Json] | None,
) -> Json:
    paths = sorted(out.glob("data-*.arrow"))
    tables = [_read_part(path) for path in paths]
    accounts = [json.loads(table.schema.metadata[ACCOUNT_KEY]) for table in tables]
    table = pa.concat_tables([t.replace_schema_metadata(tables[0].schema.metadata) for t in tables])
    parts = [{"file": p.name, "rows": t.num_rows, "digest": digest_file(p)} for p, t in zip(paths, tables, strict=True)]
    manifest = {
        "kind": kind,
        "version": schemas.VERSION,
        "digest": digest_json([part["digest"] for part in parts]),
        "rows_in": sum(a["rows_in"] for a in accounts) + before.total(),
        "rows_out": table.num_rows,
        "drops": dict(sum((Counter(a["drops"]) for a in accounts), before)),
        "nulls": count_nulls(table),
        "parts": parts,
        "seconds": round(time.monotonic() - started, 3),
        **({"work": work()} if work else {}),
        "versions": versions(),
        "summary": summarise(table),
    }
    state = {"_data_files": [{"filename": p.name} for p in paths], "_fingerprint": manifest["digest"], "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    write_json(out / "state.json", state)
    write_json(out / "dataset_info.json", {"description": f"scir {kind} dataset", "citation": "", "homepage": "", "license": ""})
    write_json(out / "manifest.json", manifest)
    return manifest


def count_nulls(table: pa.Table) -> dict[str, int]:
    """Nulls per column that has any, and missing verdicts per reward model as `rewards.NAME`."""
    nulls = {name: table.column(name).null_count for name in table.column_names if table.column(name).null_count}
    if "rewards" in table.column_names and table.num_rows:
        rewards = pa.chunked_array([chunk.flatten() for chunk in table.column("rewards").chunks]).combine_chunks()
        names, verdicts = rewards.field("reward_model").to_pylist(), rewards.field("log_odds").is_null().to_pylist()
        nulls |= {f"rewards.{name}": n for name, n in Counter(n for n, null in zip(names, verdicts, strict=True) if null).items()}
    return nulls


def versions() -> dict[str, str]:
    return {"scir": __version__} | {name: metadata.version(name) for name in ("torch", "transformers", "pyarrow")}


# ---------------------------------------------------------------------------------------------------------------------- reading a dataset


def _read_part(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
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
    table = _read_part(path)
    both = zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True)
    return dict(zip(table["pair_id"].to_pylist(), both, strict=True))


def is_dataset(path: Path) -> bool:
    """Whether the folder was made by a stage of ours, finished or not."""
    return (path / "plan.json").is_file()


def read_dataset(path: Path, *kinds: str) -> pa.Table:
    """A finished dataset folder as a memory-mapped table; raises DataError if it is unfinished, damaged, or of none of `kinds`."""
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
        holds = "a model" if kind == "model" else f"a '{kind}' dataset"
        raise DataError(f"{path} holds {holds}; this command needs a {needed} dataset")
    tables = []
    for part in manifest["parts"]:
        table = _read_part(path / part["file"])
        if table.num_rows != part["rows"]:
            raise DataError(
                f"{path / part['file']} holds {table.num_rows} rows and the manifest says {part['rows']}; delete it and run the stage that made it again"
            )
        tables.append(table.replace_schema_metadata(schemas.schema(kind).metadata))
    table = pa.concat_tables(tables)
    schemas.check_nulls(table, kind)
    return table


def part_bounds(n_rows: int, rows_per_part: int) -> list[tuple[int, int]]:
    """Row ranges of at most `rows_per_part` that cover 0..n_rows in order."""
    return [(low, min(low + rows_per_part, n_rows)) for low in range(0, n_rows, rows_per_part)]


def group_bounds(keys: Sequence[str], rows_per_part: int) -> list[tuple[int, int]]:
    """The same, never cutting a run of equal neighbouring keys in two."""
    bounds, low = [], 0
    for row in range(1, len(keys) + 1):
        if row == len(keys) or (row - low >= rows_per_part and keys[row] != keys[row - 1]):
            bounds.append((low, row))
            low = row
    return bounds
