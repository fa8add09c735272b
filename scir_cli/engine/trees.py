"""Token trees: token paths laid out depth first, so that shared tokens are computed once.

A `Branch` is a path and the tokens to be scored on it. A `Forest` is the trie of many paths in one
flat sequence. Each token has its position along its path and `subtree_end`, the flat index at
which everything that continues it ends. Query q may see key k iff

    k <= q < subtree_end[k]          (and position[q] - position[k] < window, in a layer with one)

This inequality covers causality, branching, and the packing of unrelated trees.

The trie is computed from the tokens alone: two answers share their prompt, two judge orders their
instruction, all pairs of N answers their answers, and all prompts a system turn, because they start
with the same tokens. Nothing here depends on the meaning of a prompt.
Left out: attention, which is in tree_attention.py.
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

    Target t is `target_tokens[t]`. It is predicted by the hidden state of the token at index
    `target_positions[t]` of the path.
    """

    ids: tuple[int, ...]
    target_positions: tuple[int, ...]
    target_tokens: tuple[int, ...]


def continuation(prompt: Sequence[int], response: Sequence[int]) -> Branch:
    """The branch that scores every token of `response` after `prompt`.

    The last token of the response is a target only: it is not part of the path.
    """
    ids = (*prompt, *response[:-1])
    first = len(prompt) - 1
    positions = range(first, first + len(response))
    return Branch(ids, tuple(positions), tuple(response))


def verdict(prompt: Sequence[int], token: int) -> Branch:
    """The branch that scores one token right after `prompt`.

    Several verdicts on one prompt share its path and cost no further forward pass.
    """
    return Branch(tuple(prompt), (len(prompt) - 1,), (token,))


@dataclass(frozen=True)
class Segment:
    """A run of tokens start..end without a fork.

    ancestors: indices of segments, root first; with the segment itself, the keys of its queries.
    """

    start: int
    end: int
    ancestors: tuple[int, ...]


@dataclass(frozen=True)
class Forest:
    """The trie of some branches in one flat sequence, and their targets.

    Targets are in the order of the branches. len(forest): number of tokens.
    """

    tokens: Ints  # (tokens,)
    positions: Ints  # (tokens,) along the path of each token
    subtree_end: Ints  # (tokens,)
    segments: tuple[Segment, ...]
    target_hidden: Ints  # (targets,) flat index of the hidden state that predicts the target
    target_token: Ints  # (targets,)
    target_branch: Ints  # (targets,)
    n_branches: int

    def __len__(self) -> int:
        return len(self.tokens)


def build(branches: Sequence[Branch]) -> Forest:
    """The forest of the branches, with their targets in the order of the branches.

    It has at most as many tokens as all paths together, and fewer if paths share a prefix.
    """
    # Sorted by their tokens, paths are in the depth-first order of their trie.
    order = sorted(range(len(branches)), key=lambda b: branches[b].ids)
    trie = _DepthFirstTrie([_as_array(branches[b].ids) for b in order])

    target_hidden: list[Ints] = [np.empty(0, dtype=np.int64)] * len(branches)
    for branch, flat_index in zip(order, trie.flat_index, strict=True):
        positions = list(branches[branch].target_positions)
        target_hidden[branch] = flat_index[positions]

    segment_sizes = [s.end - s.start for s in trie.segments]
    n_targets = [len(b.target_tokens) for b in branches]
    return Forest(
        tokens=_concatenate(trie.tokens),
        positions=_concatenate(trie.positions),
        subtree_end=np.repeat(_as_array(trie.subtree_end), segment_sizes),
        segments=tuple(trie.segments),
        target_hidden=_concatenate(target_hidden),
        target_token=_concatenate([_as_array(b.target_tokens) for b in branches]),
        target_branch=np.repeat(np.arange(len(branches)), n_targets),
        n_branches=len(branches),
    )


