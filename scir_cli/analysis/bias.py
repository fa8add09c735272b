"""What a verdict should not depend on, and does it: seat, length, format, and who wrote the response.

For each property that one response of a pair has and the other lacks (longer, lists, code, headers, written by the judge itself): how often the
verdict goes to the one that has it, and by how much more often than the gold label does. A property may go with quality, so only the excess
over labels is a bias; without labels the rate is what it is. The pairs' intervals take them for independent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from scir_cli.analysis.consistency import rounded_json
from scir_cli.analysis.statistics import mean_interval, rate_with_interval, seat_signs
from scir_cli.analysis.verdicts import Array, Verdicts

Side = NDArray[np.float16]  # (pairs,) +1, -1, 0, NaN
#: Property -> regular expression that a text with it matches (RE2).
FORMATS = {
    "lists": r"(?m)^[ \t]*(?:\d+\.|[-*+])[ \t]",
    "code": "```",
    "headers": r"(?m)^#{1,6}[ \t]",
}


def properties(v: Verdicts, table: pa.Table, own: str | None = None) -> dict[str, Side]:
    """+1 where only the first response is longer, or has a format, or is the judge's own; -1 only the second; 0 neither or both.  name -> (pairs,)

    own: the author whose responses are the judge's own, as `author` names them; None: self-preference is not looked for. NaN: author unknown.
    """
    sides = {"longer": np.sign(v.length_difference).astype(np.float16)}
    texts = _distinct(table, "text")
    sides |= {
        name: _difference(texts, lambda text, p=pattern: pc.match_substring_regex(text, p))
        for name, pattern in FORMATS.items()
    }
    if own is not None:
        sides["own"] = _difference(_distinct(table, "author"), lambda author: pc.equal(author, own))
    return sides


def biases(v: Verdicts, sides: dict[str, Side]) -> dict[str, dict[str, Any]]:
    """For each reward model: `position`, then the figures of each of `properties`; and under "gold" how the labels lean, where there are any."""
    found = {
        name: {"position": _position(v, k), **_leanings(v, v.log_odds[k], sides)}
        for k, name in enumerate(v.names)
    }
    if not np.isnan(v.gold).all():
        found["gold"] = _leanings(v, v.gold, sides)
    return rounded_json(found)


def _distinct(table: pa.Table, field: str) -> pa.DictionaryArray:
    """What the first and then the second responses have there; an answer that is in many pairs is looked at once.  -> (2 pairs,)"""
    chunks = [
        chunk
        for side in ("first", "second")
        for chunk in pc.struct_field(table[side], field).chunks
    ]
    return (
        pa.chunked_array(chunks, pa.string())
        .cast(pa.large_string())
        .dictionary_encode()
        .combine_chunks()
    )


def _difference(encoded: pa.DictionaryArray, has: Any) -> Side:
    found = pc.cast(has(encoded.dictionary), pa.float32()).take(encoded.indices)
    first, second = np.split(found.to_numpy(zero_copy_only=False).astype(np.float16), 2)
    return first - second


def _leanings(v: Verdicts, log_odds: Array, sides: dict[str, Side]) -> dict[str, Any]:
    return {name: _leaning(np.sign(log_odds), side, v.gold) for name, side in sides.items()}


def _leaning(verdict: Array, side: Side, gold: Array) -> dict[str, Any]:
    """Share of verdicts for the response that has the property (a tie: 1/2), over pairs where one has it, and its excess over the labels."""
    one = np.abs(side) == 1
    toward, labels = (1 + verdict[one] * side[one]) / 2, (1 + gold[one] * side[one]) / 2
    return {
        "pairs": int((~np.isnan(toward)).sum()),
        **rate_with_interval("rate", toward),
        **mean_interval("excess", toward - labels),
    }


def _position(v: Verdicts, k: int) -> dict[str, Any]:
    """Share of verdicts for seat A over both orders of a pair; 1/2 without bias."""
    first = (1 + seat_signs(v, k)).mean(0) / 2  # (pairs,) 0, 1/2, 1
    return {"pairs": int((~np.isnan(first)).sum()), **rate_with_interval("rate", first)}
