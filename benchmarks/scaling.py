"""How the cost of a training step grows: one factor at a time around a small base, with the
exponent of a fitted power law.

    python benchmarks/scaling.py --objective dpo scir --json scaling.json

pairs       pairs in a step, so tokens
answers     answers of one prompt; a step trains on all their pairs
vocabulary  size of the vocabulary
context     tokens of the prompt; the answers stay as they are

Everything of a step goes in one pack, so that the growth is the engine's and not the packing's;
--max-tokens-per-pack bounds memory instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import Json, child, make_model, make_pairs, table, write

#: A factor's name -> the values it takes; every other factor keeps its value in BASE.
FACTORS: dict[str, list[int]] = {
    "pairs": [1, 2, 4, 8, 16],
    "answers": [2, 3, 4, 6, 8],
    "vocabulary": [4_000, 8_000, 16_000, 32_000, 64_000],
    "context": [64, 128, 256, 512, 1024, 2048],
}
BASE = {"pairs": 4, "answers": 2, "vocabulary": 8_000, "context": 128}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="S")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--objective", nargs="+", choices=["dpo", "scir"], default=["dpo"])
    parser.add_argument("--factor", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    parser.add_argument("--points", type=int, help="only the first so many values of each factor")
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--max-tokens-per-pack", type=int, default=2**20)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps that are counted, after one that is not"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def point(objective: str, factor: str, value: int, a: argparse.Namespace) -> Json:
    """One value of one factor, in a process of its own: seconds, peak memory, tokens of a step."""
    at = {**BASE, factor: value}
    prompts = 1 if factor == "answers" else at["pairs"]
    answers, lengths = at["answers"], (a.response_tokens, a.response_tokens)
    rows = make_pairs(
        prompts * (1 + a.steps),
        at["vocabulary"],
        (at["context"], at["context"]),
        lengths,
        answers,
        a.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.json"
        pairs.write_text(json.dumps(rows))
        model = make_model(Path(folder), a.shape, seed=a.seed, vocab_size=at["vocabulary"])
        asked = {
            "model": str(model),
            "pairs": str(pairs),
            "dtype": a.dtype,
            "objective": objective,
            "steps": 1 + a.steps,
        }
        asked |= {
            "batch_size": prompts * answers * (answers - 1) // 2,
            "max_tokens_per_pack": a.max_tokens_per_pack,
        }
        record = child("scaling.py", {**asked, "learning_rate": 1e-4, "beta": 0.1})
    seconds = statistics.median(record["seconds"][1:])
    print(f"{objective} {factor} {value}: {seconds:.3g} s", file=sys.stderr)
    return {
        "objective": objective,
        "factor": factor,
        "value": value,
        "tokens needed": record["counts"][-1]["tokens"],
        "s a step": seconds,
        "peak MB": record["peak_mb"],
        "losses": record["losses"],
    }


def exponent(points: list[Json], column: str) -> float | None:
    """b of column = a * value^b, by least squares on logarithms."""
    if len(points) < 2:
        return None
    x, y = (np.log([p[name] for p in points]) for name in ("value", column))
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    a = arguments()
    if a.child:
        import engine

        print(json.dumps(engine.train(json.loads(a.child))))
        return
    points, fits = [], []
    for objective in a.objective:
        for factor in a.factor:
            found = [point(objective, factor, value, a) for value in FACTORS[factor][: a.points]]
            points += found
            fits.append(
                {
                    "objective": objective,
                    "factor": factor,
                    "from": found[0]["value"],
                    "to": found[-1]["value"],
                    **{
                        f"exponent of {column}": exponent(found, column)
                        for column in ("tokens needed", "s a step", "peak MB")
                    },
                }
            )
    print(
        table([{name: value for name, value in p.items() if name != "losses"} for p in points]),
        table(fits),
        sep="\n\n",
    )
    write({"points": points, "exponents": fits}, a.json)


if __name__ == "__main__":
    main()
