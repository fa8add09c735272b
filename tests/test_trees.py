"""Token trees against an independently built trie.

A set of distinct prefixes, and what each prefix is a prefix of.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scir_cli.engine import trees
from scir_cli.engine.trees import Branch, continuation, verdict

Prefix = tuple[int, ...]

# Paths over three tokens share prefixes by chance; paths of up to five chunks fork at up to four
# places and share long runs.
CHUNKS = [(1, 2, 3, 4), (1, 2, 5), (6,), (7, 8, 9), (7, 8, 9)]
random_paths = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
forked_paths = st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=5).map(
    lambda chunks: sum(chunks, ())
)
paths = st.one_of(random_paths, forked_paths)


@st.composite
def branches_on_paths(draw: st.DrawFn) -> Branch:
    ids = draw(paths)
    positions = draw(st.lists(st.integers(0, len(ids) - 1), max_size=4))
    return Branch(ids, tuple(positions), tuple(draw(st.integers(0, 9)) for _ in positions))


branch_sets = st.lists(branches_on_paths(), min_size=1, max_size=12)
path_sets = st.lists(paths, min_size=1, max_size=12)


def everywhere(path: Prefix) -> Branch:
    """A branch with a target at every token of its path, so that the forest tells where each token
    lies.
    """
    return Branch(path, tuple(range(len(path))), path)


def located(forest: trees.Forest, path_set: list[Prefix]) -> list[Prefix]:
    """Of each flat index, the prefix that ends there, from the targets of `everywhere` branches."""
    prefixes: list[Prefix | None] = [None] * len(forest)
    prefix_of_target = [path[: end + 1] for path in path_set for end in range(len(path))]
    for index, prefix in zip(forest.target_hidden.tolist(), prefix_of_target, strict=True):
        assert prefixes[index] in (None, prefix), "one flat index stands for two prefixes"
        prefixes[index] = prefix
    assert None not in prefixes, "a token of the forest is on no path"
    return prefixes  # type: ignore[return-value]


def trie(path_set: list[Prefix]) -> set[Prefix]:
    return {path[: end + 1] for path in path_set for end in range(len(path))}


def test_a_small_forest_is_laid_out_depth_first_with_shared_prefixes_once():
    forest = trees.build(
        [
            Branch((1, 2, 3, 4), (1, 2, 3), (3, 4, 9)),
            Branch((1, 2, 5), (1, 2), (5, 9)),
            Branch((1, 2, 3), (2,), (6,)),  # a prefix of the first
            Branch((7, 8), (1,), (9,)),  # an unrelated tree
            Branch((1, 2, 5), (2,), (8,)),  # a duplicate of the second, with another target
        ]
    )
    # 1 2 ┬ 3 ─ 4
    #     └ 5
    # 7 8
    assert forest.tokens.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert forest.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert forest.subtree_end.tolist() == [5, 5, 4, 4, 5, 7, 7]
    #                                        first    second third fourth fifth
    assert forest.target_hidden.tolist() == [1, 2, 3, 1, 4, 2, 6, 4]
    assert forest.target_token.tolist() == [3, 4, 9, 5, 9, 6, 9, 8]
    assert forest.target_branch.tolist() == [0, 0, 0, 1, 1, 2, 3, 4]
    assert forest.n_branches == 5
    assert trees.visible(forest).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # 1
        [1, 1, 0, 0, 0, 0, 0],  # 1 2
        [1, 1, 1, 0, 0, 0, 0],  # 1 2 3
        [1, 1, 1, 1, 0, 0, 0],  # 1 2 3 4
        [1, 1, 0, 0, 1, 0, 0],  # 1 2 5
        [0, 0, 0, 0, 0, 1, 0],  # 7
        [0, 0, 0, 0, 0, 1, 1],  # 7 8
    ]
    assert trees.visible(forest, window=2).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [
            0,
            1,
            0,
            0,
            1,
            0,
            0,
        ],  # 5 stands at position 2: it sees 2, not 1, however far away they lie in the sequence
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_a_continuation_scores_each_response_token_from_the_token_before_it():
    assert continuation([10, 11, 12], [20, 21, 22]) == Branch(
        (10, 11, 12, 20, 21), (2, 3, 4), (20, 21, 22)
    )


def test_a_continuation_of_one_token_needs_no_token_beyond_the_prompt():
    assert continuation([10, 11], [20]) == Branch((10, 11), (1,), (20,)) == verdict([10, 11], 20)


def test_an_empty_response_has_no_targets():
    branch = continuation([10, 11], [])
    assert (branch.target_positions, branch.target_tokens) == ((), ())


def test_two_verdicts_after_one_prompt_are_two_targets_at_one_hidden_state():
    forest = trees.build([verdict([5, 6, 7], 1), verdict([5, 6, 7], 2)])
    assert len(forest) == 3
    assert forest.target_hidden.tolist() == [2, 2]
    assert forest.target_token.tolist() == [1, 2]


def test_no_branches_make_an_empty_forest():
    forest = trees.build([])
    assert (len(forest), forest.segments, len(forest.target_hidden), forest.n_branches) == (
        0,
        (),
        0,
        0,
    )


def test_a_hundred_responses_share_one_prompt():
    prompt = list(range(100, 150))
    forest = trees.build(
        [continuation(prompt, [number, number + 1000, number + 2000]) for number in range(100)]
    )
    assert len(forest) == 50 + 100 * 2  # the third token of a response is only a target


@given(branch_sets)
def test_every_target_sees_its_path_up_to_it_in_order_and_nothing_else(branches: list[Branch]):
    forest = trees.build(branches)
    mask = trees.visible(forest)
    expected = [branch.ids[: end + 1] for branch in branches for end in branch.target_positions]
    for hidden, prefix in zip(forest.target_hidden, expected, strict=True):
        keys = np.flatnonzero(mask[hidden])
        assert tuple(forest.tokens[keys].tolist()) == prefix
        assert forest.positions[keys].tolist() == list(range(len(prefix)))


@given(branch_sets)
def test_targets_stand_in_the_order_of_the_branches(branches: list[Branch]):
    forest = trees.build(branches)
    assert forest.target_token.tolist() == [
        token for branch in branches for token in branch.target_tokens
    ]
    assert forest.target_branch.tolist() == [
        index for index, branch in enumerate(branches) for _ in branch.target_tokens
    ]
    assert forest.n_branches == len(branches)


@given(branch_sets)
def test_a_forest_holds_each_distinct_prefix_once(branches: list[Branch]):
    forest = trees.build(branches)
    nodes = trie([branch.ids for branch in branches])
    assert len(forest) == len(forest.positions) == len(forest.subtree_end) == len(nodes)
    assert sorted(forest.tokens.tolist()) == sorted(node[-1] for node in nodes)


@given(path_sets, st.one_of(st.none(), st.integers(1, 6)))
def test_a_query_sees_a_key_exactly_where_the_keys_path_is_a_prefix_of_its_own(
    path_set: list[Prefix], window: int | None
):
    forest = trees.build([everywhere(path) for path in path_set])
    nodes = located(forest, path_set)
    expected = [
        [q[: len(k)] == k and (window is None or len(q) - len(k) < window) for k in nodes]
        for q in nodes
    ]
    assert trees.visible(forest, window).tolist() == expected


@given(branch_sets)
def test_segments_tile_the_sequence(branches: list[Branch]):
    forest = trees.build(branches)
    assert [s.start for s in forest.segments] == [0, *(s.end for s in forest.segments[:-1])]
    assert forest.segments[-1].end == len(forest)
    assert all(s.start < s.end for s in forest.segments)


@given(branch_sets)
def test_a_segments_ancestors_and_its_own_tokens_are_what_its_queries_see(branches: list[Branch]):
    forest = trees.build(branches)
    mask = trees.visible(forest)
    for segment in forest.segments:
        before = [
            index
            for a in segment.ancestors
            for index in range(forest.segments[a].start, forest.segments[a].end)
        ]
        for query in range(segment.start, segment.end):
            assert np.flatnonzero(mask[query]).tolist() == [
                *before,
                *range(segment.start, query + 1),
            ]


@given(branch_sets, st.randoms(use_true_random=False))
def test_the_order_of_the_branches_does_not_change_the_layout(branches: list[Branch], random):
    shuffled = random.sample(branches, len(branches))
    one, other = trees.build(branches), trees.build(shuffled)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.subtree_end.tolist() == other.subtree_end.tolist()
    assert one.segments == other.segments


def test_three_hundred_forks_along_one_path_are_laid_out():
    forest = trees.build(
        [verdict([*range(length), 999], 0) for length in range(1, 301)]
    )  # 0 … 299, with a 999 hanging off each of them
    assert len(forest) == 300 + 300
    assert sorted(forest.positions[forest.tokens == 999].tolist()) == list(range(1, 301))


@given(
    st.lists(st.lists(branches_on_paths(), min_size=1, max_size=4), max_size=10), st.integers(1, 60)
)
@settings(max_examples=200)
def test_packs_hold_all_groups_once_in_order_within_the_budget(
    groups: list[list[Branch]], max_tokens: int
):
    ranges = trees.pack(groups, max_tokens)
    assert [index for low, high in ranges for index in range(low, high)] == list(range(len(groups)))

    def size(low: int, high: int) -> int:
        """Tokens of the groups together, what they share counted once."""
        branches = [b for group in groups[low:high] for b in group]
        assert trees.size(branches) == len(trees.build(branches))
        return len(trie([branch.ids for branch in branches]))

    for low, high in ranges:
        assert low < high
        assert high - low == 1 or size(low, high) <= max_tokens
    for (low, high), (_, end) in itertools.pairwise(ranges):
        assert size(low, high + 1) > max_tokens, (
            f"group {high} of the pack up to {end} would have fitted before"
        )


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),  # every group larger than the budget stands alone
        (5, [(0, 2), (2, 3), (3, 4)]),  # 3 + 2, then 7 alone, then 1
        (8, [(0, 2), (2, 4)]),  # 3 + 2 (+ 7 would be 12), 7 + 1
        (13, [(0, 4)]),
    ],
)
def test_groups_of_three_two_seven_and_one_tokens_are_packed(
    max_tokens: int, expected: list[tuple[int, int]]
):
    groups = [
        [verdict(range(100 * size, 101 * size), 0)] for size in (3, 2, 7, 1)
    ]  # nothing shared
    assert trees.pack(groups, max_tokens) == expected


def test_what_neighbors_share_takes_room_in_a_pack_once():
    groups = [
        [verdict([1, 2, 3, 4, answer], 0)] for answer in (5, 6, 7)
    ]  # 5 tokens alone, 7 together
    assert trees.pack(groups, 7) == [(0, 3)]
    assert trees.pack(groups, 6) == [(0, 2), (2, 3)]


def test_no_groups_need_no_pack():
    assert trees.pack([], 10) == []
