"""Token trees: any set of token paths laid out once, depth first, so that what paths share is computed once.

A `Branch` is a path and the tokens to be scored on it. A `Forest` is the trie of many paths in one flat sequence: each token keeps its
position along its own path and `subtree_end`, the flat index at which everything that continues it ends. Query q may see key k iff

    k <= q < subtree_end[k]          (and position[q] - position[k] < window, where a layer slides)

That one inequality is causality, branching, and packing of unrelated trees at once. The trie is found from the tokens themselves: two answers
share their prompt, two judge orders their instruction, all pairs of N answers their answers, and everybody a system turn, because they start alike.
Nothing here knows what a prompt is. Out on purpose: attention kernels (policy.py).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ints = np.ndarray  # int64


@dataclass(frozen=True)
class Branch:
    """A path of token ids from the root, and the tokens scored on it.

    Target t is `target_tokens[t]`, predicted by the hidden state of the token at index `target_positions[t]` of the path.
    """

    ids: tuple[int, ...]
    target_positions: tuple[int, ...]
    target_tokens: tuple[int, ...]


def continuation(prompt: Sequence[int], response: Sequence[int]) -> Branch:
    """The branch that scores every token of `response` after `prompt`; its last token needs no forward of its own."""
    ids = (*prompt, *response[:-1])
    return Branch(
        ids, tuple(range(len(prompt) - 1, len(prompt) - 1 + len(response))), tuple(response)
    )


def verdict(prompt: Sequence[int], token: int) -> Branch:
    """The branch that scores one token right after `prompt`; a second token there costs no forward of its own."""
    return Branch(tuple(prompt), (len(prompt) - 1,), (token,))


@dataclass(frozen=True)
class Segment:
    """A run of tokens without a fork, and its ancestors (indices of segments, root first): the keys its queries may see besides its own."""

    start: int
    end: int
    ancestors: tuple[int, ...]


@dataclass(frozen=True)
class Forest:
    tokens: Ints  # (tokens,)
    positions: Ints  # (tokens,) along each token's own path
    subtree_end: Ints  # (tokens,)
    segments: tuple[Segment, ...]
    target_hidden: Ints  # (targets,) flat index of the hidden state that predicts the target
    target_token: Ints  # (targets,)
    target_branch: Ints  # (targets,)
    n_branches: int

    def __len__(self) -> int:
        return len(self.tokens)


def _shared(a: Ints, b: Ints) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def build(branches: Sequence[Branch]) -> Forest:
    """The forest of the branches: the trie of their paths, with their targets in the order given.  # (tokens,) <= sum of path lengths"""
    order = sorted(
        range(len(branches)), key=lambda b: branches[b].ids
    )  # depth-first order of the trie
    paths = [np.asarray(branches[b].ids, dtype=np.int64) for b in order]
    shared = [
        0,
        *(_shared(a, b) for a, b in itertools.pairwise(paths)),
        0,
    ]  # with the neighbour before; sentinel at both ends
    tokens: list[Ints] = []
    positions: list[Ints] = []
    segments: list[Segment] = []
    flat: list[Ints] = [np.empty(0, dtype=np.int64)] * len(
        branches
    )  # of each branch: flat index of each token of its path
    size = 0
    subtree_stop: list[int] = []  # of each segment

    def lay(low: int, high: int, depth: int, ancestors: tuple[int, ...]) -> None:
        """Lays out paths low..high, which are equal before `depth`."""
        nonlocal size
        while (
            low < high and len(paths[low]) == depth
        ):  # a path that ends here: nothing more to lay out
            low += 1
        while low < high:
            top = low + 1
            while top < high and shared[top] > depth:
                top += 1
            stop = min([len(paths[low]), *shared[low + 1 : top]])
            start, size = size, size + stop - depth
            tokens.append(paths[low][depth:stop])
            positions.append(np.arange(depth, stop))
            segments.append(Segment(start, size, ancestors))
            run = np.arange(start, size)
            for path in range(low, top):
                flat[order[path]] = np.concatenate([flat[order[path]], run])
            own = len(subtree_stop)
            subtree_stop.append(size)
            lay(low, top, stop, (*ancestors, own))
            subtree_stop[own] = size
            low = top

    lay(0, len(paths), 0, ())
    subtree_end = np.repeat(
        np.asarray(subtree_stop, dtype=np.int64), [s.end - s.start for s in segments]
    )
    return Forest(
        tokens=_concatenate(tokens),
        positions=_concatenate(positions),
        subtree_end=subtree_end,
        segments=tuple(segments),
        target_hidden=_concatenate(
            [flat[i][list(b.target_positions)] for i, b in enumerate(branches)]
        ),
        target_token=_concatenate([np.asarray(b.target_tokens, dtype=np.int64) for b in branches]),
        target_branch=np.repeat(np.arange(len(branches)), [len(b.target_tokens) for b in branches]),
        n_branches=len(branches),
    )


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)


def visible(forest: Forest, window: int | None = None) -> np.ndarray:
    """Which key each query may see, from the inequality.  # (tokens, tokens) bool, [q, k]"""
    index = np.arange(len(forest))
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < forest.subtree_end[None, :])
    if window is not None:
        mask &= forest.positions[:, None] - forest.positions[None, :] < window
    return mask


class _Counter:
    """Counts the tokens of a growing trie without laying it out: a path adds what it does not share with a neighbour in the order of paths."""

    def __init__(self) -> None:
        self.paths: list[tuple[int, ...]] = []
        self.n_tokens = 0

    def add(self, branches: Sequence[Branch]) -> int:
        """The size of the forest with these branches as well, in tokens."""
        for branch in branches:
            place = bisect.bisect_left(self.paths, branch.ids)
            path = np.asarray(branch.ids, dtype=np.int64)
            near = self.paths[max(0, place - 1) : place + 1]
            self.n_tokens += len(path) - max(
                (_shared(path, np.asarray(p, dtype=np.int64)) for p in near), default=0
            )
            self.paths.insert(place, branch.ids)
        return self.n_tokens


def size(branches: Sequence[Branch]) -> int:
    """Tokens of the forest of the branches."""
    return _Counter().add(branches)


def pack(groups: Sequence[Sequence[Branch]], max_tokens: int) -> list[tuple[int, int]]:
    """Ranges of consecutive groups whose forests hold at most `max_tokens` tokens each; a larger group stands alone.

    A group (the branches of one pair, say) is never cut. What groups of a pack share counts once: neighbours should be of one prompt.
    """
    ranges: list[tuple[int, int]] = []
    low, counter = 0, _Counter()
    for index, group in enumerate(groups):
        if counter.add(group) > max_tokens and index > low:
            ranges.append((low, index))
            low, counter = index, _Counter()
            counter.add(group)
    return [*ranges, (low, len(groups))] if groups else []
