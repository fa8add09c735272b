"""Attention on token trees, through transformers' attention interface.

No model is patched, and nothing depends on a model's name.
A segment's queries see the keys of its ancestors and their own, causally, aligned at the end.
This is variable-length attention with gathered keys, implemented three times.
When a model is loaded (loading.py), the first one that works is selected, in this order:

    scir_tree_varlen   one flash-attention call for all segments (torch.nn.attention.varlen;
                       CUDA, half precision, no soft-capping, no sinks)
    scir_tree_flex     one FlexAttention kernel whose block mask is the inequality of trees.py
                       (CUDA; with soft-capping, sinks and any head size)
    scir_tree          one SDPA call per segment; plain torch for soft-capping and sinks
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
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

SDPA = "scir_tree"
VARLEN = "scir_tree_varlen"
FLEX = "scir_tree_flex"


class VarlenIndex(NamedTuple):
    """Segments as variable-length sequences, and the keys that each of them sees."""

    keys: Tensor  # (keys,) flat indices, segment by segment, each in the order of its path
    query_starts: Tensor  # (segments + 1,) int32
    key_starts: Tensor  # (segments + 1,) int32
    longest_query: int
    longest_key: int


@dataclass
class TreeLayout:
    """A forest in the form that attention needs.

    Masks and indices are computed once per forest and used by every layer.
    """

    sizes: list[int]  # tokens of each segment
    ancestors: list[tuple[int, ...]]
    positions: Tensor  # (tokens,)
    subtree_end: Tensor  # (tokens,)
    masks: dict[int | None, list[Tensor | None]] = field(default_factory=dict)
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    #: The windows with which the model's layers have called attention.
    windows: set[int | None] = field(default_factory=set)
    #: Calls of attention by the model's layers.
    n_calls: int = 0

    @classmethod
    def of(cls, forest: Forest, device: torch.device) -> TreeLayout:
        """The layout of a forest, with its tensors on the device."""
        return cls(
            sizes=[s.end - s.start for s in forest.segments],
            ancestors=[s.ancestors for s in forest.segments],
            positions=to_device(forest.positions, device),
            subtree_end=to_device(forest.subtree_end, device),
        )

    def mask(self, window: int | None) -> list[Tensor | None]:
        """Per segment, which of its keys (ancestors, then itself) each query may see.

        Each mask is (queries, keys) bool; None stands for the plain causal mask.
        """
        if window in self.masks:
            return self.masks[window]

        runs = self.positions.split(self.sizes)
        masks: list[Tensor | None] = []
        for above, query_positions in zip(self.ancestors, runs, strict=True):
            if not above and (window is None or len(query_positions) <= window):
                masks.append(None)
                continue
            # Along one path, k <= q < subtree_end[k] is position[k] <= position[q].
            key_positions = torch.cat([*(runs[a] for a in above), query_positions])
            distance = query_positions[:, None] - key_positions[None, :]
            mask = distance >= 0
            if window is not None:
                mask = mask & (distance < window)
            masks.append(mask)
        self.masks[window] = masks
        return masks

    def block_mask(self, window: int | None) -> BlockMask:
        """The inequality of trees.py, with the window, as FlexAttention's mask over the forest."""
        if window in self.block_masks:
            return self.block_masks[window]

        subtree_end = self.subtree_end
        position = self.positions

        def is_visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            on_path = (k <= q) & (q < subtree_end[k])
            if window is None:
                return on_path
            return on_path & (position[q] - position[k] < window)

        n = len(position)
        block_mask = create_block_mask(is_visible, None, None, n, n, device=position.device)
        self.block_masks[window] = block_mask
        return block_mask

    @cached_property
    def gather(self) -> VarlenIndex:
        """The flat indices of each segment's keys: first those of its ancestors."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        runs = [np.arange(low, high) for low, high in itertools.pairwise(starts)]
        keys = []
        for above, run in zip(self.ancestors, runs, strict=True):
            keys.append(np.concatenate([*(runs[a] for a in above), run]))

        lengths = [len(k) for k in keys]
        key_starts = np.concatenate([[0], np.cumsum(lengths)])
        device = self.positions.device
        return VarlenIndex(
            keys=to_device(np.concatenate(keys), device),
            query_starts=to_device(starts.astype(np.int32), device),
            key_starts=to_device(key_starts.astype(np.int32), device),
            longest_query=max(self.sizes),
            longest_key=max(lengths),
        )


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers as a tensor on the device, copied without waiting for the device."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AttentionOptions(NamedTuple):
    """How a layer computes attention; None stands for the default of the attention interface."""

    scaling: float | None  # of the scores; by default 1 / sqrt(head size)
    window: int | None  # positions that a query sees, itself included; by default all
    softcap: float | None  # the scores become softcap * tanh(scores / softcap); by default not
    sinks: Tensor | None = None  # (heads,), a score without a value, part of the normalizer


#: query (1, heads, tokens, head size), key and value (1, key heads, tokens, head size), layout and
#: options -> (1, tokens, heads, head size)
TreeAttention = Callable[[Tensor, Tensor, Tensor, TreeLayout, AttentionOptions], Tensor]


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    options: AttentionOptions,
) -> Tensor:
    """Attention on a forest, one SDPA call per segment. Shapes as in TreeAttention."""
    queries = query.split(layout.sizes, dim=2)
    keys = key.split(layout.sizes, dim=2)
    values = value.split(layout.sizes, dim=2)
    masks = layout.mask(options.window)
    out = []
    for segment, (above, mask) in enumerate(zip(layout.ancestors, masks, strict=True)):
        k = keys[segment]
        v = values[segment]
        if above:
            k = torch.cat([*(keys[a] for a in above), k], dim=2)
            v = torch.cat([*(values[a] for a in above), v], dim=2)
        out.append(_attend(queries[segment], k, v, mask, options))
    return torch.cat(out, dim=2).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attention of one segment's queries to its keys.

    q: (1, heads, queries, head size); k, v: (1, key heads, keys, head size);
    mask: (queries, keys) bool, None for causal -> (1, heads, queries, head size)
    """
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    # Gemma 2's soft-capping and gpt-oss's sinks, which SDPA does not support.
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (options.scaling or q.shape[-1] ** -0.5)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.float().masked_fill(~mask, -math.inf)
    out = scores.softmax(-1).to(v.dtype) @ v
    if options.sinks is None:
        return out
    return with_sinks(out, scores.logsumexp(-1), options.sinks)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention with a sink per head, from attention without.

    A sink takes the share exp(sink) / (exp(sink) + exp(lse)) of the weights and has no value.
    out: (1, heads, queries, head size); lse: (1, heads, queries), the log of the sum of the
    exponentiated scores; sinks: (heads,) -> as out
    """
    share = torch.sigmoid(lse.float() - sinks.float()[None, :, None])
    return out * share[..., None].to(out.dtype)


def varlen_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    options: AttentionOptions,
) -> Tensor:
    """Attention on a forest in one flash-attention call. Shapes as in TreeAttention.

    Each segment is a sequence whose keys are gathered, causal from the end of its path.
    Raises ValueError for soft-capping and sinks.
    """
    from torch.nn.attention.varlen import varlen_attn

    if options.softcap is not None:
        raise ValueError("flash attention does not support soft-capping")
    if options.sinks is not None:
        # varlen_attn returns a log-sum-exp, but without a gradient (torch 2.13).
        raise ValueError("flash attention does not support sinks")
    index = layout.gather
    q = query[0].transpose(0, 1)  # (tokens, heads, head size)
    k = key[0].transpose(0, 1).index_select(0, index.keys)  # (keys, key heads, head size)
    v = value[0].transpose(0, 1).index_select(0, index.keys)

    # Flash attention counts the keys before a query, without the query itself; -1 is no limit.
    keys_before = -1 if options.window is None else options.window - 1
    keywords: dict[str, Any] = {"scale": options.scaling, "window_size": (keys_before, 0)}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            keywords["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
    out: Any = varlen_attn(
        q,
        k,
        v,
        index.query_starts,
        index.key_starts,
        index.longest_query,
        index.longest_key,
        **keywords,
    )
    return out[None]


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    options: AttentionOptions,
) -> Tensor:
    """Attention on a forest as one FlexAttention kernel. Shapes as in TreeAttention.

    Blocks of keys that no query of a block may see are skipped.
    """
    # A tensor, because a compiled kernel with dynamic shapes refuses a float (torch 2.11).
    softcap = torch.tensor(options.softcap or 0.0, device=query.device)

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    # On a CPU, for tests, FlexAttention has only a forward pass, and needs no compilation.
    attend = _compiled_flex() if query.is_cuda else flex_attention
    aux = {} if options.sinks is None else {"return_aux": _log_sum_exp()}
    result: Any = attend(
        query,
        key,
        value,
        score_mod=cap if options.softcap else None,
        block_mask=layout.block_mask(options.window),
        scale=options.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **aux,
    )
    if options.sinks is None:
        return result.transpose(1, 2)
    out, other = result
    return with_sinks(out, other.lse, options.sinks).transpose(1, 2)


def _log_sum_exp() -> Any:
    """The request for FlexAttention's log-sum-exp.

    Raises ImportError if torch is too old to return one with a gradient.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def register() -> None:
    """Registers the three implementations with transformers, without attention masks.

    Each builds its mask from the layout, so transformers builds none.
    """
    implementations: dict[str, TreeAttention] = {
        SDPA: tree_attention,
        VARLEN: varlen_tree_attention,
        FLEX: flex_tree_attention,
    }
    for name, attend in implementations.items():
        AttentionInterface.register(name, _for_transformers(attend))
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


