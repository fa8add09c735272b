"""Dry run: estimates the tokens, packs, memory and time of a training run.

Tokens and packs are counted. Memory and time are measured, in steps on the largest pack and four
others with a learning rate of 0:

    peak memory = weights + memory that those steps add

No architecture needs a formula, and a run that does not fit is recognized before it starts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scir_cli.engine import trees
from scir_cli.engine.policy import Policy
from scir_cli.settings import TrainSettings
from scir_cli.training.objectives import Example, Objective
from scir_cli.training.optimizer import MasterAdamW
from scir_cli.training.trainer import batches, keep_freed_memory

#: Of the histogram of tokens per pair
BINS = 8

#: Packs between the smallest and the largest that are measured too, as fifths of their ranks.
#: Freed memory is reused in pieces, so the peak depends on a change of sizes.
MEASURED_FIFTHS = (3, 1, 4, 2)

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")

Json = dict[str, Any]


def estimate(
    policy: Policy, examples: Sequence[Example], settings: TrainSettings, objective: Objective
) -> Json:
    """Steps, pairs, packs, tokens, bytes and seconds of a run on one process."""
    steps = batches(len(examples), settings)
    branches = [objective.branches(example) for example in examples]
    packs = _all_packs(steps, branches, settings.max_tokens_per_pack)
    sizes = [trees.size(pack) for pack in packs]
    n_tokens = sum(sizes)

    if settings.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
        policy.model.train()
    added_bytes, seconds = _measure(policy, _measured_packs(packs, sizes))
    weights_bytes = sum(p.numel() * p.element_size() for p in policy.model.parameters())

    # A step of several packs scores them once more, without gradient: a third of a pass.
    one_pass = objective.separable or len(packs) == len(steps)
    n_passes = 1 if one_pass else 4 / 3
    capacity = max(settings.max_tokens_per_pack, max(sizes))
    return {
        "steps": len(steps),
        "pairs": len(examples),
        "tokens_a_pair": _histogram([trees.size(group) for group in branches]),
        "packs": len(packs),
        "packing_efficiency": n_tokens / (len(packs) * capacity),
        "tokens": n_tokens,
        "tokens_without_sharing": sum(len(branch.ids) for pack in packs for branch in pack),
        "weights_bytes": weights_bytes,
        "peak_bytes": weights_bytes + added_bytes,
        "seconds": n_tokens / max(sizes) * seconds * n_passes,
    }


def _all_packs(
    steps: Sequence[Sequence[int]], branches: Sequence[Sequence[trees.Branch]], max_tokens: int
) -> list[list[trees.Branch]]:
    """The branches of each pack of the run.

    steps: indices of the pairs of each step; branches: of each pair.
    """
    packs = []
    for step in steps:
        groups = [branches[index] for index in step]
        for low, high in trees.pack(groups, max_tokens):
            packs.append([branch for group in groups[low:high] for branch in group])
    return packs


def _measured_packs(
    packs: Sequence[list[trees.Branch]], sizes: Sequence[int]
) -> list[list[trees.Branch]]:
    """The largest pack first and last, with smaller ones between."""
    by_size = np.argsort(sizes)
    largest = by_size[-1]
    others = [by_size[fifths * len(sizes) // 5] for fifths in MEASURED_FIFTHS]
    return [packs[index] for index in (largest, *others, largest)]


def _histogram(sizes: Sequence[int]) -> list[list[int]]:
    """[upper bound in tokens, number of pairs] of each bin, in ascending order."""
    counts, edges = np.histogram(sizes, bins=BINS)
    bins = zip(edges[1:], counts, strict=True)
    return [[int(np.ceil(edge)), int(count)] for edge, count in bins]


def _measure(policy: Policy, packs: Sequence[Sequence[trees.Branch]]) -> tuple[int, float]:
    """The bytes that optimizer steps on these packs add, and the seconds of the last.

    The bytes are at the peak, gradients and optimizer state included, above those before.
    """
    cuda = policy.device.type == "cuda"
    if not cuda:
        keep_freed_memory()
    before = _memory(cuda, reset=True)
    params = [p for p in policy.model.parameters() if p.requires_grad]
    # A learning rate of 0: the weights do not change.
    optimizer = MasterAdamW(params, lr=0.0, weight_decay=0.0)
    for branches in packs:
        started = time.monotonic()
        optimizer.zero_grad()
        policy.branch_logps(branches).sum().backward()
        optimizer.step()
        peak = _memory(cuda)
        seconds = time.monotonic() - started
    return peak - before, seconds


def _memory(cuda: bool, *, reset: bool = False) -> int:
    """Bytes at the peak since the last reset.

    reset: starts a new peak and returns the bytes that are in use now.
    """
    if cuda:
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        # 5 resets the peak resident set size (proc(5)).
        CLEAR_REFS.write_text("5", encoding="ascii")
    field = "VmRSS:" if reset else "VmHWM:"
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    kibibytes = int(line.split()[1])
    return kibibytes * 1024
