"""Tables of judged pairs -> arrays of verdicts."""

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


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What each reward model says of each pair; the module's docstring has shapes and units."""

    names: list[str]  # reward models, in order of first appearance
    log_odds: Array  # (models, pairs)
    forward: Array  # (models, pairs)
    swapped: Array  # (models, pairs)
    verdict_mass: (
        Array  # (models, pairs) probability on the verdict tokens; NaN: the model has none
    )
    gold: Array  # (pairs,)
    length_difference: Array  # (pairs,) length of first minus length of second, tokens
    subset: list[str | None]
    pair_ids: list[str]  # [] where nobody asks for them

    def take(self, rows: NDArray[np.intp]) -> Verdicts:
        """The verdicts on some of the pairs, with all the models.  rows: (n,) indices"""
        matrices = {
            name: getattr(self, name)[:, rows]
            for name in ("log_odds", "forward", "swapped", "verdict_mass")
        }
        vectors = {name: getattr(self, name)[rows] for name in ("gold", "length_difference")}
        pair_ids = [self.pair_ids[i] for i in rows] if self.pair_ids else []
        return replace(
            self, **matrices, **vectors, subset=[self.subset[i] for i in rows], pair_ids=pair_ids
        )


# From a table


def from_table(table: pa.Table, ids: bool = True) -> Verdicts:
    """The verdicts in a judged or preferences table, joined by reward model's name and not by place in the list.

    Raises DataError for a missing column, a nameless or repeated reward model in one pair, and log-odds that are infinite.
    """
    names, matrix = rewards_matrix(table)
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


def join(parts: Sequence[Verdicts]) -> Verdicts:
    """The pairs of all parts, one part after the other."""
    names = list(dict.fromkeys(name for part in parts for name in part.names))

    def joined(field: str) -> Array:
        return np.concatenate(
            [_rows_of(getattr(part, field), part.names, names) for part in parts], axis=1
        )

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
    return list(dict.fromkeys(name for table in tables for name in rewards_matrix(table)[0]))


def log_odds(table: pa.Table, models: list[str]) -> Array:
    """What `models` say, NaN where the table has nothing of one.  -> (models, pairs)"""
    names, matrix = rewards_matrix(table)
    return _rows_of(matrix("log_odds"), names, models)


def _rows_of(matrix: Array, known: list[str], names: list[str]) -> Array:
    """The rows of `names`, NaN for one that is not among `known`."""
    nothing = np.full((1, matrix.shape[1]), np.nan)
    return np.concatenate([matrix, nothing])[
        [known.index(name) if name in known else -1 for name in names]
    ]


def rewards_matrix(table: pa.Table) -> tuple[list[str], Callable[[str], Array]]:
    """The reward models in order of first appearance, and what makes a field of their verdicts a matrix, (models, pairs)."""
    check_nulls(table, "judged")
    rewards = table["rewards"].combine_chunks()
    pair = pc.list_parent_indices(rewards).to_numpy()  # (verdicts,) row each verdict belongs to
    verdicts = rewards.flatten()  # unlike .values, keeps to the slice
    encoded = pc.struct_field(verdicts, "reward_model").dictionary_encode()
    if encoded.null_count:
        raise DataError(
            f"'rewards' holds {encoded.null_count} verdicts without a reward_model; name the model that gave each"
        )
    names, model = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def matrix(field: str) -> Array:
        values = np.full((len(names), len(table)), np.nan)
        values[model, pair] = _floats(pc.struct_field(verdicts, field))
        return values

    odds = matrix("log_odds")
    counts = np.bincount(model * np.int64(len(table)) + pair, minlength=odds.size).reshape(
        odds.shape
    )
    for wrong, what in (
        (counts > 1, "more than one verdict"),
        (np.isinf(odds), "infinite log-odds"),
    ):
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
    return np.array([*encoded.dictionary.to_pylist(), None], object)[
        encoded.indices.fill_null(-1).to_numpy()
    ].tolist()


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


def subset_rows(subset: Sequence[str | None]) -> dict[str, NDArray[np.intp]]:
    """The rows of each subset, in order of first appearance; those without one are under "(none)"."""
    encoded = pa.array(subset, pa.string()).fill_null("(none)").dictionary_encode()
    codes = encoded.indices.to_numpy()
    return {
        name: np.flatnonzero(codes == code)
        for code, name in enumerate(encoded.dictionary.to_pylist())
    }