class _DepthFirstTrie:
    """The trie of sorted paths, laid out segment by segment.

    tokens, positions, segments, subtree_end: one entry per segment.
    flat_index: per path, the flat index of each of its tokens.
    """

    def __init__(self, paths: Sequence[Ints]) -> None:
        self.paths = paths
        # Tokens that path i shares with path i - 1; nothing before the first and after the last.
        neighbors = itertools.pairwise(paths)
        self.shared = [0, *(_shared_prefix(a, b) for a, b in neighbors), 0]

        self.n_tokens = 0
        self.tokens: list[Ints] = []
        self.positions: list[Ints] = []
        self.segments: list[Segment] = []
        self.subtree_end: list[int] = []
        self.flat_index: list[Ints] = [np.empty(0, dtype=np.int64)] * len(paths)
        self._lay_out(0, len(paths), 0, ())

    def _lay_out(self, low: int, high: int, depth: int, ancestors: tuple[int, ...]) -> None:
        """Lays out paths low..high, which are equal before `depth`."""
        # Paths that end at this depth are laid out already.
        while low < high and len(self.paths[low]) == depth:
            low += 1

        while low < high:
            # Paths low..top go on with the same token, and fork or end at `stop`.
            top = low + 1
            while top < high and self.shared[top] > depth:
                top += 1
            stop = min([len(self.paths[low]), *self.shared[low + 1 : top]])

            segment = self._add_segment(low, top, depth, stop, ancestors)
            self._lay_out(low, top, stop, (*ancestors, segment))
            self.subtree_end[segment] = self.n_tokens
            low = top

    def _add_segment(
        self, low: int, top: int, depth: int, stop: int, ancestors: tuple[int, ...]
    ) -> int:
        """Adds tokens depth..stop of the paths low..top as a segment, and returns its index."""
        start = self.n_tokens
        end = start + stop - depth
        self.n_tokens = end
        self.tokens.append(self.paths[low][depth:stop])
        self.positions.append(np.arange(depth, stop))

        run = np.arange(start, end)
        for path in range(low, top):
            self.flat_index[path] = np.concatenate([self.flat_index[path], run])

        self.segments.append(Segment(start, end, ancestors))
        self.subtree_end.append(end)
        return len(self.segments) - 1


def _shared_prefix(a: Ints, b: Ints) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _as_array(values: Sequence[int]) -> Ints:
    return np.asarray(values, dtype=np.int64)


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)


def visible(forest: Forest, window: int | None = None) -> np.ndarray:
    """Which keys each query may see, from the inequality above.

    Returns (tokens, tokens) bool, indexed [query, key].
    """
    index = np.arange(len(forest))
    query = index[:, None]
    key = index[None, :]
    mask = (key <= query) & (query < forest.subtree_end[None, :])
    if window is not None:
        distance = forest.positions[:, None] - forest.positions[None, :]
        mask &= distance < window
    return mask


class _TokenCounter:
    """Counts the tokens of a growing trie without laying it out.

    A path adds the tokens that it does not share with either neighbor in the sorted order of paths.
    """

    def __init__(self) -> None:
        self.paths: list[tuple[int, ...]] = []
        self.n_tokens = 0

    def add(self, branches: Sequence[Branch]) -> int:
        """Adds branches, and returns the size of the forest with them, in tokens."""
        for branch in branches:
            index = bisect.bisect_left(self.paths, branch.ids)
            neighbors = self.paths[max(0, index - 1) : index + 1]
            path = _as_array(branch.ids)
            shared = [_shared_prefix(path, _as_array(neighbor)) for neighbor in neighbors]
            self.n_tokens += len(path) - max(shared, default=0)
            self.paths.insert(index, branch.ids)
        return self.n_tokens


def size(branches: Sequence[Branch]) -> int:
    """The size of the forest of the branches, in tokens."""
    return _TokenCounter().add(branches)


def pack(groups: Sequence[Sequence[Branch]], max_tokens: int) -> list[tuple[int, int]]:
    """Ranges (low, high) of consecutive groups whose forests hold at most `max_tokens` tokens.

    A group (the branches of one pair, for example) is never split: one above the limit is a range
    by itself. Tokens that the groups of a range share count once, so groups of one prompt should be
    neighbors.
    """
    if not groups:
        return []
    ranges: list[tuple[int, int]] = []
    low = 0
    counter = _TokenCounter()
    for index, group in enumerate(groups):
        if counter.add(group) > max_tokens and index > low:
            ranges.append((low, index))
            low = index
            counter = _TokenCounter()
            counter.add(group)
    return [*ranges, (low, len(groups))]
