"""The study: the world's gold is what it says, no method gets a gold label, cells resume, and the
page is what the results say.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from study import figures, regimes, report, summary, world
from study import run as study
from study.experiments import EXPERIMENTS, MAIN, WITH_JUDGES, Method, Setup

TINY = Setup(
    size=world.Size(hidden=32, layers=1, n_base=40, n_seed=12, n_prompts=6, n_heldout=12, n_test=3),
    base={"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2},
    tune={"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2},
    loop={
        "learning_rate": 1e-3,
        "batch_size": 8,
        "max_steps": 2,
        "num_epochs": 9,
        "n": 2,
        "max_new_tokens": 6,
        "keep_cut": True,
    },
    max_new_tokens=6,
)


# ------------------------------ the world


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("sort 3142", "1234", 1.0),
        ("sort 3142", "well then 1234", 1.0),  # the phrase in front does not count
        ("sort 3142", "1243", 0.5),
        ("sort 3142", "12345", 0.8),  # one place too many: 4 of 5
        ("sort 3142", "", 0.0),
        ("add 3+9+4", "3,12,16", 1.0),
        ("add 3+9+4", "3,11,16", 2 / 3),
        ("drop b abcb", "ac", 1.0),
        ("drop b abcb", "acb", 2 / 3),
        ("spell kmp", "kamipo", 1.0),
        ("spell kmp", "kamapo", 5 / 6),  # the vowel of before
        ("spell kmp", "kumo", 4 / 6),
    ],
)
def test_quality_equals_the_numbers_worked_by_hand(prompt: str, response: str, expected: float):
    assert world.quality(prompt, response) == pytest.approx(expected)


@pytest.mark.parametrize("name", world.FAMILIES)
def test_a_right_answer_has_quality_one_and_slips_cost(name: str):
    draw, family = random.Random(0), world.FAMILIES[name]
    prompts = [family.prompt(draw) for _ in range(200)]
    assert all(world.quality(p, family.answer(draw, p)) == 1 for p in prompts)
    slipped = [world.quality(p, world.noisy_answer(draw, p, (0, 0, 1))) for p in prompts]
    assert 0.2 < sum(slipped) / len(slipped) < 0.8


def test_quality_is_almost_independent_of_length_and_a_length_bias_can_be_planted():
    size = world.Size()

    def longer_is_chosen(bias: float) -> float:
        draw = random.Random(1)
        prompts = world.draw_prompts(draw, 600, set(), size.families)
        pairs = [
            pair
            for p in prompts
            if (pair := world.labeled_pair(draw, p, size.slips, length_bias=bias))
        ]
        differ = [
            len(p["chosen"]) > len(p["rejected"])
            for p in pairs
            if len(p["chosen"]) != len(p["rejected"])
        ]
        return sum(differ) / len(differ)

    assert 0.42 < longer_is_chosen(0.0) < 0.58
    assert longer_is_chosen(0.8) > 0.85


def test_what_other_judges_are_taught_is_the_quality_in_fifths_and_the_better_seat():
    pair = {"prompt": "sort 3142", "chosen": "1234", "rejected": "1243"}  # qualities 1 and 1/2
    rubric = [world.lesson(random.Random(seed), "rubric", pair) for seed in range(20)]
    scores = {row["prompt"].split("\n")[1]: row["chosen"] for row in rubric}
    assert scores == {"1234": "5", "1243": "2"}  # round(5 * 0.5) = 2
    assert all(row["rejected"] != row["chosen"] and row["rejected"] in "012345" for row in rubric)
    written = {
        row["prompt"]: row["chosen"]
        for seed in range(20)
        if (row := world.lesson(random.Random(seed), "rationale", pair))
    }
    assert written == {
        "sort 3142\nA 1234\nB 1243\nwhy?": "A 5 B 2\n\nVerdict: A",
        "sort 3142\nA 1243\nB 1234\nwhy?": "A 2 B 5\n\nVerdict: B",
    }


def test_held_out_and_test_prompts_are_nobody_s_training_prompts(tmp_path: Path):
    world.write(tmp_path, TINY.size, seed=3)
    prompts = {
        name: {
            json.loads(line)["prompt"]
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("base", "seed", "prompts", "heldout", "test")
    }
    measured = prompts["heldout"] | prompts["test"]
    assert not prompts["heldout"] & prompts["test"]
    assert all(not measured & prompts[name] for name in ("base", "seed", "prompts"))


def test_the_gold_scorer_answers_only_for_what_it_was_allowed():
    gold = world.Gold(("evaluation",))
    with pytest.raises(PermissionError, match="asked for nothing"):
        gold("sort 21", "12")
    with gold.purpose("evaluation"):
        assert gold("sort 21", "12") == 1
    with gold.purpose("oracle"), pytest.raises(PermissionError, match="oracle"):
        gold("sort 21", "12")


# ------------------------------ the runner


def results(folder: Path, methods: list[Method], gold: world.Gold) -> dict[str, Any]:
    study.run_experiment("tiny", folder / "out", [0], methods, TINY, gold, folder / "results")
    return json.loads((folder / "results" / "tiny.json").read_text())


def cell(name: str) -> Method:
    return next(m for m in MAIN if m.name == name)


def test_a_cell_is_measured_after_each_iteration_and_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    gold = world.Gold(("evaluation",))
    first = results(tmp_path, [cell("scir"), cell("srlm")], gold)
    assert [(r["method"], r["iteration"]) for r in first["records"]] == [
        ("scir", 1),
        ("scir", 2),
        ("srlm", 1),
        ("srlm", 2),
    ]
    assert all(
        0 <= r[k] <= 1
        for r in first["records"]
        for k in ("sampled_quality", "judge_accuracy", "agreement", "flip_rate")
    )
    assert {r["steps"] for r in first["records"]} == {2}
    capsys.readouterr()
    assert results(tmp_path, [cell("scir"), cell("srlm")], gold) == first
    assert "srlm:" not in capsys.readouterr().out


def test_rubric_and_rationale_are_measured_and_trained_where_a_world_teaches_them(tmp_path: Path):
    (four,) = [m for m in WITH_JUDGES if m.name == "scir-l3, rubric and rationale"]
    setup = replace(TINY, size=replace(TINY.size, judges=("rubric", "rationale")), iterations=1)
    study.run_experiment(
        "tiny",
        tmp_path / "out",
        [0],
        [four],
        setup,
        world.Gold(("evaluation",)),
        tmp_path / "results",
    )
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert all(
        0 <= found[f"{name}_accuracy"] <= 1
        for found in (result["m1"]["0"], *result["records"])
        for name in setup.size.judges
    )
    assert "gradient_rationale" in result["records"][0]


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_no_method_but_the_oracle_and_the_external_scores_reads_gold_outside_evaluation(
    tmp_path: Path, every: int
):
    blind = [m for m in MAIN if not m.scores][::every]
    assert len(results(tmp_path, blind, world.Gold(("evaluation",)))["records"]) == 2 * len(blind)
    with pytest.raises(PermissionError, match="oracle"):
        results(tmp_path, [cell("oracle")], world.Gold(("evaluation", "external")))
    scored = results(
        tmp_path / "scored",
        [cell("oracle"), cell("external")],
        world.Gold(("evaluation", "oracle", "external")),
    )
    assert len(scored["records"]) == 4


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_method_of_every_experiment_is_a_recipe_whose_settings_exist(name: str):
    setup, methods = EXPERIMENTS[name]
    assert len({m.name for m in methods}) == len(methods)
    for method in methods:
        settings = {"judge_prompt": "x", **setup.loop, **method.settings}
        study.recipe.load(study.RECIPES / f"{method.recipe}.yaml", Path("out"), settings)


# ------------------------------ the page


def test_an_interval_of_three_differences_by_hand():
    # 1, 2, 3: mean 2, s = 1, t(2) = 4.303: 2 -+ 4.303 / sqrt 3 = 2 -+ 2.4843
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 2 - 2.48434, 2 + 2.48434), abs=1e-4
    )
    assert report.interval([0.5, 0.5])[1:] == (
        -float("inf"),
        float("inf"),
    )  # two seeds that are alike establish nothing
    assert report.interval([1 / 60, 1 / 60, 1 / 60])[1:] == (
        -float("inf"),
        float("inf"),
    )  # nor do three


def records(**values: list[float]) -> list[dict[str, Any]]:
    """Method -> its figure on seeds 0, 1, 2 …, the same for every figure that is claimed about."""
    return [
        {"method": m, "seed": seed, "iteration": 1, **dict.fromkeys(report.CLAIMED, x)}
        for m, column in values.items()
        for seed, x in enumerate(column)
    ]


def test_differences_are_paired_by_seed_and_a_seed_that_one_lacks_is_left_out():
    rows = records(a=[0.5, 0.7, 0.9], b=[0.4, 0.5])
    assert report.paired(rows, "a", "b", 1, "agreement") == pytest.approx([0.1, 0.2])
    assert report.paired(rows, "a", "nobody", 1, "agreement") == []


def test_the_page_states_what_the_intervals_allow_and_counts_fewer_flips_as_better():
    rows = records(a=[0.61, 0.62, 0.63], b=[0.5, 0.5, 0.5], c=[0.4, 0.5, 0.6])
    better = ", ".join(report.FIGURES[f][0] for f in report.CLAIMED if f != "flip_rate")
    assert report.said(rows, ["a", "c"], "b", 1) == [
        f"- `a` against `b`: better in {better}; worse in flips.",
        "- `c` against `b`: no difference is established.",
    ]
    assert report.said(rows[:1] + rows[3:4], ["a"], "b", 1) == []  # one seed


def test_a_rank_correlation_by_hand_and_each_seed_set_speaks_for_itself():
    assert report.rank_correlation([0.1, 0.5, 0.9], [3, 4, 5]) == pytest.approx(1)
    assert report.rank_correlation([1, 2, 3], [3, 1, 2]) == pytest.approx(
        1 - 6 * (4 + 1 + 1) / (3 * 8)
    )  # 1 - 6 sum d^2 / (n (n^2 - 1))
    rows = records(scir=[0.6, 0.7, 0.8, 0.7, 0.6] * 2 + [0.1, 0.2], srlm=[0.5] * 10 + [0.3, 0.3])
    text = report.again(rows, ["scir", "srlm"], 1)
    assert "| scir | 10 | **+0.180**" in text
    assert "| scir | 2 | -0.150 |" in text
    assert "| 2 methods | -1.00 |" in text
    assert report.again(rows[:10], ["scir", "srlm"], 1) == ""  # nothing fresh yet


def test_the_pages_that_are_committed_are_those_the_results_give():
    results = {p.stem: json.loads(p.read_text()) for p in (report.HERE / "results").glob("*.json")}
    assert report.PAGE.read_text(encoding="utf-8") == summary.page(results)
    assert report.APPENDIX.read_text(encoding="utf-8") == report.appendix(results)


def test_the_page_says_how_much_of_the_distance_to_gold_labels_is_closed():
    rows = records(consensus=[0.6, 0.7, 0.8], srlm=[0.5, 0.5, 0.5], oracle=[0.7, 0.9, 1.1])
    rows += records(scir=[0.5, 0.6, 0.7])
    for row in rows:
        row["label_accuracy"] = row["sampled_quality"]
    sentence = summary.distance_to_gold(rows, 1)
    assert "consensus labels +0.200 [-0.048, +0.448], 50% of that distance" in sentence
    assert "70% are correct under `consensus`, 50% under `srlm` and 60%" in sentence


# ------------------------------ pictures


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def bars(svg: str, width: str) -> list[tuple[float, float]]:
    """From where to where lines of a width go, left to right."""
    found = re.findall(rf'd="M ([\d.]+) [\d.]+ L ([\d.]+) [^>]*stroke-width: {width};', svg)
    return [(float(a), float(b)) for a, b in found]


def test_an_interval_is_drawn_to_the_scale_of_its_panel_and_colored_by_what_helps():
    marks = [
        [(0.02, 0.01, 0.03)],
        [(-0.01, -0.03, 0.01)],
        [(0.01, -float("inf"), float("inf"))],
        [None],
    ]
    names = ["scir (9)", "open (9)", "two seeds (2)", "none (0)"]
    svg = figures.forest(
        "x",
        "less it",
        names,
        [figures.Forest("gold", 1, marks), figures.Forest("flips", -1, marks)],
    )
    assert {
        *names,
        "less it",
        "gold",
        "more is better →",
        "flips",
        "← less is better",
        "not measured",
    } <= set(texts(svg))
    assert {
        "interval holds 0",
        "no interval",
        "better, 95 % interval without 0",
        "worse, 95 % interval without 0",
    } <= set(texts(svg))
    (zero, _), _ = bars(svg, "0.9")
    helps, holds, *_ = drawn = bars(svg, "1.6")
    assert len(drawn) == 4  # two panels, two intervals each
    unit = (helps[1] - helps[0]) / 2  # 0.01 to 0.03
    assert helps == pytest.approx((zero + unit, zero + 3 * unit), abs=0.03)
    assert holds == pytest.approx((zero - 3 * unit, zero + unit), abs=0.03)
    green, red = (
        re.findall(rf"M ([\d.]+) [^>]*stroke: {c}; stroke-width: 1.6;", svg)
        for c in ("#15845a", "#c63560")
    )
    assert len(green) == len(red) == 1 and float(green[0]) < float(
        red[0]
    )  # the same difference in gold, then in flips


def test_a_mean_beyond_the_reach_of_a_panel_is_written():
    marks = [[(0.01, 0.005, 0.015)]] * 3 + [[(-0.9, -1.0, -0.8)]]
    assert "−0.90" in texts(
        figures.forest("x", "", list("abcd"), [figures.Forest("gold", 1, marks)] * 2)
    )
    assert figures.span(figures.Forest("gold", 1, marks)) == pytest.approx(
        (-0.06 - 0.006, 0.015 + 0.006)
    )  # 4 x 0.015, and 8 % of 0.075


@pytest.mark.parametrize("high", [0.013, 0.07, 0.4, 1.0])
@pytest.mark.parametrize("low", [0.0, 0.5, 1.0])
def test_a_panel_has_zero_and_a_number_that_does_not_touch_it(low: float, high: float):
    found = figures.ticks(-low * high * 1.1, high * 1.1)
    assert 0 in found and len(found) > 1
    assert min(abs(x) for x in found if x) >= 0.24 * 1.1 * high * (1 + low)


def test_pictures_name_every_method_world_and_cell():
    main = records(scir=[0.61, 0.62, 0.64], srlm=[0.5, 0.5, 0.5], other=[0.4, 0.5, 0.6])
    sweep = [m.name for m in EXPERIMENTS["sweep"][1]]
    cells = records(**{name: [(i + 10) / 100] for i, name in enumerate(sweep)})
    m1 = {str(seed): dict.fromkeys(report.CLAIMED, 0.5) for seed in range(3)}
    drawn = report.pictures(
        {
            "main": {
                "records": main,
                "m1": m1,
                "methods": [{"name": n} for n in ("scir", "srlm", "other")],
            },
            "real": {
                "records": [r | {"sampled_quality": None} for r in main],
                "m1": m1,
                "methods": [],
            },
            "sweep": {
                "records": cells,
                "methods": [
                    {"name": m.name, "settings": m.settings} for m in EXPERIMENTS["sweep"][1]
                ],
            },
        }
    )
    assert set(drawn) == set(report.ALT)
    assert {"scir (3)", "other (3)"} <= set(texts(drawn["methods"])) and "srlm (3)" not in texts(
        drawn["methods"]
    )
    assert {"main (3)", "A real model (3)", "not measured"} <= set(texts(drawn["worlds"]))
    assert {"M_1", "M_2", "scir", "srlm"} <= set(texts(drawn["courses"]))
    assert {f"{(i + 10) / 100:.2f}" for i in range(len(sweep))} <= set(texts(drawn["sweep"]))
    assert all(
        "var(" not in svg and svg.startswith('<svg width="864" height="') for svg in drawn.values()
    )


def test_the_pictures_that_are_committed_are_those_the_page_names_and_the_results_give():
    results = {p.stem: json.loads(p.read_text()) for p in (report.HERE / "results").glob("*.json")}
    committed = {p.stem: p.read_text(encoding="utf-8") for p in report.IMAGES.iterdir()}
    assert committed == report.pictures(results) | summary.pictures(results)
    pages = summary.page(results) + report.appendix(results)
    assert set(committed) == set(re.findall(r"\]\(study/([\w-]+)\.svg\)", pages))
    assert all(len(svg) < 80_000 for svg in committed.values())


def test_without_matplotlib_the_page_is_written_and_one_line_names_the_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "PAGE", tmp_path / "study.md")
    monkeypatch.setattr(report, "APPENDIX", tmp_path / "study_appendix.md")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'scir-cli\[report\]'"):
        report.main()
    assert "(study/consensus.svg)" in (tmp_path / "study.md").read_text(encoding="utf-8")
    appendix = (tmp_path / "study_appendix.md").read_text(encoding="utf-8")
    assert "(study/methods.svg)" in appendix


# ------------------------------ the map of regimes


def test_a_student_of_the_map_has_the_accuracy_that_it_is_given():
    rng = np.random.default_rng(0)
    for accuracy in (0.55, 0.8):
        student = regimes.student_of_accuracy(rng, accuracy)
        assert regimes.accuracy_of(student) == pytest.approx(accuracy)
        x = rng.standard_normal((40_000, regimes.DIMENSIONS))
        assert (np.sign(x @ student) == np.sign(x[:, 0])).mean() == pytest.approx(
            accuracy, abs=0.01
        )


def test_agreement_pays_where_the_agreed_labels_are_worth_more():
    # ((0.8 + 0.8 - 1) / 0.6)^2 = 1 > 0.68; ((0.9 + 0.6 - 1) / 0.8)^2 = 0.39 < 0.58
    assert regimes.agreement_pays(0.8, 0.8, 0.8**2 + 0.2**2)
    assert not regimes.agreement_pays(0.9, 0.6, 0.9 * 0.6 + 0.1 * 0.4)


@pytest.mark.parametrize("arrangement", regimes.ARRANGEMENTS)
def test_the_committed_map_is_what_the_simulation_gives(arrangement: str):
    cell = next(c for c in regimes.read() if (c["arrangement"], c["judge"]) == (arrangement, 0.75))
    assert (cell["other"], cell["seeds"]) == (0.90, regimes.N_SEEDS)
    correlation = regimes.ARRANGEMENTS[arrangement]
    rows = [regimes.one_seed(seed, 0.75, 0.90, correlation) for seed in range(regimes.N_SEEDS)]
    for key, value in cell["mean"].items():
        assert np.mean([row[key] for row in rows]) == pytest.approx(value, abs=1e-4)
