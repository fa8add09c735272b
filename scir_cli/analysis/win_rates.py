"""Preferences between responses -> win rates, with length and style taken out, as pure functions of arrays.

    preference    (pairs,) probability in [0, 1] that the model's response beats the other; NaN: no verdict
    lengths       (2, pairs) characters of the model's response and of the other's

What is fitted is fitted with scikit-learn (`pip install 'scir-cli[eval]'`), imported where it is needed. A figure that cannot be had is None and
`reasons` or `notes` say why; one that should not be trusted comes with a note.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scir_cli.analysis.statistics import wilson
from scir_cli.errors import DataError

Array = NDArray[np.float64]

FEW_PAIRS = 100  # below, a standard error is about 5 points: said [ours]
ONE_SIDED = 0.95  # share of pairs with the longer response on one side from which length and model are called inseparable [ours]
GAMED_WEIGHT = (
    0.2 / 2
)  # AlpacaEval 2: weight of its two gamed baselines' annotations together 0.2, lambda of "length_controlled_v1"
FOLDS = 5  # AlpacaEval 2's cross-fitting
STRENGTHS = np.logspace(-4, 4, 10)  # the values of C it tries: LogisticRegressionCV's default
STYLE = ("length", "headers", "lists", "bold")
MAX_CONDITION = 30.0  # Belsley, Kuh & Welsch 1980: from here on collinearity is serious
ROUNDS = 200  # bootstrap samples of an interval [ours]


@dataclass(frozen=True, eq=False)
class Gamed:
    """AlpacaEval's df_gamed.csv: annotations of baselines that were only told to be long or short, and how hard each instruction is."""

    preference: Array  # (rows,) NaN: none
    std_delta_len: Array  # (rows,) length difference over its standard deviation, as it is there
    difficulty: Array  # (rows,)
    of_index: dict[int, float]  # instruction's index -> difficulty


def win_rate(preference: Array) -> dict[str, Any]:
    """Mean preference and its standard error; and with verdicts counted as 1, 0, or 1/2 for a draw, the rate and its Wilson interval."""
    known = preference[~np.isnan(preference)]
    n = len(known)
    wins = float((known > 0.5).sum() + 0.5 * (known == 0.5).sum())
    low, high = wilson(wins, n)
    counted = (
        {"discrete_win_rate": wins / n, "discrete_low": low, "discrete_high": high} if n else {}
    )
    return {
        "pairs": len(preference),
        "verdicts": n,
        "win_rate": float(known.mean()) if n else None,
        "standard_error": _sem(known),
        "wins": int((known > 0.5).sum()),
        "losses": int((known < 0.5).sum()),
        "draws": int((known == 0.5).sum()),
        **(counted or dict.fromkeys(("discrete_win_rate", "discrete_low", "discrete_high"))),
    }


def _sem(values: Array) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def reliability_notes(preference: Array, lengths: Array) -> list[str]:
    """Why these pairs may not carry the figures made of them, one sentence each."""
    known = ~np.isnan(preference)
    n, notes = int(known.sum()), []
    if 0 < n < FEW_PAIRS:
        notes.append(
            f"only {n} pairs with a verdict: a win rate of 50 % would have a standard error of {50 / math.sqrt(n):.0f} points"
        )
    longer = np.sign(lengths[0] - lengths[1])
    share = max((longer > 0).mean(), (longer < 0).mean()) if len(longer) else 0.0
    if share >= ONE_SIDED and len(longer) > 1:
        side = "the model's" if (longer > 0).mean() == share else "the other's"
        notes.append(
            f"{side} response is the longer one in {share:.0%} of the pairs: its length cannot be told from its quality"
        )
    sides = np.sign(preference[known] - 0.5)
    if n > 1 and abs(sides.sum()) == n:
        notes.append(f"all {n} verdicts go to one side: a fit to them has no bound")
    elif (
        n > 1
        and share < ONE_SIDED
        and (np.abs(longer[known]) == 1).all()
        and abs((sides * longer[known]).sum()) == n
    ):
        which = "longer" if sides[0] == longer[known][0] else "shorter"
        notes.append(
            f"the {which} response wins in all {n} pairs: length explains everything, and what is left of it nothing"
        )
    return notes


# Length control, as AlpacaEval 2 does it


