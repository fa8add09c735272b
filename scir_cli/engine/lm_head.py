"""The head: hidden states -> log-probabilities of their targets. Only rows that have targets meet the vocabulary, in chunks.

    logp[row, token] = z[token] - logsumexp(z),   z = cap * tanh(scale * (W h + b) / cap)
    d logp / d z     = onehot(token) - P,          P = softmax(z)

Where P of all rows fits into KEEP_BYTES it is kept for the backward pass (in the weights' precision); else the chunks are computed again there.
Either way memory grows with a constant and never with tokens * vocabulary. A target's own logit is computed in fp32: verdict margins of 0.2 nat
survive bf16. A head that is not a plain linear layer (adapters on it) takes torch's own autograd, chunk by chunk, with recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from scir_cli.engine.trees import Forest

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in fp32
KEEP_BYTES = 2**28  # probabilities held for the backward pass


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: scale (Cohere, Granite), then soft-capping (Gemma)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        scale = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1
        )
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def target_logps(hidden: Tensor, head: Any, finish: LogitTransform, forest: Forest) -> Tensor:
    """Log-probability of each target, nats.  hidden: (tokens, width) -> (targets,) fp32"""
    asked = np.stack([forest.target_hidden, forest.target_token], axis=1)
    # two answers that start alike ask for the same log-probability once; sorted by row
    pairs, place = np.unique(asked, axis=0, return_inverse=True)
    rows, row_of = np.unique(pairs[:, 0], return_inverse=True)
    index, row, token = (torch.from_numpy(x).to(hidden.device) for x in (rows, row_of, pairs[:, 1]))
    bounds = _chunks(row_of, len(rows), max(16, CHUNK_ELEMENTS // head.weight.shape[0]))
    h = hidden.index_select(0, index)  # (rows, width)
    if type(head) is nn.Linear:
        logps = _TargetLogps.apply(h, head.weight, head.bias, row, token, finish, bounds)
    else:
        inputs = [(h[a:b], head, row[c:d] - a, token[c:d], finish) for a, b, c, d in bounds]
        parts = [
            checkpoint(_plain, *i, use_reentrant=False) if torch.is_grad_enabled() else _plain(*i)
            for i in inputs
        ]
        logps = torch.cat([h.new_zeros(0, dtype=torch.float32), *parts])
    return logps[torch.from_numpy(place.reshape(-1)).to(hidden.device)]


def _chunks(row_of: np.ndarray, n_rows: int, size: int) -> list[tuple[int, int, int, int]]:
    """(first row, end row, first pair, end pair) of each chunk of at most `size` rows."""
    bounds = []
    for low in range(0, n_rows, size):
        first, last = np.searchsorted(row_of, [low, low + size])
        bounds.append((low, min(low + size, n_rows), int(first), int(last)))
    return bounds


def _plain(h: Tensor, head: Any, row: Tensor, token: Tensor, finish: LogitTransform) -> Tensor:
    logits = finish(head(h).float())  # (rows, vocab)
    return logits[row, token] - logits.logsumexp(-1)[row]


class _TargetLogps(torch.autograd.Function):
    """Log-probabilities of distinct (row, token) pairs.  h: (rows, width); weight: (vocab, width); row, token: (pairs,) -> (pairs,)"""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor, token: Tensor, finish: LogitTransform, bounds: Any) -> Tensor:  # fmt: skip
        out = h.new_empty(len(row), dtype=torch.float32)
        wanted = (
            any(ctx.needs_input_grad[:3]) and finish.cap is None
        )  # capped logits are needed again themselves
        kept = (
            weight.new_empty(len(h), len(weight))
            if wanted and len(h) * len(weight) * weight.element_size() <= KEEP_BYTES
            else None
        )
        straight = (
            kept if kept is not None and kept.dtype == torch.float32 and finish.scale == 1 else None
        )  # made where it is kept
        for low, high, first, last in bounds:
            at = row[first:last] - low, token[first:last]
            block = None if straight is None else straight[low:high]
            z = finish(logits_of_rows(h[low:high], weight, bias, *at, out=block))
            logps = _log_softmax(z)  # (rows, vocab) fp32
            out[first:last] = logps[at]
            if kept is not None:
                p = logps.exp_().index_put_(
                    at, logps.new_zeros(())
                )  # the targets' own part is exact, in backward
                if straight is None:
                    kept[low:high] = p
        ctx.save_for_backward(h, weight, bias, row, token, out, kept)
        ctx.finish, ctx.bounds = finish, bounds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        """slope: (pairs,) d loss / d logp.  d loss / d z = onehot * slope - P * (sum of slopes of the row)"""
        h, weight, bias, row, token, out, kept = ctx.saved_tensors
        total = slope.new_zeros(len(h)).index_add_(0, row, slope)  # (rows,)
        own = slope - total[row] * out.exp()  # (pairs,) d loss / d z at the targets, fp32
        grads = _Gradients(h, weight, bias, ctx.needs_input_grad)
        if kept is not None:
            grads.add(
                slice(None), kept, total * -ctx.finish.scale, row, token, own * ctx.finish.scale
            )
            return *grads.done(), None, None, None, None
        for low, high, first, last in ctx.bounds:
            at = row[first:last] - low, token[first:last]
            z = ctx.finish(logits_of_rows(h[low:high], weight, bias, *at))
            bend = (
                ctx.finish.scale
                if ctx.finish.cap is None
                else ctx.finish.scale * (1 - (z / ctx.finish.cap).square())
            )  # dz / d(Wh+b)
            own_here = own[first:last] * (bend if isinstance(bend, float) else bend[at])
            p = (_log_softmax(z).exp_() * bend).index_put_(at, z.new_zeros(()))
            grads.add(slice(low, high), p.to(weight.dtype), -total[low:high], *at, own_here)
        return *grads.done(), None, None, None, None


class _Gradients:
    """Sums the gradients of h, weight and bias over chunks."""

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, needed: Any) -> None:
        self.h, self.weight = h, weight
        self.dh = torch.empty_like(h) if needed[0] else None
        self.dw: Tensor | None = None  # fp32 sums
        self.db: Tensor | None = None
        self.needs_dw, self.needs_db = needed[1], needed[2] and bias is not None

    def add(
        self, rows: slice, p: Tensor, total: Tensor, row: Tensor, token: Tensor, own: Tensor
    ) -> None:
        """p: (rows, vocab) without the targets; total: (rows,); own: (pairs,) d loss / d logit at the targets"""
        h = self.h[rows]
        if self.dh is not None:
            dh = (p @ self.weight).float() * total[:, None]
            self.dh[rows] = dh.index_add_(0, row, self.weight[token].float() * own[:, None])
        if self.needs_dw:
            dw = (p.T @ (h.float() * total[:, None]).to(h.dtype)).float()
            self.dw = dw if self.dw is None else self.dw.add_(dw)
            self.dw.index_add_(0, token, h[row].float() * own[:, None])
        if self.needs_db:
            db = p.T.float() @ total
            self.db = db if self.db is None else self.db.add_(db)
            self.db.index_add_(0, token, own)

    def done(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = self.weight.dtype
        return (
            self.dh,
            None if self.dw is None else self.dw.to(dtype),
            None if self.db is None else self.db.to(dtype),
        )


def logits_of_rows(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor,
    token: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """(rows, vocab) in fp32; the targets' own exact, the others as exact as the weights' precision makes them."""
    logits = torch.mm(h, weight.T, out=out).float()
    if bias is not None:
        logits += bias.float()
    if weight.dtype != torch.float32:
        exact = (h[row].float() * weight[token].float()).sum(-1)
        logits.index_put_((row, token), exact if bias is None else exact + bias[token].float())
    return logits


def _log_softmax(z: Tensor) -> Tensor:
    """In place on a CPU, where a fresh buffer costs more than the arithmetic."""
    return torch.log_softmax(z, -1, out=z) if z.device.type == "cpu" else torch.log_softmax(z, -1)
