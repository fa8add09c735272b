"""Time and memory of the stages that only count, by rows: `filter` on judged pairs.

    python benchmarks/data_stages.py --rows 10000 100000 1000000

Memory is the peak above what was resident before the stage began (imports and settings), Arrow's memory-mapped pages included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import common


def make_candidates(folder: Path, pairs: int) -> Path:
    """5 answers a prompt, so 10 pairs, with a column `score` beside them: what somebody else's reward model said."""
    import numpy as np
    import pyarrow as pa

    from scir_cli import schemas, store

    draw = np.random.default_rng(0)

    def make(low: int, high: int) -> Any:
        index = np.arange(low, high)
        answers = draw.integers(0, 8, high - low)
        columns = prompt_columns(index // 5) | {
            "candidate_id": [f"{i:016x}" for i in index], "response": [answer(i // 5, a) for i, a in zip(index, answers, strict=True)],
            "token_ids": [[int(a)] * 40 for a in answers], "finish_reason": ["stop"] * len(index), "duplicate_of": [None] * len(index),
            "model": ["m"] * len(index), "seed": index,
        }  # fmt: skip
        table = as_table(columns, schemas.schema("candidates")).append_column("score", pa.array(draw.normal(size=len(index))))
        return store.Part(table, len(index))

    store.write_dataset(folder, "candidates", {"stage": "generate", "rows": pairs}, store.part_bounds(pairs // 2, 25_000), make)
    return folder


def make_judged(folder: Path, rows: int) -> Path:
    """Pairs with two reward models, 10 a prompt, answers of 40 tokens; some of a prompt's answers are alike."""
    import numpy as np

    from scir_cli import schemas, store

    draw = np.random.default_rng(0)

    def make(low: int, high: int) -> Any:
        n, index = high - low, np.arange(low, high)
        columns = prompt_columns(index // 10) | {
            "pair_id": [f"{i:016x}" for i in index], "gold": [None] * n, "reference_logps": [[]] * n
        }  # fmt: skip
        for side in ("first", "second"):
            answers = draw.integers(0, 8, n)
            columns[side] = [
                {"candidate_id": f"{i:016x}-{a}", "text": answer(i, a), "token_ids": [int(a)] * 40, "finish_reason": "stop"}
                for i, a in zip(index // 10, answers, strict=True)
            ]
        odds = draw.normal(size=(n, 2))
        columns["rewards"] = [
            [{"reward_model": name, "log_odds": float(a)} for name, a in zip(("judge", "implicit"), both, strict=True)] for both in odds
        ]
        return store.Part(as_table(columns, schemas.schema("judged")), n)

    store.write_dataset(folder, "judged", {"stage": "judge", "rows": rows}, store.part_bounds(rows, 50_000), make)
    return folder


def prompt_columns(prompts: Any) -> dict[str, Any]:
    names = [f"{i:016x}" for i in prompts]
    return {
        "prompt_id": names, "subset": [None] * len(names), "messages": [[{"role": "user", "content": f"Question {p}? " + "word " * 30}] for p in names]
    }  # fmt: skip


def answer(prompt: int, number: int) -> str:
    return f"Answer {number} of {prompt:016x}. " + "word " * 40


def as_table(columns: dict[str, Any], schema: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def child(arguments: dict[str, Any]) -> None:
    from scir_cli import config, stages

    run = stages.load("filter")
    settings = config.build(config.FilterSettings, {"input": arguments["input"], "output_dir": arguments["out"]}, where="benchmark")
    meter = common.Meter()
    meter.start()
    manifest = run(settings)
    meter.tick()
    print(json.dumps({**meter.result(), "rows_out": manifest["rows_out"], "drops": manifest["drops"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    results = []
    with tempfile.TemporaryDirectory() as root:
        for rows in given.rows:
            source = make_judged(Path(root) / f"judged-{rows}", rows)
            result = common.child("data_stages.py", {"input": str(source), "out": f"{root}/out-{rows}"})
            size = sum(path.stat().st_size for path in source.glob("*.arrow")) / 2**20
            results.append(
                {
                    "rows": rows, "MB in": round(size), "rows out": result["rows_out"], "CPU s": round(result["cpu_seconds"][0], 2),
                    "wall s": round(result["wall_seconds"][0], 2), "peak MB": result["peak_mb"],
                }
            )  # fmt: skip
    print(common.table(results))
    if given.json:
        given.json.write_text(json.dumps({"versions": common.versions("pyarrow"), "table": results}, indent=2))


if __name__ == "__main__":
    main()
