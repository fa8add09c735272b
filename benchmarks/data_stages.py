"""Time and memory of the stages by rows, where no model computes: `generate` with the fake backend
(rows are prompts, one sample each, read from a file of --form), `judge` with scores from outside,
`check-consistency` and `filter` (rows are pairs).

    python benchmarks/data_stages.py --rows 10000 100000 1000000 --stages generate judge \\
        check-consistency filter --peer-python .venv-data/bin/python

Beside `filter` stands the least that its work can take: pyarrow alone reads the same columns and
writes those that `filter` wrote; and the least that its promises cost: the rows to keep and their
labels are given, so they are picked, written, synced and digested, and nothing else. With --cold an
input is read from the disk and not from memory: see the wall time then. Memory is the peak above
what was resident before the stage began (imports and settings), memory-mapped pages included; and
that of memory which is no file's. With --peer-python the work of `filter` is done in pandas and in
polars as well (pandas_polars.py), and has to keep the same pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import common
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

PEERS = ("pandas", "polars")
STAGES = ("generate", "judge", "check-consistency", "filter")


def make_prompts(file: Path, rows: int) -> Path:
    """Prompts of about 200 letters, a twentieth of them repeated.

    What the file's name ends in says how they are written.
    """
    import pyarrow.csv
    import pyarrow.parquet

    def table(low: int, high: int) -> Any:
        return pa.table(
            {
                "prompt": [
                    f"Question {i % (rows - rows // 20)}? " + "word " * 35 for i in range(low, high)
                ],
                "source": ["x"] * (high - low),
            }
        )

    schema, bounds = (
        table(0, 0).cast(pa.schema([("prompt", pa.string()), ("source", pa.string())])).schema,
        range(0, rows, 50_000),
    )
    parts = (table(low, min(low + 50_000, rows)) for low in bounds)
    if file.suffix == ".jsonl":
        with file.open("w") as sink:
            sink.writelines(json.dumps(row) + "\n" for part in parts for row in part.to_pylist())
        return file
    writer = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}[file.suffix]
    with writer(file, schema) as sink:
        for part in parts:
            sink.write_table(part)
    return file


def make_candidates(folder: Path, pairs: int) -> Path:
    """5 answers a prompt, so 10 pairs, with a column `score` beside them.

    What somebody else's reward model said.
    """
    import numpy as np

    from scir_cli.data import dataset, schemas

    draw = np.random.default_rng(0)

    def make(low: int, high: int) -> Any:
        index = np.arange(low, high)
        answers = draw.integers(0, 8, high - low)
        columns = prompt_columns(index // 5) | {
            "candidate_id": [f"{i:016x}" for i in index],
            "response": [answer(i // 5, a) for i, a in zip(index, answers, strict=True)],
            "token_ids": [[int(a)] * 40 for a in answers],
            "finish_reason": ["stop"] * len(index),
            "duplicate_of": [None] * len(index),
            "weights_key": ["m"] * len(index),
            "seed": index,
        }
        table = as_table(columns, schemas.schema("candidates")).append_column(
            "score", pa.array(draw.normal(size=len(index)))
        )
        return dataset.Part(table, len(index))

    dataset.write_dataset(
        folder,
        "candidates",
        {"stage": "generate", "rows": pairs},
        dataset.part_bounds(pairs // 2, 25_000),
        make,
    )
    return folder


def make_judged(folder: Path, rows: int) -> Path:
    """Pairs with two reward models, 10 a prompt, answers of 40 tokens.

    Some of a prompt's answers are alike.
    """
    import numpy as np

    from scir_cli.data import dataset, schemas

    draw = np.random.default_rng(0)

    def make(low: int, high: int) -> Any:
        n, index = high - low, np.arange(low, high)
        columns = prompt_columns(index // 10) | {
            "pair_id": [f"{i:016x}" for i in index],
            "gold_label": [None] * n,
            "reference_logps": [[]] * n,
        }
        for side in ("first", "second"):
            answers = draw.integers(0, 8, n)
            columns[side] = [
                {
                    "candidate_id": f"{i:016x}-{a}",
                    "text": answer(i, a),
                    "token_ids": [int(a)] * 40,
                    "finish_reason": "stop",
                }
                for i, a in zip(index // 10, answers, strict=True)
            ]
        odds = draw.normal(size=(n, 2))
        columns["rewards"] = [
            [
                {"reward_model": name, "log_odds": float(a)}
                for name, a in zip(("judge", "implicit"), both, strict=True)
            ]
            for both in odds
        ]
        return dataset.Part(as_table(columns, schemas.schema("judged")), n)

    dataset.write_dataset(
        folder, "judged", {"stage": "judge", "rows": rows}, dataset.part_bounds(rows, 50_000), make
    )
    return folder


def prompt_columns(prompts: Any) -> dict[str, Any]:
    names = [f"{i:016x}" for i in prompts]
    return {
        "prompt_id": names,
        "subset": [None] * len(names),
        "extra": [None] * len(names),
        "messages": [
            [{"role": "user", "content": f"Question {p}? " + "word " * 30}] for p in names
        ],
    }


def answer(prompt: int, number: int) -> str:
    return f"Answer {number} of {prompt:016x}. " + "word " * 40


def as_table(columns: dict[str, Any], schema: Any) -> Any:
    return pa.Table.from_arrays(
        [pa.array(columns[field.name], field.type) for field in schema], schema=schema
    )


def child(given: dict[str, Any]) -> None:
    from scir_cli import config, registry, stages
    from scir_cli.data import dataset

    run = stages.load(given["stage"])
    values = {"input": given["input"], "output_dir": given["out"], **given["settings"]}
    settings = config.build(registry.STAGES[given["stage"]].settings, values, where="benchmark")
    pa.array([0])  # with its first array pyarrow imports pandas, where that is installed
    manifest, found = common.measured(lambda: run(settings))
    name = "candidate_id" if given["stage"] == "generate" else "pair_id"
    kept = digest(
        pa.concat_tables(
            part.select([name]) for part in dataset.open_dataset(Path(given["out"])).tables()
        )[name]
    )
    print(json.dumps({**found, "rows_out": manifest["rows_out"], "kept": kept}))


def copy(given: dict[str, Any]) -> None:
    """Reads what `filter` read and writes what it wrote, part by part as it does.

    With `picked` it is made of what was read, and digested.
    """
    parts = [sorted(Path(given[name]).glob("data-*.arrow")) for name in ("input", "filtered")]
    files = list(zip(*parts, strict=True))
    kept = [
        pc.is_in(mapped(one)["pair_id"], mapped(other)["pair_id"].combine_chunks())
        for one, other in files
        if given["picked"]
    ]
    if given["cold"]:
        forget(Path(given["input"]))
    work = (
        (lambda: pick_and_write(files, kept, Path(given["out"])))
        if kept
        else (lambda: read_and_write(files, Path(given["out"])))
    )
    rows, found = common.measured(work)
    print(json.dumps({**found, "rows_out": rows, "kept": None}))


def read_and_write(files: list[tuple[Path, Path]], out: Path) -> int:
    rows = 0
    for source, filtered in files:
        with pa.OSFile(str(source)) as file:
            pa.ipc.open_stream(file).read_all()
        rows += write(mapped(filtered), out / source.name)
    return rows


def pick_and_write(files: list[tuple[Path, Path]], kept: list[Any], out: Path) -> int:
    rows = 0
    for (source, filtered), mask in zip(files, kept, strict=True):
        table, made = mapped(source).filter(mask), mapped(filtered)
        for name in made.column_names[table.num_columns :]:  # label, margin, chosen …
            table = table.append_column(name, made[name])
        rows += write(table, out / source.name)
        with (out / source.name).open("rb") as written:
            hashlib.file_digest(written, xxhash.xxh3_128)
    return rows


def mapped(path: Path) -> Any:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def write(table: Any, path: Path) -> int:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    return len(table)


def digest(ids: Any) -> str:
    """Of the ids that are kept, in their order."""
    return hashlib.blake2b("\n".join(ids.to_pylist()).encode(), digest_size=16).hexdigest()


def forget(source: Path) -> None:
    """Takes a file, or a dataset's parts, out of the page cache."""
    for path in [source] if source.is_file() else source.glob("*.arrow"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    stage: str, rows: int, root: Path, model: Path | None, form: str, cold: bool
) -> dict[str, Any]:
    make = {"generate": make_prompts, "judge": make_candidates}.get(stage, make_judged)
    source = root / f"{make.__name__}-{rows}{f'.{form}' if stage == 'generate' else ''}"
    if not source.exists():
        make(source, rows)
    given = {
        "stage": stage,
        "input": str(source),
        "out": str(root / f"{stage}-{rows}"),
        "settings": {},
    }
    if stage == "generate":
        given["settings"] = {"model": str(model), "backend": "fake", "n": 1}
    if stage == "judge":
        given["settings"] = {
            "model": str(model),
            "reward_models": ["external"],
            "score_column": "score",
            "rows_per_part": 2000,
        }
    if cold:
        forget(source)
    return line(rows, f"scir {stage}", source, common.child("data_stages.py", given))


