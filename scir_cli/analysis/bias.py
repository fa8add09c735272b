"""Position bias, length bias, format bias and self-preference of reward models.

A verdict should not depend on the seat, length, format or author of a response.
For each property that one response of a pair has and the other lacks (longer, lists, code, headers,
written by the judge itself), two figures: the rate of verdicts for the response that has it, and
its excess over the rate of gold labels for it.
A property may go with quality, so only the excess over labels is a bias; without labels there is
only the rate.
The intervals treat pairs as independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from scir_cli.analysis.consistency import rounded_json
from scir_cli.analysis.statistics import mean_interval, rate_with_interval, seat_signs
from scir_cli.analysis.verdicts import Array, Verdicts

# (pairs,) +1: only the first response has the property, -1: only the second, 0: neither or both,
# NaN: not known.
Side = NDArray[np.float16]

#: Property -> regular expression (RE2) that a text with it matches.
FORMATS = {
    "lists": r"(?m)^[ \t]*(?:\d+\.|[-*+])[ \t]",
    "code": "```",
    "headers": r"(?m)^#{1,6}[ \t]",
}


def properties(v: Verdicts, table: pa.Table, own: str | None = None) -> dict[str, Side]:
    """The side of each pair that has a property: longer, each of FORMATS, and "own".

    longer: with reasoning, tokens. "longer answer": without it, characters; left out if no
    response has reasoning. FORMATS are those of the answer.

    own: the judge's name in the column `author`; its responses have the property "own".
    Without it that property is left out; NaN if a response has no author.

    -> property: (pairs,)
    """
    sides = {"longer": np.sign(v.length_difference).astype(np.float16)}
    if not np.isnan(v.answer_length_difference).all():
        sides["longer answer"] = np.sign(v.answer_length_difference).astype(np.float16)

    texts = _encoded(table, "text")
    for name, pattern in FORMATS.items():
        sides[name] = _side_with(texts, pc.match_substring_regex, pattern)

    if own is not None:
        authors = _encoded(table, "author")
        sides["own"] = _side_with(authors, pc.equal, own)
    return sides


def biases(v: Verdicts, sides: dict[str, Side]) -> dict[str, dict[str, Any]]:
    """The figures of each reward model: `position`, then each property of `sides`.

    The figures of the gold labels are under "gold", if a pair has a label.

    sides: as `properties` returns them.
    """
    figures = {}
    for k, name in enumerate(v.names):
        position = {"position": _position(v, k)}
        figures[name] = position | _rates_toward(v, v.log_odds[k], sides)
    if not np.isnan(v.gold).all():
        figures["gold"] = _rates_toward(v, v.gold, sides)
    return rounded_json(figures)


def _encoded(table: pa.Table, field: str) -> pa.DictionaryArray:
    """A field of the first and then of the second responses, dictionary-encoded.

    A response that is in many pairs is then matched only once.

    -> (2 pairs,)
    """
    chunks = []
    for side in ("first", "second"):
        values = pc.struct_field(table[side], field)
        chunks += values.chunks
    # 64-bit offsets: the texts of a large dataset exceed 2 GiB together.
    texts = pa.chunked_array(chunks, pa.string()).cast(pa.large_string())
    return texts.dictionary_encode().combine_chunks()


def _side_with(encoded: pa.DictionaryArray, test: Callable[..., Any], argument: str) -> Side:
    """The side of each pair that passes `test(values, argument)`.

    encoded: (2 pairs,) as `_encoded` returns it.
    -> (pairs,) NaN if a value is null
    """
    passes = test(encoded.dictionary, argument)
    passes = pc.cast(passes, pa.float32()).take(encoded.indices)
    numbers = passes.to_numpy(zero_copy_only=False).astype(np.float16)
    first, second = np.split(numbers, 2)
    return first - second


def _rates_toward(v: Verdicts, log_odds: Array, sides: dict[str, Side]) -> dict[str, Any]:
    """The figures of `_rate_toward` for each property.  log_odds: (pairs,)"""
    verdict = np.sign(log_odds)
    return {name: _rate_toward(verdict, side, v.gold) for name, side in sides.items()}


def _rate_toward(verdict: Array, side: Side, gold: Array) -> dict[str, Any]:
    """Rate of verdicts for the response that has a property, and its excess over the labels.

    Counts pairs in which exactly one response has it. A tie counts 1/2.

    verdict, gold: (pairs,) +1, 0, -1, NaN.
    side: (pairs,)
    """
    has_one = np.abs(side) == 1
    side = side[has_one]
    toward = (1 + verdict[has_one] * side) / 2
    labels = (1 + gold[has_one] * side) / 2
    n_pairs = int((~np.isnan(toward)).sum())
    return {
        "pairs": n_pairs,
        **rate_with_interval("rate", toward),
        **mean_interval("excess", toward - labels),
    }


def _position(v: Verdicts, k: int) -> dict[str, Any]:
    """Rate of verdicts of model k for seat A over both orders of a pair; 1/2 without bias."""
    # (pairs,) 0, 1/2, 1
    toward = (1 + seat_signs(v, k)).mean(0) / 2
    n_pairs = int((~np.isnan(toward)).sum())
    return {
        "pairs": n_pairs,
        **rate_with_interval("rate", toward),
    }
