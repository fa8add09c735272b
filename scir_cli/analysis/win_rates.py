"""Preferences between responses -> win rates, also with length and style controlled.

    preference    (pairs,) probability in [0, 1] that the model's response beats the other;
                  NaN: no verdict
    lengths       (2, pairs) characters of the model's response and of the other's

These are pure functions of arrays. Fits need scikit-learn (`pip install 'scir-cli[eval]'`), which
is imported only when a function needs it.
An unavailable figure is None, and a reason or a note explains it; an unreliable figure has a note.
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

# Below it a standard error is about 5 points, and a note says so [ours].
FEW_PAIRS = 100
# Share of pairs with the longer response on one side from which the effects of length and of the
# model count as inseparable [ours].
ONE_SIDED = 0.95
# AlpacaEval 2: the annotations of its two gamed baselines have weight 0.2 together, the lambda of
# "length_controlled_v1".
GAMED_WEIGHT = 0.2 / 2
# Folds of AlpacaEval 2's cross-fitting.
FOLDS = 5
# The values of C that AlpacaEval 2 tries: the default of LogisticRegressionCV.
STRENGTHS = np.logspace(-4, 4, 10)
NOTHING_TO_FIT = (
    "cross-validation finds nothing to fit in these pairs: they are too few, or all even"
)
STYLE = ("length", "headers", "lists", "bold")
# Collinearity is serious from this condition number on (Belsley, Kuh & Welsch 1980).
MAX_CONDITION = 30.0
# Bootstrap samples of an interval [ours].
ROUNDS = 200


@dataclass(frozen=True, eq=False)
class Gamed:
    """AlpacaEval's df_gamed.csv: annotations of gamed baselines, and instructions' difficulty.

    A gamed baseline is a model that was prompted to be verbose or concise.
    """

    # (rows,) NaN: no verdict
    preference: Array
    # (rows,) length difference over its standard deviation, as in the file
    std_delta_len: Array
    # (rows,)
    difficulty: Array
    # Index of an instruction -> its difficulty.
    of_index: dict[int, float]


def win_rate(preference: Array) -> dict[str, Any]:
    """The mean preference with its standard error, and the discrete win rate.

    The discrete rate counts a verdict as 1, 0, or 1/2 for a draw, and has its Wilson interval.
    Without verdicts the rates are None.

    preference: (pairs,)
    """
    known = preference[~np.isnan(preference)]
    n = len(known)
    n_wins = int((known > 0.5).sum())
    n_losses = int((known < 0.5).sum())
    n_draws = int((known == 0.5).sum())

    successes = n_wins + 0.5 * n_draws
    low, high = wilson(successes, n)
    return {
        "pairs": len(preference),
        "verdicts": n,
        "win_rate": float(known.mean()) if n else None,
        "standard_error": _standard_error(known),
        "wins": n_wins,
        "losses": n_losses,
        "draws": n_draws,
        "discrete_win_rate": successes / n if n else None,
        "discrete_low": low if n else None,
        "discrete_high": high if n else None,
    }


def _standard_error(values: Array) -> float | None:
    """The standard error of the mean; None for fewer than two values.  values: (n,)"""
    n = len(values)
    if n < 2:
        return None
    return float(values.std(ddof=1) / math.sqrt(n))


def reliability_notes(preference: Array, lengths: Array) -> list[str]:
    """Reasons why figures from these pairs may be unreliable, one sentence each.

    preference: (pairs,)
    lengths: (2, pairs) characters.
    """
    known = ~np.isnan(preference)
    n = int(known.sum())
    # (pairs,) +1: the model's response is longer
    longer = np.sign(lengths[0] - lengths[1])
    share = _one_sided_share(longer)

    notes = []
    if 0 < n < FEW_PAIRS:
        error = 50 / math.sqrt(n)
        notes.append(
            f"only {n} pairs with a verdict: a win rate of 50 % would have a standard error "
            f"of {error:.0f} points"
        )
    if share >= ONE_SIDED and len(longer) > 1:
        side = "the model's" if (longer > 0).mean() == share else "the other's"
        notes.append(
            f"{side} response is the longer one in {share:.0%} of the pairs: the effect of its "
            "length cannot be separated from its quality"
        )

    # (verdicts,) +1: the model's response wins
    winner = np.sign(preference[known] - 0.5)
    longer = longer[known]
    if n > 1 and abs(winner.sum()) == n:
        notes.append(f"all {n} verdicts go to one side: a fitted strength has no bound")
    elif n > 1 and share < ONE_SIDED and _determined_by_length(winner, longer):
        which = "longer" if winner[0] == longer[0] else "shorter"
        notes.append(
            f"the {which} response wins in all {n} pairs: length explains every verdict, so a "
            "length-controlled rate is not informative"
        )
    return notes


def _one_sided_share(longer: Array) -> float:
    """The share of pairs whose longer response is on the more frequent side.  longer: (pairs,)"""
    if not len(longer):
        return 0.0
    model_is_longer = (longer > 0).mean()
    other_is_longer = (longer < 0).mean()
    return max(model_is_longer, other_is_longer)


def _determined_by_length(winner: Array, longer: Array) -> bool:
    """Whether always the longer or always the shorter response wins.

    winner, longer: (verdicts,) +1: the model's response, -1: the other's, 0: neither.
    """
    lengths_differ = (np.abs(longer) == 1).all()
    one_rule = abs((winner * longer).sum()) == len(winner)
    return bool(lengths_differ and one_rule)


# Length control, as in AlpacaEval 2


def length_controlled(
    preference: Array,
    lengths: Array,
    difficulty: Array | None = None,
    gamed: Gamed | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Any]:
    """AlpacaEval 2's length-controlled win rate: the mean prediction for pairs of equal length.

    logit P(win) = phi tanh(d / sd(d)) + psi difficulty + theta, d = other's length - model's
    (Dubois et al. 2024, arXiv 2404.04475), by L1-regularized logistic regression on probabilities
    with the C of the best 5-fold cross-validated log loss.
    With `gamed`, its rows have weight 0.1 and no theta: "length_controlled_v1". Without it:
    "length_controlled_minimal", or "length_controlled_noreg" with difficulty only.
    The standard error is AlpacaEval's, of the predictions; None without difficulty, since all
    predictions are then equal. The interval is ours, a bootstrap over pairs at the same C.
    If no fit is possible, all figures are None and "length_controlled_reason" explains it.

    preference: (pairs,)
    lengths: (2, pairs) characters.
    difficulty: (pairs,) of the instructions.
    rounds: bootstrap samples.
    """
    # (pairs,)
    delta = lengths[1] - lengths[0]
    scale = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    known = ~np.isnan(preference)
    reason = _no_fit(int(known.sum()), scale)
    if reason:
        return _no_length_controlled(reason)

    names, features = _length_features(delta / scale, difficulty)
    x = features[known]
    p = preference[known]
    weight = np.ones(len(p))
    if gamed is not None:
        x, p, weight = _with_gamed(gamed, x, p, weight)
    n = len(p)
    c = _best_regularization(x, p, weight)

    # Each pair as if its responses were equally long.
    level = features.copy()
    level[:, 0] = 0
    beta = _fit_logistic(x, p, weight, c)
    if not beta.any():
        return _no_length_controlled(NOTHING_TO_FIT)
    predicted = _sigmoid(level @ beta)
    standard_error = _standard_error(predicted) if difficulty is not None else None
    rates = _bootstrap_rates(x, p, weight, c, level, _resamples(n, np.arange(n), rounds, seed))
    low, high = _interval(rates)
    return {
        "length_controlled_win_rate": float(predicted.mean()),
        "length_controlled_standard_error": standard_error,
        "length_controlled_low": float(low),
        "length_controlled_high": float(high),
        "length_controlled_weights": dict(zip(names, map(float, beta), strict=True)),
        "length_controlled_reason": None,
    }


def _bootstrap_rates(
    x: Array, p: Array, weight: Array, c: float, level: Array, resamples: Sequence[Array]
) -> Array:
    """The mean prediction of a fit to each resample.

    x: (rows, features)
    p, weight: (rows,)
    level: (pairs, features) of the pairs to predict.
    resamples: (rows,) each, the number of times that each row is drawn.
    -> (resamples,)
    """
    rates = []
    for times in resamples:
        beta = _fit_logistic(x, p, weight * times, c)
        predicted = _sigmoid(level @ beta)
        rates.append(predicted.mean())
    return np.array(rates)


def _no_fit(n: int, scale: float) -> str | None:
    """The reason why n pairs cannot be fitted; None if they can.

    scale: standard deviation of the length difference, characters.
    """
    if n < 2 * FOLDS:
        return f"{n} pairs with a verdict are too few to fit length on (at least {2 * FOLDS})"
    if not scale > 0:
        return "all pairs have the same difference in length, so there is nothing to control for"
    return None


def _no_length_controlled(reason: str) -> dict[str, Any]:
    """The figures of `length_controlled` without a fit."""
    return {
        "length_controlled_win_rate": None,
        "length_controlled_standard_error": None,
        "length_controlled_low": None,
        "length_controlled_high": None,
        "length_controlled_weights": None,
        "length_controlled_reason": reason,
    }


def _length_features(delta: Array, difficulty: Array | None) -> tuple[list[str], Array]:
    """The names of the features, and the features of each pair.

    delta: (pairs,) length difference over its standard deviation.
    difficulty: (pairs,)
    -> (pairs, features)
    """
    columns = {"length": np.tanh(delta)}
    if difficulty is not None:
        columns["difficulty"] = difficulty
    columns["model"] = np.ones(len(delta))
    return list(columns), np.stack(list(columns.values()), 1)


def _with_gamed(gamed: Gamed, x: Array, p: Array, weight: Array) -> tuple[Array, Array, Array]:
    """The rows of the gamed baselines and then the given ones: features, preferences, weights.

    The order is AlpacaEval's; the folds depend on it.

    x: (rows, 3) length, difficulty, model.
    p, weight: (rows,)
    """
    known = ~np.isnan(gamed.preference)
    length = np.tanh(gamed.std_delta_len)
    no_model = np.zeros(len(known))
    gamed_x = np.stack([length, gamed.difficulty, no_model], 1)[known]
    gamed_p = gamed.preference[known]
    gamed_weight = np.full(len(gamed_p), GAMED_WEIGHT)
    return (
        np.concatenate([gamed_x, x]),
        np.concatenate([gamed_p, p]),
        np.concatenate([gamed_weight, weight]),
    )


def extreme_change(before: float, after: float) -> bool:
    """Whether length control moved a win rate so far that its authors consider it a failure.

    It is AlpacaEval's `get_is_extreme_changes`. Both rates are in [0, 1].
    """
    lowest = min(before - before / 4, before - 0.1)
    highest = max(before + (1 - before) / 4, before + 0.1)
    return after < lowest or after > highest


def _best_regularization(x: Array, p: Array, weight: Array) -> float:
    """The C of STRENGTHS with the least mean log loss over the folds.

    x: (rows, features)
    p: (rows,) in [0, 1].
    weight: (rows,)
    """
    from sklearn.model_selection import GroupKFold

    # Each row once as a win, with weight p, and once as a loss, with weight 1 - p.
    n = len(p)
    both_outcomes = np.concatenate([x, x])
    groups = np.tile(np.arange(n), 2)
    folds = []
    for train, test in GroupKFold(FOLDS).split(both_outcomes, groups=groups):
        folds.append((train[train < n], test[test < n]))

    def loss(c: float) -> float:
        """The mean log loss over the folds, nats."""
        losses = []
        for train, test in folds:
            beta = _fit_logistic(x[train], p[train], weight[train], c)
            predicted = _sigmoid(x[test] @ beta)
            losses.append(_log_loss(predicted, p[test], weight[test]))
        return float(np.mean(losses))

    return float(min(STRENGTHS, key=loss))


def _log_loss(predicted: Array, p: Array, weight: Array) -> Any:
    """The weighted mean cross-entropy of the predictions, nats.  predicted, p, weight: (rows,)"""
    q = np.clip(predicted, 1e-15, 1 - 1e-15)
    log_likelihood = p * np.log(q) + (1 - p) * np.log(1 - q)
    return -np.mean(weight * log_likelihood)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow.  (...) -> (...)"""
    return np.exp(-np.logaddexp(0, -x))


