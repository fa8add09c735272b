"""Rows of pairs -> examples that an objective trains on, with label and size in tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from scir_cli.data import dataset, folders, readers
from scir_cli.data.storage import to_path
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import DataError
from scir_cli.rewards import reward_models
from scir_cli.rewards.pairs import encode_pairs, without_foreign_ids
from scir_cli.training.objectives import Example, Objective

LABEL = {"first": 1, "second": -1, None: 0}


@dataclass(frozen=True)
class PairRows:
    """The pairs of one source.

    spec: the source, as the user named it.
    dropped: number of rows of the source that are not in the table, by reason.
    encoding: digest of tokenizer and chat template of the token ids; None: unknown, or no ids.
    """

    spec: str
    table: pa.Table
    dropped: Counter[str]
    encoding: str | None = None


@dataclass(frozen=True)
class Encoded:
    """The pairs of one source as examples.

    drops: number of rows of the source that are no example, by reason.
    encoded_again: number of pairs whose token ids another tokenizer or chat template made.
    """

    examples: list[Example] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    encoded_again: int = 0

    @property
    def account(self) -> dict[str, Any]:
        """Rows in, rows out and drops, as a manifest holds them."""
        n_out = len(self.examples)
        account = {
            "rows_in": n_out + self.drops.total(),
            "rows_out": n_out,
            "drops": dict(self.drops),
        }
        again = {"encoded_again": self.encoded_again} if self.encoded_again else {}
        return {**account, **again}


def load_training_rows(spec: str, limit: int | None) -> PairRows:
    """The pairs of --input.

    Raises DataError if no pair is left.
    """
    path = to_path(spec)
    if folders.is_dataset(path):
        opened = dataset.open_dataset(path, "preferences", "judged").head(limit)
        rows = PairRows(spec, opened.read(), Counter(), opened.encoding)
    else:
        rows = PairRows(spec, *readers.load_pairs(spec, limit))
    if not rows.table.num_rows:
        reasons = dict(rows.dropped) or "it has no rows"
        raise DataError(f"{spec} holds no pair to train on ({reasons})")
    return rows


def load_labeled_rows(spec: str) -> PairRows:
    """The pairs of --validation or --anchors, whose labels are the gold labels.

    Raises DataError if no pair has one.
    """
    pairs, dropped = readers.open_pairs(spec)
    table = pairs.slice(0, pairs.num_rows)
    encoding = dataset.encoding_of(pairs)
    if not pc.count(table["gold_label"]).as_py():
        dropped = +(dropped + Counter(unlabeled=table.num_rows))
        reasons = dict(dropped) or "it has no rows"
        raise DataError(f"{spec} holds no pair with a gold label ({reasons})")
    return PairRows(spec, table, dropped, encoding)


def encode_examples(
    rows: PairRows, objective: Objective, policy: LazyPolicy, *, labeled: bool
) -> Encoded:
    """The rows as examples.

    labeled: use the column `label`, or the gold labels without it; else all are unlabeled.
    Drops: those of the source; as in `rewards.pairs.tokenize_pairs`; unlabeled;
    unfinished_rationale (it ends inside its reasoning); too_long.
    Raises DataError if all rows are dropped.
    """
    table, encoded_again = without_foreign_ids(rows.table, rows.encoding, policy.encoding)
    encoded, pairs, drops = encode_pairs(table, policy.chat)
    drops += rows.dropped
    labels = _labels(encoded) if labeled else [0] * len(pairs)
    probabilities = _label_probabilities(encoded)
    examples = []
    for pair, label, probability in zip(pairs, labels, probabilities, strict=True):
        if labeled and label == 0:
            drops["unlabeled"] += 1
            continue
        if reward_models.undecided(objective.models, pair):
            drops["unfinished_rationale"] += 1
            continue
        branches = objective.branches(Example(pair, label))
        longest = max(len(branch.ids) for branch in branches)
        if longest > policy.context_length:
            drops["too_long"] += 1
            continue
        examples.append(Example(pair, label, probability))
    if not examples:
        raise DataError(f"{rows.spec} leaves no pair to train on: {dict(drops)}")
    return Encoded(examples, drops, encoded_again)


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
