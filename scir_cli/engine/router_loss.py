"""The auxiliary loss of a mixture of experts, which keeps its router from choosing few of them.

    number of experts x sum over experts of (share of the tokens) x (mean probability)

Equations 4 to 6 of Switch Transformer (arXiv 2101.03961), by the function of the model's own
module. For a router that uses all experts alike it is the number of experts per token.
Added in training if `output_router_logits` is true in config.json, times `router_aux_loss_coef`, as
transformers' and TRL's trainers do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class RouterLoss:
    """The loss of one model, and its sum over the passes since `take`.

    weight: share of the next pass in the step's loss; 0 where no gradient is wanted.
    """

    balance: Callable[..., Tensor]
    n_experts: int
    top_k: int
    coefficient: float
    weight: float = 0.0
    parts: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, core: Any) -> RouterLoss | None:
        """The loss of a causal language model; None if it has no router, or is not to have one."""
        config = core.config.get_text_config()
        balance = getattr(sys.modules[type(core).__module__], "load_balancing_loss_func", None)
        coefficient = getattr(config, "router_aux_loss_coef", None)
        if not (getattr(config, "output_router_logits", False) and balance and coefficient):
            return None
        # A wrapper around a text model has them in its config alone.
        n_experts, top_k = (
            getattr(core, name, None) or getattr(config, name)
            for name in ("num_experts", "num_experts_per_tok")
        )
        return cls(balance, n_experts, top_k, float(coefficient))

    @property
    def is_wanted(self) -> bool:
        """Whether the next pass adds to the loss."""
        return self.weight > 0 and torch.is_grad_enabled()

    def add_to(self, hidden: Tensor, router_logits: Any, lengths: Tensor | None) -> Tensor:
        """The hidden states; their backward pass also sends the loss's gradient to the router.

        hidden: (rows, tokens, width). router_logits: per layer, (rows x tokens, experts).
        lengths: (rows,) tokens without padding; None: there is no padding.
        """
        mask = None
        if lengths is not None:
            mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        loss = self.balance(tuple(router_logits), self.n_experts, self.top_k, mask)
        self.parts.append(self.weight * loss.detach())
        added: Tensor = _AddLoss.apply(hidden, self.weight * self.coefficient * loss)
        return added

    def take(self) -> float:
        """The sum over the passes since the last call, each times its weight."""
        total = float(sum(self.parts))
        self.parts.clear()
        return total


class _AddLoss(torch.autograd.Function):
    """Returns its first argument; adds the second one to whatever loss is computed from it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.ones_like(ctx.like)
