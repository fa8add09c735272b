"""`filter --rule consensus` and soft labels of one reward model.

What is written, what is refused, what is warned about.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run, run_command
from rows import pair, response, verdict

from scir_cli.data import dataset, files
from scir_cli.data.schemas import to_table
from scir_cli.errors import ConfigError, DataError
from scir_cli.stages import soft_labels

VOTERS = ["judge", "likelihood", "pmi"]
LN3 = math.log(3)


def write(folder: Path, votes: dict[str, list[float | None]], gold: list[str | None]) -> Path:
    """A judged dataset: log-odds of each reward model on each pair, and the gold labels."""
    rows = [
        pair(
            i,
            [verdict(name, values[i]) for name, values in votes.items()],
            label,
            first=response(f"a{i}", 2 + i % 3),
            second=response(f"b{i}", 3),
        )
        for i, label in enumerate(gold)
    ]
    table = to_table("judged", rows)
    plan = {"stage": "judge", "votes": votes, "gold": gold}
    bounds = [(0, len(rows))]
    dataset.write_dataset(folder, "judged", plan, bounds, lambda *_: dataset.Part(table, len(rows)))
    return folder


def labeled(folder: Path, n: int = 40, seed: int = 0) -> Path:
    """Pairs with gold labels, on which three independent voters are each better than chance."""
    rng = np.random.default_rng(seed)
    gold = rng.choice([-1.0, 1.0], n)
    votes = {name: (0.5 * gold + rng.normal(0, 1, n)).tolist() for name in VOTERS}
    return write(folder, votes, ["first" if g > 0 else "second" for g in gold])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return dataset.read_dataset(folder, "preferences").to_pylist()


#: Sizes 2, 0.1, 4: likelihood counts 20-fold, pmi a half.
THREE: dict[str, list[float | None]] = {
    "judge": [2.0, 2.0, -2.0, 2.0, 2.0],
    "likelihood": [0.1, -0.1, -0.1, 0.1, None],
    "pmi": [4.0, -4.0, 8.0, -8.0, 4.0],
}


def test_consensus_labels_every_pair_with_the_probability_of_its_pool(tmp_path: Path):
    write(tmp_path / "judged", THREE, [None] * 5)
    manifest = run(
        "filter",
        input=str(tmp_path / "judged"),
        rule="consensus",
        label_temperature=2 / (3 * LN3),
        output_dir=tmp_path / "out",
    )
    # z = (2 + 2 + 2) / 3, (2 - 2 - 2) / 3, (-2 - 2 + 4) / 3 = 0, (2 + 2 - 4) / 3 = 0, no verdict of
    # likelihood
    assert manifest["drops"] == {"tie": 2, "no_verdict": 1}
    first, second = rows_of(tmp_path / "out")
    assert (first["pair_id"], first["label"]) == ("p0", "first")
    assert (second["pair_id"], second["label"]) == ("p1", "second")
    # z / T = 2 * 3 ln 3 / 2 = ln 27, and a third of it: ln 3
    assert first["label_probability"] == pytest.approx(27 / 28)
    assert second["label_probability"] == pytest.approx(3 / 4)
    assert [r["margin"] for r in (first, second)] == pytest.approx([3 * LN3, LN3])
    assert second["chosen"][0]["content"] == "b1"
    figures = manifest["summary"]["soft_labels"]
    assert figures["voters"] == pytest.approx({"judge": 2.0, "likelihood": 0.1, "pmi": 4.0})
    # ties are half sure: (27/28 + 3/4 + 1/2 + 1/2) / 4
    assert figures["mean_certainty"] == pytest.approx((27 / 28 + 3 / 4 + 1) / 4)


def test_one_reward_model_has_soft_labels_where_they_are_requested(tmp_path: Path):
    write(tmp_path / "judged", {"judge": [LN3, -2 * LN3, 4 * LN3]}, [None] * 3)
    common = {"input": str(tmp_path / "judged"), "rule": "judge"}
    run("filter", **common, output_dir=tmp_path / "hard")
    assert [row["label_probability"] for row in rows_of(tmp_path / "hard")] == [None] * 3
    run("filter", **common, soft_labels=True, output_dir=tmp_path / "soft")
    soft = rows_of(tmp_path / "soft")
    assert [row["label_probability"] for row in soft] == pytest.approx([3 / 4, 9 / 10, 81 / 82])
    assert [row["label"] for row in soft] == ["first", "second", "first"]
    run("filter", **common, soft_labels=True, label_temperature=2.0, output_dir=tmp_path / "warm")
    warm = rows_of(tmp_path / "warm")
    assert [row["label_probability"] for row in warm][1:] == pytest.approx([3 / 4, 9 / 10])


def test_a_temperature_near_zero_makes_hard_labels_of_a_pool(tmp_path: Path):
    source = labeled(tmp_path / "judged")
    common = {"input": str(source), "rule": "consensus"}
    run("filter", **common, output_dir=tmp_path / "soft")
    run("filter", **common, label_temperature=1e-9, output_dir=tmp_path / "hard")
    soft, hard = rows_of(tmp_path / "soft"), rows_of(tmp_path / "hard")
    assert [row["label"] for row in soft] == [row["label"] for row in hard]
    assert {row["label_probability"] for row in hard} == {1.0}


def test_a_voter_weighs_what_the_labeled_pairs_show(tmp_path: Path):
    # 22 labeled pairs: judge right on 17 (ln 3), likelihood on 11 (0), pmi on 20 (ln 7).
    gold = [1.0 if i % 2 else -1.0 for i in range(22)]
    votes = {
        name: [size * g * (1 if i < right else -1) for i, g in enumerate(gold)]
        for name, size, right in (("judge", 2.0, 17), ("likelihood", 0.1, 11), ("pmi", 4.0, 20))
    }
    write(tmp_path / "seed", votes, ["first" if g > 0 else "second" for g in gold])
    write(tmp_path / "judged", THREE, [None] * 5)
    manifest = run(
        "filter",
        input=str(tmp_path / "judged"),
        rule="consensus",
        calibrate_on=str(tmp_path / "seed"),
        voter_weights="calibrated",
        output_dir=tmp_path / "out",
    )
    figures = manifest["summary"]["soft_labels"]
    both = LN3 + math.log(7)
    expected = {"judge": LN3 / both, "likelihood": 0.0, "pmi": math.log(7) / both}
    assert figures["weights"] == pytest.approx(expected)
    # pmi, of the same sizes, is heavier than the judge wherever they differ
    labels = [row["label"] for row in rows_of(tmp_path / "out")]
    assert labels == ["first", "second", "first", "second"]
    assert manifest["drops"] == {"no_verdict": 1}


def test_calibrated_weights_need_labeled_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    write(tmp_path / "judged", THREE, [None] * 5)
    words = ["filter", "-i", str(tmp_path / "judged"), "-o", str(tmp_path / "out")]
    words += ["--rule", "consensus", "--voter-weights", "calibrated"]
    assert run_command(words, monkeypatch) == 2
    assert "needs --rule consensus and --calibrate-on" in capsys.readouterr().err


def test_the_temperature_is_fitted_on_labeled_pairs_and_stands_in_the_manifest(tmp_path: Path):
    own = labeled(tmp_path / "own", seed=1)
    seed_pairs = labeled(tmp_path / "seed", n=200)
    manifest = run(
        "filter",
        input=str(own),
        rule="consensus",
        calibrate_on=str(seed_pairs),
        output_dir=tmp_path / "out",
    )
    found = files.read_json(tmp_path / "out" / "manifest.json")["summary"]["soft_labels"]
    assert found == manifest["summary"]["soft_labels"]
    fit = found["calibration"]
    assert fit["low"] < fit["temperature"] < fit["high"]
    assert (fit["pairs"], found["temperature"]) == (200, fit["temperature"])
    assert fit["nll"] <= fit["nll_uncalibrated"]
    assert set(fit["models"]) == set(VOTERS)
    # three independent voters together are better than each of them
    assert all(fit["accuracy"] > model["accuracy"] for model in fit["models"].values())
    # the same labels at that temperature, given as a number
    run(
        "filter",
        input=str(own),
        rule="consensus",
        label_temperature=fit["temperature"],
        output_dir=tmp_path / "given",
    )
    fitted, given = rows_of(tmp_path / "out"), rows_of(tmp_path / "given")
    assert [r["label_probability"] for r in fitted] == pytest.approx(
        [r["label_probability"] for r in given]
    )


@pytest.mark.parametrize(
    ("votes", "values", "error", "message"),
    [
        ({"judge": [1.0, 2.0]}, {}, ConfigError, "no verdicts of 'likelihood'"),
        (THREE | {"pmi": [1.0] * 5}, {}, DataError, "'pmi' has log-odds 1 on all of its 5 pairs"),
        (THREE | {"pmi": [0.0] * 5}, {}, DataError, "'pmi' has log-odds 0 on all of its 5 pairs"),
        (THREE | {"pmi": [None] * 5}, {}, DataError, "'pmi' has a verdict on none of the pairs"),
        (
            THREE | {"pmi": [3 * a for a in THREE["judge"]]},
            {},
            DataError,
            "'judge' and 'pmi' are the same voter",
        ),
        (
            THREE | {"implicit": [1.0, -2.0, 1.0, 1.0, 3.0]},
            {"voters": ["all"]},
            ConfigError,
            "'implicit': the implicit reward is the policy in training",
        ),
        (THREE, {"voters": ["judge", "judge"]}, ConfigError, "it names 'judge' twice"),
        (THREE, {"rule": "agree", "soft_labels": True}, ConfigError, "one log-odds"),
        (THREE, {"rule": "judge", "label_temperature": 2.0}, ConfigError, "need --soft-labels"),
    ],
)
def test_what_cannot_be_pooled_is_refused(
    tmp_path: Path,
    votes: dict[str, list[float | None]],
    values: dict[str, Any],
    error: type[Exception],
    message: str,
):
    write(tmp_path / "judged", votes, [None] * len(next(iter(votes.values()))))
    given = {"rule": "consensus", **values}
    with pytest.raises(error, match=message):
        run("filter", input=str(tmp_path / "judged"), **given, output_dir=tmp_path / "out")


def test_implicit_votes_where_it_is_named_and_the_reason_against_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "judged", THREE | {"implicit": [1.0, -2.0, 1.0, 1.0, 3.0]}, [None] * 5)
    manifest = run(
        "filter",
        input=str(tmp_path / "judged"),
        rule="consensus",
        voters=["judge", "implicit"],
        output_dir=tmp_path / "out",
    )
    assert "the policy in training" in capsys.readouterr().err
    assert list(manifest["summary"]["soft_labels"]["voters"]) == ["judge", "implicit"]


@pytest.mark.parametrize(
    ("n", "gold", "message"),
    [
        (10, "first", "10 labeled pairs have a verdict, and a temperature needs at least 20"),
        (30, None, "0 labeled pairs have a verdict"),
        (30, "as judged", "separable"),
    ],
)
def test_pairs_that_calibrate_nothing_are_refused_in_one_line(
    tmp_path: Path,
    n: int,
    gold: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    signs = [1.0 if i % 2 else -1.0 for i in range(n)]
    judge = [sign * (1 + i) for i, sign in enumerate(signs)]
    labels = ["first" if s > 0 else "second" for s in signs] if gold == "as judged" else [gold] * n
    source = write(tmp_path / "judged", {"judge": judge}, labels)
    words = ["--input", str(source), "--rule", "judge", "--soft-labels"]
    words += ["--calibrate-on", str(source), "--output-dir", str(tmp_path / "out")]
    assert run_command(["filter", *words], monkeypatch) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert message in line


def test_a_run_warns_about_voters_that_are_one_and_labels_that_are_sure_long_or_one_sided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rng = np.random.default_rng(3)
    # the first response has 2, 3 or 4 tokens in turn, the second 3: the judge follows the length
    judge = 10 * (np.arange(30) % 3 - 0.5) ** 2 + 20 * (np.arange(30) % 3) + 1
    nearly = judge + rng.normal(0, 0.5, 30)
    source = write(
        tmp_path / "judged",
        {"judge": judge.tolist(), "likelihood": nearly.tolist()},
        [None] * 30,
    )
    manifest = run(
        "filter",
        input=str(source),
        rule="consensus",
        voters=["judge", "likelihood"],
        output_dir=tmp_path / "out",
    )
    printed = capsys.readouterr().err
    one, long, sure, side = manifest["summary"]["soft_labels"]["warnings"]
    assert "judge, likelihood have become one" in one
    assert "prefer the longer response" in long
    assert "sure of everything" in sure
    assert "all 30 labels prefer the first response" in side
    assert all(line in printed for line in (one, long, sure, side, "the labels have temperature 1"))


def test_labels_that_say_nothing_are_warned_about(tmp_path: Path):
    source = labeled(tmp_path / "judged")
    manifest = run(
        "filter",
        input=str(source),
        rule="consensus",
        label_temperature=100.0,
        output_dir=tmp_path / "out",
    )
    (line,) = manifest["summary"]["soft_labels"]["warnings"]
    assert "hardly sure of anything" in line


def calibrated(low: float, high: float, before: float | None, now: float | None) -> dict[str, Any]:
    """Figures of a pool with a temperature of 1 from two-sided gold labels."""
    calibration = {
        "temperature": 1.0,
        "low": low,
        "high": high,
        "one_sided": False,
        "length_correlation": before,
    }
    return {"calibration": calibration, "length_correlation": now}


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        # a factor of 16 between the ends, and one of 3
        (calibrated(0.25, 4.0, 0.1, 0.1), "uncertain: 1, 95 % interval 0.25 to 4"),
        (calibrated(0.5, 1.5, 0.1, 0.1), None),
        # 0.4 apart, and 0.25
        (calibrated(0.9, 1.1, 0.125, -0.275), "+0.12 on the calibration pairs, -0.28 on these"),
        (calibrated(0.9, 1.1, 0.125, 0.375), None),
        (calibrated(0.9, 1.1, None, 0.375), None),
        ({"calibration": None, "length_correlation": 0.4}, None),
    ],
)
def test_a_vague_temperature_and_a_pool_that_drifts_in_length_are_warned_about(
    figures: dict[str, Any], message: str | None
):
    lines = soft_labels.calibration_guards(figures)
    assert len(lines) == (message is not None)
    assert all(message in line for line in lines if message)


@pytest.mark.parametrize(("n", "factor"), [(20, 3.92), (40, 2.96)])
def test_a_few_nearly_separable_pairs_give_a_temperature_and_a_warning(
    tmp_path: Path, n: int, factor: float
):
    # n - 1 of n pairs are labeled correctly, |z| = 2: T = 2 / ln(n - 1). The half width of log T is
    # 1.96 / (ln(n - 1) / 2 * sqrt(n * 4 * (n - 1) / n^2)):
    # 0.683 for 20 pairs, e^1.366 = 3.92; 0.542 for 40 pairs, e^1.084 = 2.96.
    signs = [1.0 if i % 2 else -1.0 for i in range(n)]
    gold = ["first" if sign > 0 else "second" for sign in [-signs[0], *signs[1:]]]
    seed_pairs = write(tmp_path / "seed", {"judge": [2 * sign for sign in signs]}, gold)
    manifest = run(
        "filter",
        input=str(labeled(tmp_path / "own")),
        rule="judge",
        soft_labels=True,
        calibrate_on=str(seed_pairs),
        output_dir=tmp_path / "out",
    )
    found = manifest["summary"]["soft_labels"]
    fit = found["calibration"]
    assert fit["temperature"] == pytest.approx(2 / math.log(n - 1), rel=1e-6)
    assert fit["high"] / fit["low"] == pytest.approx(factor, rel=2e-3)
    assert any("uncertain" in line for line in found["warnings"]) == (factor > 3)
