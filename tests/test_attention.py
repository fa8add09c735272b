"""Trees as variable-length attention.

What the CUDA path hands to flash attention is right, shown on a CPU with a plain definition of that
kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from helpers import load_fp32
from plain_scorer import (
    assert_same_gradients,
    assert_same_logps,
    gradients,
    plain_logps,
    plain_model,
    questions,
)
from torch import Tensor
from toy import make_model

from scir_cli.engine import tree_attention


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch's varlen_attn by its documentation.

    Sequences one by one, causal from the end, at most window_size[0] keys back.
    """
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    out = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]  # (queries, heads, size)
        k, v = (
            x[cu_seq_k[i] : cu_seq_k[i + 1]].repeat_interleave(
                query.shape[1] // key.shape[1], dim=1
            )
            for x in (key, value)
        )
        age = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None, :]
        seen = (age >= 0) & ((age <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        out.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        )
    return torch.cat(out)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "gemma3", "gpt2"])
def test_one_variable_length_call_scores_and_differentiates_like_one_sequence_at_a_time(
    arch: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(tree_attention, "candidates", lambda device, dtype: [tree_attention.VARLEN])
    folder, asked = make_model(tmp_path / "model", arch), questions()
    packed, plain = load_fp32(folder), plain_model(folder)
    assert packed.tree_attention == tree_attention.VARLEN
    got, want = packed.branch_logps(asked.branches), plain_logps(plain, asked)
    assert_same_logps(got, want)
    assert_same_gradients(gradients(packed.model, got), gradients(plain, want))


def test_where_flash_attention_cannot_serve_the_next_one_does(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """Soft-capped scores, sinks, and a machine whose kernel refuses (no CUDA here)."""
    monkeypatch.setattr(
        tree_attention,
        "candidates",
        lambda device, dtype: [tree_attention.VARLEN, tree_attention.SDPA],
    )
    for arch in ("llama", "gemma2", "gpt_oss"):
        assert load_fp32(make_model(tmp_path / arch, arch)).tree_attention == tree_attention.SDPA


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_oss"])
def test_one_flex_call_scores_like_one_sequence_at_a_time(
    arch: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """Its block mask is the inequality of trees.py.

    Grouped heads, windows and capped scores with it. Forward only: a CPU refuses the rest.
    """
    monkeypatch.setattr(tree_attention, "candidates", lambda device, dtype: [tree_attention.FLEX])
    folder, asked = make_model(tmp_path / "model", arch), questions()
    packed = load_fp32(folder)
    assert packed.tree_attention == tree_attention.FLEX
    with torch.no_grad():
        assert_same_logps(
            packed.branch_logps(asked.branches), plain_logps(plain_model(folder), asked)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["gemma2", "llama"])
def test_on_a_gpu_flex_scores_and_differentiates_like_one_sequence_at_a_time(
    arch: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tree_attention, "candidates", lambda device, dtype: [tree_attention.FLEX])
    folder, asked = make_model(tmp_path / "model", arch, hidden_size=128, head_dim=32), questions()
    packed, plain = load_fp32(folder, device="cuda"), plain_model(folder).to("cuda")
    assert packed.tree_attention == tree_attention.FLEX
    got, want = packed.branch_logps(asked.branches), plain_logps(plain, asked)
    assert_same_logps(got, want)
    assert_same_gradients(gradients(packed.model, got), gradients(plain, want))


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_on_a_gpu_in_bf16_flash_attention_on_trees_is_as_near_to_fp32_as_the_model_itself(
    arch: str, tmp_path: Any
):
    folder = make_model(tmp_path / "model", arch, hidden_size=128, head_dim=32)
    packed = load_fp32(folder, dtype="bf16", device="cuda")
    assert packed.tree_attention == tree_attention.VARLEN
    exact, half, asked = plain_model(folder), plain_model(folder, torch.bfloat16), questions()
    with torch.no_grad():
        want = plain_logps(exact, asked)
        ours, own = (
            packed.branch_logps(asked.branches).cpu() - want,
            plain_logps(half, asked) - want,
        )
    assert ours.square().mean().sqrt() < 1.5 * own.square().mean().sqrt()
