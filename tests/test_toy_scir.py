"""SCIR on a toy with gold labels.

Say the letter you are told. What the objective promises has to happen here, and the test says by
how much.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_fp32
from toy import make_model

from scir_cli import config
from scir_cli.analysis import statistics
from scir_cli.data import schemas
from scir_cli.engine import trees
from scir_cli.engine.policy import Policy
from scir_cli.rewards import reward_models
from scir_cli.rewards.pairs import Context, Pair, encode_pairs
from scir_cli.settings import IMPLICIT_SCALE, TrainSettings
from scir_cli.training import objectives
from scir_cli.training.objectives import Example
from scir_cli.training.trainer import Trainer

LETTERS = "cdefghijklmnopqrstuv"  # 380 pairs; without a and b, which are too close to the verdicts
LABELED, UNLABELED = 120, 130  # the other 130 are held out: no training sees them


def pairs(policy: Policy) -> list[tuple[Pair, int]]:
    """All (letter, wrong letter) pairs in a random order, the right answer first in about half of
    them.
    """
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for letter in LETTERS:
        for wrong in LETTERS.replace(letter, ""):
            right_first = bool(rng.integers(2))
            texts = (letter, wrong) if right_first else (wrong, letter)
            sides = [{"text": text, "token_ids": []} for text in texts]
            row = {
                "pair_id": letter + wrong,
                "prompt_id": letter,
                "messages": [{"role": "user", "content": f"Say {letter}."}],
                "rewards": [],
                "reference_logps": [],
            }
            rows.append({**row, "first": sides[0], "second": sides[1]})
            labels.append(1 if right_first else -1)
    _, encoded, drops = encode_pairs(schemas.to_table("judged", rows), policy.chat)
    assert not drops
    return [(encoded[i], labels[i]) for i in rng.permutation(len(rows))]


def settings(**values: object) -> TrainSettings:
    base = {
        "model": "x",
        "input": "x",
        "output_dir": "x",
        "reward_reference": "M_0",
        "num_epochs": 100,
        "schedule": "linear",
        "implicit_scale": IMPLICIT_SCALE,
    }
    return config.build(TrainSettings, base | values, where="test")


def train(
    policy: Policy, examples: list[Example], folder: Path, chosen: TrainSettings, start: str
) -> None:
    folder.mkdir()
    Trainer(
        policy,
        objectives.TABLE[chosen.objective](chosen, policy.chat, start, "M_0"),
        examples,
        chosen,
        folder,
    ).train()


@torch.no_grad()
def remember(policy: Policy, items: list[Pair], key: str) -> None:
    groups = [[trees.continuation(p.prompt_ids, ids) for ids in p.response_ids] for p in items]
    for pair, logps in zip(items, policy.score(groups, 4096), strict=True):
        pair.reference_logps[key] = (float(logps[0]), float(logps[1]))


def figures(
    policy: Policy, data: list[tuple[Pair, int]], chosen: TrainSettings
) -> dict[str, float]:
    """Agreement of the averaged judge with the implicit reward, flips, and the accuracy of each, on
    the pairs.
    """
    models = reward_models.make(["judge", "implicit"], policy.chat, chosen)
    items, gold = [p for p, _ in data], np.array([label for _, label in data])
    logps = torch.stack(
        list(policy.score([reward_models.all_branches(models, p) for p in items], 4096))
    )
    odds = reward_models.all_outputs(models, logps, Context.of(items, "M_0"))
    stacked = np.stack([o.log_odds.numpy().astype(float) for o in odds.values()])
    orders = odds["judge"].orders
    assert orders is not None
    return {
        "agreement": float(np.mean(statistics.agreement(stacked).agree)),
        "flips": float((orders[0].sign() == -orders[1].sign()).float().mean()),
        "judge": float(np.mean(stacked[0] * gold > 0)),
        "implicit": float(np.mean(stacked[1] * gold > 0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_scir_raises_the_agreement_of_judge_and_implicit_reward_on_a_toy_with_gold_labels(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The judge is taught first and the implicit reward a little.

    SCIR then gets no label. Five of six seeds keep these bounds (docs/log.md).
    """
    prompt = tmp_path / "judge.txt"
    prompt.write_text("{question} A {a} B {b}", encoding="utf-8")
    policy = load_fp32(
        make_model(
            tmp_path / "m0",
            seed=seed,
            hidden_size=64,
            intermediate_size=128,
            initializer_range=0.05,
        )
    )
    data = pairs(policy)
    everyone = [p for p, _ in data]
    labeled = [Example(p, label) for p, label in data[:LABELED]]
    pools = {"unlabeled": data[LABELED:][:UNLABELED], "held-out": data[LABELED + UNLABELED :]}

    remember(policy, everyone, "M_0")
    common = {"judge_prompt": prompt, "batch_size": 30}
    sft = settings(objective="sft", sft_weight=0.0, learning_rate=2e-3, max_steps=300, **common)
    train(policy, labeled, tmp_path / "sft", sft, "M_0")
    remember(policy, everyone, "taught")
    train(
        policy,
        labeled,
        tmp_path / "dpo",
        settings(objective="dpo", learning_rate=3e-4, max_steps=40, **common),
        "taught",
    )
    remember(policy, everyone, "M_1")
    scir = settings(
        objective="scir", learning_rate=3e-4, max_steps=40, **common | {"batch_size": 65}
    )
    before = {name: figures(policy, pool, scir) for name, pool in pools.items()}
    train(policy, [Example(p) for p, _ in pools["unlabeled"]], tmp_path / "scir", scir, "M_1")
    after = {name: figures(policy, pool, scir) for name, pool in pools.items()}

    with capsys.disabled():
        for pool in pools:
            moves = (
                f"{name} {x:.3f} -> {after[pool][name]:.3f}" for name, x in before[pool].items()
            )
            print(
                f"\ntoy, seed {seed}, {len(pools[pool])} {pool} pairs: " + ", ".join(moves), end=""
            )

    for pool, gain in {"unlabeled": 0.1, "held-out": 0.03}.items():
        old, new = before[pool], after[pool]
        assert (
            0.5 <= old["agreement"] <= 0.9 and old["judge"] >= 0.75 and old["implicit"] >= 0.55
        )  # informative, and something to gain
        assert new["agreement"] >= old["agreement"] + gain
        assert new["flips"] <= old["flips"] + 0.01  # one pair of 130
        assert new["judge"] >= old["judge"] - 0.03
        assert new["implicit"] >= old["implicit"] - 0.03
    assert after["unlabeled"]["flips"] < before["unlabeled"]["flips"]
    assert (
        after["unlabeled"]["implicit"] >= before["unlabeled"]["implicit"] + 0.03
    )  # what the judge knows has moved over
