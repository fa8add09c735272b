"""AdamW with fp32 master weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scir_cli.engine.distributed import full_tensor, shard_like


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 copies of bf16 weights; weights in fp32 need no copy.

    bf16 keeps 8 bits, so most updates of a small learning rate would round to nothing.
    """

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        self.model_params = list(params)
        masters = [
            p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.model_params
        ]
        super().__init__(masters, fused=True, **options)

    @property
    def master(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One parameter at a time, so that fp32 gradients never exist all at once."""
        group = self.param_groups[0]
        masters = group["params"]
        try:
            for master, live in zip(masters, self.model_params, strict=True):
                group["params"] = [master]
                if master is not live:
                    master.grad = None if live.grad is None else live.grad.float()
                    live.grad = None
                super().step(closure)
                if master is not live:
                    live.copy_(master)
                    master.grad = None
        finally:
            group["params"] = masters

    def zero_grad(self, set_to_none: bool = True) -> None:
        for live in getattr(self, "model_params", ()):
            live.grad = None

    def update(self, max_norm: float) -> float:
        """Ends a step: clips the gradient and takes it, if it is finite. Returns its norm before clipping."""
        gradients = [p.grad for p in self.model_params if p.grad is not None]
        norm = total_norm(gradients)
        if norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / norm)
        if math.isfinite(norm):
            self.step()
        return norm

    def whole(self, keep: bool) -> dict[str, Any]:
        """All state as one process would have it. Collective: every rank has to call it; without `keep`, tensors are None."""
        moments = [{k: full_tensor(v, keep) for k, v in self.state[p].items()} for p in self.master]
        return {"master": [full_tensor(p, keep) for p in self.master], "moments": moments}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Loads the state that `whole` returned, under any number of ranks."""
        for master, live, values, moments in zip(
            self.master, self.model_params, state["master"], state["moments"], strict=True
        ):
            master.copy_(shard_like(values, master))
            if live is not master:
                live.copy_(master)
            self.state[master] = {
                k: v if k == "step" else shard_like(v, master) for k, v in moments.items()
            }


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together, over all shards."""
    return float(full_tensor(torch.nn.utils.get_total_norm(gradients)))
