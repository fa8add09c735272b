"""Pairs that are ordered by construction, worked by hand.

And a temperature fitted on them from candidates to labels.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run

from scir_cli.data import dataset
from scir_cli.data.schemas import to_table
from scir_cli.errors import ConfigError
from scir_cli.stages import damage


def candidate(i: int, prompt: str, text: str, duplicate_of: str | None = None) -> dict[str, object]:
    return {
        "candidate_id": f"c{i}",
        "prompt_id": prompt,
        "messages": [{"role": "user", "content": prompt}],
        "response": text,
        "token_ids": list(range(len(text.split()))),
        "finish_reason": "stop",
        "duplicate_of": duplicate_of,
        "weights_key": "w",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("text", "truncated", "shuffled", "repeated"),
    [
        (
            "It rains. It pours! Stay in.",
            "It rains. It",
            "Stay in. It rains. It pours!",
            "It rains. It pours! Stay in. Stay in.",
        ),
        ("One two three", None, None, "One two three One two three"),
        ("Go. Go.", None, None, "Go. Go. Go."),
    ],
)
def test_each_damage_by_hand(text: str, truncated: str | None, shuffled: str | None, repeated: str):
    assert damage.truncated(text) == truncated
    assert damage.shuffled(text) == shuffled
    assert damage.repeated(text) == repeated


def test_the_undamaged_response_is_the_gold_label_on_either_side():
    candidates = [
        candidate(1, "p", "It rains. It pours! Stay in."),
        candidate(2, "p", "Sun. Warm and dry all day."),
        candidate(3, "q", "Seven"),
        candidate(4, "q", "Seven", duplicate_of="c3"),
    ]
    table, drops = damage.damaged_pairs(to_table("candidates", candidates))
    rows = table.to_pylist()
    assert drops == {"unusable_candidate": 1}
    # c1 and c2 in all four ways; "Seven" repeated, and beside c1 and c2's nearest in length: six
    # words against one
    assert sorted((row["messages"][0]["content"], row["subset"]) for row in rows) == sorted(
        [("p", kind) for kind in ("truncated", "shuffled", "repeated", "other prompt")] * 2
        + [("q", "repeated"), ("q", "other prompt")]
    )
    for row in rows:
        worse = "second" if row["gold_label"] == "first" else "first"
        assert row[row["gold_label"]]["author"] == "w"
        assert row["first"]["text"] != row["second"]["text"]
        if row["subset"] != "other prompt":
            assert row[worse]["author"] == f"damage: {row['subset']}"
    assert {row["gold_label"] for row in rows} == {"first", "second"}
    assert len({row["pair_id"] for row in rows}) == len(rows)


def test_damaged_pairs_have_no_external_scores():
    with pytest.raises(ConfigError, match="leave --score-column out"):
        damage.damaged_pairs(to_table("candidates", [candidate(1, "p", "a")]), external="score")


def test_damaged_candidates_are_judged_with_labels_and_the_figures_of_each_kind(
    tiny_llama: Path, tmp_path: Path
):
    text = "".join(json.dumps({"prompt": f"Tell me of number {i}."}) + "\n" for i in range(4))
    (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8")
    common = {"model": str(tiny_llama)}
    run(
        "generate",
        **common,
        input=str(tmp_path / "prompts.jsonl"),
        n=2,
        max_new_tokens=8,
        output_dir=tmp_path / "candidates",
    )
    manifest = run(
        "judge",
        **common,
        input=str(tmp_path / "candidates"),
        reward_models=["judge", "likelihood"],
        pairs="damaged",
        output_dir=tmp_path / "judged",
    )
    rows = dataset.read_dataset(tmp_path / "judged", "judged").to_pylist()
    assert manifest["rows_out"] == len(rows) >= 8
    assert {row["subset"] for row in rows} >= {"repeated", "other prompt"}
    assert all(row["first"]["token_ids"] and row["second"]["token_ids"] for row in rows)
    checked = run(
        "check-consistency",
        input=str(tmp_path / "judged"),
        by_subset=True,
        output_dir=tmp_path / "consistency",
    )
    repeats = checked["by_subset"]["repeated"]["models"]["likelihood"]
    assert repeats["labeled"] == sum(row["subset"] == "repeated" for row in rows)
