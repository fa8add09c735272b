"""Log-odds -> agreement and statistics, as pure functions of arrays (numpy and pyarrow only; what METHOD 6 asks to be reported).

    log_odds           (models, pairs) nats, positive: first better, 0: a tie, NaN: no verdict
    forward, swapped   (models, pairs) the same, read with first, then with second, in seat A;
                       NaN: the model has no seats
    gold               (pairs,) +1 first better, -1 second better, NaN unlabelled

Swapping first and second negates log_odds, gold and length difference, makes forward -swapped and
swapped -forward, and changes no statistic.
A missing verdict is left out of a statistic and lowers its count: it is never a tie, a disagreement or a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from scir_cli.errors import DataError, suggest
from scir_cli.schemas import check_nulls

Array = NDArray[np.float64]

MIN_CONFIDENCE = 0.5  # tau of METHOD 3 [ours]: 0.5 asks for nothing beyond equal signs
Z = 1.959964  # a normal's 95 %
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What each reward model says of each pair; the module's docstring has shapes and units."""

    names: list[str]  # reward models, in order of first appearance
    log_odds: Array  # (models, pairs)
    forward: Array  # (models, pairs)
    swapped: Array  # (models, pairs)
    verdict_mass: Array  # (models, pairs) probability on the verdict tokens; NaN: the model has none
    gold: Array  # (pairs,)
    length_difference: Array  # (pairs,) length of first minus length of second, tokens
    subset: list[str | None]
    pair_ids: list[str]  # [] where nobody asks for them

    def take(self, rows: NDArray[np.intp]) -> Verdicts:
        """The verdicts on some of the pairs, with all the models.  rows: (n,) indices"""
        matrices = {name: getattr(self, name)[:, rows] for name in ("log_odds", "forward", "swapped", "verdict_mass")}
        vectors = {name: getattr(self, name)[rows] for name in ("gold", "length_difference")}
        pair_ids = [self.pair_ids[i] for i in rows] if self.pair_ids else []
        return replace(self, **matrices, **vectors, subset=[self.subset[i] for i in rows], pair_ids=pair_ids)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Whether some models agree on each pair; every field is (pairs,), NaN where one of them has no verdict."""

    agree: Array  # 1.0 or 0.0
    margin: Array  # smallest |log-odds|, nats
    mean: Array  # mean log-odds, nats
    spread: Array  # largest minus smallest log-odds, nats


# From a table


def from_table(table: pa.Table, ids: bool = True) -> Verdicts:
    """The verdicts in a judged or preferences table, joined by reward model's name and not by place in the list.

    Raises DataError for a missing column, a nameless or repeated reward model in one pair, and log-odds that are infinite.
    """
    names, matrix = _rewards(table)
    return Verdicts(
        names,
        matrix("log_odds"),
        matrix("forward_log_odds"),
        matrix("swapped_log_odds"),
        matrix("verdict_mass"),
        gold_signs(table["gold_label"]),
        length_difference(table),
        _shared(table["subset"]),
        table["pair_id"].to_pylist() if ids else [],
    )


def from_tables(tables: Iterable[pa.Table]) -> Verdicts:
    """The verdicts of several tables one after the other; of their rows only numbers, subsets and ids are kept."""
    return join([from_table(table) for table in tables])


def summary_of(tables: Iterable[pa.Table]) -> dict[str, Any]:
    """`summary` of several tables one after the other; of their rows nothing but the numbers it needs is kept."""
    return summary(join([replace(from_table(table, ids=False), subset=[]) for table in tables]))


def join(parts: Sequence[Verdicts]) -> Verdicts:
    """The pairs of all parts, one part after the other."""
    names = list(dict.fromkeys(name for part in parts for name in part.names))

    def joined(field: str) -> Array:
        return np.concatenate([_rows_of(getattr(part, field), part.names, names) for part in parts], axis=1)

    return Verdicts(
        names,
        joined("log_odds"),
        joined("forward"),
        joined("swapped"),
        joined("verdict_mass"),
        np.concatenate([part.gold for part in parts]),
        np.concatenate([part.length_difference for part in parts]),
        [subset for part in parts for subset in part.subset],
        [pair_id for part in parts for pair_id in part.pair_ids],
    )


def model_names(tables: Iterable[pa.Table]) -> list[str]:
    """The reward models of several tables in order of first appearance; raises as `from_table` does."""
    return list(dict.fromkeys(name for table in tables for name in _rewards(table)[0]))


def log_odds(table: pa.Table, models: list[str]) -> Array:
    """What `models` say, NaN where the table has nothing of one.  -> (models, pairs)"""
    names, matrix = _rewards(table)
    return _rows_of(matrix("log_odds"), names, models)


def _rows_of(matrix: Array, known: list[str], names: list[str]) -> Array:
    """The rows of `names`, NaN for one that is not among `known`."""
    nothing = np.full((1, matrix.shape[1]), np.nan)
    return np.concatenate([matrix, nothing])[[known.index(name) if name in known else -1 for name in names]]


def _rewards(table: pa.Table) -> tuple[list[str], Callable[[str], Array]]:
    """The reward models in order of first appearance, and what makes a field of their verdicts a matrix, (models, pairs)."""
    check_nulls(table, "judged")
    rewards = table["rewards"].combine_chunks()
    pair = pc.list_parent_indices(rewards).to_numpy()  # (verdicts,) row each verdict belongs to
    verdicts = rewards.flatten()  # unlike .values, keeps to the slice
    encoded = pc.struct_field(verdicts, "reward_model").dictionary_encode()
    if encoded.null_count:
        raise DataError(f"'rewards' holds {encoded.null_count} verdicts without a reward_model; name the model that gave each")
    names, model = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def matrix(field: str) -> Array:
        values = np.full((len(names), len(table)), np.nan)
        values[model, pair] = _floats(pc.struct_field(verdicts, field))
        return values

    odds = matrix("log_odds")
    counts = np.bincount(model * np.int64(len(table)) + pair, minlength=odds.size).reshape(odds.shape)
    for wrong, what in ((counts > 1, "more than one verdict"), (np.isinf(odds), "infinite log-odds")):
        if wrong.any():
            k, i = np.argwhere(wrong)[0]
            raise DataError(
                f"pair {table['pair_id'][i]} holds {what} of '{names[k]}'; expected one finite number, or null for no verdict"
            )
    return names, matrix


def gold_signs(gold: pa.ChunkedArray) -> Array:
    """+1 for "first", -1 for "second", NaN for null.  -> (pairs,)"""
    return 2 * _floats(pc.index_in(gold, value_set=pa.array(["second", "first"]))) - 1


def _shared(texts: pa.ChunkedArray) -> list[str | None]:
    """The texts, equal ones as one object: a subset's name takes no more memory for a million rows than for one."""
    encoded = texts.combine_chunks().dictionary_encode()
    return np.array([*encoded.dictionary.to_pylist(), None], object)[encoded.indices.fill_null(-1).to_numpy()].tolist()


