"""Every architecture is scored and trained as the model itself, or refused by name.

Tiny random models of the installed transformers: each is compared with its own forward pass, one
sequence at a time, trained for a step with and without adapters, and loaded again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import architectures

#: A hybrid with a vision tower, sinks with experts, a wrapper that no causal class loads, a Mamba
#: layer whose kernel reads a weight, keys that are compressed, and a router that returns a tuple
HANDFUL = {
    "qwen3_5": "padded",
    "gpt_oss": "trees",
    "mistral3": "trees",
    "falcon_h1": "padded",
    "deepseek_v4": "equal",
    "phimoe": "padded",
}
ALL = [*architectures.ARCHITECTURES, *architectures.WRAPPERS]
REST = [name for name in ALL if name not in HANDFUL]
NOISE = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def assert_right(row: architectures.Row) -> None:
    assert row.refused == ""
    assert row.logps < 1e-4
    assert row.gradients < 1e-3
    assert row.reloaded < 1e-4
    assert row.lost == 0
    assert not row.trained.startswith("0 ")
    assert row.adapters > 0


@NOISE
@pytest.mark.parametrize("name", HANDFUL)
def test_an_architecture_is_scored_trained_saved_and_loaded_as_the_model_itself(name: str):
    row = architectures.measure(name)
    assert_right(row)
    assert row.scored == HANDFUL[name]


@pytest.mark.slow
@NOISE
@pytest.mark.parametrize("name", REST)
def test_every_other_architecture_is_scored_trained_saved_and_loaded_as_the_model_itself(name: str):
    assert_right(architectures.measure(name))


@NOISE
def test_the_table_has_a_row_for_each_of_at_least_twenty_five_architectures():
    assert len(architectures.ARCHITECTURES) >= 25
    rows = [architectures.Row("llama", False, scored="trees", logps=2e-6, trained="3 of 3")]
    rows.append(architectures.Row("gemma3", True, refused="it is | refused"))
    lines = architectures.table(rows)
    assert lines[2].startswith("| llama | trees | 2e-06 |")
    assert lines[3] == "| gemma3 (multimodal) | refused: it is \\| refused | | | | | |"
