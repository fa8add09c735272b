"""Attention on token trees, through transformers' attention interface: no model is patched and no model name is looked at.

A segment's queries see the keys of its ancestors and their own, causally, aligned at the end: variable-length attention with gathered keys.
Three implementations of that one sentence, tried in this order when a model is loaded (policy.py), by capability:

    scir_tree_varlen   one flash-attention call for all segments (torch.nn.attention.varlen; CUDA, half precision, no soft-capping)
    scir_tree_flex     one FlexAttention kernel whose block mask is the inequality of trees.py itself (CUDA: soft-capping, odd head sizes)
    scir_tree          one SDPA call a segment; soft-capping by hand, which SDPA cannot do
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from scir_cli.engine.trees import Forest

SDPA, VARLEN, FLEX = "scir_tree", "scir_tree_varlen", "scir_tree_flex"


class VarlenIndex(NamedTuple):
    """Segments as variable-length sequences: which keys each sees, one after the other."""

    keys: Tensor  # (keys,) flat indices, segment by segment, each in the order of its path
    query_starts: Tensor  # (segments + 1,) int32
    key_starts: Tensor  # (segments + 1,) int32
    longest_query: int
    longest_key: int


@dataclass
class TreeLayout:
    """A forest as attention sees it. Masks and indices are made once a forest, and serve every layer."""

    sizes: list[int]  # tokens of each segment
    ancestors: list[tuple[int, ...]]
    positions: Tensor  # (tokens,)
    subtree_end: Tensor  # (tokens,)
    masks: dict[int | None, list[Tensor | None]] = field(default_factory=dict)
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    windows: set[int | None] = field(default_factory=set)  # those attention was told of

    @classmethod
    def of(cls, forest: Forest, device: torch.device) -> TreeLayout:
        sizes = [s.end - s.start for s in forest.segments]
        positions, end = (to_device(x, device) for x in (forest.positions, forest.subtree_end))
        return cls(sizes, [s.ancestors for s in forest.segments], positions, end)

    def mask(self, window: int | None) -> list[Tensor | None]:
        """Per segment, which of its keys (ancestors, then itself) each query may see; None: plain causal.  # (queries, keys) bool"""
        if window not in self.masks:
            runs = self.positions.split(self.sizes)
            masks: list[Tensor | None] = []
            for up, own in zip(self.ancestors, runs, strict=True):
                if not up and (window is None or len(own) <= window):
                    masks.append(None)
                    continue
                # along one path, k <= q < subtree_end[k] is position[k] <= position[q]
                age = own[:, None] - torch.cat([*(runs[a] for a in up), own])[None, :]
                masks.append((age >= 0) if window is None else (age >= 0) & (age < window))
            self.masks[window] = masks
        return self.masks[window]

    def block_mask(self, window: int | None) -> BlockMask:
        """Query q sees key k iff k <= q < subtree_end[k], and no further back than the window: for FlexAttention."""
        if window not in self.block_masks:
            end, position = self.subtree_end, self.positions

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                inside = (k <= q) & (q < end[k])
                return inside if window is None else inside & (position[q] - position[k] < window)

            n = len(position)
            self.block_masks[window] = create_block_mask(
                sees, None, None, n, n, device=position.device
            )
        return self.block_masks[window]

    @cached_property
    def gather(self) -> VarlenIndex:
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        runs = [np.arange(low, high) for low, high in itertools.pairwise(starts)]
        keys = [
            np.concatenate([*(runs[a] for a in up), own])
            for up, own in zip(self.ancestors, runs, strict=True)
        ]
        lengths = [len(k) for k in keys]
        key_starts = np.concatenate([[0], np.cumsum(lengths)])
        flat = (np.concatenate(keys), starts.astype(np.int32), key_starts.astype(np.int32))
        index, query, key = (to_device(x, self.positions.device) for x in flat)
        return VarlenIndex(index, query, key, max(self.sizes), max(lengths))


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers on the device, without waiting for it."""
    tensor = torch.from_numpy(values)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (1, key heads, tokens, head size)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: TreeLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a forest, as transformers' attention interface wants it.  -> (1, tokens, heads, head size)"""
    assert plan is not None, "the model does not hand keywords on to attention"
    plan.windows.add(sliding_window)
    queries, keys, values = (x.split(plan.sizes, dim=2) for x in (query, key, value))
    out = []
    for own, (up, mask) in enumerate(zip(plan.ancestors, plan.mask(sliding_window), strict=True)):
        k = torch.cat([*(keys[a] for a in up), keys[own]], dim=2) if up else keys[own]
        v = torch.cat([*(values[a] for a in up), values[own]], dim=2) if up else values[own]
        out.append(_attend(queries[own], k, v, mask, scaling, softcap))
    return torch.cat(out, dim=2).transpose(1, 2), None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scaling or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)  # Gemma 2's soft-capping, which SDPA cannot do
    mask = (
        torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is None
        else mask
    )
    return scores.float().masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v


def varlen_tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: TreeLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same in one flash-attention call: (tokens, heads, head size) queries against gathered keys, causal from the end of each path."""
    from torch.nn.attention.varlen import varlen_attn

    assert plan is not None, "the model does not hand keywords on to attention"
    if softcap is not None:
        raise ValueError("flash attention cannot cap its scores")
    plan.windows.add(sliding_window)
    g = plan.gather
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = k.index_select(0, g.keys), v.index_select(0, g.keys)
    options: dict[str, Any] = {
        "scale": scaling,
        "window_size": (-1 if sliding_window is None else sliding_window - 1, 0),
    }
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out: Any = varlen_attn(
        q, k, v, g.query_starts, g.key_starts, g.longest_query, g.longest_key, **options
    )
    return out[None], None


def flex_tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: TreeLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same as one FlexAttention kernel over the flat sequence; whole blocks that no query may see are skipped."""
    assert plan is not None, "the model does not hand keywords on to attention"
    plan.windows.add(sliding_window)

    limit = softcap or 0.0

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    attend = (
        _compiled_flex() if query.is_cuda else flex_attention
    )  # on a CPU only its forward pass is there, and only for tests
    out: Any = attend(
        query, key, value, score_mod=cap if softcap else None, block_mask=plan.block_mask(sliding_window), scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2), None


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def register() -> None:
    """Makes all known to transformers; the mask is theirs to make, so transformers makes none. torch.compile leaves them as they are."""
    for name, function in (
        (SDPA, tree_attention),
        (VARLEN, varlen_tree_attention),
        (FLEX, flex_tree_attention),
    ):
        AttentionInterface.register(name, torch.compiler.disable(function, recursive=False))
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Implementations to try, the fastest first."""
    half = dtype in (torch.bfloat16, torch.float16)
    return [VARLEN, FLEX, SDPA] if device.type == "cuda" and half else [SDPA]
