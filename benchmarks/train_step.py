"""A training step of this package beside a step of TRL's DPOTrainer: same model, pairs, order,
optimizer, machine.

    python benchmarks/train_step.py --shape S M --dtype fp32 bf16 \\
        --trl-python .venv-trl/bin/python --json train_step.json

scir-dpo            DPO on the pairs
scir-scir           the whole SCIR objective: DPO, implicit reward, both judge orders, penalty
trl                 TRL's DPOTrainer with precomputed reference log-probabilities
trl-compact         the same, projecting response positions only, as TRL does on CUDA and not on
                    a CPU (the same as trl on CUDA)
trl-out-of-the-box  TRL with its defaults: bf16 autocast, gradient checkpointing, the reference
                    model in the loop

Each run is a process of its own and the implementations take turns. tokens/s counts every sequence
in full, tokens needed what is left when shared prefixes count once. TRL's bf16 is autocast over
fp32 weights; ours is bf16 weights with fp32 copies in the optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import SHAPES, Json, child, make_model, make_pairs, table, write

OURS = {"scir-dpo": "dpo", "scir-scir": "scir"}
THEIRS = ("trl", "trl-compact", "trl-out-of-the-box")
PRECISION = {
    ("scir", "bf16"): "bf16 weights, fp32 copies",
    ("trl", "bf16"): "bf16 autocast, fp32 weights",
}
#: Dense bf16 matrix operations a second at the chip's peak, from its data sheet.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["S"])
    parser.add_argument(
        "--layers", type=int, help="fewer layers than the shape has, where it does not fit"
    )
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*OURS, *THEIRS],
        default=["scir-dpo", "scir-scir", "trl", "trl-compact"],
    )
    parser.add_argument(
        "--trl-python",
        type=Path,
        help="Python of TRL's environment; without it only this package is measured",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--response-tokens", type=int, nargs=2, default=(64, 256))
    parser.add_argument(
        "--max-tokens-per-pack", type=int, help="the package's default where it is not given"
    )
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=5, help="steps that are")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(shape: str, dtype: str, a: argparse.Namespace, folder: Path) -> list[Json]:
    """One record a run, implementations taking turns."""
    overrides = {"num_hidden_layers": a.layers} if a.layers else {}
    model = make_model(
        folder, shape, dtype if shape in ("1.5b", "8b") else "fp32", a.seed, **overrides
    )
    size = SHAPES[shape][1].get("vocab_size", 32_000)
    steps = a.warmup + a.steps
    rows = make_pairs(
        steps * a.batch_size, size, tuple(a.prompt_tokens), tuple(a.response_tokens), seed=a.seed
    )
    (folder / "pairs.json").write_text(json.dumps(rows))
    asked = {
        "model": str(model),
        "pairs": str(folder / "pairs.json"),
        "dtype": dtype,
        "steps": steps,
        "batch_size": a.batch_size,
        "learning_rate": 1e-4,
        "beta": 0.1,
        "max_tokens_per_pack": a.max_tokens_per_pack,
    }
    records = []
    for run in range(a.runs):
        for name in a.only:
            if name in OURS:
                record = child("train_step.py", {**asked, "objective": OURS[name]})
            elif a.trl_python:
                record = child("trl_step.py", {**asked, "implementation": name}, str(a.trl_python))
            else:
                continue
            records.append(
                {"shape": shape, "dtype": dtype, "implementation": name, "run": run, **record}
            )
            print(
                f"{shape} {dtype} {name} run {run}: {step_seconds(record, a):.3g} s",
                file=sys.stderr,
            )
    return records


def summarize(records: list[Json], a: argparse.Namespace) -> list[Json]:
    """A line for each implementation.

    Medians over the counted steps, then over runs; ratios are of runs that took turns.
    """
    rows = []
    by_name: dict[str, list[Json]] = {}
    for record in records:
        by_name.setdefault(record["implementation"], []).append(record)
    ours = by_name.get("scir-dpo", [])
    for name, runs in by_name.items():
        needs = runs[0] if name in OURS else (ours or [{}])[0]  # TRL's step needs what ours needs
        counts = needs.get("counts", [])[a.warmup :]
        per_step = (
            {key: statistics.fmean(c[key] for c in counts) for key in counts[0]} if counts else {}
        )
        seconds = statistics.median(step_seconds(run, a) for run in runs)
        ratios = [
            step_seconds(run, a) / step_seconds(base, a)
            for run, base in zip(runs, ours, strict=False)
        ]
        dtype = runs[0]["dtype"]
        rows.append(
            {
                "shape": runs[0]["shape"],
                "implementation": name,
                "precision": PRECISION.get((name.split("-")[0], dtype), dtype),
                "s a step": seconds,
                "times scir-dpo": statistics.median(ratios) if ratios else None,
                "peak MB": statistics.median(run["peak_mb"] for run in runs),
                "pairs/s": a.batch_size / seconds,
                "tokens/s": per_step["sequence_tokens"] / seconds if counts else None,
                "tokens needed": per_step.get("tokens"),
                "MFU": utilization(runs[0], needs, seconds, a),
                "largest loss difference": difference(runs, ours) if name != "scir-scir" else None,
            }
        )
    return rows


def step_seconds(run: Json, a: argparse.Namespace) -> float:
    return statistics.median(run["seconds"][a.warmup :])


def utilization(run: Json, needs: Json, seconds: float, a: argparse.Namespace) -> float | None:
    """Model FLOP utilization in bf16.

    Operations that the step cannot do without (engine.train_flops) / (seconds * peak of the chip).
    """
    peak = next((peak for chip, peak in PEAK_FLOPS.items() if chip in run["device"]), None)
    if run["dtype"] != "bf16" or not peak or not needs:
        return None
    return statistics.fmean(needs["flops"][a.warmup :]) / (seconds * peak)


def difference(runs: list[Json], ours: list[Json]) -> float | None:
    """Largest |loss - loss of scir-dpo| of any step, warm-up included.

    For scir-dpo itself, between its runs.
    """
    pairs = [
        (x, y)
        for run in runs
        for other in ours
        for x, y in zip(run["losses"], other["losses"], strict=True)
    ]
    return max(abs(x - y) for x, y in pairs) if pairs else None


def main() -> None:
    a = arguments()
    if a.child:
        import engine

        print(json.dumps(engine.train(json.loads(a.child))))
        return
    records, rows = [], []
    for shape in a.shape:
        for dtype in a.dtype:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(shape, dtype, a, Path(folder))
            records += found
            rows += summarize(found, a)
    print(table(rows))
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(a).items()
    }
    write({"settings": settings, "table": rows, "runs": records}, a.json)


if __name__ == "__main__":
    main()
