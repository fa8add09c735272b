"""What `scir train --dry-run` says a run will take, beside what it then takes.

    python benchmarks/dry_run_accuracy.py --shape S M --dtype fp32 bf16 --json plan.json

A run of a few steps is planned in one process and made in another; memory is without the weights,
which are there before training starts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from common import SHAPES, Json, child, make_model, make_pairs, table, write


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["S"])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--objective", nargs="+", choices=["dpo", "scir"], default=["dpo", "scir"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--response-tokens", type=int, nargs=2, default=(64, 256))
    parser.add_argument(
        "--max-tokens-per-pack", type=int, help="the package's default where it is not given"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(shape: str, dtype: str, objective: str, a: argparse.Namespace) -> Json:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = make_model(root, shape, dtype if shape in ("1.5b", "8b") else "fp32", a.seed)
        rows = make_pairs(
            a.steps * a.batch_size,
            SHAPES[shape][1].get("vocab_size", 32_000),
            tuple(a.prompt_tokens),
            tuple(a.response_tokens),
            seed=a.seed,
        )
        (root / "pairs.json").write_text(json.dumps(rows))
        asked = {
            "model": str(model),
            "pairs": str(root / "pairs.json"),
            "dtype": dtype,
            "steps": a.steps,
            "batch_size": a.batch_size,
            "learning_rate": 1e-4,
            "beta": 0.1,
            "max_tokens_per_pack": a.max_tokens_per_pack,
            "objective": objective,
        }
        planned, made = (
            child("dry_run_accuracy.py", asked | {"plan": True}),
            child("dry_run_accuracy.py", asked),
        )
    memory = (planned["peak_bytes"] - planned["weights_bytes"]) / 2**20
    seconds = sum(made["wall_seconds"])
    return {
        "shape": shape,
        "dtype": dtype,
        "objective": objective,
        "MB planned": memory,
        "MB measured": made["peak_mb"],
        "MB ratio": memory / made["peak_mb"],
        "s planned": planned["seconds"],
        "s measured": seconds,
        "s ratio": planned["seconds"] / seconds,
        "packing efficiency": planned["packing_efficiency"],
        "tokens shared away": 1 - planned["tokens"] / planned["tokens_without_sharing"],
    }


def main() -> None:
    a = arguments()
    if a.child:
        import engine

        asked = json.loads(a.child)
        print(json.dumps(engine.plan(asked) if asked.get("plan") else engine.train(asked)))
        return
    rows = [
        compare(shape, dtype, objective, a)
        for shape in a.shape
        for dtype in a.dtype
        for objective in a.objective
    ]
    print(table(rows))
    write({"table": rows}, a.json)


if __name__ == "__main__":
    main()
