"""What a training run will take: tokens, packs, memory, time. Counted where it can be counted, measured on one pack where it cannot.

    peak memory = weights + what steps on the largest pack and four others take: measured, with an optimizer that moves nothing

No architecture's formula is written here, and a run that does not fit is known before it starts.
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

BINS = 8  # of the histogram of tokens
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Json = dict[str, Any]


def estimate(
    policy: Policy, examples: Sequence[Example], settings: TrainSettings, objective: Objective
) -> Json:
    """Tokens, steps, packs, bytes and seconds of a run, on one process; steps are tried on its largest pack and four others."""
    steps = batches(examples, settings, objective)
    groups = [objective.branches(e) for e in examples]
    packs = [
        [step[i] for i in range(*r)]
        for step in steps
        for r in trees.pack([groups[i] for i in step], settings.max_tokens_per_pack)
    ]
    sizes = [trees.size([b for i in pack for b in groups[i]]) for pack in packs]
    alone = sum(len(b.ids) for pack in packs for i in pack for b in groups[i])
    by_size = np.argsort(sizes)
    others = [
        by_size[k * len(sizes) // 5] for k in (3, 1, 4, 2)
    ]  # of other sizes: memory that is kept is used in pieces
    probes = [[b for i in packs[k] for b in groups[i]] for k in (by_size[-1], *others, by_size[-1])]
    if settings.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
        policy.model.train()
    taken, seconds = _probe(policy, probes)
    passes = (
        1 if objective.separable or len(packs) == len(steps) else 4 / 3
    )  # several packs: scored once more, a third of a pass
    return {
        "steps": len(steps),
        "pairs": len(examples),
        "tokens_a_pair": _histogram([trees.size(g) for g in groups]),
        "packs": len(packs),
        "packing_efficiency": sum(sizes)
        / (len(packs) * max(settings.max_tokens_per_pack, max(sizes))),
        "tokens": sum(sizes),
        "tokens_without_sharing": alone,
        "weights_bytes": sum(p.numel() * p.element_size() for p in policy.model.parameters()),
        "peak_bytes": sum(p.numel() * p.element_size() for p in policy.model.parameters()) + taken,
        "seconds": sum(sizes) / max(sizes) * seconds * passes,
    }


def _histogram(sizes: Sequence[int]) -> list[list[int]]:
    """[tokens at most, how many pairs], from the fewest tokens to the most."""
    counts, edges = np.histogram(sizes, bins=BINS)
    return [[int(np.ceil(edge)), int(count)] for edge, count in zip(edges[1:], counts, strict=True)]


def _probe(policy: Policy, packs: Sequence[Sequence[trees.Branch]]) -> tuple[int, float]:
    """Bytes that optimiser steps on the packs take above what is there before (gradients and optimizer state among them); seconds of the last."""
    cuda = policy.device.type == "cuda"
    if not cuda:
        keep_freed_memory()
    before = _memory(cuda, reset=True)
    optimizer = MasterAdamW(
        [p for p in policy.model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
    )  # moves nothing
    for branches in packs:
        started = time.monotonic()
        optimizer.zero_grad()
        policy.branch_logps(branches).sum().backward()
        optimizer.step()
        peak = _memory(cuda)
        seconds = time.monotonic() - started
    return peak - before, seconds


def _memory(cuda: bool, *, reset: bool = False) -> int:
    """Bytes at the peak since the last reset; with `reset`, bytes now, from which a new peak is counted."""
    if cuda:
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        CLEAR_REFS.write_text("5", encoding="ascii")
    field = "VmRSS:" if reset else "VmHWM:"
    return next(
        int(line.split()[1]) * 1024
        for line in STATUS.read_text().splitlines()
        if line.startswith(field)
    )
