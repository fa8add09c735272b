"""Losses and label rules against numbers that the authors' own functions gave on these inputs, in
double precision (2026-11-24).

SimPO: princeton-nlp/SimPO 1b3e8f3, `simpo_loss`. DPO, IPO, SPPO: uclaml/SPPO 5e61c4e, `sppo_loss`.
CREAM: Raibows/CREAM de1d04b, the lines of `training_step`, and scipy's kendalltau on ordinal ranks
as in `cal_consistency`. DICE: sail-sg/dice 865aa6d, `optimize_alpha`, lengths in characters.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from scir_cli.analysis import label_rules
from scir_cli.training import losses

CHOSEN, REJECTED = ([-10.0, -12.5], [-14.0, -11.0])  # summed log-probabilities under the policy
REFERENCE = ([-11.0, -12.0], [-13.0, -13.0])


def f64(*values: object) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


RATIOS = f64(CHOSEN, REJECTED) - f64(*REFERENCE)  # (2, pairs)
FIRST = f64([1.0, 1.0])


def test_dpo_and_ipo_equal_the_authors_numbers():
    assert losses.dpo(RATIOS, FIRST, 0.1).tolist() == pytest.approx(
        [0.5981388693815918, 0.8259394198788436]
    )
    assert losses.ipo(RATIOS, FIRST, 0.1).tolist() == pytest.approx([9.0, 56.25])


def test_sppo_is_twice_theirs_which_is_a_mean_of_two_terms():
    assert losses.sppo(RATIOS, FIRST, 1e-3).tolist() == pytest.approx(
        [2 * 249001.0, 2 * 251252.125]
    )


def test_sppo_s_soft_label_has_the_gradient_of_theirs():
    # theirs at P(win) = 0.75: ((h_w - 250)^2 + (h_l + 250)^2) / 2 = 62001 for the first pair, whose
    # gradient is h_w - 250 and h_l + 250
    ratios = RATIOS.clone().requires_grad_()
    losses.hedged(
        partial(losses.sppo, ratios, beta=1e-3), FIRST, f64([0.75, 0.75])
    ).sum().backward()
    ours = ratios.grad
    assert ours is not None
    theirs = torch.stack([RATIOS[0] - 250, RATIOS[1] + 250])
    assert (theirs.square().sum(0) / 2).tolist() == pytest.approx([62001.0, 63127.125])
    assert torch.allclose(ours, 2 * theirs)


def test_simpo_equals_the_authors_numbers():
    means = f64([-0.5, -1.2], [-0.9, -0.3])
    assert losses.simpo(means, FIRST, 2.0, 2.0 * 0.8).tolist() == pytest.approx(
        [1.171100698848325, 3.4328285396404876]
    )


def test_cream_s_loss_and_rate():
    loss = losses.hedged(partial(losses.dpo, RATIOS, beta=0.1), FIRST, f64([2 / 3, 0.9]))
    assert loss.tolist() == pytest.approx([0.6648055360482585, 0.8009394198788435])
    for now, before, rate in (
        ([0.3, 0.9, 0.1, 0.5, 0.7], [0.2, 0.8, 0.6, 0.4, 1.0], 0.7),
        ([3, 2, 1, 0.5], [1, 2, 3, 0.4], 0.5),
    ):
        i, j = np.triu_indices(len(now), 1)
        a, b = (np.array(scores)[i] - np.array(scores)[j] for scores in (now, before))
        assert label_rules.rank_consistency(a, b, ["p"] * len(a))[0] == pytest.approx(rate)


def test_the_length_penalty_alpha_equals_that_of_dice():
    odds = np.array([2.0, 0.2, 3.0, 0.6, 0.9, -0.4, 1.3])
    difference = np.array([4.0, 2, 2, -6, 9, 1, 4])
    assert label_rules.length_neutral(odds, difference)[1] == pytest.approx(0.1)
