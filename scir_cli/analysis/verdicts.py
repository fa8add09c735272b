"""Tables of judged pairs -> arrays of verdicts.

log_odds           (models, pairs) nats, positive: first better, 0: a tie, NaN: no verdict
forward, swapped   (models, pairs) the same, with first, then with second, in seat A;
                   NaN: the model has no seats
gold               (pairs,) +1 first better, -1 second better, NaN unlabeled
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from scir_cli.data.schemas import check_nulls
from scir_cli.errors import DataError

Array = NDArray[np.float64]

MATRICES = ("log_odds", "forward", "swapped", "verdict_mass")
VECTORS = ("gold", "length_difference", "answer_length_difference")


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The verdicts of several reward models on the same pairs, and what is known of the pairs.

    The module's docstring has the signs and units of the verdicts.
    """

    # Reward models, in order of first appearance.
    names: list[str]
    # (models, pairs)
    log_odds: Array
    # (models, pairs)
    forward: Array
    # (models, pairs)
    swapped: Array
    # (models, pairs) probability on the verdict tokens; NaN: the model has none
    verdict_mass: Array
    # (pairs,)
    gold: Array
    # (pairs,) length of first less length of second, tokens, with their reasoning
    length_difference: Array
    # (pairs,) the same without reasoning, characters; NaN if neither has reasoning
    answer_length_difference: Array
    # One per pair; None: no subset.
    subset: list[str | None]
    # One per pair; empty if the caller does not need them.
    pair_ids: list[str]

    def take(self, rows: NDArray[np.intp]) -> Verdicts:
        """The verdicts of all models on some of the pairs.

        rows: (n,) indices of pairs.
        """
        matrices = {name: getattr(self, name)[:, rows] for name in MATRICES}
        vectors = {name: getattr(self, name)[rows] for name in VECTORS}
        pair_ids = [self.pair_ids[i] for i in rows] if self.pair_ids else []
        return replace(
            self,
            **matrices,
            **vectors,
            subset=[self.subset[i] for i in rows],
            pair_ids=pair_ids,
        )


# From a table


def from_table(table: pa.Table, ids: bool = True) -> Verdicts:
    """The verdicts in a judged or preferences table.

    Verdicts are joined by the reward model's name, not by their index in a row's list.
    ids: whether to read the pair ids; without them `pair_ids` is empty.

    Raises DataError if a column is missing, or if a pair holds a reward model without a name, a
    reward model twice, or infinite log-odds.
    """
    names, matrix = rewards_matrix(table)
    return Verdicts(
        names=names,
        log_odds=matrix("log_odds"),
        forward=matrix("forward_log_odds"),
        swapped=matrix("swapped_log_odds"),
        verdict_mass=matrix("verdict_mass"),
        gold=gold_signs(table["gold_label"]),
        length_difference=length_difference(table),
        answer_length_difference=answer_length_difference(table),
        subset=_interned_texts(table["subset"]),
        pair_ids=table["pair_id"].to_pylist() if ids else [],
    )


def from_tables(tables: Iterable[pa.Table]) -> Verdicts:
    """The verdicts of several tables, one table after the other.

    Only numbers, subsets and ids of their rows stay in memory.
    Raises DataError as `from_table` does.
    """
    parts = [from_table(table) for table in tables]
    return join(parts)


def join(parts: Sequence[Verdicts]) -> Verdicts:
    """The pairs of all parts, one part after the other; NaN for a model that a part lacks."""
    names = _distinct_names(part.names for part in parts)

    def joined_matrix(field: str) -> Array:
        """The matrix of a field.  -> (models, pairs of all parts)"""
        blocks = []
        for part in parts:
            block = _rows_of(getattr(part, field), part.names, names)
            blocks.append(block)
        return np.concatenate(blocks, axis=1)

    return Verdicts(
        names=names,
        log_odds=joined_matrix("log_odds"),
        forward=joined_matrix("forward"),
        swapped=joined_matrix("swapped"),
        verdict_mass=joined_matrix("verdict_mass"),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in VECTORS},
        subset=[subset for part in parts for subset in part.subset],
        pair_ids=[pair_id for part in parts for pair_id in part.pair_ids],
    )


def model_names(tables: Iterable[pa.Table]) -> list[str]:
    """The reward models of several tables, in order of first appearance.

    Raises DataError as `from_table` does.
    """
    return _distinct_names(rewards_matrix(table)[0] for table in tables)


def _distinct_names(parts: Iterable[list[str]]) -> list[str]:
    """The names of all parts, each once, in order of first appearance."""
    distinct: dict[str, None] = {}
    for names in parts:
        distinct.update(dict.fromkeys(names))
    return list(distinct)


def log_odds(table: pa.Table, models: list[str]) -> Array:
    """The log-odds of `models`, NaN for a model that the table lacks.

    -> (models, pairs) nats
    Raises DataError as `from_table` does.
    """
    names, matrix = rewards_matrix(table)
    return _rows_of(matrix("log_odds"), names, models)


def _rows_of(matrix: Array, names: list[str], wanted: list[str]) -> Array:
    """The rows of the models `wanted`, NaN for one that is not in `names`.

    matrix: (names, pairs)
    -> (wanted, pairs)
    """
    missing = np.full((1, matrix.shape[1]), np.nan)
    with_missing = np.concatenate([matrix, missing])
    rows = [names.index(name) if name in names else -1 for name in wanted]
    return with_missing[rows]


