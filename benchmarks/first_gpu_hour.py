"""What to run first on a GPU: correctness, training steps, judging, sampling; then the tables.

    python benchmarks/first_gpu_hour.py --out DIR --minutes 6
    python benchmarks/first_gpu_hour.py --tables DIR --write docs/performance.md

Each part (gpu_parts.py) is a process of its own that can fail or run out of time alone; DIR holds
first_gpu_hour.json, written again after every part, and log.txt. --tiny rehearses on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import HERE, Json, table

#: Parts in the order of their value, with the seconds each may take.
PARTS = {
    "environment": 75,
    "tests": 150,
    "train": 180,
    "head": 40,
    "judge": 70,
    "train-large": 90,
    "profile": 60,
    "generate": 60,
    "attention": 90,
    "trl": 120,
}
RESULT = "first_gpu_hour.json"
#: Dense bf16 operations per second at the peak, from the data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
START, END = "<!-- first_gpu_hour.py writes from here", "<!-- to here -->"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=6, help="budget of all parts together")
    parser.add_argument("--parts", help="comma-separated names of parts; all by default")
    parser.add_argument("--skip", default="", help="comma-separated names of parts to leave out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--tables", type=Path, help="print the tables of this folder's results")
    parser.add_argument("--write", type=Path, help="with --tables: put them into this page")
    return parser.parse_args()


# ------------------------------ running


def run_part(name: str, options: Json, seconds: float, log: Path) -> Json:
    """Runs a part in a process group of its own, which is ended after `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        command = [sys.executable, str(HERE / "gpu_parts.py"), name, str(records)]
        command.append(json.dumps({**options, "seconds": seconds}))
        output = Path(folder) / "output.txt"
        start = time.monotonic()
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=child_environment(),
                start_new_session=True,
            )
            status = wait(process, seconds)
        text = output.read_text(errors="replace")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n===== {name}: {status}\n{text[-200_000:]}")
        lines = records.read_text().splitlines() if records.exists() else []
    result: Json = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "done":
        result["end_of_output"] = text[-3000:]
    return {**result, "records": [json.loads(line) for line in lines]}


def wait(process: subprocess.Popen[Any], seconds: float) -> str:
    """Waits for a part; when its time is over, ends it with its children."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return "done" if code == 0 else f"failed with status {code}"


def child_environment() -> dict[str, str]:
    """The environment of a part: this checkout is importable, and nothing asks a network."""
    root = str(HERE.parent)
    path = os.environ.get("PYTHONPATH")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {
        **os.environ,
        **offline,
        **quiet,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
    }


def run(a: argparse.Namespace) -> Json:
    """Runs the parts that fit into the budget; writes the result after each."""
    a.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    skipped = a.skip.split(",")
    names = a.parts.split(",") if a.parts else [name for name in PARTS if name not in skipped]
    command = "python benchmarks/first_gpu_hour.py " + " ".join(sys.argv[1:])
    date = time.strftime("%Y-%m-%d")
    result: Json = {"command": command, "date": date, "tiny": a.tiny, "parts": {}}
    for name in names:
        left = 60 * a.minutes - (time.monotonic() - started)
        if left < 20:
            result["parts"][name] = {"status": "skipped: no time left", "records": []}
        else:
            seconds = min(PARTS[name], left)
            part = run_part(name, {"tiny": a.tiny}, seconds, a.out / "log.txt")
            result["parts"][name] = part
            print(f"{name}: {part['status']}, {part['seconds']} s", flush=True)
        write_json(result, a.out / RESULT)
    return result


def write_json(result: Json, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.move(temporary, path)


# ------------------------------ tables


def records_of(result: Json, part: str) -> list[Json]:
    return result["parts"].get(part, {}).get("records", [])


def named(records: Sequence[Json], name: str) -> Json:
    """The first record of this name, or {}."""
    return next((record for record in records if record["name"] == name), {})


def state(record: Json) -> str | None:
    """Why a record holds no figures, or None if it does."""
    if "skipped" in record:
        return str(record["skipped"])
    if "error" in record:
        return "out of memory" if "out of memory" in record["error"].lower() else "failed"
    return None


def utilization(record: Json) -> float | None:
    peak = next((p for chip, p in PEAK_FLOPS.items() if chip in record.get("device", "")), None)
    return 100 * record["flops"] / (record["seconds"] * peak) if peak else None


def training_rows(records: Sequence[Json]) -> list[Json]:
    """A row per way of taking a step; `times` compares with scir's DPO step of the same length."""
    steps = [r for r in records if "checkpointing" in r and not state(r)]
    base = {
        r["length"]: r["seconds"]
        for r in steps
        if r["name"] == "scir train, DPO" and not r["checkpointing"]
    }
    rows = []
    for r in steps:
        reference = base.get(r["length"])
        rows.append(
            {
                "step": r["name"],
                "lengths": r["length"],
                "recompute": "yes" if r["checkpointing"] else "no",
                "s per step": r["seconds"],
                "times scir's DPO": r["seconds"] / reference if reference else None,
                "tokens computed": r["tokens_computed"],
                "sequence tokens/s": r["sequence_tokens_per_second"],
                "MFU %": utilization(r),
                "peak GB": r["peak_gb"],
                "packs": str(max(r["packs"])) if "packs" in r else None,
            }
        )
    return rows


def trl_rows(records: Sequence[Json]) -> list[Json]:
    return [
        {
            "step": "TRL's DPOTrainer",
            "lengths": r["length"],
            "s per step": r["seconds"],
            "peak GB": r["peak_gb"],
        }
        for r in records
        if "seconds" in r
    ]


def columns(records: Sequence[Json], names: Sequence[str]) -> list[Json]:
    """The records that hold figures, with these columns only."""
    return [{n: r.get(n) for n in names} for r in records if not state(r)]


def failures(result: Json) -> list[Json]:
    """A row per part that did not end, and per record with an error."""
    rows = []
    for name, part in result["parts"].items():
        if part["status"] != "done":
            rows.append({"part": name, "what": "the whole part", "how": part["status"]})
        for record in part["records"]:
            text = record.get("error") or record.get("skipped")
            if text:
                end = text.strip().splitlines()[-1].replace("|", "/")[:160]
                rows.append({"part": name, "what": record["name"], "how": end})
    return rows


def page(result: Json) -> str:
    """All tables, as Markdown."""
    env = records_of(result, "environment")
    machine, versions = named(env, "machine"), named(env, "versions").get("versions", {})
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    chosen = named(env, "chosen").get("kind")
    blocks = [
        f"`{result['command']}` ({result['date']}): {machine.get('nvidia_smi')}; {shown}.\n"
        f"Trees are scored by `{chosen}`. Random weights in bf16; medians of 5 steps after 3."
    ]
    tests = [r for r in records_of(result, "tests") if "outcome" in r]
    if tests:
        counts = {o: sum(r["outcome"] == o for r in tests) for o in ("passed", "failed", "skipped")}
        blocks.append("Tests: " + ", ".join(f"{n} {o}" for o, n in counts.items() if n) + ".")
    for title, part in (
        ("A training step at the shape of Qwen2.5-1.5B, all weights", "train"),
        ("A training step at the shape of Llama-3-8B, LoRA of rank 16", "train-large"),
    ):
        blocks += section(title, training_rows(records_of(result, part)))
        if part == "train" and records_of(result, part):
            blocks.append(FORMULA)
    blocks += section("TRL's own trainer", trl_rows(records_of(result, "trl")))
    names = [
        "name",
        "size",
        "seconds",
        "pairs_per_second",
        "tokens_computed",
        "sequence_tokens",
        "peak_gb",
    ]
    judged = columns(records_of(result, "judge"), names)
    blocks += section("Judging all pairs of 5 answers, seconds per prompt", judged)
    names = ["batch_size", "requests", "seconds", "tokens_sampled", "sampled_per_second", "peak_gb"]
    blocks += section(
        "`generate` with transformers", columns(records_of(result, "generate"), names)
    )
    names = ["name", "log2_chunk_elements", "log2_keep_bytes", "ms", "peak_gb"]
    blocks += section("The head, forward and backward", columns(records_of(result, "head"), names))
    names = ["kind", "tokens", "prompt_tokens", "first_call_seconds", "ms"]
    kinds = [r for r in records_of(result, "attention") if "ms" in r]
    blocks += section("One layer's attention, forward and backward", columns(kinds, names))
    blocks += section("What failed or was left out", failures(result))
    return "\n\n".join(blocks) + "\n"


FORMULA = (
    "MFU: 6 * (N * tokens + head * rows) + 12 * layers * width * (keys seen by all queries)\n"
    "operations (4 instead of 6 where the weights are frozen) per second over 989 TFLOP/s, the\n"
    "dense bf16 peak. N: parameters of the layers; head: vocabulary * width; tokens: without\n"
    "padding and recomputation; rows: positions that the head visits. Sequence tokens count\n"
    "shared prefixes in full. Padded steps attend with torch's SDPA and use scir's optimizer."
)


def section(title: str, rows: list[Json]) -> list[str]:
    return [f"### {title}", table(rows)] if rows else []


def write_page(text: str, path: Path) -> None:
    """Replaces what stands between the two marks of a page."""
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    mark, _, rest = rest.partition("\n")
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{path} has no marks of first_gpu_hour.py")
    path.write_text(f"{before}{START}{mark}\n{text}{END}{after}", encoding="utf-8")


def main() -> None:
    a = arguments()
    if a.tables:
        text = page(json.loads((a.tables / RESULT).read_text(encoding="utf-8")))
        print(text)
        if a.write:
            write_page(text, a.write)
        return
    if not a.out:
        raise SystemExit("give --out DIR, or --tables DIR")
    print(page(run(a)))


if __name__ == "__main__":
    main()
