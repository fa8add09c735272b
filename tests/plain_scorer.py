"""A plain scorer, written independently of scir_cli, and what is asked of both it and the engine.

One sequence at a time through a second copy of the model, with its own attention: full logits,
log_softmax, gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from toy import VOCABULARY
from transformers import AutoModelForCausalLM

from scir_cli.engine.trees import Branch, continuation, verdict


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, said twice.

    As branches for the engine, and as (context, answer) for the plain scorer.
    """

    branches: list[Branch]
    sequences: list[tuple[list[int], list[int]]]


def questions(seed: int = 0) -> Asked:
    """Three prompts with three answers each (some starting alike, one given twice), and judge
    prompts that share a start and have two verdicts each.
    """
    random = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return random.integers(4, VOCABULARY, n).tolist()

    sequences = []
    system = ids(5)
    for length in (3, 14, 30):  # with the answers: below and beyond the sliding windows of 8 and 16
        prompt, start = system + ids(length), ids(3)
        answers = [start + ids(7), start + ids(4), ids(9)]
        sequences += [(prompt, answer) for answer in [*answers, answers[0]]]
    instruction, a, b = ids(12), ids(8), ids(6)
    for order in ([*a, 9, *b], [*b, 9, *a]):
        sequences += [([*instruction, *order, 7], [token]) for token in (36, 37)]
    return Asked(
        [continuation(p, r) if len(r) > 1 else verdict(p, r[0]) for p, r in sequences], sequences
    )


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A second copy of the model.

    Eager attention is each model's own definition: the only one with Gemma 2's soft-capping.
    """
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def plain_logps(model: Any, asked: Asked) -> Tensor:
    """Summed log-probability of each answer after its context, one sequence at a time through the
    whole model.
    """
    sums = []
    for context, answer in asked.sequences:
        ids = torch.tensor([context + answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        logps = torch.log_softmax(logits.float(), dim=-1)
        sums.append(sum(logps[len(context) + i - 1, token] for i, token in enumerate(answer)))
    return torch.stack(sums)


def gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """Gradient of a random weighted sum of the branches, by parameter."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(7)).to(logps.device)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(
        zip(named, torch.autograd.grad((weights * logps).sum(), list(named.values())), strict=True)
    )


def assert_same_logps(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    worst = ((got - want).abs() / want.abs()).max().item()
    assert worst < 1e-4, f"log-probabilities differ by {worst:.1e} relative"


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    off = {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}
    assert not {name: value for name, value in off.items() if not value < 1e-4}
