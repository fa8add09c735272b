"""Verdicts of reward models -> the `rewards` column, and small operations on tables of pairs."""

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
    """The `rewards` column: the verdicts of each pair, one reward model after the other.  -> (pairs,)

    answers: of each reward model; log-odds (pairs,), nats.
    rationales: token ids of what each model wrote about each pair, in that order; empty if none wrote.
    min_mass: probability on the verdict tokens below which there is no verdict (null).
    """
    n = len(next(iter(answers.values())).log_odds)

    def column(values: Sequence[torch.Tensor | None]) -> pa.Array:
        numbers = np.stack(
            [np.full(n, np.nan) if v is None else v.double().numpy() for v in values], axis=1
        ).ravel()
        return pa.array(numbers, mask=np.isnan(numbers))

    outputs = answers.values()
    log_odds = [_confident_log_odds(output, min_mass) for output in outputs]
    orders = [
        column([None if output.orders is None else output.orders[order] for output in outputs])
        for order in range(2)
    ]
    masses = column([output.verdict_mass for output in outputs])
    columns = [pa.array([*answers] * n, pa.string()), column(log_odds), *orders, masses]
    columns.append(
        pa.array(
            rationales or [None] * (n * len(answers)),
            schemas.REWARDS.value_type.field("rationale_token_ids").type,
        )
    )
    verdicts = pa.StructArray.from_arrays(columns, fields=list(schemas.REWARDS.value_type))
    ends = pa.array(np.arange(n + 1) * len(answers), pa.int32())
    return pa.ListArray.from_arrays(ends, verdicts, type=schemas.REWARDS)


def _confident_log_odds(output: RewardOutput, min_mass: float) -> torch.Tensor:
    """The log-odds, NaN where the verdict tokens have too little probability.  -> (pairs,) nats"""
    if output.verdict_mass is None:
        return output.log_odds
    return output.log_odds.masked_fill(output.verdict_mass.double() < min_mass, torch.nan)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with other values in a column."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), values)


def filter_rows(table: pa.Table, keep: np.ndarray, reason: str) -> tuple[pa.Table, Counter[str]]:
    """The rows to keep, and the number of the others under the reason.  keep: (rows,) bool"""
    return table.filter(pa.array(keep)), +Counter({reason: int((~keep).sum())})