def _resamples(n: int, group: NDArray[np.intp], rounds: int, seed: int) -> list[Array]:
    """The number of times each row is drawn if whole groups are drawn with replacement.

    group: (n,) the group of each row.
    -> one (n,) array per round
    """
    n_groups = int(group.max()) + 1 if n else 0
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(rounds):
        uniform = np.full(n_groups, 1 / n_groups)
        times = rng.multinomial(n_groups, uniform)
        drawn.append(times[group].astype(np.float64))
    return drawn


def _interval(drawn: Array) -> Array:
    """The ends of a 95 % bootstrap interval.  (rounds, ...) -> (2, ...)"""
    ends = np.percentile(drawn, [2.5, 97.5], axis=0)
    return np.asarray(ends)


def _fit_logistic(x: Array, p: Array, weight: Array, c: float, l1: bool = True) -> Array:
    """The coefficients of a logistic regression on probabilities, without intercept.

    x: (rows, features)
    p: (rows,) in [0, 1].
    weight: (rows,)
    l1: whether the penalty is L1, with AlpacaEval's solver and settings; L2 otherwise.
    -> (features,)
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    settings: dict[str, Any]
    if l1:
        settings = {
            "solver": "liblinear",
            "l1_ratio": 1.0,
            "random_state": 123,
            "max_iter": 100,
        }
    else:
        settings = {"solver": "lbfgs", "tol": 1e-8, "max_iter": 1000}
    model = LogisticRegression(C=c, fit_intercept=False, **settings)

    # Each row once as a win, with weight p, and once as a loss, with weight 1 - p.
    both_outcomes = np.concatenate([x, x])
    outcome = np.repeat([1, 0], len(p))
    outcome_weight = np.concatenate([p * weight, (1 - p) * weight])
    with warnings.catch_warnings():
        # liblinear does not converge at the largest C; AlpacaEval accepts that too.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(both_outcomes, outcome, sample_weight=outcome_weight)
    return np.asarray(model.coef_[0], dtype=np.float64)


def sklearn_available() -> bool:
    """Whether scikit-learn is installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        return False
    return True


