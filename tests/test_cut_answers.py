"""Answers that the length limit cut: recorded, counted, and dropped unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import generate, run

from scir_cli.data import dataset, schemas
from scir_cli.report import tables


@pytest.mark.parametrize("backend", ["fake", "transformers", "thinking_backends:Thinks"])
def test_each_backend_records_which_answers_ended_by_themselves(
    backend: str, tiny_llama: Path, prompts: Path, tmp_path: Path
):
    manifest = generate(
        tiny_llama, prompts, tmp_path / "out", backend, max_new_tokens=5, temperature=2.0
    )
    rows = dataset.read_dataset(tmp_path / "out").to_pylist()
    for row in rows:
        stopped = row["token_ids"][-1] == 2
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert stopped or len(row["token_ids"]) == 5
    n_cut = sum(row["finish_reason"] == "length" for row in rows)
    assert n_cut > 0
    assert manifest["summary"]["cut"] == n_cut
    assert f", {n_cut} cut at the length limit" in tables.summary_line("generate", "out", manifest)


def pair(number: int, first: str, second: str) -> dict[str, Any]:
    """A judged pair whose responses ended for these reasons."""

    def response(reason: str, side: str) -> dict[str, Any]:
        return {
            "candidate_id": f"{number}{side}",
            "text": f"{number} {side}",
            "token_ids": [5, 6],
            "finish_reason": reason,
        }

    return {
        "pair_id": f"{number:016x}",
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"Question {number}"}],
        "first": response(first, "a"),
        "second": response(second, "b"),
        "rewards": [{"reward_model": "judge", "log_odds": 1.0}],
        "reference_logps": [],
    }


def test_pairs_with_a_cut_response_are_dropped_unless_asked_for(tmp_path: Path):
    reasons = [("stop", "stop"), ("length", "stop"), ("stop", "length"), ("length", "length")]
    rows = [pair(i, *each) for i, each in enumerate(reasons)]
    table = schemas.to_table("judged", rows)
    dataset.write_dataset(
        tmp_path / "judged", "judged", {"stage": "judge"}, [(0, 4)],
        lambda *_: dataset.Part(table, 4),
    )  # fmt: skip
    common = {"input": str(tmp_path / "judged"), "rule": "judge"}
    dropped = run("filter", **common, output_dir=tmp_path / "dropped")
    assert (dropped["rows_out"], dropped["drops"]) == (1, {"cut": 3})
    unlabeled = run("filter", **common, keep_unlabeled=True, output_dir=tmp_path / "unlabeled")
    assert unlabeled["drops"] == {"cut": 3}
    kept = run("filter", **common, keep_cut=True, output_dir=tmp_path / "kept")
    assert (kept["rows_out"], kept["drops"]) == (4, {})
