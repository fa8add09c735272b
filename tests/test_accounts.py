"""A command accounts for every row that it read: out, or dropped with a reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import run, train

from scir_cli.data import dataset
from scir_cli.errors import DataError
from scir_cli.report import tables
from scir_cli.stages import eval_winrate


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


FIVE = (
    {"prompt": "Q1", "chosen": "a", "rejected": "b"},
    {"prompt": "Q1", "chosen": "a", "rejected": "b"},
    {"prompt": "Q2", "chosen": "", "rejected": "b"},
    {"prompt": "Q3", "chosen": "a", "rejected": "a"},
    {"prompt": "word " * 600, "chosen": "a", "rejected": "b"},
)


def test_eval_rewards_counts_what_it_dropped_per_reward_model(world: Path, tmp_path: Path):
    manifest = run(
        "eval rewards",
        model=str(world / "policy"),
        input=lines(tmp_path / "five.jsonl", *FIVE),
        reward_models=["judge", "likelihood"],
        output_dir=tmp_path / "scores",
    )
    assert (manifest["rows_in"], manifest["rows_out"]) == (10, 2)
    reasons = ("duplicate_pair", "empty_response", "identical_responses", "too_long")
    assert manifest["drops"] == dict.fromkeys(reasons, 2)
    line = tables.summary_line("eval rewards", "scores", manifest)
    assert line.startswith(
        "eval rewards: 10 in = 2 out + 2 duplicate_pair, 2 empty_response, "
        "2 identical_responses, 2 too_long"
    )


UNLABELED = {"messages": [{"role": "user", "content": "Q4"}]}


def test_train_counts_the_drops_of_every_source(world: Path, tmp_path: Path):
    labeled = lines(tmp_path / "five.jsonl", *FIVE)
    manifest = train(
        world,
        tmp_path / "out",
        input=str(world / "gold.jsonl"),
        objective="dpo",
        validation=labeled,
        anchors=labeled,
    )
    sources = manifest["sources"]
    gold = {"rows_in": 6, "rows_out": 6, "drops": {}}
    five = {"rows_in": 5, "rows_out": 1, "drops": sources["anchors"]["drops"]}
    assert sources == {"input": gold, "anchors": five, "validation": five}
    reasons = ("duplicate_pair", "empty_response", "identical_responses", "too_long")
    assert Counter(five["drops"]) == Counter(reasons)
    assert (manifest["rows_in"], manifest["rows_out"]) == (16, 8)
    assert Counter(manifest["drops"]) == Counter(reasons) + Counter(reasons)

    estimate = train(
        world,
        tmp_path / "none",
        input=str(world / "gold.jsonl"),
        objective="dpo",
        validation=labeled,
        anchors=labeled,
        dry_run=True,
    )
    assert estimate["rows_in"] == 16
    assert estimate["sources"] == sources


@pytest.mark.parametrize("setting", ["validation", "anchors"])
def test_missing_labels_are_counted_and_errors_name_their_own_file(
    world: Path, tmp_path: Path, setting: str
):
    """The judged pairs of the world have no gold label; those of `some` have one in part."""
    table = dataset.read_dataset(world / "judged")
    labels = ["first" if i % 2 else None for i in range(len(table))]
    column = table.column_names.index("gold_label")
    partly = table.set_column(column, "gold_label", [labels])
    plan = {"stage": "judge"}
    part = dataset.Part(partly, len(table))
    dataset.write_dataset(tmp_path / "some", "judged", plan, [(0, 1)], lambda *_: part)
    given = {"input": str(world / "gold.jsonl"), "objective": "dpo"}
    manifest = train(world, tmp_path / "out", **given, **{setting: str(tmp_path / "some")})
    found = manifest["sources"][setting]
    n_labeled = len(table) - labels.count(None)
    assert found["drops"] == {"unlabeled": labels.count(None)}
    assert (found["rows_in"], found["rows_out"]) == (len(table), n_labeled)

    with pytest.raises(DataError, match="judged holds no pair with a gold label .*unlabeled"):
        train(world, tmp_path / "none", **given, **{setting: str(world / "judged")})
    long = lines(tmp_path / "long.jsonl", FIVE[4])
    with pytest.raises(DataError, match=r"long\.jsonl leaves no pair to train on: .*too_long"):
        train(world, tmp_path / "none", **given, **{setting: long}, overwrite=True)


# -------------------------------------------------------------------------------- join keys


def test_two_examples_of_rewardbench_2_with_one_id_stay_two(world: Path, tmp_path: Path):
    first = {"id": "1", "prompt": "Q1", "chosen": ["a"], "rejected": ["b", "c", "d"]}
    rows = [
        first,
        {"id": "1", "prompt": "Q2", "chosen": ["a", "z"], "rejected": ["b", "c", "d", "e"]},
        first | {"chosen": ["x"]},
        first | {"id": "2", "chosen": ["y"]},
    ]
    manifest = run(
        "eval rewards",
        model=str(world / "policy"),
        input=lines(tmp_path / "rb2.jsonl", *[row | {"subset": "Math"} for row in rows]),
        reward_models=["likelihood"],
        output_dir=tmp_path / "scores",
    )
    assert manifest["rows_out"] == 3 + 8 + 3 + 3
    benchmark = manifest["summary"]["benchmark"]
    assert benchmark["name"] == "RewardBench 2"
    assert (benchmark["models"]["likelihood"]["examples"], manifest["drops"]) == (4, {})
    assert benchmark["models"]["likelihood"]["incomplete"] == 0


def candidates(folder: Path, *prompts: list[tuple[str, str]], text: str) -> str:
    rows = []
    for i, turns in enumerate(prompts):
        rows.append(
            {
                "candidate_id": f"{text}{i}",
                "prompt_id": f"p{i}",
                "messages": [{"role": role, "content": content} for role, content in turns],
                "subset": None,
                "response": f"{text} {i}",
                "token_ids": [1],
                "finish_reason": "stop",
                "duplicate_of": None,
                "weights_key": text,
                "seed": 0,
            }
        )
    part = dataset.Part(rows, len(rows))
    plan = {"stage": "generate"}
    dataset.write_dataset(folder, "candidates", plan, [(0, 1)], lambda *_: part)
    return str(folder)


def test_prompts_that_differ_in_the_system_turn_are_compared_one_by_one(
    world: Path, tmp_path: Path
):
    river = ("user", "Name a river.")
    prompts = [
        [("system", "Answer in German."), river],
        [("system", "Answer in French."), river],
        [("user", "Name a hill.")],
    ]
    given = {
        "model": str(world / "policy"),
        "responses": [candidates(tmp_path / "a", *prompts, text="a")],
        "baseline": candidates(tmp_path / "b", *prompts, text="b"),
        "output_dir": tmp_path / "scores",
    }
    manifest = run("eval winrate", **given)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["drops"]) == (3, 3, {})
    written = json.loads((tmp_path / "scores" / "annotations.json").read_text(encoding="utf-8"))
    assert [row["instruction"] for row in written] == [
        "System: Answer in German.\nUser: Name a river.",
        "System: Answer in French.\nUser: Name a river.",
        "Name a hill.",
    ]
    found = eval_winrate.load_responses(given["baseline"], Counter())
    assert [row["output"] for row in found.values()] == ["b 0", "b 1", "b 2"]


def test_annotations_that_contradict_each_other_are_counted_and_none_of_them_wins(tmp_path: Path):
    def annotation(instruction: str, preference: float | None) -> dict[str, Any]:
        outputs = {"output_1": "a", "output_2": "b", "generator_1": "x", "generator_2": "y"}
        return {"instruction": instruction, "preference": preference, **outputs}

    votes = [("Q1", 2.0), ("Q1", 1.0), ("Q2", 2.0), ("Q2", 2.0), ("Q3", None), ("Q3", 1.0)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([annotation(*vote) for vote in votes]), encoding="utf-8")
    manifest = run("eval winrate", annotations=[str(path)], output_dir=tmp_path / "out")
    assert (manifest["rows_in"], manifest["rows_out"]) == (6, 1)
    assert manifest["drops"] == {"contradictory_annotation": 4, "duplicate_annotation": 1}
