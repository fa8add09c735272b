"""The same pairs judged again, by another iteration, judge prompt or seed: how much of each reward model's verdicts stays.

    a, b        Verdicts on the same pairs in the same order (`in_common` finds them by pair id)
    prompt      (pairs,) codes;  response (2, pairs) codes of first and second, one for each response of a prompt

A missing verdict on either side leaves the pair out. Rows judged on other responses have other ids and cannot be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from scir_cli.analysis.consistency import pairwise_agreement, rounded_json
from scir_cli.analysis.statistics import agreement, mean_interval, rate_with_interval
from scir_cli.analysis.verdicts import Array, Verdicts

Codes = NDArray[np.intp]


def common_rows(ids: Sequence[str], others: Sequence[str]) -> tuple[Codes, Codes, dict[str, int]]:
    """Rows of the pairs that both hold, each id once (its first row), in the order of `ids`; and how many are left out, by reason."""
    place = {pair: i for i, pair in reversed(list(enumerate(others)))}
    seen = {pair: i for i, pair in reversed(list(enumerate(ids)))}
    rows = sorted((i, place[pair]) for pair, i in seen.items() if pair in place)
    left = {
        "only_here": len(seen) - len(rows),
        "only_there": len(place) - len(rows),
        "duplicate_pair": len(ids) - len(seen) + len(others) - len(place),
    }
    both = np.array(rows, dtype=np.intp).reshape(-1, 2)
    return both[:, 0], both[:, 1], left


def prompt_and_response_codes(table: pa.Table) -> tuple[Codes, Codes]:
    """Prompts (pairs,) and responses (2, pairs) as numbers: a response is known by its text within its prompt."""
    prompt = (
        table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.intp)
    )
    texts = pa.concat_arrays(
        [pc.struct_field(table[side], "text").combine_chunks() for side in ("first", "second")]
    )
    text = texts.dictionary_encode().indices.to_numpy().astype(np.int64)
    _, response = np.unique(
        np.tile(prompt, 2) * (text.max(initial=0) + 1) + text, return_inverse=True
    )
    return prompt, response.reshape(2, -1)


def verdict_stability(
    a: Verdicts, b: Verdicts, prompt: Codes, response: Codes
) -> dict[str, dict[str, Any]]:
    """What stays of each reward model that both hold: verdicts, ranks of a prompt's responses, and accuracy where there are labels."""
    found = {}
    for name in [name for name in a.names if name in b.names]:
        one, other = a.log_odds[a.names.index(name)], b.log_odds[b.names.index(name)]
        change = (
            (np.sign(one) - np.sign(other)) * a.gold / 2
        )  # correct here less correct there, a tie being 1/2
        ranks = rank_agreement(one, other, prompt, response)
        found[name] = {
            **pairwise_agreement(one, other),
            **ranks,
            **mean_interval("accuracy_change", change),
        }
    return rounded_json(found)


def unanimous_rate(runs: Sequence[Verdicts]) -> dict[str, dict[str, Any]]:
    """How often each reward model gives a pair the same verdict in all runs.  runs: on the same pairs in the same order"""
    names = [name for name in runs[0].names if all(name in v.names for v in runs)]
    stacked = {name: np.stack([v.log_odds[v.names.index(name)] for v in runs]) for name in names}
    return rounded_json(
        {
            name: rate_with_interval("unanimous", agreement(log_odds).agree)
            for name, log_odds in stacked.items()
        }
    )


def rank_agreement(a: Array, b: Array, prompt: Codes, response: Codes) -> dict[str, Any]:
    """CREAM's two measures over prompts with three or more responses of which both judged every pair (arXiv 2410.12735).

    A response's score is its sum of log-odds against the others: for a pointwise reward its rank is the reward's own, for a judge the choice
    of score is ours.  kendall = mean of 2/(J(J-1)) sum_{i<j} sgn[(a_i - a_j)(b_i - b_j)];  top_order: the same best and the same worst.
    """
    known = ~(np.isnan(a) | np.isnan(b))
    prompt, response = prompt[known], response[:, known]
    n_responses, n_prompts = int(response.max(initial=-1)) + 1, int(prompt.max(initial=-1)) + 1
    scores = [_scores(side[known], response, n_responses) for side in (a, b)]
    owner = np.zeros(n_responses, dtype=np.intp)
    owner[response.ravel()] = np.tile(prompt, 2)
    judged = np.bincount(response.ravel(), minlength=n_responses) > 0
    size = np.bincount(owner[judged], minlength=n_prompts)  # J
    pairs = np.bincount(prompt, minlength=n_prompts)
    whole = (size >= 3) & (pairs == size * (size - 1) // 2)
    same = np.prod([np.sign(s[response[0]] - s[response[1]]) for s in scores], axis=0)
    tau = (np.bincount(prompt, same, minlength=n_prompts) / np.maximum(pairs, 1))[whole]
    ends = [_best_and_worst(s[judged], owner[judged], np.flatnonzero(judged)) for s in scores]
    top = np.zeros(n_prompts)
    top[np.unique(owner[judged])] = (ends[0] == ends[1]).all(0)
    cream = {
        "cream_consistency": (float(tau.mean()) + 1) / 2 if len(tau) else math.nan
    }  # CREAM's C
    return {
        "ranked_prompts": len(tau),
        **mean_interval("kendall", tau),
        **cream,
        **rate_with_interval("top_order", top[whole]),
    }


def _scores(log_odds: Array, response: Codes, n: int) -> Array:
    won, lost = (np.bincount(side, log_odds, minlength=n).astype(np.float64) for side in response)
    return won - lost


def _best_and_worst(scores: Array, owner: Codes, response: Codes) -> Codes:
    """The responses with the highest and the lowest score of each prompt, in order of the prompts' codes.  -> (2, prompts)"""
    order = np.lexsort((response, scores, owner))
    last = (
        np.flatnonzero(np.append(np.diff(owner[order]) != 0, True))
        if len(order)
        else np.empty(0, np.intp)
    )
    first = np.append(0, last[:-1] + 1) if len(last) else last
    return np.stack([response[order[last]], response[order[first]]])


def unshared_reward_models(a: Verdicts, b: Verdicts) -> Mapping[str, list[str]]:
    """Reward models that only one side holds."""
    return {
        "only_here": [n for n in a.names if n not in b.names],
        "only_there": [n for n in b.names if n not in a.names],
    }
