"""Rows of a judged dataset and arrays of verdicts, with defaults for whatever a test does not look
at.
"""

from __future__ import annotations

import math

import numpy as np

from scir_cli.analysis.verdicts import Verdicts
from scir_cli.data.schemas import to_table

NAN = math.nan


def response(text="ab", n_tokens=2):
    return {
        "candidate_id": "c",
        "text": text,
        "token_ids": list(range(n_tokens)),
        "finish_reason": "stop",
    }


def verdict(name, log_odds, forward=None, swapped=None, mass=None):
    return {
        "reward_model": name,
        "log_odds": log_odds,
        "forward_log_odds": forward,
        "swapped_log_odds": swapped,
        "verdict_mass": mass,
    }


def pair(i, rewards, gold=None, subset=None, first=None, second=None):
    row = {
        "pair_id": f"p{i}",
        "prompt_id": "q",
        "messages": [],
        "subset": subset,
        "gold_label": gold,
        "rewards": rewards,
        "reference_logps": [],
    }
    return row | {"first": first or response(), "second": second or response()}


def judged(*rows):
    return to_table("judged", rows)


def verdicts(log_odds, forward=None, swapped=None, gold=None, length=None, subset=None):
    log_odds = np.array(log_odds, float)
    k, n = log_odds.shape
    empty, nobody = np.full((k, n), NAN), np.full(n, NAN)
    return Verdicts(
        names=["judge", "implicit", "rubric"][:k],
        log_odds=log_odds,
        forward=empty if forward is None else np.array(forward, float),
        swapped=empty if swapped is None else np.array(swapped, float),
        verdict_mass=empty,
        gold=nobody if gold is None else np.array(gold, float),
        length_difference=nobody if length is None else np.array(length, float),
        answer_length_difference=nobody,
        subset=subset or [None] * n,
        pair_ids=[f"p{i}" for i in range(n)],
    )
