"""Right-padded batches of token paths, for models that cannot score token trees.

In a causal layer, be it attention, a convolution or a recurrence, nothing depends on the tokens to
the right. Paths of different lengths can therefore share a batch without a mask, and a path that
is the start of another one is scored on that one's row: both verdicts of a judge prompt, and a
prompt with its answers, are one row each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scir_cli.engine.trees import Branch, Ints

#: How a model that takes no trees is scored (probe.py selects the first that is exact):
#: padded: paths of similar lengths in a batch; equal: paths of one length in a batch, each for
#: itself; alone: one path at a time, through the model's own head.
Batching = Literal["padded", "equal", "alone"]

#: A batch of at most this many tokens takes about as long as one row of it.
SMALL_BATCH_TOKENS = 512

#: A larger batch has at most this many tokens, with padding, per token without.
MAX_PADDING = 1.25


@dataclass(frozen=True)
class Batch:
    """Some paths as rows, and the targets that are scored on them.

    targets: their indices among the targets of all branches, in the order of the branches.
    """

    ids: Ints  # (rows, longest)
    lengths: Ints  # (rows,) without padding
    target_hidden: Ints  # (targets,) flat index of the hidden state that predicts the target
    target_token: Ints  # (targets,)
    targets: Ints  # (targets,)


def build(branches: Sequence[Branch], batching: Batching, max_tokens: int | None) -> list[Batch]:
    """Batches that score every target of the branches once.

    max_tokens: of a batch, with padding; a longer path is a batch by itself. None: one batch.
    """
    paths = sorted({branch.ids for branch in branches})
    row_of_path = _rows(paths, shares_prefixes=batching == "padded")
    rows = sorted(set(row_of_path.values()), key=lambda row: (-len(row), row))

    members: dict[tuple[int, ...], list[tuple[int, Branch]]] = {row: [] for row in rows}
    first_target = 0
    for branch in branches:
        members[row_of_path[branch.ids]].append((first_target, branch))
        first_target += len(branch.target_tokens)
    return [
        _batch(group, [members[row] for row in group])
        for group in _groups(rows, batching, max_tokens)
    ]


def _rows(
    paths: Sequence[tuple[int, ...]], *, shares_prefixes: bool
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Per path, the path on whose row it is scored.  paths: sorted and distinct"""
    row_of_path: dict[tuple[int, ...], tuple[int, ...]] = {}
    following: tuple[int, ...] = ()
    for path in reversed(paths):
        # All paths between a path and one that continues it continue it as well.
        continues = shares_prefixes and following[: len(path)] == path
        row_of_path[path] = row_of_path[following] if continues else path
        following = path
    return row_of_path


def _groups(
    rows: Sequence[tuple[int, ...]], batching: Batching, max_tokens: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """The rows of each batch.  rows: longest first"""
    if batching == "equal":
        for _, same_length in itertools.groupby(rows, key=len):
            yield from _limited(list(same_length), max_tokens)
    else:
        yield from _limited(rows, max_tokens)


def _limited(
    rows: Sequence[tuple[int, ...]], max_tokens: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive rows within the limits on tokens and on padding.  rows: longest first"""
    group: list[tuple[int, ...]] = []
    n_tokens = 0
    for row in rows:
        if group and max_tokens is not None:
            padded = (len(group) + 1) * len(group[0])
            free = min(max_tokens, SMALL_BATCH_TOKENS)
            limit = min(max_tokens, MAX_PADDING * (n_tokens + len(row)))
            if padded > free and padded > limit:
                yield group
                group = []
                n_tokens = 0
        group.append(row)
        n_tokens += len(row)
    if group:
        yield group


def _batch(
    rows: Sequence[tuple[int, ...]], members: Sequence[Sequence[tuple[int, Branch]]]
) -> Batch:
    """The batch of some rows, longest first.

    members: per row, its branches, each with the index of its first target.
    """
    longest = len(rows[0])
    # A row is padded with its last token: any token of the vocabulary serves.
    ids = np.array([[*row, *row[-1:] * (longest - len(row))] for row in rows], dtype=np.int64)
    hidden: list[int] = []
    tokens: list[int] = []
    targets: list[int] = []
    for index, branches in enumerate(members):
        for first, branch in branches:
            hidden.extend(index * longest + p for p in branch.target_positions)
            tokens.extend(branch.target_tokens)
            targets.extend(range(first, first + len(branch.target_tokens)))
    return Batch(
        ids=ids,
        lengths=np.array([len(row) for row in rows], dtype=np.int64),
        target_hidden=np.array(hidden, dtype=np.int64),
        target_token=np.array(tokens, dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
    )
