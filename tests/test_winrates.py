"""Win rates against numbers worked by hand and against a second implementation, made of scipy's
optimizers and not of scikit-learn.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import shown
from scipy.optimize import minimize
from toy import make_model

from scir_cli import config, settings, stages
from scir_cli.analysis import win_rates
from scir_cli.data import dataset
from scir_cli.errors import ConfigError, DataError
from scir_cli.report import tables
from scir_cli.stages import eval_winrate

NAN = math.nan


def test_a_win_rate_is_the_mean_preference_and_counts_draws_as_half_wins():
    found = win_rates.win_rate(np.array([0.9, 0.5, 0.2, 0.8, NAN]))
    # mean 2.4/4; squares of the deviations .09 .01 .16 .04 = .3, / 3 / 4 = .025; counted: 2 + 1/2
    # of 4
    assert (found["pairs"], found["verdicts"], found["wins"], found["losses"], found["draws"]) == (
        5,
        4,
        2,
        1,
        1,
    )
    assert found["win_rate"] == pytest.approx(0.6)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.025))
    assert found["discrete_win_rate"] == 0.625


def test_no_verdicts_are_no_rate_and_one_has_no_standard_error():
    nothing = win_rates.win_rate(np.array([NAN]))
    assert (
        nothing["win_rate"],
        nothing["standard_error"],
        nothing["discrete_win_rate"],
        nothing["discrete_low"],
    ) == (None,) * 4
    assert win_rates.win_rate(np.array([0.7]))["standard_error"] is None


# Length control


def smooth(x, p, weight, c):
    """argmin of C sum_i w_i (-p log q - (1 - p) log(1 - q)) + |beta|_1, beta = u - v with u, v >=
    0.
    """

    def objective(uv):
        beta = uv[: x.shape[1]] - uv[x.shape[1] :]
        z = x @ beta
        gradient = c * (x.T @ (weight * (1 / (1 + np.exp(-z)) - p)))
        return c * (weight * (np.logaddexp(0, z) - p * z)).sum() + uv.sum(), np.concatenate(
            [gradient, -gradient]
        ) + 1

    start = np.full(2 * x.shape[1], 0.1)
    done = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(start),
        options={"ftol": 1e-14, "gtol": 1e-10},
    )
    return done.x[: x.shape[1]] - done.x[x.shape[1] :]


def second_implementation(p, lengths, difficulty=None, gamed=None):
    d = lengths[1] - lengths[0]
    columns = [
        np.tanh(d / np.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1))),
        *([] if difficulty is None else [difficulty]),
    ]
    test = np.stack([np.zeros(len(d)), *columns[1:], np.ones(len(d))], 1)
    x = np.stack([*columns, np.ones(len(d))], 1)[~np.isnan(p)]
    y, weight = p[~np.isnan(p)], np.ones((~np.isnan(p)).sum())
    if gamed is not None:
        x = np.concatenate(
            [x, np.stack([np.tanh(gamed.std_delta_len), gamed.difficulty, 0 * gamed.difficulty], 1)]
        )
        y, weight = (
            np.concatenate([y, gamed.preference]),
            np.concatenate([weight, np.full(len(gamed.preference), 0.1)]),
        )
    fold = np.arange(len(y)) % 5
    losses = {}
    for c in np.logspace(-4, 4, 10):
        found = []
        for k in range(5):
            z = x[fold == k] @ smooth(x[fold != k], y[fold != k], weight[fold != k], c)
            found.append((weight[fold == k] * (np.logaddexp(0, z) - y[fold == k] * z)).mean())
        losses[c] = np.mean(found)
    return (1 / (1 + np.exp(-test @ smooth(x, y, weight, min(losses, key=losses.get))))).mean()


def annotated(n=400, seed=0, quality=-0.3, taste=1.5):
    """Preferences of a judge that likes length: a model that is worse but longer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(50, 3000, (2, n)).astype(float)
    lengths[0] *= 1.5
    difficulty = rng.normal(size=n)
    p = 1 / (
        1
        + np.exp(
            -(
                quality
                + taste * np.tanh((lengths[0] - lengths[1]) / 1200)
                + 0.8 * difficulty
                + rng.normal(0, 1, n)
            )
        )
    )
    return p, lengths, difficulty


