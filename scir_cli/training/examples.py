"""Rows of pairs -> examples that an objective trains on, with label and size in tokens."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from scir_cli.data import dataset, folders, readers
from scir_cli.data.storage import to_path
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import DataError
from scir_cli.rewards.pairs import encode_pairs
from scir_cli.training.objectives import Example, Objective

LABEL = {"first": 1, "second": -1, None: 0}


def load_training_rows(spec: str, limit: int | None) -> tuple[pa.Table, Counter[str]]:
    """The pairs of --input, and the number of dropped rows by reason.

    Raises DataError if no pair is left.
    """
    path = to_path(spec)
    dropped: Counter[str] = Counter()
    if folders.is_dataset(path):
        table = dataset.read_dataset(path, "preferences", "judged").slice(0, limit)
    else:
        table, dropped = readers.load_pairs(spec, limit)
    if not table.num_rows:
        raise DataError(f"{spec} holds no pair to train on ({dict(dropped) or 'it has no rows'})")
    return table, dropped


def load_labelled_rows(spec: str) -> pa.Table:
    """The pairs with a gold label, for validation and anchors."""
    table, _ = readers.load_pairs(spec)
    return table.filter(pc.is_valid(table["gold_label"]))


def encode_examples(
    table: pa.Table, objective: Objective, policy: LazyPolicy, spec: str, *, labelled: bool
) -> tuple[list[Example], Counter[str]]:
    """The rows as examples, and the number of dropped rows by reason.

    labelled: use the column `label`, or the gold labels without it; else all are unlabelled.
    spec: the source of the rows, for the error message.
    Drops: prompt_boundary, unlabelled, too_long.
    Raises DataError if all rows are dropped.
    """
    encoded, pairs, drops = encode_pairs(table, policy.chat)
    labels = _labels(encoded) if labelled else [0] * len(pairs)
    probabilities = _label_probabilities(encoded)
    examples = []
    for pair, label, probability in zip(pairs, labels, probabilities, strict=True):
        if labelled and label == 0:
            drops["unlabelled"] += 1
            continue
        branches = objective.branches(Example(pair, label))
        longest = max(len(branch.ids) for branch in branches)
        if longest > policy.context_length:
            drops["too_long"] += 1
            continue
        examples.append(Example(pair, label, probability))
    if table.num_rows and not examples:
        raise DataError(f"{spec} leaves no pair to train on: {dict(drops)}")
    return examples, drops


def _labels(table: pa.Table) -> list[int]:
    """+1, -1, or 0 without a label, of each row."""
    column = "label" if "label" in table.column_names else "gold_label"
    return [LABEL[word] for word in table[column].to_pylist()]


def _label_probabilities(table: pa.Table) -> list[float]:
    """The probability that each row's label is correct; 1 if it is not in the table."""
    if "label_probability" not in table.column_names:
        return [1.0] * table.num_rows
    probabilities = table["label_probability"].to_pylist()
    return [1.0 if probability is None else probability for probability in probabilities]