#: Keywords of transformers' models that change nothing here, whatever their value:
#: dropout: a policy is scored without dropout, in training too; deterministic: of its backward.
#: position_ids: packed sequences are recognized by them; the layout has its own positions.
#: use_cache, output_attentions, output_hidden_states, output_router_logits, return_dict,
#: cache_position, num_items_in_batch: what else a model returns or keeps.
HARMLESS = frozenset(
    {
        "dropout",
        "deterministic",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "cache_position",
        "num_items_in_batch",
    }
)


class UnsupportedAttentionError(ValueError):
    """A model's attention computes something that trees do not reproduce."""


def _check_keywords(keywords: dict[str, Any]) -> None:
    """Raises UnsupportedAttentionError for a keyword that might change the result.

    An unknown keyword would be ignored, so each of them has to be None.
    """
    for name, value in keywords.items():
        if value is None or name in HARMLESS or (name == "is_causal" and value is True):
            continue
        raise UnsupportedAttentionError(f"its attention uses {name}, which is not supported")


def _for_transformers(attend: TreeAttention) -> Callable[..., tuple[Tensor, None]]:
    """The implementation with the signature that transformers' attention interface requires.

    torch.compile leaves both functions as they are.
    """
    attend = torch.compiler.disable(attend, recursive=False)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        plan: TreeLayout | None = None,
        s_aux: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Shapes as in TreeAttention. s_aux: sinks.

        plan: from the keywords of the model's forward pass.
        Raises UnsupportedAttentionError for a keyword that is not known and not None.
        """
        if plan is None:
            raise UnsupportedAttentionError("it does not pass keywords on to attention")
        _check_keywords({"attention_mask": attention_mask, **keywords})
        plan.windows.add(sliding_window)
        plan.n_calls += 1
        options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
        return attend(query, key, value, plan, options), None

    return torch.compiler.disable(attention, recursive=False)


def candidates(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the implementations to try, fastest first."""
    half = dtype in (torch.bfloat16, torch.float16)
    return [VARLEN, FLEX, SDPA] if device.type == "cuda" and half else [SDPA]