def length_controlled(
    preference: Array,
    lengths: Array,
    difficulty: Array | None = None,
    gamed: Gamed | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Any]:
    """AlpacaEval 2's length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475): the mean prediction for pairs of equal length.

    logit P(win) = phi tanh(d / sd(d)) + psi difficulty + theta,  d = other's length - model's;  L1-regularised logistic regression on
    probabilities, C chosen by 5-fold cross-validated log loss.  The standard error is theirs, of the predictions (None where all are equal);
    the interval is ours, a bootstrap over pairs at the same C.  With `gamed`, its rows have weight 0.1 and no theta: "length_controlled_v1".
    Without: "length_controlled_minimal", or "_noreg" with difficulty only.
    """
    names = ["length", *(["difficulty"] if difficulty is not None else []), "model"]
    nothing = {
        f"length_controlled_{name}": None
        for name in ("win_rate", "standard_error", "low", "high", "weights")
    }
    delta = lengths[1] - lengths[0]  # (pairs,)
    scale = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    known = ~np.isnan(preference)
    reason = _no_fit(int(known.sum()), scale)
    if reason:
        return nothing | {"length_controlled_reason": reason}
    own = [
        np.tanh(delta / scale),
        *([difficulty] if difficulty is not None else []),
        np.ones(len(delta)),
    ]
    x, p, weight = np.stack(own, 1)[known], preference[known], np.ones(int(known.sum()))
    if gamed is not None:
        there = ~np.isnan(gamed.preference)
        columns = np.stack(
            [np.tanh(gamed.std_delta_len), gamed.difficulty, np.zeros(len(there))], 1
        )
        x, p = (
            np.concatenate([columns[there], x]),
            np.concatenate([gamed.preference[there], p]),
        )  # in AlpacaEval's order: folds depend on it
        weight = np.concatenate([np.full(int(there.sum()), GAMED_WEIGHT), weight])
    c = _best_regularization(x, p, weight)
    level = np.stack([np.zeros(len(delta)), *own[1:]], 1)  # as if no response were longer

    def predict(weight: Array) -> tuple[Array, Array]:
        beta = _fit_logistic(x, p, weight, c)
        return _sigmoid(level @ beta), beta

    predicted, beta = predict(weight)
    if not beta.any():
        return nothing | {
            "length_controlled_reason": "cross-validation finds nothing to fit in these pairs: they are too few, or all even"
        }
    drawn = _resamples(len(p), np.arange(len(p)), rounds, seed)
    low, high = _interval(np.array([predict(weight * times)[0].mean() for times in drawn]))
    return {
        "length_controlled_win_rate": float(predicted.mean()),
        "length_controlled_standard_error": _sem(predicted) if difficulty is not None else None,
        "length_controlled_low": float(low),
        "length_controlled_high": float(high),
        "length_controlled_weights": dict(zip(names, map(float, beta), strict=True)),
        "length_controlled_reason": None,
    }


def _no_fit(n: int, scale: float) -> str | None:
    if n < 2 * FOLDS:
        return f"{n} pairs with a verdict are too few to fit length on (at least {2 * FOLDS})"
    return (
        None
        if scale > 0
        else "all pairs have the same difference in length, so there is nothing to control for"
    )


def extreme_change(before: float, after: float) -> bool:
    """Whether length control moved a rate so far that its authors call it a sign of failure (their `get_is_extreme_changes`)."""
    return after < min(before - before / 4, before - 0.1) or after > max(
        before + (1 - before) / 4, before + 0.1
    )


def _best_regularization(x: Array, p: Array, weight: Array) -> float:
    """The C with the best mean log loss over the folds.  x: (rows, features), p: (rows,) in [0, 1]"""
    from sklearn.model_selection import GroupKFold

    twice = np.concatenate(
        [x, x]
    )  # each row once as a win, weighing p, and once as a loss, weighing 1 - p
    groups = np.tile(np.arange(len(p)), 2)
    folds = list(GroupKFold(FOLDS).split(twice, groups=groups))

    def loss(c: float) -> float:
        losses = []
        for train, test in folds:
            rows, held = train[train < len(p)], test[test < len(p)]
            q = np.clip(
                _sigmoid(x[held] @ _fit_logistic(x[rows], p[rows], weight[rows], c)),
                1e-15,
                1 - 1e-15,
            )
            losses.append(
                -np.mean(weight[held] * (p[held] * np.log(q) + (1 - p[held]) * np.log(1 - q)))
            )
        return float(np.mean(losses))

    return float(min(STRENGTHS, key=loss))


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _resamples(n: int, group: NDArray[np.intp], rounds: int, seed: int) -> list[Array]:
    """How often each row is drawn when whole groups are drawn with replacement.  group: (n,) -> rounds of (n,)"""
    n_groups = int(group.max()) + 1 if n else 0
    rng = np.random.default_rng(seed)
    return [
        rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups))[group].astype(np.float64)
        for _ in range(rounds)
    ]


def _interval(drawn: Array) -> Array:
    """The ends of a 95 % bootstrap interval.  drawn: (rounds, ...) -> (2, ...)"""
    return np.asarray(np.percentile(drawn, [2.5, 97.5], axis=0))


