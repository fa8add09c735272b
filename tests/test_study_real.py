"""The study's world of real text.

Damage does what it says, held-out kinds stay held out, and the runner goes through it with a toy
model.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import make_model

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from study import real, report, world
from study import run as study
from study.experiments import ON_REAL, REAL

ANSWER = ("Rain is water from clouds.", "It falls when drops grow heavy.", "Plants need it.")
OTHERS = [
    ANSWER,
    ("Bread is made of flour.", "Bake it until it is brown."),
    ("Cats sleep all day long.", "They hunt at night, mostly."),
]


def damaged(kind: str, seed: int = 0) -> str:
    return (real.SEEN | real.UNSEEN)[kind](random.Random(seed), ANSWER, OTHERS)


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> real.Size:
    """A world of made-up text and a toy model."""
    folder = tmp_path_factory.mktemp("real")
    things = (
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
    answers = [
        (
            f"The {t} is {n} years old. It was made by hand in a small town. You could use it {n} "
            "times."
        )
        for n, t in enumerate(things)
    ]
    lines = [
        json.dumps({"prompt": f"Tell me of the {t}.", "response": a})
        for t, a in zip(things, answers, strict=True)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    model = make_model(folder / "llama", "llama")
    return real.Size(
        model=str(model),
        text=str(folder / "text.jsonl"),
        n_seed=4,
        n_seed_pairs=6,
        n_pairs=5,
        n_heldout=3,
    )


# ------------------------------ damage


@pytest.mark.parametrize("kind", real.SEEN | real.UNSEEN)
def test_damage_is_never_the_answer_itself_and_the_same_for_a_seed(kind: str):
    made = [damaged(kind, seed) for seed in range(20)]
    assert " ".join(ANSWER) not in made
    assert made == [damaged(kind, seed) for seed in range(20)]


def test_a_foreign_answer_is_another_prompt_s():
    assert {damaged("foreign", s) for s in range(20)} == {" ".join(other) for other in OTHERS[1:]}


def test_shuffled_sentences_are_the_same_in_all_five_other_orders():
    made = {damaged("shuffled", s) for s in range(60)}
    assert len(made) == 5
    assert all(sorted(real.sentences(text)) == sorted(ANSWER) for text in made)


def test_a_truncated_answer_is_40_to_70_percent_of_its_words_without_a_full_stop():
    for seed in range(20):
        made = damaged("truncated", seed)
        assert " ".join(ANSWER).startswith(made)
        assert 0.35 <= len(made.split()) / 14 <= 0.75  # 14 words, rounded
        assert made[-1] not in ".,"


def test_a_contradicted_answer_replaces_a_sentence_by_the_denial_of_another():
    denied = "Rain is not water from clouds."
    made = {damaged("contradicted", s) for s in range(40)}
    assert made == {f"{ANSWER[0]} {denied} {ANSWER[2]}", f"{ANSWER[0]} {ANSWER[1]} {denied}"}


def test_a_repeated_sentence_stands_in_place_of_another():
    for seed in range(20):
        said = real.sentences(damaged("repeated", seed))
        assert len(said) == 3 and len(set(said)) == 2 and set(said) < set(ANSWER)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("It can rain and it will.", "It cannot rain and it will."),
        ("Cats sleep.", None),  # no auxiliary verb
        ("It is not so.", None),
        ("It isn't so.", None),
    ],
)
def test_a_sentence_is_denied_at_its_first_auxiliary_verb(sentence: str, expected: str | None):
    assert real.negated(sentence) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (
            "One two three. Four five. Six seven eight nine.\nTen.",
            ("One two three.", "Four five."),
        ),  # 3 + 2 + 4 words; at most 6
        ("One two three. One two three.", None),
        ("One two three. Four", None),  # no end
        ("One. Two.", None),  # too short
    ],
)
def test_an_answer_is_cut_to_whole_sentences_of_its_first_paragraph(
    response: str, expected: real.Sentences | None
):
    assert real.cut(response, (4, 6)) == expected


def test_repetition_counts_runs_of_three_words_by_hand():
    assert real.repetition("a b c a b c") == 0.25  # abc bca cab abc: one of four
    assert real.repetition("a b") == 0


# ------------------------------ the world


def test_held_out_kinds_and_prompts_are_in_nothing_that_is_trained_on(size: real.Size):
    rows = real.rows(size, seed=1)
    assert {r["subset"] for r in rows["seed"]} <= real.SEEN.keys()
    assert {r["subset"] for r in rows["heldout"]} == real.SEEN.keys()
    assert {r["subset"] for r in rows["unseen"]} == real.UNSEEN.keys()
    prompts = {name: {r["prompt"] for r in rows[name]} for name in rows}
    assert prompts["heldout"] == prompts["unseen"] == prompts["test"]
    assert not prompts["seed"] & prompts["prompts"] and not prompts["heldout"] & (
        prompts["seed"] | prompts["prompts"]
    )
    answers = real.answers(size)
    # An unlabeled pair is an answer and the same answer damaged in a way that is taught.
    for row in rows["prompts"]:
        (bad,) = set(row["answers"]) - {" ".join(answers[row["prompt"]])}
        assert bad in {
            kind(
                random.Random(s),
                answers[row["prompt"]],
                [answers[p] for p in sorted(prompts["prompts"])],
            )
            for kind in real.SEEN.values()
            for s in range(200)
        }


def test_every_held_out_prompt_has_every_kind_and_the_world_is_the_same_for_a_seed(size: real.Size):
    rows = real.rows(size, seed=1)
    assert sorted((r["prompt"], r["subset"]) for r in rows["heldout"]) == sorted(
        (p, kind) for p in {r["prompt"] for r in rows["heldout"]} for kind in real.SEEN
    )
    assert rows == real.rows(size, seed=1) != real.rows(size, seed=2)


def test_the_order_of_an_unlabeled_pair_carries_no_information():
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    first = [real.unlabeled(random.Random(seed), pair)["answers"][0] for seed in range(200)]
    assert 70 < first.count("good") < 130


def test_too_little_text_is_an_error_with_both_numbers(size: real.Size):
    with pytest.raises(
        ValueError, match="has 12 answers that can be used; a world of this size needs 107"
    ):
        real.rows(dataclasses.replace(size, n_pairs=100), seed=0)


# ------------------------------ the runner


def test_the_study_runs_on_real_text_with_a_toy_model(size: real.Size, tmp_path: Path):
    short: dict[str, Any] = {"max_steps": 2, "batch_size": 4}
    setup = dataclasses.replace(
        REAL,
        size=size,
        dtype="fp32",
        max_new_tokens=6,
        base=REAL.base | short,
        tune=REAL.tune | short,
        loop=REAL.loop | short,
    )
    methods = [m for m in ON_REAL if m.name in ("srlm", "scir")]
    gold = world.Gold(("evaluation",), real.scorer(size))
    study.run_experiment("real", tmp_path / "out", [0], methods, setup, gold, tmp_path)
    result = json.loads((tmp_path / "real.json").read_text())
    assert [(r["method"], r["iteration"], r["steps"]) for r in result["records"]] == [
        ("srlm", 1, 2),
        ("scir", 1, 2),
    ]
    names = (
        "judge_accuracy",
        "unseen_judge_accuracy",
        "judge on foreign",
        "unseen_implicit on repeated",
        "own_judge_accuracy",
        "sampled_cut",
    )
    assert all(0 <= r[name] <= 1 for r in result["records"] for name in names)
    page = report.section("real", result)
    assert (
        page.startswith("## A real model")
        and "after 2 steps of 4 pairs" in page.replace("\n", " ")
        and "flips, unseen" in page
        and "sampled quality" not in page
    )