# Bradley-Terry over several models


def markdown_counts(text: str) -> tuple[int, int, int, int]:
    """Characters, and headers, list items and bold passages outside code blocks.

    The patterns are Arena-Hard-Auto's.
    """
    prose = re.sub(r"```[^`]*```", "", text)
    headers = re.findall(r"^#{1,6}\s", prose, re.MULTILINE)
    lists = re.findall(r"^\s*(?:\d+\.|[-*+])\s", prose, re.MULTILINE)
    bold = re.findall(r"\*\*[^*\n]+\*\*|__[^_\n]+__", prose, re.MULTILINE)
    return len(text), len(headers), len(lists), len(bold)


def style_differences(ours: Array, theirs: Array) -> Array:
    """Arena-Hard-Auto's style features, each over its standard deviation.

    length = (a - b) / (a + b); the others are per character, (a - b) / (a + b + 1).
    Two differences are ours. Length is in characters, not tokens. Features are not centered: with
    the baseline always on one side, the mean difference in style would count as quality.
    A constant column is 0.

    ours, theirs: (pairs, 4) `markdown_counts`.
    -> (pairs, 4)
    """
    our_length = ours[:, :1]
    their_length = theirs[:, :1]
    total = np.maximum(our_length + their_length, 1)
    length = (our_length - their_length) / total

    our_rates = ours[:, 1:] / np.maximum(our_length, 1)
    their_rates = theirs[:, 1:] / np.maximum(their_length, 1)
    rates = (our_rates - their_rates) / (our_rates + their_rates + 1)

    x = np.concatenate([length, rates], 1)
    scale = x.std(0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)