def gamed_rows(n=400, seed=1):
    rng = np.random.default_rng(seed)
    difficulty = np.tile(rng.normal(size=n), 2)
    delta = rng.normal(np.repeat([1.0, -1.0], n), 1)
    return win_rates.Gamed(
        1 / (1 + np.exp(1.5 * np.tanh(delta) - 0.5 * difficulty)),
        delta,
        difficulty,
        dict(enumerate(difficulty[:n])),
    )


@pytest.mark.parametrize("form", ["minimal", "noreg", "v1"])
def test_the_length_controlled_rate_is_that_of_a_second_implementation(form):
    p, lengths, difficulty = annotated()
    p[7] = NAN
    known = {
        "minimal": {},
        "noreg": {"difficulty": difficulty},
        "v1": {"difficulty": difficulty, "gamed": gamed_rows()},
    }[form]
    found = win_rates.length_controlled(p, lengths, **known, rounds=20)
    rate = found["length_controlled_win_rate"]
    assert rate == pytest.approx(
        second_implementation(p, lengths, **known), abs=0.001
    )  # 0.1 points
    assert found["length_controlled_low"] < rate < found["length_controlled_high"]
    assert rate < win_rates.win_rate(p)["win_rate"] - 0.05  # its length is taken out
    assert (found["length_controlled_standard_error"] is None) == (
        form == "minimal"
    )  # equal predictions have no spread


def test_length_control_gives_the_same_model_the_same_rate_whichever_way_its_length_was_gamed():
    rates = []
    for factor in (0.6, 1.0, 1.6):
        rng = np.random.default_rng(3)
        lengths = rng.integers(200, 2000, (2, 2000)).astype(float)
        lengths[0] *= factor
        delta = lengths[1] - lengths[0]
        p = 1 / (1 + np.exp(-(0.4 - 2 * np.tanh(delta / delta.std(ddof=1)))))
        rates.append(
            (
                win_rates.win_rate(p)["win_rate"],
                win_rates.length_controlled(p, lengths, rounds=2)["length_controlled_win_rate"],
            )
        )
    plain, controlled = zip(*rates, strict=True)
    assert max(plain) - min(plain) > 0.25
    assert controlled == pytest.approx([1 / (1 + math.exp(-0.4))] * 3, abs=0.005)


@pytest.mark.parametrize(
    ("p", "lengths", "reason"),
    [
        ([0.6] * 9, [[1, 2, 3] * 3, [3, 1, 1] * 3], "9 pairs with a verdict are too few"),
        ([0.6] * 8 + [NAN] * 4, [range(12), range(12, 0, -1)], "8 pairs with a verdict"),
        ([0.6] * 12, [range(12), range(12)], "the same difference in length"),
        ([0.5] * 40, [range(40), range(40, 0, -1)], "nothing to fit"),
    ],
)
def test_a_rate_that_cannot_be_computed_is_none_with_its_reason(p, lengths, reason):
    found = win_rates.length_controlled(
        np.array(p), np.array([list(side) for side in lengths], float)
    )
    assert found["length_controlled_win_rate"] is None
    assert reason in found["length_controlled_reason"]


@pytest.mark.parametrize(
    ("p", "ours", "theirs", "expected"),
    [
        ([0.6, 0.3, 0.3, 0.6] * 30, [1, 2, 3, 4] * 30, [2, 1, 4, 3] * 30, []),
        ([0.6, 0.3, 0.3, 0.6] * 5, [1, 2, 3, 4] * 5, [2, 1, 4, 3] * 5, ["only 20 pairs"]),
        (
            [0.6, 0.3] * 60,
            [9] * 120,
            [1, 2, 3] * 40,
            ["the model's response is the longer one in 100%"],
        ),
        (
            [0.6, 0.7] * 60,
            [1, 2, 3, 4] * 30,
            [2, 1, 4, 3] * 30,
            ["all 120 verdicts go to one side"],
        ),
        (
            [0.2, 0.7] * 60,
            [1, 2, 3, 4] * 30,
            [2, 1, 4, 3] * 30,
            ["the longer response wins in all 120 pairs"],
        ),
    ],
)
def test_pairs_that_do_not_suffice_for_a_figure_are_noted_with_the_reason(
    p, ours, theirs, expected
):
    notes = win_rates.reliability_notes(np.array(p), np.array([ours, theirs], float))
    assert len(notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(notes, expected, strict=True))


