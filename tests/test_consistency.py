"""Agreement and statistics against numbers worked by hand, and the properties that hold for any
verdicts.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rows import judged, pair, response, verdict, verdicts

from scir_cli.analysis import consistency, statistics
from scir_cli.analysis.verdicts import from_table
from scir_cli.data.schemas import schema
from scir_cli.errors import DataError

NAN = math.nan
LN3 = math.log(3)  # sigmoid(ln 3) = 3/4, sigmoid(ln 9) = 9/10


def three_rows():
    return judged(
        pair(
            0,
            [verdict("judge", 1.0, 3.0, -1.0, 0.9), verdict("implicit", -0.5)],
            "first",
            "chat",
            response("abc", 3),
            response("a", 1),
        ),
        pair(
            1,
            [verdict("implicit", 0.25), verdict("judge", None)],
            "second",
            None,
            response("abcde", 0),
            response("ab", 7),
        ),
        pair(
            2,
            [verdict("judge", 2.0, 1.0, 3.0, 0.7)],
            None,
            "code",
            response("a", 4),
            response("a", 9),
        ),
    )


# From a table


def test_verdicts_are_joined_by_the_name_of_the_reward_model_and_nulls_become_nan():
    v = from_table(three_rows())
    assert v.names == ["judge", "implicit"]
    np.testing.assert_array_equal(v.log_odds, [[1.0, NAN, 2.0], [-0.5, 0.25, NAN]])
    np.testing.assert_array_equal(v.forward, [[3.0, NAN, 1.0], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(v.swapped, [[-1.0, NAN, 3.0], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(v.verdict_mass, [[0.9, NAN, 0.7], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(v.gold, [1, -1, NAN])
    assert (v.subset, v.pair_ids) == (["chat", None, "code"], ["p0", "p1", "p2"])


def test_lengths_are_tokens_or_characters_for_a_pair_in_which_a_side_has_no_tokens():
    # p0: 3 - 1 tokens; p1: the first has no token ids, so 5 - 2 characters; p2: 4 - 9 tokens
    np.testing.assert_array_equal(from_table(three_rows()).length_difference, [2, 3, -5])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_slice_of_a_table_gives_the_rows_of_the_slice(chunked):
    rows = [
        pair(
            i,
            [verdict(f"m{i % 2}", float(i)), verdict("all", -float(i))],
            first=response(n_tokens=i + 1),
        )
        for i in range(7)
    ]
    table = (
        pa.concat_tables([judged(*rows[:2]), judged(*rows[2:4]), judged(*rows[4:])])
        if chunked
        else judged(*rows)
    )
    v = from_table(table.slice(1, 5))
    assert v.pair_ids == ["p1", "p2", "p3", "p4", "p5"]
    assert v.names == ["m1", "all", "m0"]  # order of first appearance within the slice
    np.testing.assert_array_equal(
        v.log_odds, [[1, NAN, 3, NAN, 5], [-1, -2, -3, -4, -5], [NAN, 2, NAN, 4, NAN]]
    )
    np.testing.assert_array_equal(v.length_difference, [0, 1, 2, 3, 4])  # i + 1 tokens against 2


@pytest.mark.parametrize(
    "table",
    [schema("judged").empty_table(), judged(pair(0, []), pair(1, []))],
    ids=["no rows", "no rewards"],
)
def test_a_table_without_rows_or_rewards_has_a_summary_of_nothing(table):
    v = from_table(table)
    s = consistency.summary(v)
    assert (s["pairs"], s["models"], s["between"]) == (len(table), {}, [])
    assert (s["agreed"]["pairs"], s["agreed"]["rate"]) == (0, None)
    assert consistency.row_columns(v)["agree"].null_count == len(table)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            [verdict("judge", 1.0), verdict("judge", 2.0)],
            "pair p1 holds more than one verdict of 'judge'",
        ),
        (
            [verdict("other", 1.0), verdict("judge", -math.inf)],
            "pair p1 holds infinite log-odds of 'judge'",
        ),
        ([verdict(None, 1.0)], "'rewards' holds 1 verdicts without a reward_model"),
    ],
)
def test_verdicts_that_could_only_be_guessed_at_are_refused(rewards, message):
    with pytest.raises(DataError, match=message):
        from_table(judged(pair(0, [verdict("judge", 1.0)]), pair(1, rewards)))


def test_a_table_without_rewards_column_is_refused_by_name():
    with pytest.raises(DataError, match="'rewards'"):
        from_table(three_rows().drop_columns(["rewards"]))


# Statistics


def test_agreement_needs_equal_signs_that_are_not_ties_and_every_verdict():
    a = statistics.agreement(
        np.array([[2.0, 2.0, 0.0, 0.0, NAN, -1.0], [1.0, -1.0, 0.0, 3.0, 1.0, -4.0]])
    )
    np.testing.assert_array_equal(a.agree, [1, 0, 0, 0, NAN, 1])
    np.testing.assert_array_equal(a.margin, [1, 1, 0, 0, NAN, 1])
    np.testing.assert_array_equal(a.mean, [1.5, 0.5, 0, 1.5, NAN, -2.5])
    np.testing.assert_array_equal(a.spread, [1, 3, 0, 3, NAN, 3])


def test_the_confidence_of_agreement_is_that_of_the_least_confident_model():
    log_odds = np.array([[LN3, LN3, -LN3], [2 * LN3, 2 * LN3, -2 * LN3]]) * [
        1.01,
        0.99,
        1.01,
    ]  # least sure: just over, under, over 3/4
    np.testing.assert_array_equal(statistics.agreement(log_odds, 0.75).agree, [1, 0, 1])


def test_kappa_of_a_two_by_two_table_is_two_fifths():
    # The textbook table: 20 both +, 5 (+,-), 10 (-,+), 15 both -.  p_o = 35/50 = 0.7;
    # p_e = 25/50 * 30/50 + 25/50 * 20/50 = 0.3 + 0.2 = 0.5; kappa = (0.7 - 0.5) / (1 - 0.5) = 0.4
    a = np.repeat([2.0, 0.1, -3.0, -1.0], [20, 5, 10, 15])
    b = np.repeat([1.0, -1.0, 1.0, -1.0], [20, 5, 10, 15])
    assert statistics.cohen_kappa(a, b) == pytest.approx(0.4)


def test_kappa_counts_a_tie_as_a_third_category_and_leaves_missing_verdicts_out():
    # Known pairs: (0,0) (+,0) (+,+) (-,-).  p_o = 3/4; a: 1/4 -, 1/4 0, 2/4 +; b: 1/4 -, 2/4 0, 1/4
    # +;
    # p_e = (1 + 2 + 2)/16 = 5/16; kappa = (12 - 5) / (16 - 5) = 7/11
    a, b = np.array([0.0, 1, 1, -1, NAN, 1]), np.array([-0.0, 0, 1, -1, 1, NAN])
    assert statistics.cohen_kappa(a, b) == pytest.approx(7 / 11)


@pytest.mark.parametrize(("a", "b"), [([], []), ([NAN, 1], [1, NAN]), ([1, 2], [3, 4])])
def test_kappa_is_undefined_without_pairs_or_where_chance_agrees_always(a, b):
    assert math.isnan(statistics.cohen_kappa(np.array(a, float), np.array(b, float)))


def test_spearman_gives_tied_values_their_average_rank():
    # ranks of a: 1, 2.5, 2.5, 4 -> -1.5, 0, 0, 1.5 (sum of squares 4.5); of b: 1, 3, 2, 4 -> -1.5,
    # 0.5, -0.5, 1.5 (5)
    # products: 2.25 + 0 + 0 + 2.25 = 4.5; rho = 4.5 / sqrt(4.5 * 5) = sqrt(0.9).  The fifth pair
    # has no verdict.
    assert statistics.spearman(
        np.array([10.0, 20, 20, 90, NAN]), np.array([-7.0, 3, 2, 4, 0])
    ) == pytest.approx(math.sqrt(0.9))


def test_spearman_sees_order_only_and_is_undefined_for_a_constant():
    assert statistics.spearman(np.array([1.0, 2, 3]), np.array([-1.0, -10, -1e9])) == pytest.approx(
        -1
    )
    assert math.isnan(statistics.spearman(np.array([1.0, 2, 3]), np.array([5.0, 5, 5])))
    assert math.isnan(statistics.spearman(np.array([]), np.array([])))


def test_wilson_for_eight_of_ten():
    # z^2 = 3.841459; center 0.8 + 0.1920729 = 0.9920729; half 1.959964 sqrt(0.016 + 0.00960365) =
    # 0.3136159; both / 1.3841459
    assert statistics.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert statistics.wilson(0, 5)[0] == 0
    assert statistics.wilson(5, 5)[1] == 1
    assert all(math.isnan(x) for x in statistics.wilson(0, 0))


def test_calibration_error_weighs_each_bin_by_its_pairs():
    # Confidence 3/4 (bin [0.75, 0.8)): right, wrong, right -> |2/3 - 3/4| = 1/12, weight 3/5.
    # Confidence 9/10 (bin [0.9, 0.95)): right and a tie's half -> |3/4 - 9/10| = 3/20, weight 2/5.
    # 1/20 + 3/50 = 0.11
    log_odds = np.array([LN3, -LN3, LN3, 2 * LN3, -2 * LN3, 5.0, NAN]) * (1 + 1e-12)
    assert statistics.calibration_error(
        log_odds, np.array([1, 0, 1, 1, 0.5, NAN, 1])
    ) == pytest.approx(0.11)


def test_calibration_error_of_the_surest_and_least_sure_verdicts_falls_in_the_outer_bins():
    # sigmoid(800) is 1 in float64 and sigmoid(ln 49) 0.98: both in bin 9, wrong and right -> |(0 +
    # 1) - (1 + 0.98)| = 0.98.
    # sigmoid(ln 12) = 12/13 = 0.923: bin 8, right -> 1/13.  sigmoid(0) = 1/2: bin 0, a tie's half
    # -> 0.  Over four pairs
    error = statistics.calibration_error(
        np.array([800.0, -math.log(49), math.log(12), 0.0]), np.array([0, 1, 1, 0.5])
    )
    assert error == pytest.approx((0.98 + 1 / 13) / 4)
    assert math.isnan(statistics.calibration_error(np.array([NAN]), np.array([1.0])))


def test_entropy_is_log_two_for_a_tie_and_even_in_the_log_odds():
    # p = 3/4: 1/4 ln 4 + 3/4 ln(4/3) = ln 4 - 3/4 ln 3 = 0.562335
    np.testing.assert_allclose(
        statistics.entropy(np.array([0, LN3, -LN3, 800, NAN])),
        [math.log(2), 0.562335, 0.562335, 0, NAN],
        atol=1e-6,
    )


# Confidence


def test_a_reliability_curve_holds_the_bins_of_the_calibration_error():
    # Confidence 3/4: right, wrong, right; confidence 9/10: right and a tie's half (as in the test
    # of the error): 3 at 2/3, 2 at 3/4
    log_odds = np.array([LN3, -LN3, LN3, 2 * LN3, -2 * LN3, 5.0, NAN]) * (1 + 1e-12)
    low, high = statistics.reliability(log_odds, np.array([1, 0, 1, 1, 0.5, NAN, 1]))
    assert (low["pairs"], low["confidence"], low["accuracy"]) == (
        3,
        pytest.approx(0.75),
        pytest.approx(2 / 3),
    )
    assert (high["pairs"], high["confidence"], high["accuracy"]) == (
        2,
        pytest.approx(0.9),
        pytest.approx(0.75),
    )
    assert (low["accuracy_low"], low["accuracy_high"]) == pytest.approx(statistics.wilson(2, 3))


def test_a_risk_coverage_curve_takes_the_surest_first_and_equals_together():
    # Labeled: four, one of them not covered.  By confidence: .9 right | .8 wrong, right | then
    # nothing.  The fifth has no label.
    confidence = np.array([0.8, 0.9, NAN, 0.8, 0.95])
    curve = statistics.risk_coverage(confidence, np.array([0, 1, 1, 1, NAN]))
    assert [(p["coverage"], p["pairs"], p["accuracy"], p["confidence"]) for p in curve] == [
        (0.25, 1, 1.0, 0.9),
        (0.75, 3, pytest.approx(2 / 3), 0.8),
    ]
    assert (
        statistics.risk_coverage(confidence, np.full(5, NAN))
        == statistics.risk_coverage(np.full(5, NAN), np.ones(5))
        == []
    )


def test_a_risk_coverage_curve_has_the_mean_of_every_prefix():
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(0.5, 1, 1000), rng.integers(0, 2, 1000).astype(float)
    curve = statistics.risk_coverage(confidence, correct, points=10)
    order = np.argsort(-confidence)
    assert [p["pairs"] for p in curve] == list(range(100, 1001, 100))
    assert [p["accuracy"] for p in curve] == pytest.approx(
        [correct[order[:n]].mean() for n in range(100, 1001, 100)]
    )


def test_the_agreed_label_covers_only_what_is_agreed_and_a_pair_without_a_verdict_is_not_covered():
    v = verdicts([[2.0, 1.0, -1.0, NAN], [1.0, 3.0, 1.0, 1.0]], gold=[1, -1, 1, 1])
    points = consistency.curves(v)["risk_coverage"]
    # agreed: the first (margin 1, right) and the second (margin 1, wrong) of four labeled
    assert [(p["coverage"], p["accuracy"]) for p in points["agreed"]] == [(0.5, 0.5)]
    assert points["judge"][-1]["coverage"] == 0.75
    assert points["implicit"][-1]["coverage"] == 1


def test_the_curves_do_not_depend_on_the_order_of_the_rows():
    rng = np.random.default_rng(1)
    v = verdicts(rng.normal(size=(2, 300)).round(1), gold=rng.choice([-1.0, 1.0, NAN], 300))
    assert consistency.curves(v.take(rng.permutation(300))) == consistency.curves(v)


def test_labels_that_are_missing_or_all_equal_and_repeated_ids_are_notes():
    assert (
        consistency.data_notes(verdicts([[1.0, 1.0]], gold=[1, -1]), 0)
        == consistency.data_notes(verdicts([[1.0, 1.0]]), 0)
        == []
    )
    (missing,) = consistency.data_notes(verdicts([[1.0, 1.0, 1.0]], gold=[1, -1, NAN]), 0)
    assert missing.startswith("1 of 3 pairs have no gold label")
    (equal,) = consistency.data_notes(verdicts([[1.0, 1.0]], gold=[-1, -1]), 0)
    assert equal.startswith("all 2 gold labels are 'second'")
    (repeated,) = consistency.data_notes(verdicts([[1.0, 1.0, 1.0]]), 1)
    assert repeated.startswith("1 rows repeat the pair_id")


# Reports


def test_a_judge_flips_where_both_orders_go_to_the_same_seat():
    # (forward, swapped): A A flips; A B agrees; B B flips; tie A does not; the last has one order
    # and is not counted: 2 of 4.
    # Seat A over the nine verdicts A A, A B, B B, tie A, A: 5.5 of 9
    forward, swapped = [1.0, 2.0, -1.0, 0.0, 1.0], [-3.0, 2.0, 2.0, -1.0, NAN]
    v = verdicts([[-1.0, 2.0, 0.5, -0.5, NAN]], [forward], [swapped])
    model = consistency.summary(v)["models"]["judge"]
    assert model["flip_rate"] == 0.5
    assert model["first_seat_rate"] == pytest.approx(5.5 / 9, abs=1e-6)


def test_a_summary_has_every_number_worked_by_hand():
    v = verdicts(
        [[LN3, -LN3, 0.0, 2.0, NAN], [1.0, 1.0, -1.0, NAN, -1.0]],
        gold=[1, -1, -1, NAN, 1],
        length=[1, 2, 3, 4, 5],
    )
    s = consistency.summary(v)
    judge, implicit = s["models"]["judge"], s["models"]["implicit"]
    assert (s["pairs"], judge["verdicts"], judge["ties"], judge["labeled"]) == (5, 4, 1, 3)
    assert judge["abs_log_odds_quantiles"]["0.5"] == judge["median_abs_log_odds"] == round(LN3, 6)
    assert judge["abs_log_odds_quantiles"]["0.25"] == round(
        0.75 * LN3, 6
    )  # of 0, ln 3, ln 3, 2: at 0.25 * 3 gaps
    assert judge["mean_abs_log_odds"] == pytest.approx((2 * LN3 + 2) / 4, abs=1e-6)
    assert judge["accuracy"] == round(2.5 / 3, 6)  # right, right, a tie's half
    assert (judge["accuracy_low"], judge["accuracy_high"]) == pytest.approx(
        statistics.wilson(2.5, 3), abs=1e-6
    )
    assert judge["calibration_error"] == round(
        1 / 6, 6
    )  # ln 3 twice right: 2/3 * (1 - 3/4); the tie: 1/3 * 0
    assert (
        judge["length_correlation"] == 0.4
    )  # ranks 3 1 2 4 with 1 2 3 4: 1 - 6 (4 + 1 + 1 + 0) / (4 * 15)
    assert (judge["flip_rate"], judge["first_seat_rate"], judge["verdict_mass"]) == (
        None,
        None,
        None,
    )
    assert (implicit["verdicts"], implicit["accuracy"], implicit["labeled"]) == (
        4,
        0.5,
        4,
    )  # right, wrong, right, wrong
    # Both have a verdict on three pairs: (+,+) (-,+) (0,-).  p_o 1/3, p_e = 1/3 * 2/3 + 1/3 * 1/3 =
    # 1/3, so kappa 0
    between = s["between"][0]
    assert (between["first"], between["second"], between["pairs"]) == ("judge", "implicit", 3)
    assert (between["agreement"], between["kappa"]) == (round(1 / 3, 6), 0)
    assert between["spearman"] == 0  # ranks less 2: 1 -1 0 with 0.5 0.5 -1, product 0
    agreed = s["agreed"]
    assert (
        agreed["pairs"],
        agreed["rate"],
        agreed["accuracy"],
        agreed["labeled"],
        agreed["mean_margin"],
    ) == (
        1,
        round(1 / 3, 6),
        1,
        1,
        1,
    )
    json.dumps(s, allow_nan=False)


def test_missing_verdicts_are_counted_and_never_guessed():
    s = consistency.summary(from_table(three_rows()))
    assert [m["verdicts"] for m in s["models"].values()] == [2, 2]
    assert s["between"][0]["pairs"] == 1  # only p0 has both, and there they disagree
    assert (s["agreed"]["pairs"], s["agreed"]["rate"], s["agreed"]["accuracy"]) == (0, 0, None)
    nobody = consistency.summary(verdicts([[NAN, NAN]], gold=[1, -1]))["models"]["judge"]
    assert {k: x for k, x in nobody.items() if k != "abs_log_odds_quantiles" and x is not None} == {
        "verdicts": 0,
        "ties": 0,
        "labeled": 0,
    }


def test_the_agreed_label_is_right_where_its_sign_is_the_gold_one():
    # Agreed: - - + +, and the fifth pair not; gold - + + and unlabeled: right on 2 of 3
    s = consistency.summary(
        verdicts([[-1, -2, 3, 4, 1], [-2, -1, 1, 2, -1]], gold=[-1, 1, 1, NAN, 1])
    )["agreed"]
    assert (s["pairs"], s["rate"], s["accuracy"], s["labeled"], s["mean_margin"]) == (
        4,
        0.8,
        round(2 / 3, 6),
        3,
        1.25,
    )


def test_the_models_that_decide_agreement_can_be_named():
    v = verdicts([[1.0, 1.0], [1.0, -1.0], [-1.0, NAN]])
    assert (
        consistency.summary(v)["agreed"]["rate"] == 0
    )  # one pair with all three verdicts, not agreed
    assert consistency.summary(v, ["judge", "implicit"])["agreed"]["rate"] == 0.5
    assert (
        consistency.summary(v, ["judge", "implicit"], min_confidence=0.8)["agreed"]["pairs"] == 0
    )  # sigmoid(1) = 0.73
    with pytest.raises(DataError, match="Did you mean 'judge'"):
        consistency.summary(v, ["juge"])


def test_subsets_are_summed_up_apart_and_pairs_without_one_are_not_lost():
    v = verdicts([[1.0, -1.0, 2.0, NAN]], gold=[1, 1, 1, 1], subset=["chat", None, "chat", "code"])
    subsets = consistency.by_subset(v)
    assert {name: s["pairs"] for name, s in subsets.items()} == {"chat": 2, "(none)": 1, "code": 1}
    assert [s["models"]["judge"]["accuracy"] for s in subsets.values()] == [1, 0, None]


def test_the_columns_of_a_consistency_table_are_null_where_a_verdict_is_missing():
    columns = consistency.row_columns(verdicts([[1.0, 2.0, NAN], [3.0, -1.0, 1.0]]))
    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "agree": [True, False, None],
        "margin": [1, 1, None],
        "mean_log_odds": [2, 0.5, None],
        "spread": [2, 3, None],
    }
    assert [columns[name].type for name in columns] == [
        schema("consistency").field(name).type for name in columns
    ]


NUMBERS = st.sampled_from([NAN, 0.0, -0.0, 1e-9]) | st.floats(-50, 50, width=32)
GOLD = st.sampled_from([1.0, -1.0, NAN])


@given(n=st.integers(0, 12), data=st.data())
def test_swapping_every_pair_negates_the_log_odds_and_changes_no_statistic(n, data):
    orders = data.draw(hnp.arrays(float, (2, 2, n), elements=NUMBERS))
    others = data.draw(hnp.arrays(float, (1, n), elements=NUMBERS))
    judges = (orders[0] + orders[1]) / 2
    no_seats = np.full((1, n), NAN)
    gold = data.draw(hnp.arrays(float, n, elements=GOLD))
    length = data.draw(hnp.arrays(float, n, elements=st.integers(-3, 3)))
    v = verdicts(
        np.concatenate([judges, others]),
        np.concatenate([orders[0], no_seats]),
        np.concatenate([orders[1], no_seats]),
        gold,
        length,
    )
    swapped = replace(
        v,
        log_odds=-v.log_odds,
        forward=-v.swapped,
        swapped=-v.forward,
        gold=-gold,
        length_difference=-length,
    )
    assert consistency.summary(v) == consistency.summary(swapped)
    one, other = statistics.agreement(v.log_odds), statistics.agreement(swapped.log_odds)
    for name, sign in (("agree", 1), ("margin", 1), ("mean", -1), ("spread", 1)):
        np.testing.assert_array_equal(getattr(one, name), sign * getattr(other, name))


def test_swapping_the_responses_of_a_table_swaps_its_verdicts():
    flipped = {"first": "second", "second": "first", None: None}
    rows = three_rows().to_pylist()
    swapped = [
        row
        | {"first": row["second"], "second": row["first"], "gold_label": flipped[row["gold_label"]]}
        | {
            "rewards": [
                verdict(
                    r["reward_model"],
                    r["log_odds"] and -r["log_odds"],
                    r["swapped_log_odds"] and -r["swapped_log_odds"],
                    r["forward_log_odds"] and -r["forward_log_odds"],
                    r["verdict_mass"],
                )
                for r in row["rewards"]
            ]
        }
        for row in rows
    ]
    assert consistency.summary(from_table(judged(*swapped))) == consistency.summary(
        from_table(three_rows())
    )


def test_a_hundred_thousand_pairs_take_less_than_five_seconds():
    n, rng = 100_000, np.random.default_rng(0)
    row = judged(
        pair(0, [verdict("judge", 1.0, 1.0, -1.0, 0.9), verdict("implicit", 1.0)], "first", "chat")
    )
    columns = {name: row[name].take(pa.array(np.zeros(n, int))) for name in row.column_names}
    log_odds = rng.normal(size=2 * n)
    structs = columns["rewards"].combine_chunks().flatten()
    fields = dict(zip(structs.type.names, structs.flatten(), strict=True)) | {
        "log_odds": pa.array(log_odds)
    }
    offsets = pa.array(np.arange(0, 2 * n + 1, 2, dtype=np.int32))
    columns["rewards"] = pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays(fields.values(), fields.keys())
    )
    table = pa.table([columns[name] for name in row.column_names], schema=row.schema)
    start = time.perf_counter()
    v = from_table(table)
    s = consistency.summary(v)
    consistency.by_subset(v), consistency.row_columns(v)
    assert time.perf_counter() - start < 5
    np.testing.assert_array_equal(v.log_odds, log_odds.reshape(n, 2).T)
    assert s["agreed"]["rate"] == pytest.approx(
        0.5, abs=0.01
    )  # independent signs; standard error 0.0016


@pytest.mark.parametrize(
    "module", ["analysis.consistency", "stages.check_consistency", "stages.filter"]
)
def test_what_scores_nothing_does_not_import_torch(module):
    code = f"import sys, scir_cli.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