def design_matrix(matches: NDArray[np.intp], n_models: int, style: Array | None = None) -> Array:
    """+1 for the model and -1 for the other, and then the style features.

    The last model has no column: its strength is 0.

    matches: (pairs, 2) indices of the model and of the other.
    style: (pairs, features)
    -> (pairs, n_models - 1 + features)
    """
    x = np.zeros((len(matches), n_models))
    rows = np.arange(len(matches))
    x[rows, matches[:, 0]] += 1
    x[rows, matches[:, 1]] -= 1
    columns = [x[:, :-1]]
    if style is not None:
        columns.append(style)
    return np.concatenate(columns, 1)


def condition_number(x: Array) -> float:
    """Condition number of the columns scaled to equal length, without those that are all 0.

    Above MAX_CONDITION a fit cannot separate the columns.

    x: (rows, columns)
    """
    length = np.linalg.norm(x, axis=0)
    nonzero = length > 0
    return float(np.linalg.cond(x[:, nonzero] / length[nonzero]))


def bradley_terry(
    x: Array,
    preference: Array,
    groups: Sequence[Any],
    n_models: int,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Array]:
    """Strengths of models with bootstrap intervals over instructions.

    P(i beats j) = sigmoid(s_i - s_j + style w), with strength 0 for the last model.

    x: (pairs, columns) of `design_matrix`.
    preference: (pairs,)
    groups: (pairs,) the instruction of each pair.
    rounds: bootstrap samples.
    -> "strength", "low" and "high", (models,) nats, and "style", (features,)

    Raises DataError if some models were never compared with the others.
    """
    known = ~np.isnan(preference)
    x = x[known]
    preference = preference[known]
    k = n_models - 1
    _check_connected(x[:, :k])
    _, group = np.unique(np.asarray(groups)[known], return_inverse=True)

    def fit(weight: Array) -> Array:
        """The coefficients.  weight: (known pairs,) -> (columns,)"""
        # Almost no penalty, but enough for a finite strength of a model that always wins.
        return _fit_logistic(x, preference, weight, 1e6, l1=False)

    beta = fit(np.ones(len(x)))
    drawn = [fit(times) for times in _resamples(len(group), group, rounds, seed)]
    low, high = _interval(np.stack(drawn))
    return {
        "strength": np.append(beta[:k], 0.0),
        "low": np.append(low[:k], 0.0),
        "high": np.append(high[:k], 0.0),
        "style": beta[k:],
    }


def _check_connected(models: Array) -> None:
    """Raises DataError unless comparisons link every model to the last one.

    Otherwise the strengths are not determined.

    models: (pairs, n_models - 1) of `design_matrix`.
    """
    rank = int(np.linalg.matrix_rank(models))
    n_free = models.shape[1] - rank
    if n_free:
        raise DataError(
            f"{n_free + 1} groups of models were never compared with each other, so their "
            "strengths have no common scale; add comparisons between the groups"
        )
