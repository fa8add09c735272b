"""The auxiliary loss of a router: its value, its gradient, and that training adds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_fp32, train
from safetensors.torch import load_file
from toy import make_model
from transformers import AutoModelForCausalLM

from scir_cli.engine import batches, trees
from scir_cli.engine.policy import Policy

COEFFICIENT = 0.5


def router_grads(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if ".router." in name}
    assert found
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    return make_model(
        tmp_path / "model",
        "gpt_oss",
        output_router_logits=True,
        router_aux_loss_coef=COEFFICIENT,
    )


def logps(policy: Policy, in_trees: bool, *rows: list[int]) -> torch.Tensor:
    """Of all tokens but the first three of each row."""
    branches = [trees.continuation(row[:3], row[3:]) for row in rows]
    if in_trees:
        return policy.branch_logps(branches)
    with policy.plain_attention_mode():
        return policy.batched_logps(branches, "padded")


@pytest.mark.parametrize("in_trees", [True, False])
def test_its_gradient_is_that_of_the_models_own_loss(mixture: Path, in_trees: bool):
    policy = load_fp32(mixture)
    assert policy.takes_trees
    balance = policy.router_loss
    assert balance is not None
    balance.weight = 0.25
    ids = list(range(5, 25))
    (0 * logps(policy, in_trees, ids).sum()).backward()
    plain = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    loss = plain(torch.tensor([ids[:-1]]), output_router_logits=True).aux_loss
    (0.25 * COEFFICIENT * loss).backward()
    assert balance.take() == pytest.approx(0.25 * float(loss.detach()), rel=1e-5)
    expected = router_grads(plain)
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-4
    for name, grad in router_grads(policy.model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7)


def test_padding_is_no_token_of_a_router(mixture: Path):
    policy = load_fp32(mixture)
    balance = policy.router_loss
    assert balance is not None
    balance.weight = 1.0
    rows = [list(range(5, 25)), list(range(30, 48))]
    branches = [trees.continuation(row[:3], row[3:]) for row in rows]
    (batch,) = batches.build(branches, "padded", None)
    assert batch.lengths.tolist() == [19, 17]
    with policy.plain_attention_mode():
        policy.scorer(torch.from_numpy(batch.ids), targets=batch)
    plain = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    ids = torch.tensor([list(range(5, 24)), [*range(30, 47), 0, 0]])
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    loss = plain(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert balance.take() == pytest.approx(float(loss.detach()), rel=1e-5)


def test_batches_share_the_loss_by_their_tokens(mixture: Path):
    policy = load_fp32(mixture)
    balance = policy.router_loss
    assert balance is not None
    balance.weight = 1.0
    rows = [list(range(5, 25)), list(range(30, 36))]
    logps(policy, False, *rows)
    together = balance.take()
    plain = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    # Rows of so different lengths are two batches, each with its share of the 24 tokens.
    expected = 0.0
    for row in rows:
        loss = plain(torch.tensor([row[:-1]]), output_router_logits=True).aux_loss
        expected += len(row[:-1]) / 24 * float(loss.detach())
    assert together == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "scir"])
def test_training_adds_it_where_the_config_asks_for_it(world: Path, tmp_path: Path, objective: str):
    base = make_model(tmp_path / "base", "gpt_oss", seed=1)
    routers = []
    for wanted in (True, False):
        model = make_model(
            tmp_path / f"model {wanted}",
            "gpt_oss",
            output_router_logits=wanted,
            router_aux_loss_coef=COEFFICIENT,
            seed=3,
        )
        for name, tokens in (("one", 100_000), ("many", 200)):
            out = tmp_path / f"{name} {wanted}"
            train(
                world,
                out,
                model=str(model),
                objective=objective,
                batch_size=6,
                max_steps=1,
                reward_reference=str(base),
                input=str(world / "gold.jsonl"),
                max_tokens_per_pack=tokens,
            )
            records = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
            (step,) = [record for record in records if record["kind"] == "train"]
            assert ("router_loss" in step) == wanted
            # 2 experts per token: 2 if all four are used alike, 4 if only two are
            if wanted:
                assert 1.8 < step["router_loss"] <= 4
        weights = load_file(out / "model.safetensors")
        routers.append({name: w for name, w in weights.items() if ".router." in name})
    assert routers[0].keys() == routers[1].keys() != set()
    assert any(not w.equal(routers[1][name]) for name, w in routers[0].items())