def _floats(values: pa.Array | pa.ChunkedArray) -> Array:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)  # null -> NaN


def length_difference(table: pa.Table) -> Array:
    """Length of first minus length of second, (pairs,): in tokens, or in characters where one of the two has no token ids."""
    sides = (table["first"], table["second"])
    tokens = [_floats(pc.list_value_length(pc.struct_field(side, "token_ids"))) for side in sides]
    if np.min(tokens, initial=1) > 0:
        return np.subtract(*tokens)
    characters = [_floats(pc.utf8_length(pc.struct_field(side, "text"))) for side in sides]
    return np.where(np.minimum(*tokens) > 0, np.subtract(*tokens), np.subtract(*characters))


# Statistics


def agreement(log_odds: Array, min_confidence: float = MIN_CONFIDENCE) -> Agreement:
    """Agreement of all models on each pair; a tie never agrees, no verdict is NaN.  log_odds: (models, pairs)

    m = 1[all a_i have one sign] 1[min_i max(p_i, 1-p_i) >= tau]  (METHOD 3)
    """
    if not len(log_odds):
        log_odds = np.full((1, log_odds.shape[1]), np.nan)
    sign, margin = np.sign(log_odds), np.abs(log_odds).min(0)  # min and max hand NaN on
    agree = (sign == sign[0]).all(0) & (sign[0] != 0) & (_confidence(margin) >= min_confidence)
    return Agreement(np.where(np.isnan(margin), np.nan, agree), margin, log_odds.mean(0), log_odds.max(0) - log_odds.min(0))


def _confidence(log_odds: Array) -> Array:
    return 1 / (1 + np.exp(-np.abs(log_odds)))  # max(p, 1-p) = sigmoid(|a|)


def entropy(log_odds: Array) -> Array:
    """Entropy of sigmoid(a), nats, NaN for no verdict.  H = softplus(a) - a sigmoid(a), here of |a|: H is even; (...) -> (...)"""
    size = np.abs(log_odds)
    return np.log1p(np.exp(-size)) + size * (1 - _confidence(size))


