"""Stability of each reward model's verdicts on the same pairs under a second judgment.

The second judgment is from another iteration, judge prompt or seed.

    a, b        Verdicts on the same pairs in the same order (`common_rows` aligns them by pair id)
    prompt      (pairs,) codes of the prompts
    response    (2, pairs) codes of the first and second responses;
                a prompt's response has one code

A pair without a verdict on either side is left out.
Rows judged on other responses have other ids and cannot be compared pair by pair.
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
    """The rows, on each side, of the pairs that both sides hold, and the number left out by reason.

    Each id counts once, at its first row. The rows are in the order of `ids`.

    -> (common,), (common,), reason: number of rows
    """
    row_of = _first_rows(ids)
    other_row_of = _first_rows(others)
    rows = []
    other_rows = []
    for pair, row in row_of.items():
        if pair in other_row_of:
            rows.append(row)
            other_rows.append(other_row_of[pair])

    repeated = len(ids) - len(row_of)
    repeated_others = len(others) - len(other_row_of)
    left_out = {
        "only_here": len(row_of) - len(rows),
        "only_there": len(other_row_of) - len(rows),
        "duplicate_pair": repeated + repeated_others,
    }
    return (
        np.array(rows, dtype=np.intp),
        np.array(other_rows, dtype=np.intp),
        left_out,
    )


def _first_rows(ids: Sequence[str]) -> dict[str, int]:
    """The first row of each id, in order of first appearance."""
    rows: dict[str, int] = {}
    for row, pair in enumerate(ids):
        rows.setdefault(pair, row)
    return rows


def prompt_and_response_codes(table: pa.Table) -> tuple[Codes, Codes]:
    """Codes of the prompts, (pairs,), and of the responses, (2, pairs).

    Two responses have one code if they have the same prompt and the same text.
    """
    prompts = table["prompt_id"].combine_chunks().dictionary_encode()
    # (pairs,)
    prompt = prompts.indices.to_numpy().astype(np.intp)

    texts = []
    for side in ("first", "second"):
        texts.append(pc.struct_field(table[side], "text").combine_chunks())
    encoded = pa.concat_arrays(texts).dictionary_encode()
    # (2 pairs,)
    text = encoded.indices.to_numpy().astype(np.int64)

    n_texts = text.max(initial=0) + 1
    # (2 pairs,) one number per prompt and text
    key = np.tile(prompt, 2) * n_texts + text
    _, response = np.unique(key, return_inverse=True)
    return prompt, response.reshape(2, -1)


def verdict_stability(
    a: Verdicts, b: Verdicts, prompt: Codes, response: Codes
) -> dict[str, dict[str, Any]]:
    """The figures of each reward model that both sides hold.

    They are the agreement of its verdicts, the agreement of its ranks of a prompt's responses, and
    the change in accuracy from b to a over labeled pairs.

    prompt: (pairs,)
    response: (2, pairs)
    """
    figures = {}
    for name in a.names:
        if name not in b.names:
            continue
        log_odds_a = _log_odds_of(a, name)
        log_odds_b = _log_odds_of(b, name)
        difference = np.sign(log_odds_a) - np.sign(log_odds_b)
        # Correct in a less correct in b; a tie counts 1/2.
        accuracy_change = difference * a.gold / 2
        figures[name] = {
            **pairwise_agreement(log_odds_a, log_odds_b),
            **rank_agreement(log_odds_a, log_odds_b, prompt, response),
            **mean_interval("accuracy_change", accuracy_change),
        }
    return rounded_json(figures)


def _log_odds_of(v: Verdicts, name: str) -> Array:
    """The log-odds of the reward model with that name.

    -> (pairs,) nats
    """
    k = v.names.index(name)
    return v.log_odds[k]


def unanimous_rate(runs: Sequence[Verdicts]) -> dict[str, dict[str, Any]]:
    """The share of pairs on which each reward model has the same verdict in all runs.

    runs: verdicts on the same pairs in the same order.
    """
    figures = {}
    for name in runs[0].names:
        if not all(name in v.names for v in runs):
            continue
        # (runs, pairs)
        log_odds = np.stack([_log_odds_of(v, name) for v in runs])
        unanimous = agreement(log_odds).agree
        figures[name] = rate_with_interval("unanimous", unanimous)
    return rounded_json(figures)


def rank_agreement(a: Array, b: Array, prompt: Codes, response: Codes) -> dict[str, Any]:
    """CREAM's two measures of how well two models' ranks of responses agree (arXiv 2410.12735).

    kendall = mean over prompts of 2/(J(J-1)) sum_{i<j} sgn[(a_i - a_j)(b_i - b_j)]
    top_order = share of prompts on which both have the same best and the same worst response.
    cream_consistency = (kendall + 1) / 2, CREAM's C.
    They count prompts with J >= 3 responses of which both models judged every pair.
    The score of a response is the sum of its log-odds against the others. For a pointwise reward
    its rank is the reward's; for a judge the choice of score is ours.

    a, b: (pairs,) log-odds, nats.
    prompt: (pairs,)
    response: (2, pairs)
    """
    known = ~(np.isnan(a) | np.isnan(b))
    prompt = prompt[known]
    response = response[:, known]
    n_responses = int(response.max(initial=-1)) + 1
    n_prompts = int(prompt.max(initial=-1)) + 1
    scores_a = _scores(a[known], response, n_responses)
    scores_b = _scores(b[known], response, n_responses)

    # (responses,)
    prompt_of = np.zeros(n_responses, dtype=np.intp)
    prompt_of[response.ravel()] = np.tile(prompt, 2)
    judged = np.bincount(response.ravel(), minlength=n_responses) > 0
    # (judged,)
    judged_codes = np.flatnonzero(judged)
    prompt_of_judged = prompt_of[judged]

    # (prompts,)
    size = np.bincount(prompt_of_judged, minlength=n_prompts)
    n_pairs = np.bincount(prompt, minlength=n_prompts)
    n_all_pairs = size * (size - 1) // 2
    complete = (size >= 3) & (n_pairs == n_all_pairs)

    # (pairs,) +1: both models put the two responses in the same order
    same = _order(scores_a, response) * _order(scores_b, response)
    # (prompts,)
    total = np.bincount(prompt, same, minlength=n_prompts)
    tau = total / np.maximum(n_pairs, 1)
    tau = tau[complete]

    # (2, prompts with a judged pair)
    ends_a = _best_and_worst(scores_a[judged], prompt_of_judged, judged_codes)
    ends_b = _best_and_worst(scores_b[judged], prompt_of_judged, judged_codes)
    same_ends = (ends_a == ends_b).all(0)
    # (prompts,)
    top_order = np.zeros(n_prompts)
    top_order[np.unique(prompt_of_judged)] = same_ends

    consistency = math.nan
    if len(tau):
        consistency = (float(tau.mean()) + 1) / 2
    return {
        "ranked_prompts": len(tau),
        **mean_interval("kendall", tau),
        "cream_consistency": consistency,
        **rate_with_interval("top_order", top_order[complete]),
    }


def _scores(log_odds: Array, response: Codes, n: int) -> Array:
    """The sum of each response's log-odds against the others, nats.

    log_odds: (pairs,)
    response: (2, pairs)
    n: the number of responses.
    -> (n,)
    """
    first, second = response
    as_first = np.bincount(first, log_odds, minlength=n).astype(np.float64)
    as_second = np.bincount(second, log_odds, minlength=n).astype(np.float64)
    return as_first - as_second


def _order(scores: Array, response: Codes) -> Array:
    """+1 if the first response has the higher score, -1 the second, 0 neither.

    scores: (responses,)
    response: (2, pairs)
    -> (pairs,)
    """
    first, second = response
    margin = scores[first] - scores[second]
    return np.sign(margin)


def _best_and_worst(scores: Array, prompt_of: Codes, response: Codes) -> Codes:
    """The responses with the highest and the lowest score of each prompt.

    Prompts are in order of their codes. Responses of equal score are in order of theirs.

    scores, prompt_of, response: (responses,)
    -> (2, prompts)
    """
    order = np.lexsort((response, scores, prompt_of))
    if not len(order):
        return np.empty((2, 0), np.intp)
    is_last = np.append(np.diff(prompt_of[order]) != 0, True)
    last = np.flatnonzero(is_last)
    first = np.append(0, last[:-1] + 1)
    best = response[order[last]]
    worst = response[order[first]]
    return np.stack([best, worst])


def unshared_reward_models(a: Verdicts, b: Verdicts) -> Mapping[str, list[str]]:
    """The reward models that only one side holds."""
    return {
        "only_here": [name for name in a.names if name not in b.names],
        "only_there": [name for name in b.names if name not in a.names],
    }
