"""MT-Bench's single-answer grading.

Questions of several turns, answers that see those before them, grades from probabilities.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import make_model

from scir_cli import config, settings, stages
from scir_cli.data import dataset
from scir_cli.errors import ConfigError, DataError
from scir_cli.report import tables
from scir_cli.stages import eval_mt_bench


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 82, "category": "math", "turns": ["1 + 1?", "And 1?"], "reference": ["2", "3"]},
    {"question_id": 83, "category": "math", "turns": ["One turn."]},
]


def run(**values: Any) -> Any:
    return stages.load("eval mt-bench")(
        config.build(settings.EvalMtBenchSettings, {"dtype": "fp32", **values}, where="test")
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mt")
    for seed in (1, 2):
        make_model(root / f"m{seed}", seed=seed, max_position_embeddings=2048)
    make_model(root / "short", seed=3, max_position_embeddings=160)
    return root


def test_a_grade_is_the_mean_over_the_probabilities_of_one_to_ten():
    # 0.2 on 4, 0.2 on 10, 0.1 on 1: (0.8 + 2 + 0.1) / 0.5
    logps = torch.full((10,), -math.inf)
    logps[3], logps[9], logps[0] = math.log(0.2), math.log(0.2), math.log(0.1)
    assert eval_mt_bench.expected_grade(logps) == pytest.approx((5.8, 0.5))


@pytest.mark.slow
def test_each_turn_sees_the_answers_before_it_and_ten_is_not_one(models: Path, tmp_path: Path):
    manifest = run(
        model=str(models / "m1"),
        judge=str(models / "m2"),
        input=lines(tmp_path / "q.jsonl", QUESTIONS),
        max_new_tokens=6,
        output_dir=tmp_path / "o",
        report=tmp_path / "page.html",
    )
    assert "By category" in (tmp_path / "page.html").read_text(encoding="utf-8")
    answers = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in map(
            json.loads, (tmp_path / "o" / "answers.jsonl").read_text("utf-8").splitlines()
        )
    }
    assert {name: len(turns) for name, turns in answers.items()} == {"81": 2, "82": 2, "83": 1}
    (second,) = dataset.read_dataset(
        tmp_path / "o" / "turn-2-0.0", "candidates"
    ).to_pylist()  # math is answered greedily
    assert [(m["role"], m["content"]) for m in second["messages"]] == [
        ("user", "1 + 1?"),
        ("assistant", answers["82"][0]),
        ("user", "And 1?"),
    ]
    assert (tmp_path / "o" / "turn-1-0.7").is_dir()
    rows = dataset.read_dataset(tmp_path / "o", "scores").to_pylist()
    assert [(r["example_id"], r["metric"]) for r in rows] == [
        ("81", "turn 1"),
        ("81", "turn 2"),
        ("82", "turn 1"),
        ("82", "turn 2"),
        ("83", "turn 1"),
    ]
    assert all(1 <= r["value"] <= 10 and 0 < json.loads(r["detail"])["mass"] <= 1 for r in rows)
    s, value = manifest["summary"], {(r["example_id"], r["metric"]): r["value"] for r in rows}
    of_82 = (value["82", "turn 1"] + value["82", "turn 2"]) / 2
    assert s["categories"]["math"]["grade"] == pytest.approx(
        (of_82 + value["83", "turn 1"]) / 2, abs=1e-6
    )
    assert (s["all"]["grades"], s["turns"]["turn 2"]["grades"]) == (5, 2)
    tables.grade_table(s)
    # the answers it wrote are graded alike when they are given
    again = run(
        answers=str(tmp_path / "o" / "answers.jsonl"),
        judge=str(models / "m2"),
        input=str(tmp_path / "q.jsonl"),
        output_dir=tmp_path / "a",
    )
    assert again["summary"]["all"]["grade"] == pytest.approx(s["all"]["grade"], abs=1e-5)


@pytest.mark.slow
def test_the_reference_and_the_conversation_are_in_the_judges_prompt(models: Path):
    from helpers import load_fp32

    chat = load_fp32(models / "m2").chat
    conversation = eval_mt_bench.dialogue(QUESTIONS[1], ["two {x}", "three"], 1)
    found = eval_mt_bench.branches(chat, conversation, ["3!"])
    assert len(found) == 10
    text = chat.tokenizer.decode(found[-1].ids)
    for part in (
        "A reference answer to the last question: 3!",
        "User: 1 + 1?\nAssistant: two {x}\nUser: And 1?\nAssistant: three",
    ):
        assert part in text
    one, ten = found[0], found[9]
    assert one.target_tokens[-1] in chat.end_ids and ten.target_tokens[-1] in chat.end_ids
    assert one.target_tokens != ten.target_tokens[: len(one.target_tokens)]


@pytest.mark.slow
def test_what_has_no_answer_is_dropped_and_what_does_not_fit_has_no_grade(
    models: Path, tmp_path: Path
):
    answers = [
        {"question_id": 81, "model_id": "x", "choices": [{"turns": ["Yes."]}]},
        {"question_id": 83, "choices": [{"turns": ["word " * 300]}]},
    ]
    questions = lines(tmp_path / "q.jsonl", [*QUESTIONS, QUESTIONS[0]])
    manifest = run(
        answers=lines(tmp_path / "a.jsonl", answers),
        judge=str(models / "short"),
        input=questions,
        output_dir=tmp_path / "o",
    )
    assert manifest["drops"] == {"duplicate_question": 2, "not_answered": 3}
    assert manifest["rows_in"] == manifest["rows_out"] + 5 == 7
    rows = dataset.read_dataset(tmp_path / "o", "scores").to_pylist()
    assert [(r["example_id"], r["value"]) for r in rows if r["value"] is None][-1] == ("83", None)
    assert "have no grade" in manifest["summary"]["notes"][0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1, "turns": "one"}], "row 1: expected 'question_id', and 'turns'"),
        ([{"turns": ["one"]}], "row 1: expected 'question_id'"),
        ([1], "one JSON object per line"),
        ([], "holds no question"),
    ],
)
def test_questions_of_another_form_are_one_line(tmp_path: Path, rows: list[Any], message: str):
    with pytest.raises(DataError, match=message):
        eval_mt_bench.load_questions(lines(tmp_path / "q.jsonl", rows), None)


def test_answers_of_another_form_and_a_missing_judge_are_one_line(tmp_path: Path):
    with pytest.raises(DataError, match="row 1: expected FastChat's answers"):
        eval_mt_bench.load_answers(lines(tmp_path / "a.jsonl", [{"question_id": 1, "choices": []}]))
    for values, message in (
        ({}, "pass either --model"),
        ({"answers": "a"}, "pass --judge"),
        ({"answers": "a", "model": "m"}, "pass either"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.build(
                settings.EvalMtBenchSettings,
                {"input": "q", "output_dir": "o", **values},
                where="test",
            )
