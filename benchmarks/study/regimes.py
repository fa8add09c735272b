"""Who should label? A map of regimes from a simulation with a linear reward.

    python benchmarks/study/regimes.py
        writes results/regimes/regimes.json; report.py draws it (about two minutes)

Pairs have features x ~ N(0, I) of DIMENSIONS, and gold labels y = sign(w_gold . x).
The judge's log-odds are a_1 = d_1 y + e_1, with d_1 such that it is correct on a share p_1.
The second voter is one of ARRANGEMENTS: as the judge, with independent errors or with errors of
correlation 0.5, correct on a share p_2; or the student itself, a_2 = w_0 . x.
The student is a linear reward w that starts at w_0, and is fitted to N_PAIRS labeled pairs by the
loss of soft labels (DPO's, at beta = 1) and a ridge RIDGE / 2 |w - w_0|^2, to convergence.
Labels come from scir_cli.analysis.consensus, with a temperature from N_CALIBRATION labeled pairs.
The figure is the student's accuracy on new pairs, 1 - angle(w, w_gold) / pi, which is exact.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scir_cli.analysis import consensus
from scir_cli.analysis.verdicts import Array

RESULTS = Path(__file__).parent / "results" / "regimes" / "regimes.json"

JUDGE = (0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90)  # p_1
OTHER = (0.90, 0.85, 0.80, 0.75, 0.70, 0.65, 0.60, 0.55)  # p_2
#: Name -> correlation of the errors; None: the second voter is the student.
ARRANGEMENTS: dict[str, float | None] = {
    "independent errors": 0.0,
    "errors with correlation 0.5": 0.5,
    "the second voter is the student": None,
}
METHODS = ("srlm", "srlm-soft", "agreement", "consensus", "consensus, calibrated weights")
N_SEEDS, DIMENSIONS, N_PAIRS, N_CALIBRATION, RIDGE = 60, 16, 256, 112, 0.01
#: Accuracy of a student that does not vote, before training.
START = 0.6


def student_of_accuracy(rng: np.random.Generator, accuracy: float) -> Array:
    """A unit vector at the angle pi (1 - accuracy) to the gold one.  -> (DIMENSIONS,)"""
    other = rng.standard_normal(DIMENSIONS)
    other[0] = 0
    start: Array = math.sin(math.pi * (1 - accuracy)) * other / np.linalg.norm(other)
    start[0] = math.cos(math.pi * (1 - accuracy))
    return start


def accuracy_of(w: Array) -> float:
    """Share of new pairs on which sign(w . x) is the gold label.  w: (DIMENSIONS,)"""
    return 1 - math.acos(float(np.clip(w[0] / np.linalg.norm(w), -1, 1))) / math.pi


def voters(
    rng: np.random.Generator,
    n: int,
    judge: float,
    other: float,
    correlation: float | None,
    w: Array,
) -> tuple[Array, Array, Array]:
    """-> features (n, DIMENSIONS), gold (n,), log-odds of both voters (2, n)"""
    x = rng.standard_normal((n, DIMENSIONS))
    gold = np.sign(x[:, 0])
    errors = rng.standard_normal((2, n))
    rho = correlation or 0.0
    errors[1] = rho * errors[0] + math.sqrt(1 - rho**2) * errors[1]
    quantile = NormalDist().inv_cdf
    second = x @ w if correlation is None else quantile(other) * gold + errors[1]
    return x, gold, np.array([quantile(judge) * gold + errors[0], second])


def fit(x: Array, target: Array, kept: Array, start: Array) -> Array:
    """The minimum of the soft labels' loss over the kept pairs, by Newton's method.

    x: (n, d), target: (n,) P(first better), kept: (n,) 0 or 1, start: (d,) -> (d,)
    """
    w = start.copy()
    for _ in range(100):
        p = consensus.label_probability(x @ w)
        slope = x.T @ (kept * (p - target)) / kept.sum() + RIDGE * (w - start)
        curvature = (x * (kept * p * (1 - p))[:, None]).T @ x / kept.sum()
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(w)), slope)
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    return w


def one_seed(seed: int, judge: float, other: float, correlation: float | None) -> dict[str, float]:
    """Method -> accuracy of the trained student; also the accuracies and agreement of the voters.

    Raises CalibrationError if the calibration pairs fit no temperature.
    """
    rng = np.random.default_rng(seed)
    start = student_of_accuracy(rng, other if correlation is None else START)
    arrangement = (judge, other, correlation, start)
    _, gold, calibration = voters(rng, N_CALIBRATION, *arrangement)
    x, y, log_odds = voters(rng, N_PAIRS, *arrangement)

    def soft(n_voters: int, calibrated: bool = False) -> Array:
        known = calibration[:n_voters]
        sizes = consensus.sizes(known)
        weights = consensus.calibrated_weights(known, gold) if calibrated else None
        fitted = consensus.fit_temperature(consensus.pool(known, sizes, weights), gold)
        pooled = consensus.pool(log_odds[:n_voters], sizes, weights)
        return consensus.label_probability(pooled, fitted.temperature)

    every = np.ones(N_PAIRS)
    hard = (log_odds[0] > 0).astype(float)
    agreed = (log_odds[0] * log_odds[1] > 0).astype(float)
    targets = {
        "srlm": (hard, every),
        "srlm-soft": (soft(1), every),
        "agreement": (hard, agreed),
        "consensus": (soft(2), every),
        "consensus, calibrated weights": (soft(2, calibrated=True), every),
    }
    trained = {
        name: accuracy_of(fit(x, target, kept, start)) for name, (target, kept) in targets.items()
    }
    correct = log_odds * y > 0
    return trained | {
        "judge_accuracy": float(correct[0].mean()),
        "other_accuracy": float(correct[1].mean()),
        "agreement_rate": float(agreed.mean()),
    }


def agreement_pays(judge: float, other: float, agreement: float) -> bool:
    """Whether n (2p - 1)^2 is larger for the agreed labels than for the judge's.

    A < ((p_1 + p_2 - 1) / (2 p_1 - 1))^2, docs/method.md, section 8
    """
    return agreement < ((judge + other - 1) / (2 * judge - 1)) ** 2


def cells() -> Iterator[dict[str, Any]]:
    """One record per arrangement, p_1 and p_2: means over seeds, and standard errors."""
    for name, correlation in ARRANGEMENTS.items():
        for other in OTHER:
            for judge in JUDGE:
                rows = []
                for seed in range(N_SEEDS):
                    try:
                        rows.append(one_seed(seed, judge, other, correlation))
                    except consensus.CalibrationError:
                        continue
                yield {
                    "arrangement": name,
                    "judge": judge,
                    "other": other,
                    "seeds": len(rows),
                    "mean": {key: round(fmean(row[key] for row in rows), 4) for key in rows[0]},
                    "agreement_less_srlm": difference(rows, "agreement", "srlm"),
                }


def difference(rows: Sequence[dict[str, float]], first: str, second: str) -> list[float]:
    """Mean difference and its standard error, paired by seed."""
    values = [row[first] - row[second] for row in rows]
    return [round(fmean(values), 4), round(stdev(values) / math.sqrt(len(values)), 4)]


def read() -> list[dict[str, Any]]:
    """The committed records of the simulation."""
    records: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return records


def best(cell: dict[str, Any], methods: Sequence[str]) -> str:
    """The method whose student has the largest mean accuracy."""
    return max(methods, key=lambda method: float(cell["mean"][method]))


def formula(cell: dict[str, Any]) -> bool:
    """Whether agreement pays by the measured accuracies and agreement of a cell."""
    mean = cell["mean"]
    return agreement_pays(mean["judge_accuracy"], mean["other_accuracy"], mean["agreement_rate"])


def main() -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in cells())
    RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(RESULTS)


if __name__ == "__main__":
    main()