def test_an_extreme_change_is_one_by_the_authors_rule():
    # 20 %: below min(15, 10) or above max(40, 30); 50 %: below min(37.5, 40), above max(62.5, 60)
    said = [
        (0.2, 0.11),
        (0.2, 0.09),
        (0.2, 0.39),
        (0.2, 0.41),
        (0.5, 0.38),
        (0.5, 0.37),
        (0.5, 0.62),
        (0.5, 0.63),
    ]
    assert [win_rates.extreme_change(*pair) for pair in said] == [False, True] * 4


# Bradley-Terry


def test_two_models_strength_is_the_log_odds_of_the_win_rate_with_the_interval_of_its_error():
    rng = np.random.default_rng(0)
    p = rng.beta(2, 3, 2000)
    found = win_rates.bradley_terry(
        win_rates.design_matrix(np.tile([0, 1], (2000, 1)), 2), p, range(2000), 2, rounds=400
    )
    mean, error = p.mean(), p.std(ddof=1) / math.sqrt(2000)
    assert found["strength"] == pytest.approx([math.log(mean / (1 - mean)), 0], abs=1e-4)
    half = 1.96 * error / (mean * (1 - mean))  # delta method
    assert found["high"][0] - found["strength"][0] == pytest.approx(half, rel=0.15)
    assert found["strength"][0] - found["low"][0] == pytest.approx(half, rel=0.15)


def test_three_models_and_their_style_are_fitted_as_scipy_fits_them():
    rng = np.random.default_rng(1)
    n, true = 3000, np.array([0.8, -0.5, 0.0])
    matches = np.stack([rng.permutation(3)[:2] for _ in range(n)])
    style = rng.normal(size=(n, 2))
    p = 1 / (
        1
        + np.exp(
            -(
                true[matches[:, 0]]
                - true[matches[:, 1]]
                + style @ [0.7, -0.2]
                + rng.normal(0, 0.3, n)
            )
        )
    )
    x = win_rates.design_matrix(matches, 3, style)
    found = win_rates.bradley_terry(x, p, range(n), 3, rounds=20)

    def loss(s):
        z = np.append(s[:2], 0)[matches[:, 0]] - np.append(s[:2], 0)[matches[:, 1]] + style @ s[2:]
        return (np.logaddexp(0, z) - p * z).sum()

    expected = minimize(loss, np.zeros(4), method="BFGS").x
    assert np.concatenate([found["strength"][:2], found["style"]]) == pytest.approx(
        expected, abs=2e-3
    )
    assert (found["low"][:2] < found["strength"][:2]).all() and (
        found["strength"][:2] < found["high"][:2]
    ).all()


def test_whole_instructions_are_drawn_so_that_repeating_a_pair_does_not_narrow_the_interval():
    p = np.random.default_rng(2).uniform(size=200)
    one = win_rates.bradley_terry(
        win_rates.design_matrix(np.tile([0, 1], (200, 1)), 2), p, range(200), 2, rounds=300
    )
    twice = win_rates.bradley_terry(
        win_rates.design_matrix(np.tile([0, 1], (400, 1)), 2),
        np.tile(p, 2),
        [*range(200), *range(200)],
        2,
        rounds=300,
    )
    assert twice["high"][0] - twice["low"][0] == pytest.approx(
        one["high"][0] - one["low"][0], rel=0.05
    )


def test_models_that_nothing_links_are_refused():
    matches = np.array([[0, 1], [2, 3]] * 5)
    with pytest.raises(DataError, match="2 groups of models were never compared"):
        win_rates.bradley_terry(win_rates.design_matrix(matches, 4), np.full(10, 0.6), range(10), 4)


def test_markdown_is_counted_outside_code_blocks():
    text = "# Head\n\n- a **b**\n* c\n1. d\n__e__\n```\n# no\n- no\n```\n####### no"
    assert win_rates.markdown_counts(text) == (len(text), 1, 3, 2)


def test_style_differences_are_relative_and_negate_when_the_sides_swap():
    ours, theirs = (
        np.array([[100.0, 2, 0, 0], [300, 0, 0, 0]]),
        np.array([[300.0, 0, 0, 0], [300, 0, 0, 0]]),
    )
    found = win_rates.style_differences(ours, theirs)
    # length: (100 - 300) / 400 = -1/2 and 0, sd = 1/(2 sqrt 2): -sqrt 2; headers: (.02 - 0) / 1.02
    # and 0, likewise sqrt 2; no lists, no bold
    assert found == pytest.approx(np.array([[-math.sqrt(2), math.sqrt(2), 0, 0], [0, 0, 0, 0]]))
    assert win_rates.style_differences(theirs, ours) == pytest.approx(-found)


