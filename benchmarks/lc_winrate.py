"""AlpacaEval 2's length-controlled win rate, ours beside `alpaca-eval`'s, from the same
annotations.

    python benchmarks/lc_winrate.py --alpaca-python .venv-alpaca/bin/python \\
        --annotations A.json B.json [--gamed df_gamed.csv]

The other environment: `python3 -m venv .venv-alpaca && .venv-alpaca/bin/pip install
alpaca-eval==0.6.6`. df_gamed.csv is AlpacaEval's, from the hub (tatsu-lab/alpaca_eval); without it
both sides get the same stand-in of its form, drawn from a seed: the figures then are not
AlpacaEval's, and their difference means as much. Without annotations, seeded ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import table, write

from scir_cli.analysis.win_rates import length_controlled, win_rate
from scir_cli.stages import eval_winrate

N = 805  # instructions of AlpacaEval
PEER = """
import json, sys
import pandas as pd
from alpaca_eval.metrics import glm_winrate
gamed, *files = sys.argv[1:]
glm_winrate.hf_hub_download = lambda **_: gamed
found = []
for file in files:
    df = pd.DataFrame(json.load(open(file)))
    for name in ("length_controlled_v1", "length_controlled_noreg", "length_controlled_minimal"):
        m = glm_winrate.get_length_controlled_winrate(
            df, glm_name=name, save_weights_dir=None, is_add_glm_preference_inplace=False
        )
        rates = [m["win_rate"], m["standard_error"]]
        found.append(rates + [m["length_controlled_winrate"], m["lc_standard_error"]])
print(json.dumps([[float(x) for x in row] for row in found]))
"""


def stand_in(path: Path, rng: np.random.Generator) -> Path:
    """Two gamed baselines' annotations in the form of df_gamed.csv."""
    difficulty = rng.normal(0, 1.5, N)
    lines = ["index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    for model, shift in (("concise", 1.0), ("verbose", -1.0)):
        for i in range(N):
            delta = rng.normal(shift, 1)
            p = 1 / (1 + np.exp(1.2 * np.tanh(delta) - 0.3 * difficulty[i] + rng.normal(0, 2)))
            lines.append(f"{i},{p},{delta},{difficulty[i]},False,{model}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def seeded(path: Path, rng: np.random.Generator) -> Path:
    lengths = rng.lognormal(6, 0.6, (2, N)).astype(int) + 1
    p = 1 / (1 + np.exp(-rng.normal(np.tanh((lengths[1] - lengths[0]) / 400) - 0.4, 2.5)))
    rows = [
        {
            "instruction": f"i{i}",
            "output_1": "x" * lengths[0, i],
            "output_2": "y" * lengths[1, i],
            "generator_1": "base",
            "generator_2": "seeded",
            "annotator": "seed",
            "preference": 1 + p[i],
        }
        for i in range(N)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def ours(path: Path, gamed_path: Path) -> list[dict[str, Any]]:
    (match,) = eval_winrate.from_annotations([str(path)])[0]
    gamed = eval_winrate.read_gamed(gamed_path)
    difficulty = eval_winrate.difficulties(match, gamed)
    rate = win_rate(match.preference)
    found = []
    for name, known, other in (
        ("v1", difficulty, gamed),
        ("noreg", difficulty, None),
        ("minimal", None, None),
    ):
        lc = length_controlled(match.preference, match.lengths, known, other, rounds=2)
        found.append(
            {
                "annotations": match.model,
                "glm": name,
                "win rate": 100 * rate["win_rate"],
                "ours": 100 * lc["length_controlled_win_rate"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--alpaca-python", required=True, help="Python of an environment with alpaca-eval 0.6.x."
    )
    parser.add_argument("--annotations", nargs="*", type=Path, default=[])
    parser.add_argument("--gamed", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = args.annotations or [seeded(Path(folder) / "seeded.json", rng)]
        gamed = args.gamed or stand_in(Path(folder) / "gamed.csv", rng)
        command = [args.alpaca_python, "-c", PEER, str(gamed), *map(str, files)]
        peer = json.loads(
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[-1]
        )
        rows = [row for file in files for row in ours(file, gamed)]
    for row, (rate, _, theirs, _) in zip(rows, peer, strict=True):
        row |= {"alpaca-eval": theirs, "difference": row["ours"] - theirs}
        assert abs(row["win rate"] - rate) < 1e-6, (row, rate)
    print(table(rows))
    write({"table": rows}, args.json)


if __name__ == "__main__":
    main()
