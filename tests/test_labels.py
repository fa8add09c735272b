"""Label rules of the rivals, worked by hand: DICE's length control, CREAM's consistency rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scir_cli.analysis import label_rules

NAN = np.nan


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


def test_dice_takes_out_of_the_reward_what_length_put_in():
    # Longer is better in three of four pairs: d = 4, 2, 2, -6 tokens, a = 2, 0.2, 3, 0.6. Chosen
    # less rejected is 4 + 2 + 2 - 6 = 2 tokens a four;
    # a/d = 0.5, 0.1, 1.5, -0.1 with weights 4, 2, 2, 6: in order -0.1 (6), 0.1 (8 of 14, past the
    # half).
    a, d = array(2, 0.2, 3, 0.6), array(4, 2, 2, -6)
    odds, alpha = label_rules.length_neutral(a, d)
    assert alpha == pytest.approx(0.1)
    assert odds == pytest.approx(array(1.6, 0.0, 2.8, 1.2))
    assert abs((np.sign(odds) * d).sum()) <= abs((np.sign(a) * d).sum())


def test_a_reward_that_prefers_the_shorter_answer_is_left_alone():
    odds, alpha = label_rules.length_neutral(array(-1, -2, NAN), array(3, 3, 5))
    assert alpha == 0  # DICE's search begins at 0
    assert odds[:2].tolist() == [-1, -2]
    assert np.isnan(odds[2])  # no verdict stays none
    assert label_rules.length_neutral(array(1.0), array(0.0))[1] == 0  # nothing to tell length from


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(-9, 9)), min_size=1, max_size=12))
def test_no_other_alpha_leaves_a_smaller_difference_in_length(pairs: list[tuple[float, int]]):
    a, d = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    _, best = label_rules.length_neutral(a, d)

    def difference(
        alpha: float,
    ) -> float:  # at a jump any value between its two sides can be had by breaking ties
        sides = [(np.where(a - x * d >= 0, 1, -1) * d).sum() for x in (alpha - 1e-6, alpha + 1e-6)]
        return 0.0 if min(sides) <= 0 <= max(sides) else float(np.abs(sides).min())

    assert all(difference(best) <= difference(alpha) + 1e-9 for alpha in np.linspace(0, 10, 40))


def test_cream_s_rate_is_kendall_s_tau_scaled_to_a_probability():
    # Answers 1, 2, 3 of prompt p: rewards 3, 2, 1 now and 2, 3, 1 before: of the pairs 12, 13, 23
    # two are ranked alike: tau = 1/3, C = 2/3.
    # Answers 1, 2 of prompt q are ranked alike: C = 1.  The average over prompts is 5/6.
    now, before = array(1, 2, 1, 0.5), array(-1, 1, 2, 3)
    prompts = ["p", "p", "p", "q"]
    assert label_rules.rank_consistency(now, before, prompts, average=False) == pytest.approx(
        array(2 / 3, 2 / 3, 2 / 3, 1)
    )
    assert label_rules.rank_consistency(now, before, prompts) == pytest.approx(
        array(5 / 6, 5 / 6, 5 / 6, 5 / 6)
    )


def test_a_prompt_without_a_verdict_of_both_models_has_no_rate_of_its_own():
    rates = label_rules.rank_consistency(array(1, 2), array(NAN, 1), ["p", "q"], average=False)
    assert np.isnan(rates[0]) and rates[1] == 1
