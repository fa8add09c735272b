"""Verdicts of reward models -> the `rewards` column; small operations on tables of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scir_cli.data import schemas
from scir_cli.rewards.log_odds import RewardOutput


def rewards_column(
    answers: dict[str, RewardOutput], rationales: list[Any], min_mass: float
) -> pa.Array:
    """The `rewards` column: the verdicts of each pair, one per reward model.  -> (pairs,)

    answers: output of each reward model; log-odds (pairs,), nats.
    rationales: token ids of each model's rationale about each pair, in the same order as the
    verdicts; empty if no model wrote any.
    min_mass: probability on the verdict tokens below which the verdict is null.
    """
    outputs = answers.values()
    n_pairs = len(next(iter(outputs)).log_odds)
    n_verdicts = n_pairs * len(answers)

    log_odds = [_confident_log_odds(output, min_mass) for output in outputs]
    forward = [None if output.orders is None else output.orders[0] for output in outputs]
    swapped = [None if output.orders is None else output.orders[1] for output in outputs]
    masses = [output.verdict_mass for output in outputs]
    token_ids_type = schemas.REWARDS.value_type.field("rationale_token_ids").type

    columns = [
        pa.array([*answers] * n_pairs, pa.string()),
        _interleave(log_odds, n_pairs),
        _interleave(forward, n_pairs),
        _interleave(swapped, n_pairs),
        _interleave(masses, n_pairs),
        pa.array(rationales or [None] * n_verdicts, token_ids_type),
    ]
    fields = list(schemas.REWARDS.value_type)
    verdicts = pa.StructArray.from_arrays(columns, fields=fields)
    offsets = pa.array(np.arange(n_pairs + 1) * len(answers), pa.int32())
    return pa.ListArray.from_arrays(offsets, verdicts, type=schemas.REWARDS)


def _interleave(values: Sequence[torch.Tensor | None], n_pairs: int) -> pa.Array:
    """The values of all models, pair by pair; NaN and a missing tensor become null.

    values: (pairs,) per model -> (pairs * models,)
    """
    missing = np.full(n_pairs, np.nan)
    per_model = [missing if value is None else value.double().numpy() for value in values]
    numbers = np.stack(per_model, axis=1).ravel()
    return pa.array(numbers, mask=np.isnan(numbers))


def _confident_log_odds(output: RewardOutput, min_mass: float) -> torch.Tensor:
    """The log-odds, NaN if the verdict tokens have too little probability.  -> (pairs,) nats"""
    if output.verdict_mass is None:
        return output.log_odds

    too_little = output.verdict_mass.double() < min_mass
    return output.log_odds.masked_fill(too_little, torch.nan)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with other values in one of its columns.  values: (rows,)"""
    index = table.schema.get_field_index(name)
    field = table.schema.field(index)
    return table.set_column(index, field, values)


def filter_rows(table: pa.Table, keep: np.ndarray, reason: str) -> tuple[pa.Table, Counter[str]]:
    """The rows to keep, and the number of dropped rows under the reason.  keep: (rows,) bool"""
    n_dropped = int((~keep).sum())
    # + removes a count of zero
    drops = +Counter({reason: n_dropped})
    return table.filter(pa.array(keep)), drops