def rewards_matrix(table: pa.Table) -> tuple[list[str], Callable[[str], Array]]:
    """The reward models, and a function from a field of the verdicts to its (models, pairs) matrix.

    The models are in order of first appearance.
    Raises DataError as `from_table` does.
    """
    check_nulls(table, "judged")
    rewards = table["rewards"].combine_chunks()
    # (verdicts,) the row of each verdict
    pair = pc.list_parent_indices(rewards).to_numpy()
    # Unlike .values, flatten() respects the slice.
    verdicts = rewards.flatten()

    encoded = pc.struct_field(verdicts, "reward_model").dictionary_encode()
    if encoded.null_count:
        raise DataError(
            f"'rewards' holds {encoded.null_count} verdicts without a reward_model; "
            "expected a name on each; set reward_model"
        )
    names = encoded.dictionary.to_pylist()
    model = encoded.indices.to_numpy()

    def matrix(field: str) -> Array:
        """The matrix of a field, NaN for no verdict.  -> (models, pairs)"""
        values = np.full((len(names), len(table)), np.nan)
        values[model, pair] = _floats(pc.struct_field(verdicts, field))
        return values

    odds = matrix("log_odds")
    cells = model * np.int64(len(table)) + pair
    counts = np.bincount(cells, minlength=odds.size).reshape(odds.shape)
    _refuse_cells(counts > 1, "more than one verdict", table, names)
    _refuse_cells(np.isinf(odds), "infinite log-odds", table, names)
    return names, matrix


def _refuse_cells(
    wrong: NDArray[np.bool_], problem: str, table: pa.Table, names: list[str]
) -> None:
    """Raises DataError if `wrong`, (models, pairs), is true anywhere; names the first pair."""
    if not wrong.any():
        return
    k, i = np.argwhere(wrong)[0]
    raise DataError(
        f"pair {table['pair_id'][i]} holds {problem} of '{names[k]}'; "
        "expected one finite number, or null for no verdict"
    )


def gold_signs(gold: pa.ChunkedArray) -> Array:
    """+1 for "first", -1 for "second", NaN for null.

    -> (pairs,)
    """
    labels = pa.array(["second", "first"])
    # 0, 1 or null
    index = pc.index_in(gold, value_set=labels)
    return 2 * _floats(index) - 1


def _interned_texts(texts: pa.ChunkedArray) -> list[str | None]:
    """The texts, with one Python object per distinct text.

    A subset's name then needs no more memory for a million rows than for one.
    """
    encoded = texts.combine_chunks().dictionary_encode()
    # The last entry, at index -1, is null.
    distinct = np.array([*encoded.dictionary.to_pylist(), None], object)
    codes = encoded.indices.fill_null(-1).to_numpy()
    return distinct[codes].tolist()


def _floats(values: pa.Array | pa.ChunkedArray) -> Array:
    """The values as float64, NaN for null."""
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def length_difference(table: pa.Table) -> Array:
    """Length of first less length of second.  -> (pairs,)

    With their reasoning: in tokens, or in characters if one of the two has no token ids.
    """
    sides = (table["first"], table["second"])
    token_ids = [pc.struct_field(side, "token_ids") for side in sides]
    tokens = [_floats(pc.list_value_length(ids)) for ids in token_ids]
    if np.min(tokens, initial=1) > 0:
        return np.subtract(*tokens)

    characters = []
    for side in sides:
        reasoning = pc.utf8_length(pc.struct_field(side, "reasoning")).fill_null(0)
        characters.append(_floats(reasoning) + _characters(side))
    both_have_tokens = np.minimum(*tokens) > 0
    return np.where(both_have_tokens, np.subtract(*tokens), np.subtract(*characters))


def answer_length_difference(table: pa.Table) -> Array:
    """Length of the answer of first less that of second, without reasoning.  -> (pairs,)

    In characters; NaN if neither response has reasoning.
    """
    sides = (table["first"], table["second"])
    reasonings = [pc.struct_field(side, "reasoning") for side in sides]
    missing = np.full(len(table), np.nan)
    if all(reasoning.null_count == len(table) for reasoning in reasonings):
        return missing
    has_reasoning = [np.asarray(pc.is_valid(reasoning)) for reasoning in reasonings]
    difference = np.subtract(*[_characters(side) for side in sides])
    return np.where(np.logical_or(*has_reasoning), difference, missing)


def _characters(side: pa.ChunkedArray) -> Array:
    """Length of the texts of one side, characters.  -> (pairs,)"""
    return _floats(pc.utf8_length(pc.struct_field(side, "text")))


def subset_rows(subset: Sequence[str | None]) -> dict[str, NDArray[np.intp]]:
    """The rows of each subset, in order of first appearance.

    Rows without a subset are under "(none)".
    """
    names = pa.array(subset, pa.string()).fill_null("(none)")
    encoded = names.dictionary_encode()
    # (pairs,)
    codes = encoded.indices.to_numpy()
    rows = {}
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        rows[name] = np.flatnonzero(codes == code)
    return rows
