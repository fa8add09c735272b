"""Sampling by the transformers backend: which tokens can be sampled, and how often each is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import generate, run_command

from scir_cli.backends import Sampling
from scir_cli.backends.transformers import RepetitionPenalty, SeededNucleus
from scir_cli.data import dataset

#: Tokens 0 to 3 have these probabilities.
PROBABILITIES = (0.1, 0.4, 0.2, 0.3)


def frequencies(**limits: float) -> list[float]:
    """How often each token is sampled by 1,000 evenly spaced uniform numbers."""
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, **limits}
    sampling = Sampling(max_new_tokens=1, batch_size=1, **values)
    uniforms = (torch.arange(1000)[:, None] + 0.5) / 1000
    logits = torch.tensor(PROBABILITIES).log().expand(1000, 4)
    scores = SeededNucleus(sampling, uniforms, 1)(torch.zeros(1000, 1, dtype=torch.long), logits)
    return (scores == 0).float().mean(0).tolist()


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        # at least 0.6 * 0.4 = 0.24
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        # 0.6 of the 0.9 that top_k leaves is 0.54: 0.4, and 0.3 because 0.4 is less
        ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        # 0.55 of the 0.7 that top_k leaves is 0.385: 0.4 alone
        ({"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"top_k": 3, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        # at temperature 1/2 the probabilities are as 1, 16, 4, 9; at least 0.5 * 16
        ({"temperature": 0.5, "min_p": 0.5}, [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_the_tokens_within_the_limits_keep_their_odds(
    limits: dict[str, float], expected: list[float]
):
    assert frequencies(**limits) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("limits", [{"min_p": 0.5}, {"top_k": 3000}, {"top_p": 0.9}])
def test_more_tokens_than_the_first_candidates_can_be_sampled(limits: dict[str, float]):
    # 5,000 equal tokens: the limits leave all of them, 3,000, and 4,500.
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, **limits}
    sampling = Sampling(max_new_tokens=1, batch_size=1, **values)
    uniforms = (torch.arange(500)[:, None] + 0.5) / 500
    ids = torch.zeros(500, 1, dtype=torch.long)
    scores = SeededNucleus(sampling, uniforms, 1)(ids, torch.zeros(500, 5000))
    assert len(set(scores.argmax(1).tolist())) == 500


def test_a_repeated_token_s_logit_is_made_smaller_and_padding_is_no_token():
    # The second row has one padding token, 0, which is no token of its prompt.
    ids = torch.tensor([[1, 3, 3], [0, 2, 3]])
    logits = torch.tensor([[2.0, 2.0, 2.0, -2.0]] * 2)
    scores = RepetitionPenalty(2.0, torch.tensor([0, 1]))(ids, logits)
    assert scores.tolist() == [[2.0, 1.0, 2.0, -4.0], [2.0, 2.0, 1.0, -4.0]]


def rows(folder: Path) -> list[list[int]]:
    return [row["token_ids"] for row in dataset.read_dataset(folder, "candidates").to_pylist()]


def test_an_answer_depends_on_no_other_of_its_batch_under_all_limits(
    tiny_llama: Path, tmp_path: Path
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "a much longer prompt than that"}\n')
    limits = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.5, "max_new_tokens": 12}
    for size in (1, 4):
        generate(
            tiny_llama, prompts, tmp_path / f"{size}", "transformers", batch_size=size, **limits
        )
    assert rows(tmp_path / "1") == rows(tmp_path / "4")
    plain = limits | {"repetition_penalty": 1.0}
    generate(tiny_llama, prompts, tmp_path / "plain", "transformers", **plain)
    assert rows(tmp_path / "plain") != rows(tmp_path / "4")


def test_limits_at_their_defaults_change_no_candidate_s_id(tiny_llama: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')

    def ids(name: str, **limits: float) -> list[str]:
        generate(tiny_llama, prompts, tmp_path / name, "fake", **limits)
        table = dataset.read_dataset(tmp_path / name, "candidates")
        return table["candidate_id"].to_pylist()

    before = ids("before")
    assert ids("same", top_k=0, min_p=0.0, repetition_penalty=1.0) == before
    assert set(ids("other", top_k=3)).isdisjoint(before)


def test_limits_that_are_not_the_default_reach_vllm_and_endpoints():
    assert Sampling(1.0, 0.9, 8, 1).limits() == {}
    assert Sampling(1.0, 0.9, 8, 1, top_k=3, min_p=0.1).limits() == {"top_k": 3, "min_p": 0.1}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--top-k", "-1"), ("--min-p", "1"), ("--min-p", "nan"), ("--repetition-penalty", "0")],
)
def test_a_limit_out_of_bounds_is_one_line(
    flag: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    words = ["generate", "-m", "m", "-i", "p.jsonl", "-o", str(tmp_path / "out"), flag, value]
    assert run_command(words, monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("scir: error:") for line in lines) == 1
    assert not math.isnan(float(value)) or "nan" in "\n".join(lines).lower()
