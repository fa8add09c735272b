"""This side of the benchmarks.

The package's own trainer on benchmark pairs, through its public functions only.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import Json, Meter, versions

from scir_cli import __version__, config
from scir_cli.engine import loading, trees
from scir_cli.engine.policy import Policy
from scir_cli.rewards.pairs import Pair
from scir_cli.settings import IMPLICIT_SCALE, TrainSettings
from scir_cli.training import dry_run, objectives
from scir_cli.training.objectives import Example, Objective
from scir_cli.training.trainer import Trainer

START, EARLIER = (
    "start",
    "earlier",
)  # reference keys: the model as it is, and a stand-in for the SFT model before it


def settings(a: Json, folder: str) -> TrainSettings:
    values = {
        "model": a["model"],
        "dtype": a["dtype"],
        "input": "-",
        "output_dir": folder,
        "objective": a["objective"],
        "batch_size": a["batch_size"],
        "max_steps": a["steps"],
        "learning_rate": a["learning_rate"],
        "beta": a["beta"],
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "reward_reference": EARLIER,
        "implicit_scale": IMPLICIT_SCALE,
        "gradient_checkpointing": a.get("gradient_checkpointing", False),
    }
    if a.get("lora_rank"):
        values["lora"] = {"rank": a["lora_rank"]}
    if a.get("max_tokens_per_pack"):
        values["max_tokens_per_pack"] = a["max_tokens_per_pack"]
    return config.build(TrainSettings, values, where="benchmark")


def pairs_of(row: Json, name: str) -> list[Pair]:
    """Every unordered pair of a prompt's answers, on exactly the row's token ids."""
    messages = [{"role": "user", "content": row["question"]}]
    both = itertools.combinations(range(len(row["answers"])), 2)
    return [
        Pair(
            f"{name}-{i}-{j}",
            messages,
            tuple(row["prompt_ids"]),
            (tuple(row["answer_ids"][i]), tuple(row["answer_ids"][j])),
            (row["answers"][i], row["answers"][j]),
        )
        for i, j in both
    ]


def read_pairs(path: str) -> list[Pair]:
    return [
        pair
        for index, row in enumerate(json.loads(Path(path).read_text()))
        for pair in pairs_of(row, str(index))
    ]


def remember(model: Policy, pairs: Sequence[Pair], max_tokens: int) -> None:
    """Reference log-probabilities, once, before the clock starts.

    The earlier model's are 1 nat of noise away, so that SCIR has verdicts to mask.
    """
    draw = random.Random(0)
    groups = [[trees.continuation(p.prompt_ids, ids) for ids in p.response_ids] for p in pairs]
    for pair, logps in zip(pairs, model.score(groups, max_tokens), strict=True):
        first, second = logps.tolist()
        pair.reference_logps.update(
            {START: (first, second), EARLIER: (first + draw.gauss(0, 1), second + draw.gauss(0, 1))}
        )


def in_trainer_order(examples: list[Example], seed: int) -> list[Example]:
    """The examples placed so that the trainer's own shuffle of the first epoch gives them back in
    the order they are in.
    """
    placed = list(examples)
    for example, place in zip(
        examples, np.random.default_rng([seed, 0]).permutation(len(examples)), strict=True
    ):
        placed[place] = example
    return placed


def count(objective: Objective, batch: Sequence[Example]) -> Json:
    """What a step needs at least.

    keys: tokens seen by all queries; sequence_tokens: the same paths one by one, scored tokens
    included.
    """
    branches = [branch for example in batch for branch in objective.branches(example)]
    forest = trees.build(branches)
    return {
        "tokens": len(forest),
        "rows": len(np.unique(forest.target_hidden)),
        "keys": int((forest.positions + 1).sum()),
        "sequence_tokens": sum(len(ids) + 1 for ids in {branch.ids for branch in branches}),
    }


def train_flops(model: torch.nn.Module, counts: Json) -> float:
    """Floating-point operations that a training step cannot do without; recomputation does not
    count.

    3 (forward, and twice that backward) * [2 * body weights * tokens + 2 * vocabulary * width *
    rows + 4 * layers * heads * head size * keys]
    """
    c = model.config
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head * (
        1 if c.tie_word_embeddings else 2
    )
    attention = 4 * c.num_hidden_layers * c.hidden_size * counts["keys"]
    return 3.0 * (2 * body * counts["tokens"] + 2 * head * counts["rows"] + attention)


def prepared(a: Json, folder: str) -> tuple[TrainSettings, Policy, Objective, list[Example]]:
    chosen = settings(a, folder)
    model = loading.load(chosen)
    pairs = read_pairs(a["pairs"])[: a["steps"] * a["batch_size"]]
    remember(model, pairs, chosen.max_tokens_per_pack)
    objective = objectives.TABLE[a["objective"]](chosen, model.chat, START, EARLIER)
    return chosen, model, objective, [Example(pair, label=1) for pair in pairs]


def plan(a: Json) -> Json:
    """What `scir train --dry-run` says of the run that `train` makes."""
    with tempfile.TemporaryDirectory() as folder:
        chosen, model, objective, examples = prepared(a, folder)
        return dry_run.estimate(model, examples, chosen, objective)


def train(a: Json) -> Json:
    """Trains for `steps` steps and says what each cost and what its loss was."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        chosen, model, objective, examples = prepared(a, folder)
        batches = [
            examples[i : i + a["batch_size"]] for i in range(0, len(examples), a["batch_size"])
        ]
        counts = [count(objective, batch) for batch in batches]
        flops = [train_flops(model.model, c) for c in counts]
        meter.start()
        trainer = Trainer(
            model, objective, in_trainer_order(examples, chosen.seed), chosen, Path(folder)
        )
        meter.last = meter.now()
        trainer.train(lambda step, figures: meter.tick() if "loss" in figures else None)
        log = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]
    losses = [record["loss"] for record in log if record["kind"] == "train"]
    software = {"scir": __version__} | versions("accelerate")
    return {
        **meter.result(),
        "losses": losses,
        "counts": counts,
        "flops": flops,
        "versions": software,
    }