def cohen_kappa(a: Array, b: Array) -> float:
    """Cohen's kappa of the signs of a and b where both have a verdict, a tie being a third category; NaN where undefined.

    kappa = (p_o - p_e) / (1 - p_e), p_e = sum_k P(a = k) P(b = k) (Cohen 1960).  a, b: (pairs,)
    """
    return kappa_interval(a, b)[0]


def kappa_interval(a: Array, b: Array) -> tuple[float, float, float]:
    """`cohen_kappa`, and its ends where p_o lies at the ends of its Wilson interval and p_e stays [ours]: never of width 0, as at p_o = 1."""
    a, b = _both(np.sign(a), np.sign(b))
    chance = sum((a == k).mean() * (b == k).mean() for k in (-1, 0, 1)) if len(a) else 1.0
    if chance == 1:
        return math.nan, math.nan, math.nan
    observed = float((a == b).mean())
    kappa, low, high = ((p - chance) / (1 - chance) for p in (observed, *wilson(observed * len(a), len(a))))
    return float(kappa), float(low), float(high)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation where neither is NaN, ties sharing their average rank; NaN when one side is constant.  a, b: (pairs,)"""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = _ranks(a[known]), _ranks(b[known])
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan


def _ranks(values: Array) -> Array:
    """Ranks 1..n, ties averaged, less their mean (n + 1) / 2."""
    order = np.argsort(values)
    values = values[order]
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)]) + 1  # of runs of equals
    counts = np.diff(ends, prepend=0)
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(ends - (counts - 1) / 2 - (len(values) + 1) / 2, counts)
    return ranks


def _both(a: Array, b: Array) -> tuple[Array, Array]:
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known]


def wilson(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """Lowest and highest rate that `successes` of `n` allow (Wilson 1927; z: 95 %); NaN for n = 0."""
    if not n:
        return math.nan, math.nan
    rate, shrink = successes / n, 1 + z * z / n
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


def calibration_error(log_odds: Array, correct: Array, bins: int = 10) -> float:
    """Expected calibration error of max(p, 1-p) in equal bins over [1/2, 1]; NaN with nothing to compare.

    ECE = sum_b n_b/n |accuracy_b - confidence_b| (Guo et al. 2017).  correct: (pairs,) 1, 0, 1/2 for a tie, NaN unlabelled
    """
    confidence, correct = _both(_confidence(log_odds), correct)
    if not len(correct):
        return math.nan
    return float(np.abs(np.bincount(_bins(confidence, bins), correct - confidence)).sum() / len(correct))


def _bins(confidence: Array, bins: int) -> NDArray[np.intp]:
    return np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)


def reliability(log_odds: Array, correct: Array, bins: int = 10) -> list[dict[str, Any]]:
    """Mean confidence and accuracy (with its Wilson interval) in each bin of `calibration_error` that holds a pair."""
    confidence, correct = _both(_confidence(log_odds), correct)
    bin_of = _bins(confidence, bins)
    inside = [bin_of == b for b in np.unique(bin_of)]
    return [{"pairs": int(i.sum()), "confidence": _mean(confidence[i]), **rate("accuracy", correct[i])} for i in inside]


def risk_coverage(confidence: Array, correct: Array, points: int = 20) -> list[dict[str, Any]]:
    """Accuracy on the surest pairs against the share of labelled pairs that they are: what selecting by confidence buys (El-Yaniv & Wiener 2010).

    confidence: (pairs,) NaN: not covered;  correct: (pairs,) as in `calibration_error`.  Equally sure pairs come in together, in any order of
    the rows; the last point is all that can be covered. No labelled pairs: no points.
    """
    labelled = ~np.isnan(correct)
    confidence, hits = _both(confidence[labelled], correct[labelled])
    order = np.argsort(-confidence, kind="stable")
    confidence, hits = confidence[order], np.cumsum(hits[order])
    ends = np.flatnonzero(np.append(np.diff(confidence) != 0, True)) if len(hits) else np.empty(0, int)  # last of a run of equals
    wanted = np.ceil(labelled.sum() * np.arange(1, points + 1) / points) - 1
    chosen = np.unique(ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)]) if len(ends) else ends
    curve = []
    for end in chosen:
        low, high = wilson(float(hits[end]), int(end) + 1)
        rate = {"accuracy": float(hits[end]) / (end + 1), "accuracy_low": low, "accuracy_high": high}
        curve.append(
            {"coverage": (end + 1) / int(labelled.sum()), "pairs": int(end) + 1, "confidence": float(confidence[end]), **rate}
        )
    return curve


# Reports


def curves(v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE) -> dict[str, Any]:
    """Accuracy against confidence (`reliability`) and coverage (`risk_coverage`) of each model, and of the label all agree on, by its margin."""
    correct = (1 + np.sign(v.log_odds) * v.gold) / 2  # (models, pairs)
    a = _agreement_of(v, agree_on, min_confidence)
    agreed = np.where(a.agree == 1, a.margin, np.nan)

    def covered(log_odds: Array, right: Array) -> list[dict[str, Any]]:
        """A labelled pair without a verdict is one that is not covered: a 0 there never counts."""
        return risk_coverage(_confidence(log_odds), np.where(np.isnan(v.gold), np.nan, np.nan_to_num(right)))

    return to_json(
        {
            "reliability": {name: reliability(v.log_odds[k], correct[k]) for k, name in enumerate(v.names)},
            "risk_coverage": {name: covered(v.log_odds[k], correct[k]) for k, name in enumerate(v.names)}
            | {"agreed": covered(agreed, (1 + np.sign(a.mean) * v.gold) / 2)},
        }
    )


def summary(v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE) -> dict[str, Any]:
    """All statistics of `v`, ready for JSON: floats to 6 digits, None for what is undefined (no seats, no gold, no verdicts).

    agree_on: the models that decide "agreed", all of them by default; raises DataError for one that `v` lacks.
    """
    return to_json(
        {
            "pairs": len(v.gold),
            "models": {name: _model(v, k) for k, name in enumerate(v.names)},
            "between": [_between(v, i, j) for i, j in combinations(range(len(v.names)), 2)],
            "agreed": _agreed(v, _agreement_of(v, agree_on, min_confidence)),
        }
    )


def data_notes(v: Verdicts, repeated: int) -> list[str]:
    """What a reader of the figures has to know of the rows, one sentence each.  repeated: rows whose pair_id an earlier one has"""
    known, notes = _known(v.gold), []
    if repeated:
        notes.append(f"{repeated} rows repeat the pair_id of another row; every row counts")
    if 0 < len(known) < len(v.gold):
        notes.append(f"{len(v.gold) - len(known)} of {len(v.gold)} pairs have no gold label and count in no accuracy")
    if len(known) > 1 and (known == known[0]).all():
        side = "first" if known[0] > 0 else "second"
        notes.append(
            f"all {len(known)} gold labels say '{side}': whoever always prefers that side is right, so accuracy says little"
        )
    return notes


def by_subset(
    v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> dict[str, dict[str, Any]]:
    """The summary of each subset, in order of first appearance; pairs without one are under "(none)"."""
    return {name: summary(v.take(rows), agree_on, min_confidence) for name, rows in subset_rows(v.subset).items()}


def subset_rows(subset: Sequence[str | None]) -> dict[str, NDArray[np.intp]]:
    """The rows of each subset, in order of first appearance; those without one are under "(none)"."""
    encoded = pa.array(subset, pa.string()).fill_null("(none)").dictionary_encode()
    codes = encoded.indices.to_numpy()
    return {name: np.flatnonzero(codes == code) for code, name in enumerate(encoded.dictionary.to_pylist())}


def row_columns(v: Verdicts, agree_on: Sequence[str] | None = None, min_confidence: float = MIN_CONFIDENCE) -> dict[str, pa.Array]:
    """The four columns a consistency dataset adds, (pairs,) each; null where one of `agree_on` has no verdict."""
    a = _agreement_of(v, agree_on, min_confidence)
    columns = {"agree": a.agree, "margin": a.margin, "mean_log_odds": a.mean, "spread": a.spread}
    arrays = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in columns.items()}  # NaN -> null
    return arrays | {"agree": arrays["agree"].cast(pa.bool_())}


def _agreement_of(v: Verdicts, agree_on: Sequence[str] | None, min_confidence: float) -> Agreement:
    for name in agree_on or ():
        if name not in v.names:
            raise DataError(f"no verdicts of the reward model '{name}' in this dataset.{suggest(name, v.names)}")
    return agreement(v.log_odds[[v.names.index(name) for name in agree_on or v.names]], min_confidence)


def _model(v: Verdicts, k: int) -> dict[str, Any]:
    length = spearman(v.log_odds[k], v.length_difference)
    a = _known(v.log_odds[k])
    low, high = correlation_interval(length, len(a))
    correct = (1 + np.sign(v.log_odds[k]) * v.gold) / 2  # 1, 0, 1/2 for a tie
    return {
        "verdicts": len(a),
        "ties": int((a == 0).sum()),
        "median_abs_log_odds": _quantile(np.abs(a), 0.5),
        "mean_abs_log_odds": _mean(np.abs(a)),
        "abs_log_odds_quantiles": {str(q): _quantile(np.abs(a), q) for q in QUANTILES},
        "mean_entropy": _mean(entropy(a)),
        "verdict_mass": _mean(v.verdict_mass[k]),
        **_seats(v, k),
        **{"length_correlation": length, "length_correlation_low": low, "length_correlation_high": high},
        **rate("accuracy", correct),
        "calibration_error": calibration_error(v.log_odds[k], correct),
        "labelled": len(_known(correct)),  # pairs with gold and a verdict
    }


def _seats(v: Verdicts, k: int) -> dict[str, Any]:
    signs = np.sign([v.forward[k], v.swapped[k]])  # (2, pairs) +1: first better
    flips = np.where(np.isnan(signs).any(0), np.nan, signs[0] * signs[1] < 0)
    return {
        **rate("flip_rate", flips),  # opposite signs: the seat decides, not the response
        "order_kappa": cohen_kappa(v.forward[k], v.swapped[k]),
        "first_seat_rate": _mean((1 + seat_signs(v, k)) / 2),  # over both orders; a tie counts one half
    }


def seat_signs(v: Verdicts, k: int) -> Array:
    """+1 where model k prefers seat A, -1 seat B, 0 a tie, in both orders.  -> (2, pairs)"""
    # in the swapped order the first response has seat B
    return np.sign([v.forward[k], -v.swapped[k]])


def _between(v: Verdicts, i: int, j: int) -> dict[str, Any]:
    return {"first": v.names[i], "second": v.names[j], **relation(v.log_odds[i], v.log_odds[j])}


def relation(a: Array, b: Array) -> dict[str, Any]:
    """How far two columns of log-odds agree where both have a verdict, each figure with its 95 % interval.  a, b: (pairs,)"""
    a, b = _both(a, b)
    equal = (np.sign(a) == np.sign(b)).astype(float)  # p_o of kappa: two ties are equal
    kappa, r = kappa_interval(a, b), spearman(a, b)
    ends = correlation_interval(r, len(a))
    return {
        "pairs": len(a),
        **rate("agreement", equal),
        **dict(zip(("kappa", "kappa_low", "kappa_high"), kappa, strict=True)),
        **dict(zip(("spearman", "spearman_low", "spearman_high"), (r, *ends), strict=True)),
    }


def correlation_interval(r: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation: Fisher's z with the variance (1 + r^2/2) / (n - 3) (Bonett & Wright 2000); NaN for n < 4."""
    if n < 4 or math.isnan(r):
        return math.nan, math.nan
    if abs(r) >= 1:
        return r, r
    half = Z * math.sqrt((1 + r * r / 2) / (n - 3))
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def mean_interval(name: str, values: Array) -> dict[str, float]:
    """The mean of the known values and mean +- z sd / sqrt(n), as `name`, `name_low` and `name_high`; no interval where all are equal."""
    known = _known(values)
    spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    mean, half = _mean(known), Z * spread / math.sqrt(len(known)) if spread else math.nan
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def _agreed(v: Verdicts, a: Agreement) -> dict[str, Any]:
    kept = a.agree == 1
    correct = (1 + np.sign(a.mean) * v.gold)[kept] / 2
    return {
        "pairs": int(kept.sum()),
        **rate("rate", a.agree),
        **rate("accuracy", correct),
        "labelled": len(_known(correct)),
        "mean_margin": _mean(a.margin[kept]),
    }


def rate(name: str, outcomes: Array) -> dict[str, float]:
    """The mean of the known outcomes, each in [0, 1], and its Wilson interval, as `name`, `name_low` and `name_high`."""
    known = _known(outcomes)
    low, high = wilson(float(known.sum()), len(known))
    return {name: _mean(known), f"{name}_low": low, f"{name}_high": high}


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _mean(values: Array) -> float:
    known = _known(values)
    return float(known.mean()) if known.size else math.nan


def _quantile(values: Array, q: float) -> float:
    return float(np.quantile(values, q)) if values.size else math.nan


def to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None  # + 0.0: -0.0 is 0.0
    return value
