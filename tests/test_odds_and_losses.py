"""Log-odds and losses against numbers worked by hand and against METHOD's definitions, written out
a second time pair by pair.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scir_cli.rewards.log_odds import average_orders, difference, expected_score
from scir_cli.settings import entropy_ceiling
from scir_cli.training import losses

LN2, LN4 = math.log(2), math.log(4)  # sigmoid(ln 4) = 4/5
NAN = math.nan

reals = st.floats(
    -8, 8, allow_nan=False, allow_subnormal=False
)  # a scaled subnormal is 0, which is no verdict


def f64(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def matrices(rows: int) -> st.SearchStrategy[Tensor]:
    """(rows, pairs) fp64 of one to five pairs."""
    return st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(reals, min_size=n, max_size=n), min_size=rows, max_size=rows
        ).map(lambda m: torch.tensor(m, dtype=torch.float64))
    )


def close(a: Tensor, b: Tensor | float | list[float]) -> bool:
    b = torch.as_tensor(b, dtype=a.dtype)
    assert a.shape == b.shape
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------ odds


def test_two_orders_average_the_two_seatings_in_logit_space():
    # first as A: P(A) = 0.6, P(B) = 0.2, a = ln 3; first as B: P(A) = 0.3, P(B) = 0.6, a = ln 2
    verdict_logps = f64([math.log(0.6), math.log(0.2)], [math.log(0.3), math.log(0.6)])[:, :, None]
    said = average_orders(verdict_logps)
    assert close(said.log_odds, [0.5 * (math.log(3) + math.log(2))])
    assert close(said.orders, [[math.log(3)], [math.log(2)]])
    assert close(said.verdict_mass, [0.85])  # (0.8 + 0.9) / 2


def test_a_constant_preference_for_a_seat_cancels():
    verdict_logps = f64(
        [[-1.0, -2.0], [-1.5, -0.5]], [[-3.0, -0.25], [-0.5, -4.0]]
    )  # (orders, tokens, pairs)
    biased = verdict_logps + f64(2.5, 0.0)[None, :, None]  # whoever sits in seat A gains 2.5 nats
    assert close(average_orders(biased).log_odds, average_orders(verdict_logps).log_odds)
    assert close(
        average_orders(biased).orders, average_orders(verdict_logps).orders + f64([2.5], [-2.5])
    )


def test_a_judge_that_always_answers_a_has_log_odds_of_zero():
    always_a = f64([math.log(0.9), math.log(0.1)], [math.log(0.9), math.log(0.1)])[:, :, None]
    assert close(average_orders(always_a).log_odds, [0.0])


@given(matrices(4))
def test_swapping_the_pair_negates_two_orders_and_exchanges_them(m: Tensor):
    asked = average_orders(m.unflatten(0, (2, 2)))
    swapped = average_orders(m.unflatten(0, (2, 2)).flip(0))
    assert torch.equal(swapped.log_odds, -asked.log_odds)
    assert torch.equal(swapped.orders, -asked.orders.flip(0))
    assert torch.equal(swapped.verdict_mass, asked.verdict_mass)


@given(matrices(2), st.floats(0.1, 10))
def test_swapping_the_pair_negates_a_difference(m: Tensor, scale: float):
    assert torch.equal(difference(m.flip(0), scale).log_odds, -difference(m, scale).log_odds)


def test_a_difference_is_scaled_and_has_no_orders_and_no_mass():
    said = difference(f64([3.0, 1.0], [1.0, 1.5]), 5.0)
    assert close(said.log_odds, [10.0, -2.5])
    assert said.orders is None
    assert said.verdict_mass is None


def test_the_expected_score_is_over_the_score_tokens_only():
    # 0 … 5 with probabilities .1 0 0 .2 0 .1 and .6 on other tokens: (0 * .1 + 3 * .2 + 5 * .1) /
    # .4 = 2.75
    tiny = -800.0  # exp underflows to 0
    score_logps = f64(math.log(0.1), tiny, tiny, math.log(0.2), tiny, math.log(0.1))
    expected, mass = expected_score(score_logps)
    assert close(expected, 2.75)
    assert close(mass, 0.4)


def test_the_expected_score_keeps_the_axes_behind_the_scores():
    even = torch.full((6, 2, 3), math.log(1 / 6), dtype=torch.float64)
    expected, mass = expected_score(even)
    assert close(expected, torch.full((2, 3), 2.5))  # (0 + 1 + 2 + 3 + 4 + 5) / 6
    assert close(mass, torch.ones(2, 3))


# ------------------------------ entropy, KL


def bernoulli_entropy(p: Tensor) -> Tensor:
    return -(p * p.log() + (1 - p) * (1 - p).log())


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_entropy_of_four_to_one_and_of_even_odds():
    # p = 4/5: -(0.8 ln 0.8 + 0.2 ln 0.2) = 0.50040…
    assert close(losses.entropy(f64(LN4, -LN4, 0.0)), [0.5004024235381879, 0.5004024235381879, LN2])


@given(matrices(1))
def test_entropy_is_that_of_a_bernoulli(m: Tensor):
    assert close(losses.entropy(m), bernoulli_entropy(torch.sigmoid(m)))


def test_entropy_of_a_certain_verdict_is_zero_in_fp32():
    assert losses.entropy(torch.tensor([1e4, -1e4])).tolist() == [0.0, 0.0]


def test_symmetric_kl_of_four_to_one_against_even_odds():
    # 1/2 (4/5 - 1/2)(ln 4 - 0) = 0.15 ln 4
    assert close(losses.symmetric_kl(f64([LN4], [0.0])), [0.15 * LN4])


def test_symmetric_kl_of_three_models_is_the_mean_over_their_three_pairs():
    # ln 4, 0, -ln 4: 0.15 ln 4 twice, and 1/2 (4/5 - 1/5)(2 ln 4) = 0.6 ln 4
    assert close(losses.symmetric_kl(f64([LN4], [0.0], [-LN4])), [0.3 * LN4])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_symmetric_kl_is_half_of_both_bernoulli_divergences(k: int):
    log_odds = 2 * torch.randn(
        k, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(k)
    )
    p = torch.sigmoid(log_odds)
    terms = [
        0.5 * (bernoulli_kl(p[i], p[j]) + bernoulli_kl(p[j], p[i]))
        for i, j in combinations(range(k), 2)
    ]
    assert close(losses.symmetric_kl(log_odds), sum(terms) / len(terms))


@given(matrices(3))
def test_symmetric_kl_is_zero_only_between_equal_verdicts_and_never_negative(m: Tensor):
    assert (losses.symmetric_kl(m) >= 0).all()
    assert torch.equal(losses.symmetric_kl(m[:1].expand(3, -1)), torch.zeros_like(m[0]))
    apart = m.clone()
    apart[1] = m[0] + 1
    assert (losses.symmetric_kl(apart) > 0).all()


def test_confidence_is_the_mean_entropy_of_the_models():
    assert close(losses.confidence(f64([LN4], [0.0])), [(0.5004024235381879 + LN2) / 2])


def test_below_the_floor_the_entropy_term_stands_still():
    log_odds = f64([math.log(999)], [0.0]).requires_grad_()  # P = 0.999: entropy 0.0079; and 0.6931
    value = losses.confidence(log_odds)
    assert close(value.detach(), [(0.05 + LN2) / 2])
    value.sum().backward()
    assert log_odds.grad is not None
    assert log_odds.grad.tolist() == [
        [0.0],
        [0.0],
    ]  # the first is below the floor; at even odds the slope is 0 anyway


def test_above_the_floor_the_entropy_term_pushes_towards_certainty():
    log_odds = f64([LN4], [-LN4]).requires_grad_()
    losses.confidence(log_odds).sum().backward()
    # dH/da = -a p (1 - p): -ln 4 * 0.16, half of it in a mean of two
    assert log_odds.grad is not None
    assert close(log_odds.grad, [[-0.08 * LN4], [0.08 * LN4]])


# ------------------------------ the mask


@pytest.mark.parametrize(
    ("votes", "agree"),
    [
        ([1.0, 2.0], True),
        ([-1.0, -2.0], True),
        ([1.0, -2.0], False),
        ([0.0, 2.0], False),  # a tie agrees with nobody
        ([0.0, 0.0], False),  # nor with another tie
        ([NAN, 2.0], False),  # a missing verdict is never agreement
        ([2.0, NAN], False),
        ([NAN, NAN], False),
        ([math.inf, 1e-3], True),
        ([3.0], True),
        ([1.0, 2.0, -0.1], False),
    ],
)
def test_models_agree_where_all_have_one_sign(votes: list[float], agree: bool):
    assert losses.consistent(torch.tensor(votes)[:, None]).tolist() == [agree]


@pytest.mark.parametrize(("threshold", "agree"), [(0.5, True), (0.79, True), (0.81, False)])
def test_the_least_sure_model_has_to_reach_the_threshold(threshold: float, agree: bool):
    assert losses.consistent(f64([-LN4], [-9.0]), threshold).tolist() == [
        agree
    ]  # max(p, 1 - p) = 4/5 and nearly 1


@given(matrices(3), st.floats(0.5, 0.99))
def test_agreement_does_not_depend_on_which_response_is_first_nor_on_the_order_of_the_models(
    m: Tensor, threshold: float
):
    mask = losses.consistent(m, threshold)
    assert torch.equal(losses.consistent(-m, threshold), mask)
    assert torch.equal(losses.consistent(m[[2, 0, 1]], threshold), mask)


@given(matrices(3), st.floats(0.01, 100))
def test_agreement_in_sign_is_free_of_scale(m: Tensor, scale: float):
    scaled = m * torch.tensor([1.0, scale, 1.0], dtype=torch.float64)[:, None]
    assert torch.equal(losses.consistent(scaled), losses.consistent(m))


# ------------------------------ DPO


def test_dpo_starts_at_ln_2():
    assert close(
        losses.dpo(torch.zeros(2, 3, dtype=torch.float64), f64(1.0, -1.0, 1.0), 0.1), [LN2] * 3
    )


def test_dpo_of_a_margin_of_two_nats_at_beta_a_tenth():
    # -log sigmoid(0.2) = ln(1 + e^-0.2) = 0.59814…, and the other way round ln(1 + e^0.2) =
    # 0.79814…
    log_ratios = f64([3.0, 3.0], [1.0, 1.0])
    assert close(
        losses.dpo(log_ratios, f64(1.0, -1.0), 0.1), [0.5981388693815918, 0.7981388693815918]
    )


def test_dpo_pushes_the_better_one_up_and_the_other_down_by_beta_times_the_chance_of_being_wrong():
    log_ratios = f64([3.0], [1.0]).requires_grad_()
    losses.dpo(log_ratios, f64(-1.0), 0.5).sum().backward()
    # second is better, beta * margin = -1: slope beta * sigmoid(1) = 0.5 * 0.73105…
    assert log_ratios.grad is not None
    assert close(log_ratios.grad, [[0.5 * 0.7310585786300049], [-0.5 * 0.7310585786300049]])


# ------------------------------ other preference losses

RATIOS = [
    [3.0, 3.0],
    [1.0, 1.0],
]  # h of first and second of two pairs, nats; the first is the better one, then the second
LABELS = (1.0, -1.0)


def test_ipo_is_least_at_a_margin_of_one_over_two_beta():
    # beta 0.1 wants 5 nats: (2 - 5)^2 = 9, and for the wrong order (-2 - 5)^2 = 49
    assert close(losses.ipo(f64(*RATIOS), f64(*LABELS), 0.1), [9.0, 49.0])
    assert close(losses.ipo(f64([5.0], [0.0]), f64(1.0), 0.1), [0.0])


def test_sppo_is_least_with_each_log_ratio_at_its_target():
    # beta 0.1 wants +5 and -5: (3 - 5)^2 + (1 + 5)^2 = 40, and the other way round (3 + 5)^2 + (1 -
    # 5)^2 = 80
    assert close(losses.sppo(f64(*RATIOS), f64(*LABELS), 0.1), [40.0, 80.0])


def test_simpo_is_dpo_on_mean_log_probabilities_less_a_margin():
    # -1 and -1.5 nats a token, beta 2, gamma 1.6: -log sigmoid(2 * 0.5 - 1.6) = ln(1 + e^0.6), and
    # ln(1 + e^2.6) for the wrong order
    mean_logps = f64([-1.0, -1.0], [-1.5, -1.5])
    expected = [math.log(1 + math.exp(0.6)), math.log(1 + math.exp(2.6))]
    assert close(losses.simpo(mean_logps, f64(*LABELS), 2.0, 1.6), expected)
    assert close(
        losses.simpo(mean_logps, f64(*LABELS), 2.0), losses.dpo(mean_logps, f64(*LABELS), 2.0)
    )


@pytest.mark.parametrize("loss", [losses.dpo, losses.ipo, losses.sppo, losses.simpo])
def test_a_preference_loss_does_not_depend_on_which_response_is_first(loss: Any):
    rewards = f64([3.0, -0.5], [1.0, 2.0])
    assert close(loss(rewards, f64(*LABELS), 0.3), loss(rewards.flip(0), -f64(*LABELS), 0.3))


def test_a_hedged_label_is_cream_s_mixture():
    # CREAM, tau = 1/3, C = 2/3 at a beta margin of 0.2: 2/3 * 0.59814 + 1/3 * 0.79814 = 0.66481
    # (2/3 of ln(1 + e^-0.2), 1/3 of ln(1 + e^0.2))
    loss = losses.hedged(
        lambda label: losses.dpo(f64([3.0], [1.0]), label, 0.1), f64(1.0), f64(2 / 3)
    )
    assert close(loss, [0.5981388693815918 * 2 / 3 + 0.7981388693815918 / 3])


def test_a_hedged_sppo_has_the_gradient_of_its_own_soft_target():
    h, certainty = f64([3.0], [1.0]).requires_grad_(), 0.8
    losses.hedged(
        lambda label: losses.sppo(h, label, 0.1), f64(1.0), f64(certainty)
    ).sum().backward()
    # target (C - 1/2) / beta = 3 for the better, -3 for the other: 2 (3 - 3) = 0 and 2 (1 + 3) = 8
    assert h.grad is not None
    assert close(h.grad, [[0.0], [8.0]])


# ------------------------------ the penalty


@given(matrices(3))
def test_the_penalty_depends_neither_on_the_order_of_responses_nor_on_that_of_models(m: Tensor):
    value = losses.symmetric_kl(m)
    assert close(losses.symmetric_kl(-m), value)
    assert close(losses.symmetric_kl(m[[2, 0, 1]]), value)


def test_the_matching_scale_makes_medians_equal():
    # medians 3 and 0.2: s = 15; a missing verdict is left out, and where there is nothing to match
    # nothing changes
    assert losses.matching_scale(
        f64([1.0, -3.0], [5.0, -3.0]), f64(-0.2, 0.2, NAN)
    ) == pytest.approx(15)
    assert losses.matching_scale(f64([1.0]), f64(0.0)) == 1


@pytest.mark.parametrize("k", [2, 3, 4])
def test_from_the_entropy_ceiling_on_a_small_disagreement_runs_off_by_itself(k: int):
    """Along sum a = 0, L_sym + alpha L_conf = alpha ln 2 + [2K/(K-1) - alpha] sum a^2 / 8K +
    O(a^4): the ceiling is 2K/(K-1).
    """
    ceiling = entropy_ceiling(k)
    a = torch.zeros(k, 1, dtype=torch.float64)
    a[0], a[1] = 0.05, -0.05
    for alpha, grows in ((ceiling - 0.1, False), (ceiling + 0.1, True)):
        value, rest = (losses.symmetric_kl(x) + alpha * losses.confidence(x) for x in (a, 0 * a))
        assert bool(value < rest) == grows


# ------------------------------ SCIR


SETTINGS = [
    {"beta": 0.1, "penalty_weight": 1.0, "entropy_weight": 0.1, "min_confidence": 0.5},
    {"beta": 0.5, "penalty_weight": 2.0, "entropy_weight": 0.7, "min_confidence": 0.6},
    {"beta": 0.1, "penalty_weight": 0.0, "entropy_weight": 0.1, "min_confidence": 0.7},
]


def scir_dpo(
    models: Tensor, voters: Tensor, log_ratios: Tensor, *, beta: float, **settings: Any
) -> losses.Scir:
    return losses.scir(
        models, voters, lambda label: losses.dpo(log_ratios, label, beta), **settings
    )


def by_the_book(models: Tensor, voters: Tensor, log_ratios: Tensor, s: dict[str, float]) -> Tensor:
    """METHOD section 3, pair by pair, with Bernoulli divergences and entropies instead of
    log-odds.
    """
    kept: list[Tensor] = []
    penalties: list[Tensor] = []
    for pair in range(models.shape[1]):
        p = [1 / (1 + torch.exp(-a)) for a in models[:, pair]]
        sym = [
            0.5 * (bernoulli_kl(p[i], p[j]) + bernoulli_kl(p[j], p[i]))
            for i in range(len(p))
            for j in range(i)
        ]
        conf = [torch.maximum(bernoulli_entropy(q), f64(0.05)[0]) for q in p]
        penalties.append(sum(sym) / len(sym) + s["entropy_weight"] * sum(conf) / len(conf))
        votes = voters[:, pair].tolist()
        sure = min(max(1 / (1 + math.exp(-v)), 1 / (1 + math.exp(v))) for v in votes)
        if (all(v > 0 for v in votes) or all(v < 0 for v in votes)) and sure >= s["min_confidence"]:
            better, worse = (0, 1) if votes[0] > 0 else (1, 0)
            margin = s["beta"] * (log_ratios[better, pair] - log_ratios[worse, pair])
            kept.append(torch.log(1 + torch.exp(-margin)))
    preference = sum(kept) / max(1, len(kept)) if kept else torch.zeros((), dtype=torch.float64)
    return preference + s["penalty_weight"] * sum(penalties) / len(penalties)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scir_and_its_gradient_are_those_of_the_method(
    k: int, setting: dict[str, float], seed: int
):
    random = torch.Generator().manual_seed(seed)
    models, voters, log_ratios = (
        2 * torch.randn(n, 9, dtype=torch.float64, generator=random) for n in (k, 2, 2)
    )
    ours, theirs = [
        (m.clone().requires_grad_(), h.clone().requires_grad_())
        for m, h in [(models, log_ratios)] * 2
    ]
    said = scir_dpo(ours[0], voters, ours[1], **setting)
    expected = by_the_book(theirs[0], voters, theirs[1], setting)
    assert 0 < said.mask.sum() < 9  # seeds chosen so that some pairs are kept and some are not
    assert close(said.loss.detach(), expected.detach())
    got, want = (
        torch.autograd.grad(loss, inputs, materialize_grads=True)
        for loss, inputs in [(said.loss, ours), (expected, theirs)]
    )
    assert close(got[0], want[0])
    assert close(got[1], want[1])


def test_scir_on_two_pairs_by_hand():
    # Pair 1: ln 4 and ln 4 agree on the first; pair 2: ln 4 and -ln 4 do not.
    models = f64([LN4, LN4], [LN4, -LN4])
    said = scir_dpo(
        models,
        models,
        f64([3.0, 5.0], [1.0, 9.0]),
        beta=0.1,
        penalty_weight=2.0,
        entropy_weight=0.1,
    )
    h = 0.5004024235381879
    assert said.mask.tolist() == [True, False]
    assert close(said.pair_inconsistency, [0.0, 0.6 * LN4])
    assert close(said.pair_entropy, [h, h])
    assert close(said.pair_preference_loss[:1], [0.5981388693815918])  # ln(1 + e^-0.2), as above
    assert close(said.loss, 0.5981388693815918 + 2.0 * (0.3 * LN4 + 0.1 * h))


@given(matrices(7))
def test_scir_does_not_depend_on_which_response_is_first(m: Tensor):
    models, voters, log_ratios = m[:3], m[3:5], m[5:]
    one = scir_dpo(models, voters, log_ratios, **SETTINGS[1])
    other = scir_dpo(-models, -voters, log_ratios.flip(0), **SETTINGS[1])
    assert close(other.loss, one.loss)
    assert torch.equal(other.mask, one.mask)


def test_without_penalty_and_with_all_agreeing_scir_is_the_mean_of_dpo():
    log_ratios = f64([3.0, -1.0, 0.5], [1.0, 2.0, 0.0])
    voters = f64([1.0, -2.0, 3.0], [0.5, -0.5, 4.0])
    said = scir_dpo(voters, voters, log_ratios, beta=0.1, penalty_weight=0.0, entropy_weight=0.1)
    # margins 2, 3 and 0.5 nats for the agreed one, at beta 0.1
    expected = sum(math.log(1 + math.exp(-0.1 * margin)) for margin in (2.0, 3.0, 0.5)) / 3
    assert close(said.loss, expected)


def test_the_dpo_term_is_normalized_by_the_pairs_kept_not_by_the_batch():
    voters = f64([1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.0, -1.0])  # one of four is kept
    log_ratios = f64([3.0, 50.0, 50.0, 50.0], [1.0, 0.0, 0.0, 0.0])
    said = scir_dpo(voters, voters, log_ratios, beta=0.1, penalty_weight=0.0, entropy_weight=0.1)
    assert close(said.loss, 0.5981388693815918)  # not a quarter of it


def test_where_nobody_agrees_nothing_is_preferred_and_only_the_penalty_is_left():
    models = f64([LN4], [-LN4]).requires_grad_()
    log_ratios = f64([3.0], [1.0]).requires_grad_()
    said = scir_dpo(models, models, log_ratios, beta=0.1, penalty_weight=1.0, entropy_weight=0.0)
    assert close(said.loss.detach(), 0.6 * LN4)
    said.loss.backward()
    assert log_ratios.grad is not None
    assert log_ratios.grad.tolist() == [[0.0], [0.0]]


def test_the_label_and_the_mask_pass_no_gradient():
    voters = f64([1.0, 2.0], [0.5, -1.0]).requires_grad_()
    models = f64([1.0, 2.0], [0.5, -1.0]).requires_grad_()
    said = scir_dpo(
        models,
        voters,
        f64([3.0, 1.0], [1.0, 0.0]).requires_grad_(),
        beta=0.1,
        penalty_weight=1.0,
        entropy_weight=0.1,
    )
    said.loss.backward()
    assert voters.grad is None
    assert models.grad is not None
    assert models.grad.abs().min() > 0


@pytest.mark.parametrize("votes", [[NAN, 1.0], [1.0, NAN], [NAN, NAN]])
def test_a_missing_verdict_of_a_voter_keeps_the_pair_out_of_loss_and_gradient(votes: list[float]):
    voters = torch.cat(
        [f64([1.0], [1.0]), f64(*([v] for v in votes))], dim=1
    )  # a good pair, and one without a verdict
    log_ratios = f64([3.0, 1.0], [1.0, 2.0]).requires_grad_()
    said = scir_dpo(
        f64([1.0, 1.0], [1.0, 1.0]),
        voters,
        log_ratios,
        beta=0.1,
        penalty_weight=0.0,
        entropy_weight=0.1,
    )
    assert said.mask.tolist() == [True, False]
    assert close(said.loss.detach(), 0.5981388693815918)
    said.loss.backward()
    # the first pair alone: beta * sigmoid(-0.2) = 0.1 * 0.45016…
    assert log_ratios.grad is not None
    assert close(log_ratios.grad, [[-0.045016600268752215, 0.0], [0.045016600268752215, 0.0]])


@pytest.mark.parametrize(
    ("alpha", "splits"), [(0.1, False), (3.9, False), (4.1, True), (8.0, True)]
)
def test_from_an_entropy_weight_of_four_on_two_models_gain_by_disagreeing_with_confidence(
    alpha: float, splits: bool
):
    """METHOD's second trap, K = 2, on the line a = (t, -t).

    The penalty is t tanh(t/2) + alpha H(t) = alpha ln 2 + (4 - alpha) t²/8 + O(t⁴).
    """
    t = torch.linspace(0, 10, 1001, dtype=torch.float64)
    a = torch.stack([t, -t])
    penalty = losses.symmetric_kl(a) + alpha * losses.confidence(a)
    assert close(penalty[0], alpha * LN2)
    assert bool(penalty.argmin() > 0) == splits
    assert (
        bool(penalty[10] < penalty[0]) == splits
    )  # and already a small disagreement, t = 0.1, runs off by itself


@pytest.mark.parametrize("alpha", [0.1, 3.9])
def test_below_four_the_penalty_leads_from_disagreement_to_agreement(alpha: float):
    models = f64([1.5], [-1.0]).requires_grad_()
    for _ in range(400):
        said = scir_dpo(
            models,
            models,
            torch.zeros(2, 1, dtype=torch.float64),
            beta=0.1,
            penalty_weight=1.0,
            entropy_weight=alpha,
        )
        (slope,) = torch.autograd.grad(said.loss, models)
        models = (models - slope).detach().requires_grad_()
    assert losses.consistent(models).tolist() == [True]
