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
    """The `rewards` column: the verdicts of each pair, one reward model after the other: (pairs,).

    answers: output of each reward model; log-odds (pairs,), nats.
    rationales: token ids that each model wrote about each pair, in the same order; or empty.
    min_mass: a verdict is null if its tokens have less probability than this.
    """
    n = len(next(iter(answers.values())).log_odds)

    def column(values: Sequence[torch.Tensor | None]) -> pa.Array:
        """Values of each model (pairs,) -> one array (pairs * models,), NaN as null."""
        missing = np.full(n, np.nan)
        parts = [missing if value is None else value.double().numpy() for value in values]
        numbers = np.stack(parts, axis=1).ravel()
        return pa.array(numbers, mask=np.isnan(numbers))

    outputs = list(answers.values())
    orders = [output.orders for output in outputs]
    written_type = schemas.REWARDS.value_type.field("rationale_token_ids").type
    columns = [
        pa.array([*answers] * n, pa.string()),
        column([_confident_log_odds(output, min_mass) for output in outputs]),
        column([None if order is None else order[0] for order in orders]),
        column([None if order is None else order[1] for order in orders]),
        column([output.verdict_mass for output in outputs]),
        pa.array(rationales or [None] * (n * len(answers)), written_type),
    ]
    verdicts = pa.StructArray.from_arrays(columns, fields=list(schemas.REWARDS.value_type))
    ends = pa.array(np.arange(n + 1) * len(answers), pa.int32())
    return pa.ListArray.from_arrays(ends, verdicts, type=schemas.REWARDS)


def _confident_log_odds(output: RewardOutput, min_mass: float) -> torch.Tensor:
    """The log-odds, (pairs,) nats; NaN if the verdict tokens have too little probability."""
    if output.verdict_mass is None:
        return output.log_odds
    return output.log_odds.masked_fill(output.verdict_mass.double() < min_mass, torch.nan)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with the values of one column replaced."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), values)


def filter_rows(table: pa.Table, keep: np.ndarray, reason: str) -> tuple[pa.Table, Counter[str]]:
    """The rows where `keep` (rows,) is true, and the number of the others under the reason."""
    return table.filter(pa.array(keep)), +Counter({reason: int((~keep).sum())})
