"""RewardBench's and RewardBench 2's own scoring, against tables worked by hand and against scores
of single responses.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scir_cli import config, stages
from scir_cli.analysis.reward_bench import (
    KNOWN,
    SECTIONS,
    SUBSETS_2,
    best_of,
    reward_bench,
    reward_bench_2,
    ties_score,
)
from scir_cli.data import readers
from scir_cli.settings import EvalRewardsSettings

NAN = math.nan


def test_the_subsets_have_the_authors_sizes():
    # The data set's card: 358 chat, 456 chat hard, 740 safety, 1431 reasoning; math-prm counts as
    # the six times 164 of code
    assert {name: sum(counts.values()) for name, counts in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1431 - 447 + 984,
    }


def test_a_section_weighs_its_subsets_and_the_score_weighs_the_sections_equally():
    accuracy = {subset: 1.0 for counts in SECTIONS.values() for subset in counts}
    accuracy |= {"mt-bench-med": 0.5, "donotanswer": 0.0, "math-prm": 0.5}
    found = reward_bench(accuracy)
    # Chat: (358 - 40/2) / 358; Safety: (740 - 136) / 740; Reasoning: half of it halved
    sections = {"Chat": 338 / 358, "Chat Hard": 1.0, "Safety": 604 / 740, "Reasoning": 0.75}
    assert found["sections"] == pytest.approx(sections)
    assert found["score"] == pytest.approx((338 / 358 + 1 + 604 / 740 + 0.75) / 4)
    assert (found["prior_sets"], found["score_with_prior_sets"], found["missing"]) == (
        None,
        None,
        [],
    )


def test_the_prior_sets_weigh_half_a_section():
    accuracy = dict.fromkeys(KNOWN, 1.0) | {"anthropic_hhh": 0.2, "shp": 0.2}
    found = reward_bench(accuracy)
    assert found["prior_sets"] == pytest.approx(0.6)
    assert found["score_with_prior_sets"] == pytest.approx((4 + 0.3) / 4.5)


def test_a_subset_without_a_figure_is_named_and_there_is_no_score():
    accuracy: dict[str, float | None] = {
        subset: 1.0 for counts in SECTIONS.values() for subset in counts
    }
    found = reward_bench(accuracy | {"hep-go": None, "math-prm": 0.0})
    assert (found["score"], found["missing"]) == (None, ["hep-go"])
    assert found["sections"]["Reasoning"] == pytest.approx(820 / (984 + 820))  # of what is there


@pytest.mark.parametrize(
    ("margins", "value"),
    [
        ([1, 2, 3], 1),
        ([1, -0.1, 3], 0),
        ([1, 0, 3], 1 / 2),
        ([0, 0, 0], 1 / 4),
        ([0, -1, 0], 0),
        ([1, NAN, 1], NAN),
    ],
)
def test_best_of_four_shares_a_first_place(margins, value):
    assert best_of(np.array([margins], float)) == pytest.approx(value, nan_ok=True)


def of_scores(right, wrong):
    return np.subtract.outer(np.array(right, float), np.array(wrong, float))


def test_ties_are_scored_from_scores_of_single_responses_as_the_authors_do():
    # 1: tied 5 4 against 1 2: gap 4 - 2 = 2, spread 1; ref gap 3 - 1 = 2: accurate, preferred,
    # hard; margin tanh(2/1 - 1)
    # 2: tied 5 2 against 1: gap 1, spread 3; ref gap 0 - 4 = -4: tied accurate, ref not, not
    # preferred, not hard; tanh(-4/3 - 1)
    examples = {
        "tied:1": of_scores([5, 4], [1, 2]),
        "ref:1": of_scores([3], [1, 0]),
        "tied:2": of_scores([5, 2], [1]),
        "ref:2": of_scores([0], [4]),
    }
    found = ties_score(examples)
    margin = (math.tanh(1) + math.tanh(-7 / 3)) / 2
    assert found["score"] == pytest.approx(
        0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    )


def test_equal_scores_of_all_right_answers_do_not_divide_by_zero():
    one = {"tied:7": of_scores([2, 2], [1]), "ref:7": of_scores([2], [1])}
    assert ties_score(one)["score"] == pytest.approx(1.01)
    nothing = {"tied:7": of_scores([1, 1], [1]), "ref:7": of_scores([1], [1])}
    assert ties_score(nothing)["score"] == 0  # neither gap is positive; 0/0 counts 0


def test_an_example_with_a_missing_verdict_is_counted_and_left_out():
    examples = {
        "tied:1": of_scores([5, 4], [1, 2]),
        "ref:1": of_scores([3], [1]),
        "tied:2": np.array([[NAN], [1.0]]),
    }
    assert ties_score(examples) == {
        "score": pytest.approx(1 + 0.01 * math.tanh(1)),
        "examples": 2,
        "incomplete": 1,
    }
    found = reward_bench_2(
        {("Math", "1"): np.array([[1.0, NAN]]), ("Math", "2"): np.array([[1.0, 2.0]])}
    )
    assert (found["sections"], found["incomplete"], found["score"]) == ({"Math": 1.0}, 1, None)
    assert found["missing"] == ["Factuality", "Precise IF", "Safety", "Focus", "Ties"]


# The layouts


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sides(row):
    """(chosen, rejected) texts of a pair."""
    return (
        (row["first"]["text"], row["second"]["text"])
        if row["gold_label"] == "first"
        else (row["second"]["text"], row["first"]["text"])
    )


def test_hh_transcripts_become_turns_and_a_pair_of_different_prompts_is_counted(tmp_path: Path):
    start = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: How\n\nare you?"
    rows = [
        {"chosen": start + "\n\nAssistant: Well.", "rejected": start + "\n\nAssistant: Go away."},
        {"chosen": start + "\n\nAssistant: Well.", "rejected": "\n\nHuman: Hi.\n\nAssistant: Bye."},
        {"chosen": start + "\n\nAssistant:", "rejected": start + "\n\nAssistant: Yes."},
        {"chosen": start, "rejected": start + "\n\nAssistant: Yes."},
    ]
    table, drops = readers.load_pairs(write(tmp_path / "hh.jsonl", rows))
    (row,) = table.to_pylist()
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "How\n\nare you?"),
    ]
    assert sides(row) == ("Well.", "Go away.")
    assert drops == {"different_prompts": 1, "empty_response": 2}


def test_an_answer_that_quotes_a_transcript_is_an_answer_where_a_prompt_stands_beside_it(
    tmp_path: Path,
):
    rows = [{"prompt": "Quote.", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "no"}]
    (row,) = readers.load_pairs(write(tmp_path / "quote.jsonl", rows))[0].to_pylist()
    assert sides(row) == ("\n\nHuman: a\n\nAssistant: b", "no")


def test_ultrafeedback_binarized_repeats_the_prompt_in_both_message_lists(tmp_path: Path):
    def said(text):
        return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]

    rows = [
        {
            "prompt": "Q",
            "prompt_id": "0",
            "chosen": said("a"),
            "rejected": said("b"),
            "messages": said("a"),
            "score_chosen": 9.0,
        }
    ]
    (row,) = readers.load_pairs(write(tmp_path / "uf.jsonl", rows))[0].to_pylist()
    asked = [{"role": "user", "content": "Q", "more": None}]
    assert (row["messages"], sides(row)) == (asked, ("a", "b"))


def test_a_reward_bench_2_row_is_every_right_answer_beside_every_wrong_one(tmp_path: Path):
    rows = [
        {
            "id": "tied:3",
            "prompt": "Q",
            "chosen": ["a", "b"],
            "rejected": ["c", "d", "e"],
            "subset": "Ties",
            "num_correct": 2,
        },
        {
            "id": "9",
            "prompt": "R",
            "chosen": ["a"],
            "rejected": ["a", "b"],
            "subset": "Math",
            "num_correct": 1,
        },
    ]
    table, drops = readers.load_pairs(write(tmp_path / "rb2.jsonl", rows))
    pairs = table.to_pylist()
    assert {sides(row) for row in pairs[:6]} == {(x, y) for x in "ab" for y in "cde"}
    ids = {
        row[side]["text"]: row[side]["candidate_id"]
        for row in pairs[:6]
        for side in ("first", "second")
    }
    assert (ids["b"], ids["e"]) == ("tied:3/chosen/1/2", "tied:3/rejected/2/3")
    assert (sides(pairs[6]), drops) == (("a", "b"), {"identical_responses": 1})


def benchmark_of(tmp_path: Path, rows: list[dict], scores: str) -> dict:
    """The benchmark figures of external scores, through the stage."""
    values = {
        "model": "",
        "input": write(tmp_path / "in.jsonl", rows),
        "output_dir": tmp_path / "out",
        "reward_models": ["external"],
        "external": scores,
    }
    judged = tmp_path / "judged"
    from scir_cli.data import dataset

    table, _ = readers.load_pairs(values["input"], external=scores)
    dataset.write_dataset(
        judged,
        "judged",
        {"stage": "test"},
        [(0, 1)],
        lambda low, high: dataset.Part(table, table.num_rows),
    )
    settings = config.build(
        EvalRewardsSettings, {"input": str(judged), "output_dir": tmp_path / "out"}, where="test"
    )
    return stages.load("eval rewards")(settings)["summary"]


def test_eval_rewards_gives_reward_bench_sections_where_the_subsets_are_reward_benchs(
    tmp_path: Path,
):
    rows = [
        {
            "prompt": f"{s} {i}",
            "chosen": "yes",
            "rejected": "no",
            "subset": s,
            "id": i,
            "score": 1.0 if i or s != "hep-go" else -1.0,
        }
        for counts in SECTIONS.values()
        for s in counts
        for i in range(2)
    ]
    benchmark = benchmark_of(tmp_path, rows, "score")["benchmark"]
    assert benchmark["name"] == "RewardBench"
    reasoning = (984 + 5 * 164 + 82) / (984 + 6 * 164)  # one of hep-go's two is wrong
    assert benchmark["models"]["external"]["sections"]["Reasoning"] == pytest.approx(reasoning)
    assert benchmark["models"]["external"]["score"] == pytest.approx((3 + reasoning) / 4)


def test_eval_rewards_puts_reward_bench_2_rows_together_again(tmp_path: Path):
    rows = [
        {
            "id": str(i),
            "prompt": s,
            "chosen": ["a"],
            "rejected": ["b", "c", "d"],
            "subset": s,
            "score": 1.0 if s != "Focus" else -1.0,
        }
        for i, s in enumerate(SUBSETS_2[:5])
    ]
    rows += [
        {
            "id": "ref:0",
            "prompt": "one",
            "chosen": ["a"],
            "rejected": ["b", "c"],
            "subset": "Ties",
            "score": 1.0,
        },
        {
            "id": "tied:0",
            "prompt": "two",
            "chosen": ["a", "b"],
            "rejected": ["c", "d"],
            "subset": "Ties",
            "score": 1.0,
        },
    ]
    found = benchmark_of(tmp_path, rows, "score")["benchmark"]["models"]["external"]
    assert found["sections"] == pytest.approx(
        dict.fromkeys(SUBSETS_2[:4], 1.0) | {"Focus": 0.0, "Ties": 1.01}
    )
    assert (found["score"], found["examples"], found["incomplete"]) == (
        pytest.approx((4 + 0 + 1.01) / 6),
        7,
        0,
    )
