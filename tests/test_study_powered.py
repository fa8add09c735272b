"""The powered experiment: pilot seeds choose a setting, and jobs are done once, seed by seed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import make_model

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from study import powered, real
from study.experiments import EXPERIMENTS, POWER_GRID, POWERED
from study.powered import Job, Place

THINGS = (
    "lamp",
    "boat",
    "drum",
    "vase",
    "coat",
    "ring",
    "clock",
    "chair",
    "plate",
    "shelf",
    "glove",
    "spade",
)


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> real.Size:
    """A world of made-up text and a toy model, with three unlabeled pairs a prompt."""
    folder = tmp_path_factory.mktemp("powered")
    answers = [
        f"The {t} is {n} years old. It was made by hand. You could use it {n} times a day."
        for n, t in enumerate(THINGS)
    ]
    lines = [
        json.dumps({"prompt": f"Tell me of the {t}.", "response": a})
        for t, a in zip(THINGS, answers, strict=True)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return real.Size(
        model=str(make_model(folder / "llama", "llama")),
        text=str(folder / "text.jsonl"),
        n_seed=4,
        n_seed_pairs=6,
        n_pairs=4,
        n_kinds=3,
        n_heldout=4,
    )


def record(method: str, seed: int, value: float, iteration: int = 2) -> dict[str, Any]:
    figures = dict.fromkeys(powered.PRIMARY, value)
    return {"method": method, "seed": seed, "iteration": iteration, **figures}


# ------------------------------ the world


def test_every_unlabeled_prompt_has_a_pair_of_each_kind_of_damage_and_all_pairs_differ(
    size: real.Size,
):
    rows = real.rows(size, seed=1)
    assert "prompts" not in rows and len(rows["pairs"]) == 12
    answers = real.answers(size)
    bad = {}
    for row in rows["pairs"]:
        right = " ".join(answers[row["prompt"]])
        (other,) = {row["chosen"], row["rejected"]} - {right}
        bad.setdefault(row["prompt"], set()).add(other)
    assert [len(found) for found in bad.values()] == [3] * 4
    assert len(rows["measured"]) == len(rows["heldout"]) + len(rows["unseen"]) == 20
    first = [row["chosen"] == " ".join(answers[row["prompt"]]) for row in rows["pairs"]]
    assert 0 < sum(first) < len(first)


def test_the_world_with_one_kind_a_prompt_is_what_it_was(size: real.Size):
    rows = real.rows(dataclasses.replace(size, n_kinds=1), seed=1)
    assert set(rows) == {"seed", "prompts", "heldout", "unseen", "test"}


def test_the_powered_world_has_hundreds_of_own_pairs_and_of_pairs_of_each_sort():
    world, loop = POWERED.size, POWERED.loop
    assert isinstance(world, real.Size)
    # Each own pair once an iteration
    assert world.n_pairs * world.n_kinds == loop["batch_size"] * loop["max_steps"] >= 500
    assert world.n_heldout * len(real.SEEN) >= 200 and world.n_heldout * len(real.UNSEEN) >= 200


# ------------------------------ the power rule


def test_strength_is_the_mean_difference_over_the_spread_that_is_pooled_over_settings():
    # Squares about the means: 2 * 0.05^2 and 2 * 0.03^2, with one degree of freedom each
    differences = [{"a": [0.05, 0.15]}, {"a": [0.01, 0.07]}]
    spread = ((2 * 0.05**2 + 2 * 0.03**2) / 2) ** 0.5
    assert powered.strengths(differences) == pytest.approx([0.10 / spread, 0.04 / spread])


def test_a_spread_is_at_least_that_of_the_pairs_themselves():
    assert powered.strengths([{"a": [0.04], "b": [0.02]}]) == pytest.approx([1.5])


def test_the_setting_with_the_largest_strength_is_chosen_by_the_last_iteration_alone():
    records = {
        0: [record("srlm", 900, 0.70), record("oracle", 900, 0.72)],
        1: [record("srlm", 900, 0.60), record("oracle", 900, 0.68)],
        # A cell is missing.
        2: [record("oracle", 900, 0.99)],
    }
    records[0] += [record("srlm", 900, 0.1, 1), record("oracle", 900, 0.9, 1)]
    choice = powered.choose(records)
    assert choice["setting"] == 1
    assert choice["strengths"] == pytest.approx({0: 1.0, 1: 4.0})


def test_a_pilot_without_a_finished_pair_of_cells_takes_the_first_setting():
    assert powered.choose({})["setting"] == 0


# ------------------------------ jobs


def test_jobs_cover_each_cell_once_and_make_each_seed_s_first_model_before_its_cells():
    todo = powered.jobs([900, 901], [30, 31, 32, 33], processes=3)
    assert len({job.name for job in todo}) == len(todo)
    assert sum(job.setting is not None for job in todo) == 2 * 2 * len(POWER_GRID)
    for seed in (30, 31, 32, 33):
        own = [job for job in todo if job.seed == seed]
        assert own[0] == Job(seed)
        methods = [m for job in own for m in job.methods]
        assert sorted(methods) == sorted(m.name for m in EXPERIMENTS["powered-real"][1])
    fresh = [job.seed for job in todo if job.methods and job.setting is None]
    assert fresh == sorted(fresh)


def test_a_job_is_claimed_by_one_process(tmp_path: Path):
    place = Place.of("powered-real", tmp_path)
    (tmp_path / "claims").mkdir()
    assert [place.claim(Job(30)) for _ in range(2)] == [True, False]


def test_after_the_choice_nobody_waits_for_cells_of_the_pilot(tmp_path: Path):
    place = Place.of("powered-real", tmp_path)
    pilot, fresh = Job(900, ("srlm",), 0), Job(30, ("srlm",))
    assert not place.over(pilot)
    place.choice.write_text("{}", encoding="utf-8")
    assert place.over(pilot) and not place.over(fresh)


def test_pilot_choice_and_cells_of_a_toy_model_leave_results_and_are_not_done_twice(
    size: real.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    short: dict[str, Any] = {"max_steps": 2, "batch_size": 4}
    setup = dataclasses.replace(
        POWERED,
        size=size,
        # On a machine with a GPU this is a rehearsal there.
        dtype="bf16" if torch.cuda.is_available() else "fp32",
        max_new_tokens=6,
        base=POWERED.base | short,
        tune=POWERED.tune | short,
        loop=POWERED.loop | short,
    )
    methods = tuple(m for m in EXPERIMENTS["powered-real"][1] if m.name in ("srlm", "oracle"))
    place = Place("powered-real", tmp_path / "out", setup, methods)
    monkeypatch.setattr(powered, "POWER_GRID", POWER_GRID[1:3])
    monkeypatch.setattr(powered, "TOGETHER", (("srlm",), ("oracle",)))
    for kind in ("claims", "failed"):
        (place.out / kind).mkdir(parents=True)
    todo = powered.jobs([900], [30], processes=1)
    powered.work(place, [job for job in todo if job.seed == 900])
    choice = powered.choose(place.pilot_records(todo))
    assert not any((place.out / "failed").iterdir())
    assert set(choice["oracle less srlm"]) == {0, 1}

    place.choice.write_text(json.dumps(choice), encoding="utf-8")
    powered.work(place, todo)
    assert not any((place.out / "failed").iterdir()) and all(map(place.done, todo))
    cells = [json.loads(p.read_text()) for job in todo if job.methods for p in place.results(job)]
    records = [r for cell in cells for r in cell["records"]]
    assert {(r["method"], r["seed"], r["iteration"]) for r in records} == {
        (method, seed, i) for method in ("srlm", "oracle") for seed in (900, 30) for i in (1, 2)
    }
    assert all(0 <= r[figure] <= 1 for r in records for figure in powered.PRIMARY)
    oracle = [r for r in records if r["method"] == "oracle"]
    assert all(r["label_accuracy"] == 1 and r["kept"] == 1 for r in oracle)
    # Answers are sampled of the last model alone.
    assert all(("sampled_said_twice" in r) == (r["iteration"] == 2) for r in records)
    # Nothing of the models is left, and a second run finds everything done.
    assert [p.name for p in place.folder(None).iterdir()] == ["cells"]
    (place.out / "claims").rename(tmp_path / "old")
    (place.out / "claims").mkdir()
    powered.work(place, todo)
    assert not any((place.out / "claims").iterdir())
