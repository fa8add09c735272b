"""The LM head: hidden states -> log-probabilities of their targets.

Only rows with targets are multiplied by the vocabulary, in chunks.

    logp[row, token] = z[token] - logsumexp(z),   z = cap * tanh(scale * (W h + b) / cap)
    d logp / d z     = onehot(token) - P,          P = softmax(z)

If P of all rows fits into KEEP_BYTES, it is kept for the backward pass, in the weights' precision;
if not, the backward pass computes the chunks again. In both cases memory is bounded by a constant,
not by tokens * vocabulary.
The logit of each target is computed in fp32, so verdict margins of 0.2 nats survive bf16.
A head that is not a plain linear layer (one with adapters) goes through torch's autograd, chunk by
chunk, with recomputation.

Shapes: rows are the distinct hidden states with targets, pairs the distinct (row, token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from scir_cli.engine.batches import Batch
from scir_cli.engine.trees import Forest

#: Logits in memory at once: 64 MiB in fp32 on a CPU, 256 MiB on a GPU (docs/performance.md).
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}

#: Bytes of probabilities kept for the backward pass: 256 MiB on a CPU, 1 GiB on a GPU.
KEEP_BYTES = {"cpu": 2**28, "cuda": 2**30}

#: Bounds of a chunk: (first row, end row, first pair, end pair).
Bounds = tuple[int, int, int, int]


@dataclass(frozen=True)
class LogitTransform:
    """How a model changes its logits after the head: first scaled, then soft-capped.

    scale: of Cohere, Granite and Falcon-H1. cap: of Gemma, RecurrentGemma and xLSTM.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """The transform that a model's text config describes."""
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        if not scale:
            scale = 1 / (getattr(config, "logits_scaling", None) or 1)
        names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        caps = [getattr(config, name, None) for name in names]
        return cls(scale, next((cap for cap in caps if cap), None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap is None:
            return logits
        return self.cap * torch.tanh(logits / self.cap)

    def slope(self, z: Tensor) -> float | Tensor:
        """dz / d(W h + b) at the transformed logits z, of their shape, or a number if constant."""
        if self.cap is None:
            return self.scale
        return self.scale * (1 - (z / self.cap).square())


def target_logps(
    hidden: Tensor, head: Any, transform: LogitTransform, targets: Forest | Batch
) -> Tensor:
    """Log-probability of each target, in nats.

    hidden: (tokens, width) -> (targets,) fp32
    """
    # Answers that start alike have targets in common: each (row, token) is computed once.
    # np.unique sorts the pairs by row.
    all_pairs = np.stack([targets.target_hidden, targets.target_token], axis=1)
    pairs, pair_of_target = np.unique(all_pairs, axis=0, return_inverse=True)
    rows, row_of_pair = np.unique(pairs[:, 0], return_inverse=True)

    index = torch.from_numpy(rows).to(hidden.device)
    row = torch.from_numpy(row_of_pair).to(hidden.device)
    token = torch.from_numpy(pairs[:, 1]).to(hidden.device)
    h = hidden.index_select(0, index)  # (rows, width)

    chunk_elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    rows_per_chunk = max(16, chunk_elements // head.weight.shape[0])
    bounds = _chunks(row_of_pair, len(rows), rows_per_chunk)
    if type(head) is nn.Linear:
        logps = _TargetLogps.apply(h, head.weight, head.bias, row, token, transform, bounds)
    else:
        logps = _logps_by_autograd(h, head, row, token, transform, bounds)
    return logps[torch.from_numpy(pair_of_target.reshape(-1)).to(hidden.device)]


def _chunks(row_of_pair: np.ndarray, n_rows: int, size: int) -> list[Bounds]:
    """The bounds of each chunk of at most `size` rows.  row_of_pair: (pairs,), ascending"""
    bounds = []
    for low in range(0, n_rows, size):
        first, last = np.searchsorted(row_of_pair, [low, low + size])
        bounds.append((low, min(low + size, n_rows), int(first), int(last)))
    return bounds


def _logps_by_autograd(
    h: Tensor,
    head: Any,
    row: Tensor,
    token: Tensor,
    transform: LogitTransform,
    bounds: list[Bounds],
) -> Tensor:
    """Log-probabilities under any head, chunk by chunk; backward computes them again.

    h: (rows, width); row, token: (pairs,) -> (pairs,) fp32
    """
    parts = [h.new_zeros(0, dtype=torch.float32)]
    for low, high, first, last in bounds:
        inputs = (h[low:high], head, row[first:last] - low, token[first:last], transform)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_plain_logps, *inputs, use_reentrant=False))
        else:
            parts.append(_plain_logps(*inputs))
    return torch.cat(parts)


def _plain_logps(
    h: Tensor, head: Any, row: Tensor, token: Tensor, transform: LogitTransform
) -> Tensor:
    """h: (rows, width); row, token: (pairs,) -> (pairs,) fp32"""
    logits = transform(head(h).float())  # (rows, vocab)
    return logits[row, token] - logits.logsumexp(-1)[row]


class _TargetLogps(torch.autograd.Function):
    """Log-probabilities of distinct (row, token) pairs under a linear head."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: Tensor,
        token: Tensor,
        transform: LogitTransform,
        bounds: list[Bounds],
    ) -> Tensor:
        """h: (rows, width); weight: (vocab, width); row, token: (pairs,) -> (pairs,) fp32"""
        out = h.new_empty(len(row), dtype=torch.float32)
        probabilities = None  # (rows, vocab)
        if any(ctx.needs_input_grad[:3]) and _probabilities_suffice(h, weight, transform):
            probabilities = weight.new_empty(len(h), len(weight))

        # If log_softmax is in place, and fp32 logits need no transform, logits turn into
        # probabilities in the buffer in which these are kept.
        direct_buffer = None
        if _is_in_place(h) and weight.dtype == torch.float32 and transform.scale == 1:
            direct_buffer = probabilities

        for low, high, first, last in bounds:
            at = row[first:last] - low, token[first:last]
            block = None if direct_buffer is None else direct_buffer[low:high]
            z = transform(logits_of_rows(h[low:high], weight, bias, *at, out=block))
            logps = _log_softmax(z)  # (rows, vocab) fp32
            out[first:last] = logps[at]
            if probabilities is not None:
                # The targets' entries are zero: backward adds the exact values.
                p = logps.exp_().index_put_(at, logps.new_zeros(()))
                if direct_buffer is None:
                    probabilities[low:high] = p

        ctx.save_for_backward(h, weight, bias, row, token, out, probabilities)
        ctx.transform = transform
        ctx.bounds = bounds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> Any:
        """grad_logps: (pairs,) d loss / d logp

        d loss / d z = onehot * grad_logps - P * (sum of grad_logps over the row)
        """
        h, weight, bias, row, token, out, probabilities = ctx.saved_tensors
        row_sum = grad_logps.new_zeros(len(h)).index_add_(0, row, grad_logps)  # (rows,)
        grad_target = grad_logps - row_sum[row] * out.exp()  # (pairs,) d loss / d z, fp32
        transform: LogitTransform = ctx.transform
        grads = _Gradients(h, weight, bias, ctx.needs_input_grad)

        if probabilities is not None:
            scale = transform.scale
            factor = row_sum * -scale
            grads.add(slice(None), probabilities, factor, row, token, grad_target * scale)
            return *grads.result(), None, None, None, None

        for low, high, first, last in ctx.bounds:
            at = row[first:last] - low, token[first:last]
            z = transform(logits_of_rows(h[low:high], weight, bias, *at))
            dz_dlogits = transform.slope(z)
            at_targets = dz_dlogits[at] if isinstance(dz_dlogits, Tensor) else dz_dlogits
            chunk_grad = grad_target[first:last] * at_targets
            p = (_log_softmax(z).exp_() * dz_dlogits).index_put_(at, z.new_zeros(()))
            factor = -row_sum[low:high]
            grads.add(slice(low, high), p.to(weight.dtype), factor, *at, chunk_grad)
        return *grads.result(), None, None, None, None


def _probabilities_suffice(h: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
    """Whether backward can do with the probabilities, and they fit into KEEP_BYTES.

    Soft-capped logits are needed themselves.  h: (rows, width); weight: (vocab, width)
    """
    if transform.cap is not None:
        return False
    keep_bytes = KEEP_BYTES.get(h.device.type, KEEP_BYTES["cpu"])
    return len(h) * len(weight) * weight.element_size() <= keep_bytes


class _Gradients:
    """Sums the gradients of h, weight and bias over chunks, the latter two in fp32.

    h: (rows, width); weight: (vocab, width); bias: (vocab,)
    needed: whether each of the three needs a gradient
    """

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, needed: Any) -> None:
        self.h = h
        self.weight = weight
        self.dh = torch.empty_like(h) if needed[0] else None
        self.dw: Tensor | None = None
        self.db: Tensor | None = None
        self.needs_dw = needed[1]
        self.needs_db = needed[2] and bias is not None

    def add(
        self,
        rows: slice,
        p: Tensor,
        factor: Tensor,
        row: Tensor,
        token: Tensor,
        grad_target: Tensor,
    ) -> None:
        """Adds the part of some rows, with d loss / d logits = factor * p + onehot * grad_target.

        p: (rows, vocab) without the targets; factor: (rows,)
        row, token, grad_target: (pairs,)
        """
        h = self.h[rows]
        if self.dh is not None:
            dh = (p @ self.weight).float() * factor[:, None]
            of_targets = self.weight[token].float() * grad_target[:, None]
            self.dh[rows] = dh.index_add_(0, row, of_targets)
        if self.needs_dw:
            dw = (p.T @ (h.float() * factor[:, None]).to(h.dtype)).float()
            self.dw = dw if self.dw is None else self.dw.add_(dw)
            self.dw.index_add_(0, token, h[row].float() * grad_target[:, None])
        if self.needs_db:
            db = p.T.float() @ factor
            self.db = db if self.db is None else self.db.add_(db)
            self.db.index_add_(0, token, grad_target)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of h, weight and bias, of their shapes; None for one that is not needed."""
        dtype = self.weight.dtype
        dw = None if self.dw is None else self.dw.to(dtype)
        db = None if self.db is None else self.db.to(dtype)
        return self.dh, dw, db


def logits_of_rows(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor,
    token: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The logits of some rows, those of the targets in full fp32 precision.

    The others are as precise as the weights. out: a buffer for the product, of the weights' type.
    h: (rows, width); weight: (vocab, width); row, token: (pairs,) -> (rows, vocab) fp32
    """
    logits = torch.mm(h, weight.T, out=out).float()
    if bias is not None:
        logits += bias.float()
    if weight.dtype != torch.float32:
        exact = (h[row].float() * weight[token].float()).sum(-1)
        if bias is not None:
            exact = exact + bias[token].float()
        logits.index_put_((row, token), exact)
    return logits


def _log_softmax(z: Tensor) -> Tensor:
    """log_softmax over the last axis, of z's shape; in place if _is_in_place(z)."""
    if _is_in_place(z):
        return torch.log_softmax(z, -1, out=z)
    return torch.log_softmax(z, -1)


def _is_in_place(z: Tensor) -> bool:
    """Whether _log_softmax overwrites z.

    It does on a CPU, where a new buffer costs more than the arithmetic.
    """
    return z.device.type == "cpu"
