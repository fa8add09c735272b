"""Verdicts on the same pairs compared between runs, and what they lean to.

By hand, against scipy, and through the stage.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import shown
from rows import judged, pair, response, verdict, verdicts
from scipy import stats

from scir_cli import config, settings, stages
from scir_cli.analysis import bias, consistency, stability, statistics
from scir_cli.data.dataset import Part, write_dataset
from scir_cli.errors import DataError
from scir_cli.report import tables

NAN = math.nan


# Intervals


def test_kappa_has_the_interval_of_its_observed_agreement():
    # The textbook table (p_o 0.7 of 50, p_e 0.5): kappa 0.4; Wilson of 35/50 is [0.5625, 0.8090],
    # so kappa [0.125, 0.618]
    a = np.repeat([2.0, 0.1, -3.0, -1.0], [20, 5, 10, 15])
    b = np.repeat([1.0, -1.0, 1.0, -1.0], [20, 5, 10, 15])
    assert statistics.kappa_interval(a, b) == pytest.approx((0.4, 0.125, 0.618), abs=1e-3)
    perfect = statistics.kappa_interval(np.array([1.0, -1, 1]), np.array([1.0, -1, 1]))
    assert perfect[0] == perfect[2] == 1 and perfect[1] < 0.2  # three pairs prove little


def test_a_rank_correlations_interval_has_its_nominal_coverage():
    rng, inside = np.random.default_rng(0), 0
    true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a bivariate normal with r = 0.6
    for _ in range(400):
        a = rng.normal(size=60)
        b = 0.6 * a + 0.8 * rng.normal(size=60)
        low, high = statistics.correlation_interval(statistics.spearman(a, b), 60)
        inside += low < true < high
    assert 0.92 < inside / 400 < 0.98
    assert all(math.isnan(end) for end in statistics.correlation_interval(0.5, 3))


def test_rates_kappa_and_rank_correlation_are_scipys_and_scikit_learns():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    for k, n in ((0, 3), (1, 1), (7, 9), (50, 100), (999, 1000)):
        interval = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert statistics.wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-6)
    a, b = rng.integers(-2, 3, (2, 500)).astype(float)
    b[:200] = a[:200]
    found = consistency.pairwise_agreement(a, b)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(np.sign(a), np.sign(b)))
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found["agreement"] == (np.sign(a) == np.sign(b)).mean()


# Between runs


def test_pairs_are_joined_by_id_and_what_is_left_out_is_counted():
    here, there, left = stability.common_rows(["a", "b", "c", "b", "e"], ["c", "a", "d", "a"])
    assert (here.tolist(), there.tolist()) == ([0, 2], [1, 0])
    assert left == {"only_here": 2, "only_there": 1, "duplicate_pair": 2}  # b, e; d; b and a again


def crossed(scores: np.ndarray) -> tuple[Any, Any, Any]:
    """All pairs of each prompt's responses.

    Log-odds, prompts, responses.  scores: (prompts, responses)
    """
    n = scores.shape[1]
    pairs = [(p, i, j) for p in range(len(scores)) for i, j in itertools.combinations(range(n), 2)]
    log_odds = np.array([scores[p, i] - scores[p, j] for p, i, j in pairs])
    return (
        log_odds,
        np.array([p for p, _, _ in pairs]),
        np.array([[p * n + i for p, i, _ in pairs], [p * n + j for p, _, j in pairs]]),
    )


def test_the_rank_correlation_of_pointwise_rewards_is_kendalls_of_the_scores_themselves():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(40, 5))
    other = one + rng.normal(size=one.shape)
    (a, prompt, sides), (b, _, _) = crossed(one), crossed(other)
    found = stability.rank_agreement(a, b, prompt, sides)
    taus = [stats.kendalltau(x, y).statistic for x, y in zip(one, other, strict=True)]
    top = [
        x.argmax() == y.argmax() and x.argmin() == y.argmin()
        for x, y in zip(one, other, strict=True)
    ]
    assert found["ranked_prompts"] == 40
    assert found["kendall"] == pytest.approx(np.mean(taus))
    assert found["cream_consistency"] == pytest.approx((np.mean(taus) + 1) / 2)
    assert found["kendall_high"] - found["kendall"] == pytest.approx(
        1.96 * stats.sem(taus), rel=1e-4
    )
    assert found["top_order"] == pytest.approx(np.mean(top))
    mixed = rng.permutation(len(a))
    assert stability.rank_agreement(
        a[mixed], b[mixed], prompt[mixed], sides[:, mixed]
    ) == pytest.approx(found)


def test_a_prompt_with_a_missing_pair_or_only_two_responses_is_not_ranked():
    a, prompt, sides = crossed(np.array([[3.0, 2, 1], [1, 2, 3]]))
    b = a.copy()
    b[0] = NAN  # of the first prompt
    a, b = np.append(a, 1.0), np.append(b, 1.0)
    prompt, sides = np.append(prompt, 2), np.concatenate([sides, [[6], [7]]], 1)
    found = stability.rank_agreement(a, b, prompt, sides)
    assert (found["ranked_prompts"], found["kendall"], found["top_order"]) == (1, 1.0, 1.0)
    nothing = stability.rank_agreement(np.full(7, NAN), b, prompt, sides)
    assert nothing["ranked_prompts"] == 0 and math.isnan(nothing["kendall"])


def test_what_stays_of_each_model_is_agreement_ranks_and_accuracy():
    # judge: signs + - + (tie) against + + + +: agreement 2 of 4; correct here 1, 0, 1, 1/2 and
    # there 1, 1, 1, 1 with gold + + + +
    one = verdicts([[1.0, -1, 2, 0], [1, 1, 1, 1]], gold=[1, 1, 1, 1])
    other = verdicts([[2.0, 3, 1, 1], [1, 1, NAN, 1]], gold=[1, 1, 1, 1])
    found = stability.verdict_stability(one, other, np.arange(4), np.arange(8).reshape(2, 4))
    assert (found["judge"]["agreement"], found["judge"]["accuracy_change"]) == (0.5, -1.5 / 4)
    assert (
        found["implicit"]["pairs"],
        found["implicit"]["kappa"],
        found["implicit"]["kendall"],
    ) == (3, None, None)
    assert (
        stability.unanimous_rate([one, other, one])["judge"]["unanimous"] == 0.5
    )  # a tie is never a common verdict


# What verdicts lean to


def biases(v, table, own=None):
    return bias.biases(v, bias.properties(v, table, own))


def table_of(*texts: tuple[str, str], authors: Any = (None, None)) -> pa.Table:
    rows = [
        pair(
            i,
            [verdict("judge", 1.0)],
            first=response(a) | {"author": authors[0]},
            second=response(b) | {"author": authors[1]},
        )
        for i, (a, b) in enumerate(texts)
    ]
    return judged(*rows)


def test_leaning_to_length_is_counted_where_lengths_differ_and_set_against_the_labels():
    # longer is first, first, second, none, second; verdicts first, second, second, -, tie: to the
    # longer 1, 0, 1, 1/2
    v = verdicts([[1.0, -1, -1, 1, 0]], gold=[-1, -1, -1, 1, NAN], length=[5, 5, -5, 0, -5])
    found = biases(v, table_of(*[("a", "b")] * 5))["judge"]["longer"]
    assert (found["pairs"], found["rate"]) == (4, 2.5 / 4)
    assert (found["rate_low"], found["rate_high"]) == pytest.approx(
        statistics.wilson(2.5, 4), abs=1e-6
    )
    # labeled three: verdicts to the longer 1, 0, 1; labels 0, 0, 1: excess 1, 0, 0
    assert found["excess"] == pytest.approx(1 / 3, abs=1e-6)
    gold = biases(v, table_of(*[("a", "b")] * 5))["gold"]["longer"]
    assert (gold["pairs"], gold["rate"]) == (3, pytest.approx(1 / 3, abs=1e-6))


def test_formats_are_seen_where_only_one_of_the_two_has_them():
    table = table_of(
        ("- a\n- b", "plain"),
        ("plain", "1. one"),
        ("* a", "- b"),
        ("```x```", "no"),
        ("a - b", "# Head"),
        ("#no\n1.no", "-1"),
        ("a", "\n + x"),
    )
    v = verdicts([[1.0, 1, 1, -1, -1, 1, 1]])
    found = biases(v, table)["judge"]
    # lists: rows 0 (+, wins), 1 (-, loses), 6 (-, loses); code: row 3 (+, loses); headers: row 4
    # (-, wins)
    assert (found["lists"]["pairs"], found["lists"]["rate"]) == (3, round(1 / 3, 6))
    assert (found["code"]["pairs"], found["code"]["rate"]) == (1, 0)
    assert (found["headers"]["pairs"], found["headers"]["rate"]) == (1, 1)


def test_self_preference_needs_an_author_on_both_sides():
    table = pa.concat_tables(
        [
            table_of(("a", "b"), authors=("me", "you")),
            table_of(("a", "b"), authors=("you", "me")),
            table_of(("a", "b"), authors=("me", "me")),
            table_of(("a", "b"), authors=("me", None)),
        ]
    )
    v = verdicts([[1.0, 1, 1, 1]])
    found = biases(v, table, own="me")["judge"]["own"]
    assert (found["pairs"], found["rate"]) == (2, 0.5)
    assert "own" not in biases(v, table)["judge"]


def test_the_seat_is_judged_over_both_orders():
    v = verdicts([[0.0, 1, 0]], [[1.0, 1, -1]], [[-1.0, 1, 1]])  # A A, A B, B B
    found = biases(v, table_of(*[("a", "b")] * 3))["judge"]["position"]
    assert (found["pairs"], found["rate"]) == (3, 0.5)
    assert (found["rate_low"], found["rate_high"]) == pytest.approx(
        statistics.wilson(1.5, 3), abs=1e-6
    )


def test_swapping_every_pair_changes_no_leaning():
    rng = np.random.default_rng(0)
    texts = [("- a" * int(x), "`" * 3 * int(y) + "b") for x, y in rng.integers(0, 2, (60, 2))]
    forward, swapped = rng.normal(size=(2, 1, 60))
    gold, length = rng.choice([-1.0, 1, NAN], 60), rng.integers(-2, 3, 60).astype(float)
    one = biases(
        verdicts((forward + swapped) / 2, forward, swapped, gold, length), table_of(*texts)
    )
    other = biases(
        verdicts(-(forward + swapped) / 2, -swapped, -forward, -gold, -length),
        table_of(*[(b, a) for a, b in texts]),
    )
    assert one == other


# Through the stage


def dataset(
    path: Path, log_odds: list[float], prompts: int = 1, model: str = "key", ids: str = "p"
) -> str:
    """A judged dataset.

    Every two of three responses of each prompt; log_odds of each pair in turn.
    """
    rows = []
    for number, value in enumerate(log_odds):
        i, j = list(itertools.combinations(range(3), 2))[number % 3]
        row = pair(
            f"{ids}{number}",
            [verdict("judge", value, value, -value)],
            first=response("abc"[i] * (i + 1)),
            second=response("abc"[j] * (j + 1)),
        )
        rows.append(row | {"prompt_id": f"q{number // 3}", "pair_id": f"{ids}{number}"})
    plan = {"stage": "judge", "model": model}
    write_dataset(path, "judged", plan, [(0, 1)], lambda low, high: Part(rows, len(rows)))
    return str(path)


def run(**values: Any) -> Any:
    return stages.load("check-consistency")(
        config.build(settings.CheckConsistencySettings, values, where="test")
    )


def test_check_consistency_compares_iterations_and_shows_it_at_eighty_columns(tmp_path: Path):
    now = dataset(tmp_path / "now", [1.0, 2, 1, -1, -2, -1])  # 0 > 1 > 2, then 2 > 1 > 0
    before = dataset(tmp_path / "before", [1.0, 2, 1, 1, -1, -2])  # the same; then 2 > 0 > 1
    other = dataset(tmp_path / "other", [1.0, -2, 1, -1, -2, -1])
    manifest = run(input=now, compare_to=[before, other], output_dir=tmp_path / "o")
    found = manifest["across"]["against"][0]["models"]["judge"]
    assert (found["agreement"], found["ranked_prompts"]) == (round(5 / 6, 6), 2)
    assert found["kendall"] == pytest.approx((1 + 1 / 3) / 2, abs=1e-6)
    assert found["top_order"] == 0.5
    assert manifest["across"]["unanimous"]["judge"]["unanimous"] == round(4 / 6, 6)
    text = shown(*tables.verdict_tables(manifest))
    assert (
        max(map(len, text.splitlines())) <= 80
        and "CREAM's tau" in text
        and "same verdict in all" in text
    )
    parts = run(input=now, compare_to=[before], by_subset=True, output_dir=tmp_path / "o")
    assert parts["summary"] == manifest["summary"]  # comparing changes no row
    assert parts["across"]["against"][0]["by_subset"] == {
        "(none)": manifest["across"]["against"][0]["models"]
    }
    assert parts["by_subset"]["(none)"]["biases"] == manifest["summary"]["biases"]


def test_other_pairs_cannot_be_compared_and_nothing_is_written(tmp_path: Path):
    now, other = (
        dataset(tmp_path / "now", [1.0, 1, 1]),
        dataset(tmp_path / "other", [1.0, 1, 1], ids="r"),
    )
    with pytest.raises(DataError, match="holds none of the 3 pairs"):
        run(input=now, compare_to=[other], output_dir=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_an_unknown_author_is_a_note(tmp_path: Path):
    summary = run(
        input=dataset(tmp_path / "now", [1.0, 1, 1]),
        judge_author="somebody",
        output_dir=tmp_path / "o",
    )["summary"]
    assert summary["notes"] == [
        "no pair has one response by 'somebody' and one by another known author"
    ]


@pytest.mark.slow
def test_a_hundred_thousand_pairs_are_compared_in_seconds():
    n, rng = 100_000, np.random.default_rng(0)
    texts = pa.array([f"{'- ' * (i % 2)}text {i % 7919} " * 20 for i in range(1000)])
    first, second = (
        pa.DictionaryArray.from_arrays(rng.integers(0, 1000, n), texts).dictionary_decode()
        for _ in range(2)
    )
    sides = {"first": first, "second": second}
    columns = {
        name: pa.StructArray.from_arrays([side, pa.array(["x"] * n)], ["text", "author"])
        for name, side in sides.items()
    }
    table = pa.table(columns | {"prompt_id": pa.array([f"q{i // 10}" for i in range(n)])})
    one = verdicts(
        rng.normal(size=(2, n)), length=rng.normal(size=n), gold=rng.choice([-1.0, 1.0], n)
    )
    two = verdicts(one.log_odds + rng.normal(size=(2, n)), gold=one.gold)
    start = time.perf_counter()
    here, there, _ = stability.common_rows(one.pair_ids, two.pair_ids)
    stability.verdict_stability(
        one.take(here), two.take(there), *stability.prompt_and_response_codes(table)
    )
    biases(one, table, "x")
    assert time.perf_counter() - start < 5