def test_the_condition_number_finds_columns_that_are_the_same():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    assert win_rates.condition_number(x * [1, 100, 0.01]) < 1.3  # scale is not collinearity
    assert (
        win_rates.condition_number(np.concatenate([x, x[:, :1] + 1e-3 * x[:, 1:2]], 1))
        > win_rates.MAX_CONDITION
    )


# The stage


def write(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def annotation(i: int, preference: Any, **more: Any) -> dict[str, Any]:
    row = {
        "instruction": f"i{i}",
        "output_1": "b" * (i % 7 + 1),
        "output_2": "m" * (i % 5 + 1),
        "generator_1": "base",
        "generator_2": "model",
    }
    return row | {"annotator": "judge", "preference": preference} | more


def run(**values: Any) -> Any:
    return stages.load("eval winrate")(
        config.build(settings.EvalWinrateSettings, values, where="test")
    )


def test_annotations_of_both_versions_are_read_and_a_missing_verdict_is_counted(tmp_path: Path):
    rows = [
        annotation(0, 1),
        annotation(1, 2.0),
        annotation(2, 0),
        annotation(3, 1.5),
        annotation(4, None),
        annotation(5, 1.25),
        annotation(5, 1.25),
    ]
    manifest = run(annotations=[write(tmp_path / "a.json", rows)], output_dir=tmp_path / "o")
    (match,) = manifest["summary"]["matches"]
    assert (match["pairs"], match["verdicts"], match["draws"]) == (6, 5, 2)
    assert match["win_rate"] == pytest.approx((0 + 1 + 0.5 + 0.5 + 0.25) / 5)
    assert (
        manifest["rows_in"],
        manifest["rows_out"],
        manifest["drops"],
        manifest["nulls"]["value"],
    ) == (
        7,
        6,
        {"duplicate_annotation": 1},
        1,
    )
    assert any("too few to fit length" in note for note in manifest["summary"]["notes"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([annotation(0, 3)], r"row 1: 'preference' is 3; expected 1"),
        ([annotation(0, 1), annotation(1, "2")], "row 2: 'preference' is '2'"),
        (
            [annotation(0, 1), {k: v for k, v in annotation(1, 1).items() if k != "preference"}],
            "row 2: no 'preference'",
        ),
        ([annotation(0, 1), annotation(1, 1, annotator="other")], r"2 annotators \(judge, other\)"),
        ([{"instruction": "x", "output": "y"}], "row 1: no text in 'output_1'"),
        ([annotation(0, 1, output_2=None)], "no text in 'output_2'"),
        ([], "is empty; expected rows with"),
        ({"a": 1}, r"no text in 'instruction' \(it has a\)"),
    ],
)
def test_annotations_of_another_form_are_one_clear_line(tmp_path: Path, rows: Any, message: str):
    with pytest.raises(DataError, match=message):
        eval_winrate.from_annotations([write(tmp_path / "a.json", rows)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "pass either --responses"),
        ({"annotations": ["a"], "responses": ["b"]}, "pass either --responses"),
        ({"responses": ["a"], "baseline": "b"}, "pass --model"),
        ({"responses": ["a"], "model": "m"}, "needs a --baseline"),
    ],
)
def test_what_is_missing_from_the_command_is_named(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config.build(settings.EvalWinrateSettings, {"output_dir": "o", **values}, where="test")


def gamed_file(path: Path, n: int) -> Path:
    lines = [
        f"{i},{0.3 + 0.4 * (i % 2)},{(-1) ** i * 0.7},{i % 3 - 1},False,g"
        for i in [*range(n), *range(n)]
    ]
    path.write_text(
        "\n".join(
            [
                "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline,model",
                *lines,
            ]
        ),
        encoding="utf-8",
    )
    return path


def test_difficulty_is_joined_by_index_and_an_instruction_without_one_is_refused(tmp_path: Path):
    gamed = eval_winrate.read_gamed(gamed_file(tmp_path / "g.csv", 30))
    rows = [annotation(i, 1 + (i % 4) / 4, index=29 - i) for i in range(30)]
    (match,) = eval_winrate.from_annotations([write(tmp_path / "a.json", rows)])[0]
    assert eval_winrate.difficulties(match, gamed).tolist() == [(29 - i) % 3 - 1 for i in range(30)]
    (match,) = eval_winrate.from_annotations(
        [write(tmp_path / "b.json", [*rows, annotation(99, 1, index=99)])]
    )[0]
    with pytest.raises(DataError, match="1 of 31 rows have no difficulty"):
        eval_winrate.difficulties(match, gamed)


def test_rows_without_an_index_are_placed_only_where_none_is_missing(tmp_path: Path):
    gamed = eval_winrate.read_gamed(gamed_file(tmp_path / "g.csv", 30))
    rows = [annotation(i, 1 + (i % 4) / 4) for i in range(30)]
    (match,) = eval_winrate.from_annotations([write(tmp_path / "a.json", rows)])[0]
    assert eval_winrate.difficulties(match, gamed).tolist() == [i % 3 - 1 for i in range(30)]
    # a row that is not compared moves no other
    ours, theirs = (
        [{"instruction": f"i{i}", "output": f"{o} {i}" if i else "same"} for i in range(30)]
        for o in "ab"
    )
    files = {
        "responses": [write(tmp_path / "r.json", ours)],
        "baseline": write(tmp_path / "s.json", theirs),
        "model": "m",
        "output_dir": "o",
    }
    (match,) = eval_winrate.from_responses(
        config.build(settings.EvalWinrateSettings, files, where="test")
    )[0]
    assert eval_winrate.difficulties(match, gamed).tolist() == [i % 3 - 1 for i in range(1, 30)]
    (match,) = eval_winrate.from_annotations([write(tmp_path / "b.json", rows[1:])])[0]
    with pytest.raises(
        DataError, match="29 of 29 rows have no 'index'"
    ):  # by their places all of them would get another's difficulty
        eval_winrate.difficulties(match, gamed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "it has a, b"),
        ("", "no rows"),
        ("index,preference,std_delta_len,instruction_difficulty\nx,1,1,1\n", "expected numbers"),
    ],
)
def test_a_file_of_gamed_baselines_of_another_form_is_named(
    tmp_path: Path, text: str, message: str
):
    (tmp_path / "g.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        eval_winrate.read_gamed(tmp_path / "g.csv")


def test_without_scikit_learn_win_rates_remain_and_the_rest_names_the_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(win_rates, "sklearn_available", lambda: False)
    summary = run(
        annotations=[write(tmp_path / "a.json", [annotation(i, 1 + i % 2 / 2) for i in range(20)])],
        output_dir=tmp_path / "o",
    )["summary"]
    assert summary["matches"][0]["win_rate"] == 0.25
    assert summary["matches"][0]["length_controlled_win_rate"] is summary["bradley_terry"] is None
    assert any("pip install 'scir-cli[eval]'" in note for note in summary["notes"])
    tables.winrate_tables(summary)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("judge") / "m", seed=2)


