"""The logarithmic opinion pool and its temperature, worked by hand.

Sizes, pooled log-odds, soft labels, maximum likelihood.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from scir_cli.analysis import consensus

NAN = np.nan
LN2, LN3 = math.log(2), math.log(3)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


# judge, likelihood and pmi on four pairs
VOTES = np.array(
    [
        [2.0, -4.0, 0.0, 8.0],  # |a| without the tie: 2, 4, 8
        [0.1, 0.2, -0.4, NAN],
        [-1.0, -1.0, 1.0, 3.0],
    ]
)


def test_a_voter_s_size_is_its_median_without_ties_and_missing_verdicts():
    assert consensus.sizes(VOTES).tolist() == pytest.approx([4.0, 0.2, 1.0])
    assert np.isnan(consensus.sizes(array(0, 0, NAN)[None])[0])


def test_a_pool_is_the_mean_of_matched_log_odds_in_the_judge_s_nats():
    # Likelihood times 4 / 0.2 = 20, pmi times 4 / 1 = 4:
    # (2 + 2 - 4) / 3 = 0, (-4 + 4 - 4) / 3 = -4/3, (0 - 8 + 4) / 3 = -4/3, and no verdict where
    # likelihood has none.
    pooled = consensus.pool(VOTES, array(4, 0.2, 1))
    assert pooled[:3] == pytest.approx(array(0, -4 / 3, -4 / 3), abs=1e-12)
    assert np.isnan(pooled[3])
    # Weights 2, 1, 1: (2 * 2 + 2 - 4) / 4 = 1/2, (-8 + 4 - 4) / 4 = -2, (0 - 8 + 4) / 4 = -1
    weighted = consensus.pool(VOTES, array(4, 0.2, 1), array(2, 1, 1))
    assert weighted[:3] == pytest.approx(array(0.5, -2, -1))


def test_one_voter_is_its_own_pool():
    assert consensus.pool(VOTES[:1], array(4)).tolist() == VOTES[0].tolist()


def test_a_soft_label_is_the_sigmoid_of_pooled_log_odds_over_the_temperature():
    # odds of 3 at temperature 1; ln 9 / 2 = ln 3; ln 3 / 0.5 = ln 9; swapping gives the rest to 1
    assert consensus.label_probability(array(LN3, -LN3, 0)) == pytest.approx(array(0.75, 0.25, 0.5))
    assert consensus.label_probability(array(2 * LN3), 2.0) == pytest.approx(array(0.75))
    assert consensus.label_probability(array(LN3), 0.5) == pytest.approx(array(0.9))
    extreme = consensus.label_probability(array(1e4, -1e4, NAN))
    assert extreme[:2].tolist() == [1.0, 0.0]
    assert np.isnan(extreme[2])


def test_a_temperature_makes_the_certainty_as_large_as_the_accuracy():
    # |z| is 2 on 40 pairs, of which 30 are labeled correctly: sigmoid(2 / T) = 3/4, so T = 2 / ln
    # 3.
    # Curvature in b = 1 / T: 40 * 4 * 3/16 = 30; log T lies within 1.959964 / (b sqrt 30), b = ln 3
    # / 2.
    z = np.where(np.arange(40) % 2, 2.0, -2.0)
    gold = np.sign(z) * np.where(np.arange(40) < 30, 1, -1)
    fitted = consensus.fit_temperature(z, gold)
    assert fitted.temperature == pytest.approx(2 / LN3, rel=1e-9)
    spread = math.exp(1.959964 / (LN3 / 2 * math.sqrt(30)))
    assert fitted.low == pytest.approx(2 / LN3 / spread, rel=1e-6)
    assert fitted.high == pytest.approx(2 / LN3 * spread, rel=1e-6)
    assert (fitted.pairs, fitted.accuracy) == (40, 0.75)
    # -3/4 ln(3/4) - 1/4 ln(1/4) = 2 ln 2 - 3/4 ln 3 nats at T, and softplus(-2) + 2/4 at
    # temperature 1
    assert fitted.nll == pytest.approx(2 * LN2 - 0.75 * LN3)
    assert fitted.nll_uncalibrated == pytest.approx(math.log(1 + math.exp(-2)) + 0.5)


def test_a_temperature_is_the_least_negative_log_likelihood_and_scales_with_the_log_odds():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, 2000)
    gold = np.where(rng.random(2000) < consensus.label_probability(z, 2.5), 1.0, -1.0)
    fitted = consensus.fit_temperature(z, gold)
    assert fitted.low < 2.5 < fitted.high

    def nll(temperature: float) -> float:
        return float(np.logaddexp(0, -gold * z / temperature).mean())

    assert nll(fitted.temperature) <= min(nll(fitted.temperature * s) for s in (0.999, 1.001))
    tiny = consensus.fit_temperature(1e-6 * z, gold)
    assert tiny.temperature == pytest.approx(1e-6 * fitted.temperature, rel=1e-6)
    # swapping first and second changes nothing; ties, missing verdicts and labels do not count
    more = consensus.fit_temperature(
        np.concatenate([-z, array(0, NAN, 5)]), np.concatenate([-gold, array(1, 1, NAN)])
    )
    assert more.temperature == pytest.approx(fitted.temperature, rel=1e-9)
    assert more.pairs == 2000


@pytest.mark.parametrize(
    ("z", "gold", "reason"),
    [
        (np.ones(19), np.append(np.ones(18), -1), "19 labeled pairs have a verdict"),
        (np.full(30, NAN), np.ones(30), "0 labeled pairs have a verdict"),
        (np.ones(30), np.ones(30), "separable"),
        (np.ones(30), np.where(np.arange(30) < 15, 1.0, -1.0), "no better than chance"),
    ],
)
def test_no_temperature_is_fitted_where_none_exists(z: np.ndarray, gold: np.ndarray, reason: str):
    with pytest.raises(consensus.CalibrationError, match=reason):
        consensus.fit_temperature(z, gold)


@pytest.mark.parametrize("excess", [1e-9, 1e-3])
def test_labels_near_chance_have_a_temperature_with_a_finite_interval(excess: float):
    gold = np.where(np.arange(40) < 20, 1.0, -1.0)
    z = np.where(np.arange(40) < 1, 0.1 + excess, 0.1)
    fitted = consensus.fit_temperature(z, gold)
    assert 0 < fitted.low < fitted.temperature < fitted.high < math.inf
    with pytest.raises(consensus.CalibrationError, match="no better than chance"):
        consensus.fit_temperature(np.where(np.arange(40) < 1, 0.1 + 1e-15, 0.1), gold)


def test_a_voter_weighs_as_much_as_its_labels_are_correct():
    # 22 pairs of one size each, r of them labeled correctly: with one more of each kind,
    # sigmoid(m / T) = (r + 1) / 24, so m / T = ln((r + 1) / (23 - r)).
    gold = np.where(np.arange(22) % 2, 1.0, -1.0)
    correct = np.array([[17], [20], [22], [11], [4]])
    votes = np.where(np.arange(22) < correct, gold, -gold) * array(2, 0.1, 5, 3, 1)[:, None]
    weights = consensus.calibrated_weights(votes, gold)
    assert weights == pytest.approx(array(LN3, math.log(7), math.log(23), 0, 0))
    assert consensus.calibrated_weights(-votes, -gold) == pytest.approx(weights)
    # the pool is Bayes' rule for independent voters: the sum of the calibrated log-odds
    pooled = consensus.pool(votes, consensus.sizes(votes), weights) * weights.sum() / 2
    assert pooled == pytest.approx(np.sign(votes).T @ weights)
    with pytest.raises(consensus.CalibrationError, match="no voter is better than chance"):
        consensus.calibrated_weights(votes[3:], gold)
    with pytest.raises(consensus.CalibrationError, match="19 labeled pairs"):
        consensus.calibrated_weights(votes[:, :19], gold[:19])


def test_correlations_do_not_depend_on_which_response_is_first():
    # about 0: (1*2 + 2*4) / sqrt(5 * 20) = 1;  (1*1 + 2*0.5) / sqrt(5 * 1.25) = 0.8
    votes = np.array([[1.0, 2.0, 5.0], [2.0, 4.0, NAN], [1.0, 0.5, NAN]])
    found = consensus.correlations(votes)
    assert found[0, 1] == pytest.approx(1)
    assert found[1, 2] == pytest.approx(0.8)
    swapped = consensus.correlations(votes * array(-1, 1, 1))
    assert swapped == pytest.approx(found)


def test_a_voter_with_one_value_on_all_pairs_is_constant():
    assert consensus.is_constant(array(1, 1, NAN))
    assert consensus.is_constant(array(0, 0))
    assert not consensus.is_constant(array(1, -1))
    assert not consensus.is_constant(array(1, NAN))  # one pair says nothing


def test_a_million_pairs_are_pooled_and_calibrated_in_seconds():
    rng = np.random.default_rng(1)
    z = rng.normal(0, 1, 1_000_000)
    votes = z + rng.normal(0, 1, (3, 1_000_000))
    gold = np.where(rng.random(1_000_000) < consensus.label_probability(z), 1.0, -1.0)
    started = time.monotonic()
    pooled = consensus.pool(votes, consensus.sizes(votes))
    fitted = consensus.fit_temperature(pooled, gold)
    assert consensus.label_probability(pooled, fitted.temperature).shape == (1_000_000,)
    assert time.monotonic() - started < 20
