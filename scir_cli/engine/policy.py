"""The engine: a model that scores token trees, with gradients for training and without for judging and evaluation.

`Policy.branch_logps` is the only way a log-probability enters this program. A forest (trees.py) goes through the model's own layers once, with
attention replaced (attention.py), and only hidden states that have targets meet the vocabulary (head.py). A model that cannot take trees is found out
by scoring a small forest both ways when it is loaded, and is scored branch by branch from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scir_cli.engine import trees
from scir_cli.engine.chat import Chat
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.lm_head import LogitTransform, target_logps
from scir_cli.engine.throughput import Meter
from scir_cli.engine.tree_attention import SDPA, VARLEN, TreeLayout, to_device
from scir_cli.engine.trees import Branch, Forest
from scir_cli.errors import EngineError

DUMMY_BRANCH = trees.continuation(
    [0], [0]
)  # scored by a rank that has run out, while others of a sharded model have not


class TreeScorer(nn.Module):
    """A causal language model that answers a forest with its targets' log-probabilities: one module, so that one call is what gets sharded."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.core = core

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of the model: its longest list of modules."""
        return max((m for m in self.modules() if isinstance(m, nn.ModuleList)), key=len)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        plan: TreeLayout | None = None,
        forest: Forest | None = None,
    ) -> Tensor:
        """ids, positions: (1, tokens) -> (targets,) nats, fp32; without a forest, the whole model's logits of one sequence: (1, tokens, vocab)"""
        if forest is None:
            return self.core(input_ids=ids, use_cache=False).logits
        hidden = self.core.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, plan=plan
        ).last_hidden_state[0]
        return target_logps(
            hidden,
            self.core.get_output_embeddings(),
            LogitTransform.of(self.core.config.get_text_config()),
            forest,
        )


@dataclass(frozen=True)
class Layout:
    """A forest made ready for a model on its device."""

    forest: Forest
    ids: Tensor  # (1, tokens)
    plan: TreeLayout


@dataclass
class Policy:
    """A model with its tokenizer. `key` names these weights under this precision, tokenizer and template: what a reference is looked up by."""

    model: Any
    chat: Chat
    weights_key: str
    path: Path
    plain_attention: str = "sdpa"  # what the model came with
    tree_attention: str | None = SDPA  # None: it cannot take trees
    ranks: DistributedContext | None = (
        None  # those its weights are sharded over: whatever one of them scores, all do at once
    )
    meter: Meter = field(default_factory=Meter)

    @property
    def takes_trees(self) -> bool:
        return self.tree_attention is not None

    @property
    def device(self) -> torch.device:
        """Where it computes; sharded weights may rest elsewhere."""
        return torch.device(self.ranks.device) if self.ranks else self.model.device

    def branch_logps(self, branches: Sequence[Branch], layout: Layout | None = None) -> Tensor:
        """Summed log-probability of each branch's targets, nats, in one forward pass.  -> (branches,) fp32, with gradient where enabled"""
        if not branches:
            return torch.zeros(0, device=self.device)
        layout = layout or self.build_layout(branches)
        logps = self._forest_logps(layout) if self.takes_trees else self._one_by_one(branches)
        index = torch.from_numpy(layout.forest.target_branch).to(logps.device)
        return torch.zeros(len(branches), device=logps.device).index_add(0, index, logps)

    def build_layout(self, branches: Sequence[Branch]) -> Layout:
        """The branches as their forest, on the device: all that a forward pass needs and a thread can do ahead of it."""
        forest = trees.build(branches)
        plan = TreeLayout.of(forest, self.device)
        if self.tree_attention == VARLEN:
            _ = plan.gather  # made here, and used in every layer
        return Layout(forest, to_device(forest.tokens, self.device)[None], plan)

    def __post_init__(self) -> None:
        adapted = hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
        self.scorer: Any = TreeScorer(
            self.model.get_base_model() if adapted else self.model
        )  # with or without adapters around it

    def _forest_logps(self, layout: Layout) -> Tensor:
        return self.scorer(layout.ids, layout.plan.positions[None], layout.plan, layout.forest)

    def _one_by_one(self, branches: Sequence[Branch]) -> Tensor:
        """The same numbers without trees: each branch by itself through the whole model, with the model's own attention.  # (targets,)"""
        parts = []
        for branch in branches:
            logits = self.scorer(torch.tensor([branch.ids], device=self.device))[0].float()
            rows = logits[list(branch.target_positions)]
            parts.append(
                rows.log_softmax(-1).gather(
                    1, torch.tensor(branch.target_tokens, device=rows.device)[:, None]
                )[:, 0]
            )
        return torch.cat(parts)

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Branch]], max_tokens: int) -> Iterator[Tensor]:
        """Branch log-probabilities of each group, without gradient, packed to `max_tokens` a forward.  yields (branches of the group,)"""
        packs = trees.pack(groups, max_tokens)
        for low, high in packs:
            branches = [b for group in groups[low:high] for b in group]
            layout = self.build_layout(branches)
            try:
                logps = self.branch_logps(branches, layout).cpu()
            except torch.OutOfMemoryError as error:
                raise EngineError(
                    f"out of memory with {max_tokens} tokens a pack; lower --max-tokens-per-pack"
                ) from error
            self.meter.count(
                len(layout.forest.tokens) if self.takes_trees else sum(len(b.ids) for b in branches)
            )
            yield from logps.split([len(group) for group in groups[low:high]])
        for _ in range(len(packs), max(self.ranks.all_gather(len(packs))) if self.ranks else 0):
            self.branch_logps([DUMMY_BRANCH])
        self.reshard()

    def reshard(self) -> None:
        """After passes without a backward: the outermost weights go back to their shards, which is what an optimizer must be given."""
        if self.ranks and not self.ranks.zero:  # DeepSpeed does so after every pass
            self.scorer.reshard()

    @contextmanager
    def plain_attention_mode(self) -> Iterator[None]:
        """Within it the model attends as it came, to whole sequences: for generation."""
        self.model.set_attn_implementation(self.plain_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(self.tree_attention or self.plain_attention)


def context_length(config: Any) -> int:
    """Positions a model has; without a limit, more than anybody asks for."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))