@pytest.mark.slow
def test_three_files_are_judged_two_by_two_and_their_annotations_give_the_same_rates_again(
    judge: Path, tmp_path: Path
):
    files = []
    for name, word in (("a", "yes "), ("b", "no "), ("c", "**so** ")):
        rows = [
            {
                "instruction": f"q{i}",
                "output": word * (i % 3 + 1) + str(i),
                "generator": name,
                "dataset": f"d{i % 2}",
            }
            for i in range(12)
        ]
        files.append(
            write(
                tmp_path / f"{name}.json",
                rows + ([{"instruction": "only", "output": "x"}, rows[0]] if name == "a" else []),
            )
        )
    first = run(model=str(judge), dtype="fp32", responses=files, output_dir=tmp_path / "o")
    assert first["drops"] == {"not_in_baseline": 2, "duplicate_instruction": 1}
    assert first["rows_in"] == first["rows_out"] + 3 == 39
    judged = dataset.read_dataset(tmp_path / "o" / "judged", "judged").to_pylist()
    assert {(row["first"]["author"], row["second"]["author"]) for row in judged} == {
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    }
    assert [(m["model"], m["other"], m["verdicts"]) for m in first["summary"]["matches"]] == [
        ("a", "b", 12),
        ("a", "c", 12),
        ("b", "c", 12),
    ]
    assert any(
        "2 instructions are answered in only one" in note for note in first["summary"]["notes"]
    )
    again = run(
        annotations=[str(tmp_path / "o" / "annotations.json")], output_dir=tmp_path / "again"
    )
    for one, other in zip(first["summary"]["matches"], again["summary"]["matches"], strict=True):
        assert other["win_rate"] == pytest.approx(one["win_rate"])
        assert other["by_subset"].keys() == {"d0", "d1"}
    # a match read the other way round has the other rate
    back = run(
        model=str(judge),
        dtype="fp32",
        responses=[files[1]],
        baseline=files[0],
        output_dir=tmp_path / "back",
    )
    assert back["summary"]["matches"][0]["win_rate"] == pytest.approx(
        1 - first["summary"]["matches"][0]["win_rate"], abs=1e-5
    )
    assert (
        run(model=str(judge), dtype="fp32", responses=files, output_dir=tmp_path / "o")["summary"]
        == first["summary"]
    )  # already done


