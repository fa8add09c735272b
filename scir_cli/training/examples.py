"""Rows of pairs -> examples: what an objective trains on, each with its label and its size in tokens."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from scir_cli.data import dataset, folders, readers
from scir_cli.data.storage import to_path
from scir_cli.engine import trees
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import DataError
from scir_cli.rewards.pairs import encode_pairs
from scir_cli.training.objectives import Example, Objective

LABEL = {"first": 1, "second": -1, None: 0}


def load_training_rows(spec: str, limit: int | None) -> tuple[pa.Table, Counter[str]]:
    """The pairs of --input, and the rows dropped by reason. Raises DataError if there is none."""
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
    """The rows as examples, and those that cannot be trained on by reason.

    A dataset's labels are its column `label`, or the gold labels if it has none. labelled: use them; else all are unlabelled.
    spec: where the rows are from, for the error. Drops: prompt_boundary, unlabelled, too_long.
    Raises DataError if rows are given and none of them is left.
    """
    encoded, pairs, drops = encode_pairs(table, policy.chat)
    names = encoded.column_names
    labels = (
        encoded["label" if "label" in names else "gold_label"].to_pylist()
        if labelled
        else [None] * len(pairs)
    )
    probabilities = (
        encoded["label_probability"].to_pylist()
        if "label_probability" in names
        else [None] * len(pairs)
    )
    examples = []
    for pair, word, probability in zip(pairs, labels, probabilities, strict=True):
        label = LABEL[word]
        if labelled and label == 0:
            drops["unlabelled"] += 1
            continue
        branches = objective.branches(Example(pair, label))
        if max(len(b.ids) for b in branches) > policy.context_length:
            drops["too_long"] += 1
            continue
        examples.append(
            Example(pair, label, 1.0 if probability is None else probability, trees.size(branches))
        )
    if table.num_rows and not examples:
        raise DataError(f"{spec} leaves no pair to train on: {dict(drops)}")
    return examples, drops
