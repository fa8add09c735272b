"""Statistics and tables of the study's records: means and spreads over seeds, paired differences
with intervals, and the sentences that they establish.

A difference is paired by seed (two methods share their M_1, prompts and pairs); its interval is
Student's t at 95 % over the seeds both have, and there is none for fewer than three seeds, or where
all are alike: those would establish anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]

FEWEST = 3  # seeds that an interval needs
#: Student's t, 97.5 %, by degrees of freedom 1, 2, …; beyond the table 2 is close enough.
T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
)

#: Figure -> (heading, does a rise help: +1, -1, or 0 for neither)
FIGURES = {
    "sampled_quality": ("sampled quality", 1),
    "greedy_quality": ("greedy quality", 1),
    "judge_accuracy": ("judge accuracy", 1),
    "implicit_accuracy": ("implicit accuracy", 1),
    "rubric_accuracy": ("rubric accuracy", 1),
    "rationale_accuracy": ("rationale accuracy", 1),
    "agreed_accuracy": ("accuracy where agreed", 1),
    "agreement": ("agreement", 1),
    "flip_rate": ("flips", -1),
    "judge_calibration_error": ("judge's calibration error", -1),
    "sampled_tokens": ("tokens", 0),
    "sampled_cut": ("cut off", 0),
    "sampled_repetition": ("repetition", 0),
    "unseen_judge_accuracy": ("judge accuracy, unseen", 1),
    "unseen_implicit_accuracy": ("implicit accuracy, unseen", 1),
    "unseen_agreed_accuracy": ("accuracy where agreed, unseen", 1),
    "unseen_agreement": ("agreement, unseen", 1),
    "unseen_flip_rate": ("flips, unseen", -1),
}
CLAIMED = (
    "sampled_quality",
    "greedy_quality",
    "judge_accuracy",
    "implicit_accuracy",
    "agreement",
    "flip_rate",
    "rubric_accuracy",
    "rationale_accuracy",
    "unseen_judge_accuracy",
    "unseen_implicit_accuracy",
    "unseen_agreement",
)
WHY = {
    "own_judge_accuracy": "judge accuracy on own pairs",
    "own_implicit_accuracy": "implicit accuracy on own pairs",
    "own_agreed_accuracy": "accuracy where agreed on own pairs",
    "mask_rate": "mask rate",
    "judge_abs": "judge mean abs. a",
    "implicit_abs": "implicit mean abs. a (s = 1)",
    "scale": "s",
    "penalty_weight": "lambda",
    "gradient_judge": "gradient through judge",
    "gradient_implicit": "gradient through implicit",
}
COST = {"steps": "steps", "tokens": "tokens computed", "train_seconds": "seconds of training"}


# ------------------------------ statistics


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval, mean -+ t s / sqrt(n).

    Infinite for fewer than three, and where they are all the same.
    """
    n, mean = len(differences), statistics.fmean(differences)
    if (
        n < FEWEST or max(differences) - min(differences) < 1e-5
    ):  # shares of few pairs, written to six digits, may coincide: that is no spread of 0
        return mean, -math.inf, math.inf
    half = (T[n - 2] if n - 2 < len(T) else 2.0) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def present(records: Sequence[Json], figures: Iterable[str]) -> list[str]:
    """Those of the figures that some record has: what is measured depends on the world."""
    return [figure for figure in figures if any(r.get(figure) is not None for r in records)]


def by_seed(records: Sequence[Json], method: str, iteration: int, figure: str) -> dict[int, float]:
    return {
        r["seed"]: r[figure]
        for r in records
        if r["method"] == method and r["iteration"] == iteration and r.get(figure) is not None
    }


def last_iteration(records: Sequence[Json]) -> int:
    return max((r["iteration"] for r in records), default=1)


def paired(
    records: Sequence[Json], method: str, other: str, iteration: int, figure: str
) -> list[float]:
    """method less other on each seed that both have."""
    a, b = (by_seed(records, name, iteration, figure) for name in (method, other))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


# ------------------------------ tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """mean, and the standard deviation over seeds where there are two."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def means(
    records: Sequence[Json], methods: Sequence[str], iteration: int, figures: dict[str, str]
) -> str:
    """A row a method, a column a figure: mean ± standard deviation over seeds."""
    rows, figures = [], {figure: figures[figure] for figure in present(records, figures)}
    for method in methods:
        columns = [list(by_seed(records, method, iteration, figure).values()) for figure in figures]
        n = max(map(len, columns), default=0)
        if n:
            digits = [0 if figure in ("tokens", "steps") else 3 for figure in figures]
            rows.append(
                [method, str(n), *(spread(c, d) for c, d in zip(columns, digits, strict=True))]
            )
    return table(["method", "seeds", *figures.values()], rows)


def differences(records: Sequence[Json], methods: Sequence[str], other: str, iteration: int) -> str:
    """A row a method.

    Its mean difference to `other` with its interval; ** where the interval does not hold 0.
    """
    rows, claimed = [], present(records, CLAIMED)
    for method in methods:
        if (
            method == other
            or not claimed
            or not paired(records, method, other, iteration, claimed[0])
        ):
            continue
        cells = []
        for figure in claimed:
            mean, low, high = interval(paired(records, method, other, iteration, figure))
            mark = "**" if low > 0 or high < 0 else ""
            cells.append(
                f"{mark}{mean:+.3f}{mark} [{low:+.3f}, {high:+.3f}]"
                if math.isfinite(low)
                else f"{mean:+.3f}"
            )
        rows.append(
            [method, str(len(paired(records, method, other, iteration, claimed[0]))), *cells]
        )
    return table([f"less {other}", "seeds", *(FIGURES[f][0] for f in claimed)], rows)


def said(records: Sequence[Json], methods: Sequence[str], other: str, iteration: int) -> list[str]:
    """One sentence per method: the differences from `other` that the intervals establish."""
    sentences, claimed = [], present(records, CLAIMED)
    for method in methods:
        if (
            method == other
            or not claimed
            or len(paired(records, method, other, iteration, claimed[0])) < FEWEST
        ):
            continue
        better, worse = [], []
        for figure in claimed:
            _, low, high = interval(paired(records, method, other, iteration, figure))
            heading, sign = FIGURES[figure]
            if low > 0 or high < 0:
                (better if (low > 0) == (sign > 0) else worse).append(heading)
        verdict = "; ".join(
            f"{word} in {', '.join(names)}"
            for word, names in (("better", better), ("worse", worse))
            if names
        )
        sentences.append(
            f"- `{method}` against `{other}`: {verdict or 'no difference is established'}."
        )
    return sentences


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks; equal values have the lowest of theirs."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    return statistics.correlation(*ranks)