def test_win_rates_are_joined_to_their_examples_by_id_and_not_by_place(tmp_path: Path, judge: Path):
    files = [
        write(
            tmp_path / f"{name}.json",
            [
                {"instruction": f"q{i}", "output": f"{name} {i}", "dataset": f"d{i % 2}"}
                for i in range(6)
            ],
        )
        for name in "abc"
    ]
    given = {"model": str(judge), "dtype": "fp32", "responses": files, "output_dir": tmp_path / "o"}
    first = run(**given)
    part = tmp_path / "o" / "data-00000.arrow"
    with pa.ipc.open_stream(part.read_bytes()) as stream:
        table = stream.read_all()
    backwards = table.take(pa.array(range(len(table)))[::-1])
    assert backwards["value"].to_pylist() != table["value"].to_pylist()
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(backwards)
    (tmp_path / "o" / "manifest.json").unlink()
    again = run(**given)
    assert [m["by_subset"] for m in again["summary"]["matches"]] == [
        m["by_subset"] for m in first["summary"]["matches"]
    ]
    assert again["summary"]["matches"] == first["summary"]["matches"]


def test_two_files_with_nothing_in_common_are_refused_with_the_counts(tmp_path: Path, judge: Path):
    a, b = (
        write(tmp_path / f"{n}.json", [{"instruction": i, "output": "x"}])
        for n, i in (("a", "1"), ("b", "2"))
    )
    with pytest.raises(
        DataError, match=r"no instruction in common .*'not_in_baseline': 1, 'not_in_responses': 1"
    ):
        run(model=str(judge), dtype="fp32", responses=[a], baseline=b, output_dir=tmp_path / "o")


def test_responses_are_candidates_datasets_too(tmp_path: Path):
    from collections import Counter

    rows = [
        {
            "candidate_id": f"c{i}",
            "prompt_id": f"p{i // 2}",
            "messages": [{"role": "user", "content": f"q{i // 2}"}],
            "subset": None,
            "response": f"r{i}",
            "token_ids": [1],
            "finish_reason": "stop",
            "duplicate_of": None,
            "weights_key": "key",
            "seed": 0,
        }
        for i in range(4)
    ]
    dataset.write_dataset(
        tmp_path / "c",
        "candidates",
        {"stage": "generate"},
        [(0, 4)],
        lambda low, high: dataset.Part(rows, 4),
    )
    found = eval_winrate.load_responses(str(tmp_path / "c"), Counter())
    assert {k: (row["output"], row["author"]) for k, row in found.items()} == {
        "q0": ("r0", "key"),
        "q1": ("r2", "key"),
    }  # the first of each prompt


def test_the_tables_are_whole_at_eighty_columns(tmp_path: Path):
    files = [
        write(
            tmp_path / f"{k}.json",
            [
                annotation(
                    i, 1.2 + 0.7 * (i % 5 > k), generator_2=f"some/long-model-name-{k}-instruct"
                )
                for i in range(140)
            ],
        )
        for k in range(2)
    ]
    summary = run(annotations=files, output_dir=tmp_path / "o")["summary"]
    text = shown(*tables.winrate_tables(summary))
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    rate = summary["matches"][0]["length_controlled_win_rate"]
    assert f"{rate:.1%}" in text and "against base" in text and "Bradley-Terry" in text
