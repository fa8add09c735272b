"""How long a command takes that has nothing, or next to nothing, to compute: medians of five runs.

    python benchmarks/startup.py --write docs/performance.md

Wall seconds of `python -m scir_cli …` on a random model of two small layers, each run a process of
its own. The recipe has three iterations of five stages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

COMPUTE = "--dtype fp32 --device cpu"
RECIPE = """\
all: {dtype: fp32, device: cpu}
steps:
- iterations: 3
  steps:
  - generate: {model: policy, input: prompts.jsonl, n: 2, max_new_tokens: 4,
               output_dir: "{out}/candidates-{i}"}
  - judge: {model: policy, reward_reference: base, input: "{out}/candidates-{i}",
            output_dir: "{out}/judged-{i}"}
  - check-consistency: {input: "{out}/judged-{i}", output_dir: "{out}/consistency-{i}"}
  - filter: {input: "{out}/judged-{i}", keep_unlabeled: true, keep_cut: true,
             output_dir: "{out}/preferences-{i}"}
  - train: {objective: dpo, model: policy, input: pairs.jsonl, max_steps: 1,
            output_dir: "{out}/m-{i}"}
"""

GENERATE = f"generate -m policy -i prompts.jsonl --n 2 --max-new-tokens 4 {COMPUTE} -o candidates"
JUDGE = f"judge -m policy --reward-reference base -i candidates {COMPUTE} -o judged"
CHECK = "check-consistency -i judged -o consistency"
FILTER = "filter -i judged --keep-unlabeled --keep-cut -o preferences"
TRAIN = f"train --objective dpo -m policy -i pairs.jsonl --max-steps 1 {COMPUTE} -o m"
#: What is measured -> the command.
COMMANDS = {
    "`scir --help`": "--help",
    "`scir train --help`": "train --help",
    "`inspect` of a file of 6 pairs": "inspect pairs.jsonl",
    "`generate`, 12 answers": f"{GENERATE} --overwrite",
    "`judge`, 6 pairs": f"{JUDGE} --overwrite",
    "`check-consistency`, 6 pairs": f"{CHECK} --overwrite",
    "`filter`, 6 pairs": f"{FILTER} --overwrite",
    "`train`, one step": f"{TRAIN} --overwrite",
    "`generate` again, finished": GENERATE,
    "`train` again, finished": TRAIN,
    "`check-consistency --report` again, finished": f"{CHECK} --report page.html",
    "`run` of 15 finished stages": "run recipe.yaml -o out",
    "the same with `--report`": "run recipe.yaml -o out --report story.html",
}


def seconds(command: str, folder: Path) -> float:
    """Wall seconds of a command; ends the benchmark if it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "scir_cli", *command.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(common.HERE.parent)},
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return time.perf_counter() - started


def make_world(folder: Path) -> None:
    """Two models, prompts and pairs, and everything that is later found finished."""
    for seed, name in enumerate(("policy", "base")):
        common.make_model(folder / name, "tiny", seed=seed)
    words = [(f"w{40 + i} w{60 + i}", f"w{80 + i}", f"w{100 + i} w{120 + i}") for i in range(6)]
    for name, rows in {
        "prompts": [{"prompt": prompt} for prompt, _, _ in words],
        "pairs": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in words],
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for command in (GENERATE, JUDGE, CHECK, FILTER, TRAIN, COMMANDS["`run` of 15 finished stages"]):
        seconds(command, folder)


def main() -> None:
    """Measures, prints the table, and writes it where it is asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        make_world(folder)
        for what, command in COMMANDS.items():
            runs = [seconds(command, folder) for _ in range(options.runs)]
            rows.append({"command": what, "s": round(statistics.median(runs), 2), "runs": runs})
    table = common.table([{"command": row["command"], "s": row["s"]} for row in rows])
    print(table)
    common.write({"table": rows}, options.json)
    if options.write:
        common.write_page(options.write, "startup", table)


if __name__ == "__main__":
    main()
