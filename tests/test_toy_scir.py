"""SCIR on a toy with gold labels: say the digit you are told. What the objective promises has to happen here, and the test says by how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_fp32
from toy import make_model

from scir_cli import config, consistency, objectives, reward_models
from scir_cli.objectives import Example
from scir_cli.policy import Policy
from scir_cli.reward_models import Context, Pair
from scir_cli.stages.common import encode_pair
from scir_cli.trainer import Trainer


def pairs(policy: Policy) -> list[tuple[Pair, int]]:
    """All (digit, wrong digit) pairs, the right answer first in every other one, shuffled."""
    rows = []
    for digit in range(6):
        for wrong in (d for d in range(6) if d != digit):
            right_first = (digit + wrong) % 2 == 0
            texts = (str(digit), str(wrong)) if right_first else (str(wrong), str(digit))
            sides = [{"text": text * 3, "token_ids": []} for text in texts]
            row = {
                "pair_id": f"{digit}{wrong}",
                "messages": [{"role": "user", "content": f"Say {digit}."}],
                "rewards": [],
                "reference_logps": [],
            }
            rows.append((encode_pair({**row, "first": sides[0], "second": sides[1]}, policy.chat), 1 if right_first else -1))
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def settings(**values: object) -> config.TrainSettings:
    base = {
        "model": "x",
        "input": "x",
        "output_dir": "x",
        "reward_reference": "M_0",
        "judge_prompt": None,
        "schedule": "constant",
        "branch_gradients": False,
    }
    return config.build(config.TrainSettings, base | values, where="test")


def train(policy: Policy, examples: list[Example], folder: Path, chosen: config.TrainSettings, start: str) -> None:
    folder.mkdir()
    Trainer(policy, objectives.TABLE[chosen.objective](chosen, policy.chat, start, "M_0"), examples, chosen, folder).train()


@torch.no_grad()
def remember(policy: Policy, items: list[Pair], key: str) -> None:
    groups = [[reward_models.continuation(p.prompt_ids, ids) for ids in p.response_ids] for p in items]
    for pair, logps in zip(items, policy.score(groups, 4096), strict=True):
        pair.reference_logps[key] = (float(logps[0]), float(logps[1]))


def figures(policy: Policy, data: list[tuple[Pair, int]], chosen: config.TrainSettings) -> dict[str, float]:
    """Agreement of the averaged judge with the implicit reward, flips, and the accuracy of each, on the pairs."""
    models = reward_models.make(["judge", "implicit"], policy.chat, chosen)
    items, gold = [p for p, _ in data], np.array([label for _, label in data])
    logps = torch.cat(list(policy.score([reward_models.ask(models, p) for p in items], 4096)))
    odds = reward_models.answer(models, [4, 2], logps, Context.of(items, "M_0"))
    stacked = np.stack([o.log_odds.numpy().astype(float) for o in odds.values()])
    seats = odds["judge"].seats
    assert seats is not None
    return {
        "agreement": float(np.mean(consistency.agreement(stacked).agree)),
        "flips": float((seats[0].sign() == seats[1].sign()).float().mean()),
        "judge": float(np.mean(stacked[0] * gold > 0)),
        "implicit": float(np.mean(stacked[1] * gold > 0)),
    }


@pytest.mark.slow
def test_scir_raises_the_agreement_of_judge_and_implicit_reward_on_a_toy_with_gold_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = load_fp32(make_model(tmp_path / "m0", "llama", hidden_size=64, intermediate_size=128, initializer_range=0.05))
    data = pairs(policy)
    everyone = [p for p, _ in data]
    remember(policy, everyone, "M_0")
    seed = [Example(p, label) for p, label in data[:10]]
    common = {"batch_size": 10, "learning_rate": 2e-3, "warmup_ratio": 0.0}
    train(policy, seed, tmp_path / "sft", settings(objective="sft", max_steps=25, num_epochs=25, **common), "M_0")
    train(policy, seed, tmp_path / "dpo", settings(objective="dpo", max_steps=5, num_epochs=5, **common), "M_0")
    remember(policy, everyone, "M_1")
    scir = settings(objective="scir", max_steps=30, num_epochs=30, **common | {"learning_rate": 5e-4})
    before = figures(policy, data[10:], scir)
    train(policy, [Example(p) for p in everyone[10:]], tmp_path / "scir", scir, "M_1")
    after = figures(policy, data[10:], scir)
    with capsys.disabled():
        print("\ntoy, 20 unlabelled pairs: " + ", ".join(f"{name} {before[name]:.2f} -> {after[name]:.2f}" for name in before))
    assert 0.3 <= before["agreement"] <= 0.85  # there is something to gain
    assert after["agreement"] >= before["agreement"] + 0.1
    assert after["flips"] <= before["flips"]