def measure_peer(peer: str, rows: int, root: Path, python: str) -> dict[str, Any]:
    source = root / f"make_judged-{rows}"
    found = common.child(
        "pandas_polars.py",
        {"peer": peer, "input": str(source), "out": str(root / f"{peer}.arrow")},
        python,
    )
    return line(rows, f"{peer} {found['version']}", source, found)


def measure_copy(rows: int, root: Path, picked: bool, cold: bool) -> dict[str, Any]:
    source, out, filtered = (
        root / f"make_judged-{rows}",
        root / f"copy-{rows}-{picked}",
        root / f"filter-{rows}",
    )
    out.mkdir()
    given = {
        "stage": "copy",
        "input": str(source),
        "filtered": str(filtered),
        "out": str(out),
        "picked": picked,
        "cold": cold,
    }
    work = "kept rows picked, written and digested" if picked else "columns read and written"
    return line(rows, work, source, common.child("data_stages.py", given))


def line(rows: int, work: str, source: Path, found: dict[str, Any]) -> dict[str, Any]:
    size = (
        sum(
            path.stat().st_size
            for path in ([source] if source.is_file() else source.glob("*.arrow"))
        )
        / 2**20
    )
    return {
        "rows": rows,
        "work": work,
        "MB in": round(size),
        "rows out": found["rows_out"],
        "CPU s": round(found["cpu_seconds"][0], 2),
        "wall s": round(found["wall_seconds"][0], 2),
        "peak MB": found["peak_mb"],
        "anonymous MB": found["anonymous_mb"],
        "kept": found["kept"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["filter"])
    parser.add_argument("--form", choices=["jsonl", "csv", "parquet"], default="jsonl")
    parser.add_argument(
        "--peer-python",
        help="the python of an environment with pandas, polars and pyarrow (make bench-env)",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="take inputs out of the page cache first (not for peers)",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        task = json.loads(given.child)
        (copy if task["stage"] == "copy" else child)(task)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = (
            common.make_model(root / "model", "tiny")
            if {"generate", "judge"} & {*given.stages}
            else None
        )
        for rows in given.rows:
            results += [
                measure(stage, rows, root, model, given.form, given.cold) for stage in given.stages
            ]
            if "filter" in given.stages:
                results += [
                    measure_copy(rows, root, picked, given.cold) for picked in (False, True)
                ]
            if given.peer_python:
                results += [measure_peer(peer, rows, root, given.peer_python) for peer in PEERS]
                ours, *theirs = [
                    one["kept"]
                    for one in results
                    if one["rows"] == rows
                    and one["work"].replace("scir filter", PEERS[0]).split()[0] in PEERS
                ]
                if any(kept != ours for kept in theirs):
                    raise SystemExit(f"at {rows} rows the peers keep other pairs than filter")
    kept = [result.pop("kept") for result in results]
    print(common.table(results))
    if given.json:
        given.json.write_text(
            json.dumps(
                {"versions": common.versions("pyarrow"), "table": results, "kept": kept}, indent=2
            )
        )


if __name__ == "__main__":
    main()
