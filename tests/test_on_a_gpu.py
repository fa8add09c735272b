"""What only a GPU can show: every attention, the head, the losses and whole stages in bf16."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_fp32, run
from plain_scorer import plain_logps, plain_model, questions
from torch import Tensor, nn
from toy import make_model

from scir_cli.data import dataset
from scir_cli.engine import lm_head, tree_attention, trees
from scir_cli.engine.lm_head import LogitTransform
from scir_cli.training import losses
from scir_cli.training.optimizer import MasterAdamW

pytestmark = pytest.mark.gpu

KINDS = [tree_attention.VARLEN, tree_attention.FLEX, tree_attention.SDPA]
WIDE = {"hidden_size": 128, "head_dim": 32}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    got, want = (x.detach().double().cpu() for x in (got, want))
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_each_attention_in_bf16_is_as_near_to_fp32_as_the_model_itself(
    arch: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Flash attention cannot cap scores, so a soft-capped model refuses it."""
    monkeypatch.setattr(tree_attention, "candidates", lambda device, dtype: [kind])
    folder, asked = make_model(tmp_path / "model", arch, **WIDE), questions()
    packed = load_fp32(folder, dtype="bf16", device="cuda")
    if arch == "gemma2" and kind == tree_attention.VARLEN:
        assert packed.tree_attention is None
        return
    assert packed.tree_attention == kind
    with torch.no_grad():
        exact = plain_logps(plain_model(folder), asked)
        half = plain_logps(plain_model(folder, torch.bfloat16).to("cuda"), asked)
        ours = packed.branch_logps(asked.branches)
    assert relative_error(ours, exact) < 1.5 * relative_error(half, exact)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_in_fp32_trees_score_like_one_sequence_at_a_time(arch: str, tmp_path: Path):
    folder, asked = make_model(tmp_path / "model", arch, **WIDE), questions()
    packed = load_fp32(folder, device="cuda")
    assert packed.tree_attention == tree_attention.SDPA
    with torch.no_grad():
        want = plain_logps(plain_model(folder), asked)
        assert relative_error(packed.branch_logps(asked.branches), want) < 1e-4


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_the_head_in_bf16_is_near_to_plain_autograd_in_fp64(
    cap: float | None, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of 16 rows, with probabilities kept and computed again, soft-capped and not."""
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", {"cuda": 1, "cpu": 1})
    monkeypatch.setattr(lm_head, "KEEP_BYTES", {"cuda": keep_bytes, "cpu": keep_bytes})
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    answers = torch.randint(1000, (50,)).tolist()
    forest = trees.build([trees.continuation([1], answers)])
    transform = LogitTransform(cap=cap)
    rows = torch.from_numpy(forest.target_hidden).cuda()
    got = lm_head.target_logps(hidden, head, transform, forest)
    slope = torch.linspace(-1, 1, len(got), device="cuda")
    gradients = torch.autograd.grad((got * slope).sum(), [hidden, head.weight])
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight)]
    logps = transform(exact[0][rows] @ exact[1].T).log_softmax(-1)
    want = logps[torch.arange(len(rows)), torch.tensor(answers)]
    expected = torch.autograd.grad((want * slope.double()).sum(), exact)
    assert relative_error(got, want) < 2e-3
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-2


def test_the_dpo_loss_on_the_device_equals_the_one_on_the_cpu():
    ratios = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([1.0, -1.0] * 4)
    want = losses.dpo(ratios, label, beta=0.1)
    got = losses.dpo(ratios.cuda(), label.cuda(), beta=0.1)
    torch.testing.assert_close(got.cpu(), want)


def test_a_step_in_bf16_moves_the_weights_as_a_step_in_fp32_does(tmp_path: Path):
    """One step of AdamW from the same weights; the gradient is as exact as a bf16 model's own."""
    folder, asked = make_model(tmp_path / "model", "llama", **WIDE), questions()
    moves: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for dtype in ("fp32", "bf16"):
        policy = load_fp32(folder, dtype=dtype, device="cuda")
        params = list(policy.model.parameters())
        optimizer = MasterAdamW(params, lr=1e-3, weight_decay=0.0)
        before = flat(p.detach() for p in optimizer.master)
        policy.branch_logps(asked.branches).mean().backward()
        found[dtype] = flat(p.grad for p in params)
        assert optimizer.update(1e9) == pytest.approx(float(found[dtype].norm()), rel=1e-2)
        moves[dtype] = flat(p.detach() for p in optimizer.master) - before
    plain = plain_model(folder, torch.bfloat16).to("cuda")
    plain_logps(plain, asked).mean().backward()
    own = flat(p.grad for p in plain.parameters())
    error, bound = (relative_error(x, found["fp32"]) for x in (found["bf16"], own))
    assert error < 1.5 * bound
    # AdamW's first step is the sign of the gradient, wherever the gradient is exact enough.
    large = found["fp32"].abs() > 2 * found["fp32"].square().mean().sqrt()
    assert float((moves["bf16"].sign() == moves["fp32"].sign())[large].float().mean()) > 0.95


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.float().flatten() for x in tensors])


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chain on the GPU: candidates sampled, pairs judged, preferences filtered."""
    root = tmp_path_factory.mktemp("chain")
    device: dict[str, Any] = {"device": "cuda", "dtype": "bf16"}
    base, policy = (
        make_model(root / name, seed=i, **WIDE) for i, name in enumerate(("base", "policy"))
    )
    prompts = root / "prompts.jsonl"
    words = ["cat", "dog", "sun", "sea"]
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me of {w}."}) + "\n" for w in words))
    run(
        "generate",
        model=str(policy),
        input=str(prompts),
        n=3,
        max_new_tokens=6,
        output_dir=root / "candidates",
        **device,
    )
    run(
        "judge",
        model=str(policy),
        reward_reference=str(base),
        input=str(root / "candidates"),
        reward_models=["judge", "implicit"],
        output_dir=root / "judged",
        **device,
    )
    run(
        "filter",
        input=str(root / "judged"),
        output_dir=root / "preferences",
        keep_unlabeled=True,
        agree_on=["judge", "implicit"],
    )
    return {"root": root, "base": base, "policy": policy}


def test_judge_on_a_gpu_scores_every_pair(judged: dict[str, Path]):
    table = dataset.read_dataset(judged["root"] / "judged")
    assert table.num_rows > 0
    rewards = table["rewards"].to_pylist()
    assert all(len(row) == 2 for row in rewards)


@pytest.mark.parametrize("objective", ["scir", "dpo"])
def test_train_on_a_gpu_takes_its_steps_and_writes_a_model(objective: str, judged: dict[str, Path]):
    root = judged["root"]
    out = root / objective
    run(
        "train",
        model=str(judged["policy"]),
        reward_reference=str(judged["base"]),
        input=str(root / "preferences"),
        output_dir=out,
        objective=objective,
        batch_size=4,
        max_steps=2,
        num_epochs=2,
        learning_rate=1e-4,
        device="cuda",
        dtype="bf16",
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert len(steps) == 2
    assert (out / "model.safetensors").exists()
