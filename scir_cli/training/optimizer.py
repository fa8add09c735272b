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

    bf16 has 8 bits of precision, so most updates of a small learning rate would round to nothing.
    model_params: the parameters of the model, one per master weight.
    """

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        self.model_params = list(params)
        masters = []
        for param in self.model_params:
            if param.dtype == torch.float32:
                masters.append(param)
            else:
                masters.append(param.detach().float().clone())
        super().__init__(masters, fused=True, **options)

    @property
    def master(self) -> list[Tensor]:
        """The fp32 weights that are updated, in the order of `model_params`."""
        return self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates the parameters one by one, so that one fp32 gradient exists at once."""
        group = self.param_groups[0]
        masters = group["params"]
        try:
            for master, param in zip(masters, self.model_params, strict=True):
                group["params"] = [master]
                if master is not param:
                    master.grad = None if param.grad is None else param.grad.float()
                    param.grad = None
                super().step(closure)
                if master is not param:
                    param.copy_(master)
                    master.grad = None
        finally:
            group["params"] = masters

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes the gradients of the model's parameters."""
        for param in self.model_params:
            param.grad = None

    def update(self, max_norm: float) -> float:
        """Clips the gradient and takes a step if it is finite.

        Returns the norm before clipping.
        """
        gradients = [p.grad for p in self.model_params if p.grad is not None]
        norm = total_norm(gradients)
        if norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / norm)
        if math.isfinite(norm):
            self.step()
        return norm

    def whole(self, keep: bool) -> dict[str, Any]:
        """The state as full tensors on the CPU, under any number of ranks.

        Collective: every rank must call it; ranks with keep=False get None for each tensor.
        """
        moments = []
        for master in self.master:
            state = self.state[master]
            moments.append({name: full_tensor(value, keep) for name, value in state.items()})
        masters = [full_tensor(master, keep) for master in self.master]
        return {"master": masters, "moments": moments}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Loads a state that `whole` returned, under any number of ranks."""
        saved = zip(state["master"], state["moments"], strict=True)
        params = zip(self.master, self.model_params, strict=True)
        for (master, param), (value, moments) in zip(params, saved, strict=True):
            master.copy_(shard_like(value, master))
            if param is not master:
                param.copy_(master)
            restored = {}
            for name, moment in moments.items():
                restored[name] = moment if name == "step" else shard_like(moment, master)
            self.state[master] = restored


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(full_tensor(norm))