def _fit_logistic(x: Array, p: Array, weight: Array, c: float, l1: bool = True) -> Array:
    """Logistic regression without intercept on probabilities.  -> (features,)"""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    solver = (
        {"solver": "liblinear", "l1_ratio": 1.0, "random_state": 123}
        if l1
        else {"solver": "lbfgs", "tol": 1e-8}
    )
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=100 if l1 else 1000, **solver)
    y, sample_weight = np.repeat([1, 0], len(p)), np.concatenate([p * weight, (1 - p) * weight])
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # liblinear at the largest C, as in AlpacaEval
        model.fit(np.concatenate([x, x]), y, sample_weight=sample_weight)
    return np.asarray(model.coef_[0], dtype=np.float64)


def sklearn_available() -> bool:
    """Whether scikit-learn is there."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        return False
    return True


# Bradley-Terry over several models


def markdown_counts(text: str) -> tuple[int, int, int, int]:
    """Length in characters, and headers, list items and bold passages outside code blocks (Arena-Hard-Auto's patterns)."""
    prose = re.sub(r"```[^`]*```", "", text)
    patterns = (r"^#{1,6}\s", r"^\s*(?:\d+\.|[-*+])\s", r"\*\*[^*\n]+\*\*|__[^_\n]+__")
    headers, lists, bold = (len(re.findall(pattern, prose, re.MULTILINE)) for pattern in patterns)
    return len(text), headers, lists, bold


def style_differences(ours: Array, theirs: Array) -> Array:
    """Arena-Hard-Auto's style features, each over its standard deviation.  ours, theirs: (pairs, 4) `markdown_counts` -> (pairs, 4)

    length: (a - b) / (a + b);  the others per length, (a - b) / (a + b + 1).  Ours: characters for tokens, and no centring: centred on
    pairs whose baseline is always on one side, the mean difference in style would count as quality. A constant column is 0.
    """
    total = np.maximum(ours[:, :1] + theirs[:, :1], 1)
    a, b = (side[:, 1:] / np.maximum(side[:, :1], 1) for side in (ours, theirs))
    x = np.concatenate([(ours[:, :1] - theirs[:, :1]) / total, (a - b) / (a + b + 1)], 1)
    scale = x.std(0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)


def design_matrix(matches: NDArray[np.intp], n_models: int, style: Array | None = None) -> Array:
    """+1 for the model, -1 for the other, without a column for the last model, whose strength is 0; then the style.  (pairs, columns)"""
    x = np.zeros((len(matches), n_models))
    x[np.arange(len(matches)), matches[:, 0]] += 1
    x[np.arange(len(matches)), matches[:, 1]] -= 1
    return np.concatenate([x[:, :-1], *([style] if style is not None else [])], 1)


def condition_number(x: Array) -> float:
    """Condition number of the columns at equal length, constant zeros left out: above MAX_CONDITION the fit cannot tell them apart."""
    length = np.linalg.norm(x, axis=0)
    return float(np.linalg.cond(x[:, length > 0] / length[length > 0]))


def bradley_terry(
    x: Array,
    preference: Array,
    groups: Sequence[Any],
    n_models: int,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Array]:
    """Strengths of models, P(i beats j) = sigmoid(s_i - s_j + style w), the last being 0, with bootstrap intervals over instructions.

    x: (pairs, columns) of `design`;  preference: (pairs,);  groups: (pairs,) instruction.  -> strength, low, high (models,) and style (features,).
    Raises DataError where some models were never compared with the others.
    """
    known = ~np.isnan(preference)
    x, preference = x[known], preference[known]
    _connected(x[:, : n_models - 1])
    _, group = np.unique(np.asarray(groups)[known], return_inverse=True)

    def fit(weight: Array) -> Array:
        return _fit_logistic(
            x, preference, weight, 1e6, l1=False
        )  # all but unregularised: finite where a model wins always

    whole = fit(np.ones(len(x)))
    low, high = _interval(
        np.stack([fit(times) for times in _resamples(len(group), group, rounds, seed)])
    )
    k = n_models - 1
    ends = {
        name: np.append(values[:k], 0.0)
        for name, values in (("strength", whole), ("low", low), ("high", high))
    }
    return ends | {"style": whole[k:]}


def _connected(models: Array) -> None:
    """Raises DataError unless all strengths are determined: comparisons link every model to the last one."""
    rank = int(np.linalg.matrix_rank(models))
    if rank < models.shape[1]:
        raise DataError(
            f"{models.shape[1] - rank + 1} groups of models were never compared with each other, so no scale holds them all"
        )
