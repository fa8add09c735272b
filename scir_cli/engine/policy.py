"""The engine: a model that scores token trees, with gradients in training and without elsewhere.

Every log-probability of a transformers model is computed by `Policy.branch_logps`.
A forest (trees.py) passes through the model's layers once, with their attention replaced
(tree_attention.py), and only hidden states with targets are multiplied by the vocabulary
(lm_head.py). When a model is loaded, a small forest is scored with and without trees (probe.py).
If the results differ, the model is scored in batches of padded paths from then on (batches.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scir_cli.engine import batches, checkpoints, trees
from scir_cli.engine.batches import Batch, Batching
from scir_cli.engine.chat import Chat
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.lm_head import LogitTransform, target_logps
from scir_cli.engine.router_loss import RouterLoss
from scir_cli.engine.throughput import Meter
from scir_cli.engine.tree_attention import SDPA, VARLEN, TreeLayout, to_device
from scir_cli.engine.trees import Branch, Forest
from scir_cli.errors import EngineError

#: Scored by a rank without work while other ranks of a sharded model still have some.
DUMMY_BRANCH = trees.continuation([0], [0])

#: Context length of a model that has no limit.
UNLIMITED = 2**31


class TreeScorer(nn.Module):
    """A causal language model that returns the log-probabilities of a forest's targets.

    It is one module, so that one forward call covers all parameters and can be sharded.
    """

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.core = core
        #: Set its weight to add it to the loss of a pass.
        self.router_loss = RouterLoss.of(core)

    @property
    def text(self) -> nn.Module:
        """The part of the model that reads and writes text; not a vision tower beside it."""
        return checkpoints.text_model(self.core)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers of the model: the longest list of modules in its text tower.

        Lists inside another one are parts of a layer: experts, for example.
        """
        lists = {n: m for n, m in self.text.named_modules() if isinstance(m, nn.ModuleList)}
        inner = {n for n in lists if any(n.startswith(f"{outer}.") for outer in lists)}
        return max((lists[n] for n in lists if n not in inner), key=len)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        plan: TreeLayout | None = None,
        targets: Forest | Batch | None = None,
    ) -> Tensor:
        """Log-probabilities of the targets, in nats; logits if there are no targets.

        ids: (rows, tokens), one row for a forest; positions: (1, tokens), for a forest
        -> (targets,) fp32, or (rows, tokens, vocab) without targets
        """
        if targets is None:
            return self.core(input_ids=ids, use_cache=False).logits
        of_forest: dict[str, Any] = {}
        if plan is not None:
            of_forest = {"position_ids": positions, "plan": plan}
        multimodal = self.core.config.get_text_config() is not self.core.config
        reader = self.text if multimodal else self.core.base_model
        balance = self.router_loss
        if balance is None or not balance.is_wanted:
            hidden = reader(input_ids=ids, use_cache=False, **of_forest).last_hidden_state
        else:
            of_forest["output_router_logits"] = True
            output = reader(input_ids=ids, use_cache=False, **of_forest)
            lengths = None
            if isinstance(targets, Batch):
                lengths = to_device(targets.lengths, ids.device)
            hidden = balance.add_to(output.last_hidden_state, output.router_logits, lengths)
        hidden = hidden.flatten(0, 1)
        head = self.core.get_output_embeddings()
        transform = LogitTransform.of(self.core.config.get_text_config())
        return target_logps(hidden, head, transform, targets)


@dataclass(frozen=True)
class Layout:
    """A forest on a model's device, ready for a forward pass."""

    forest: Forest
    ids: Tensor  # (1, tokens)
    plan: TreeLayout
    batches: Sequence[Batch] = ()  # of a model that takes no trees


@dataclass
class Policy:
    """A model with its tokenizer, and the scorer around it.

    weights_key: names the weights with their precision, tokenizer and chat template; cached
    reference log-probabilities are looked up by it.
    """

    model: Any
    chat: Chat
    weights_key: str
    path: Path
    #: The attention with which the model was loaded.
    plain_attention: str = "sdpa"
    #: The attention for trees; None if the model does not support trees.
    tree_attention: str | None = SDPA
    #: Why the model does not support trees.
    tree_refusal: str = ""
    #: How paths are scored if the model does not support trees.
    batching: Batching = "padded"
    #: The ranks over which the weights are sharded; all of them have to score at the same time.
    ranks: DistributedContext | None = None
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        # Adapters are modules inside the base model, which scores with or without them.
        adapted = hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
        core = self.model.get_base_model() if adapted else self.model
        self.scorer: Any = TreeScorer(core)
        #: Of the model's router, if it is to be trained with one.
        self.router_loss: RouterLoss | None = self.scorer.router_loss

    @property
    def takes_trees(self) -> bool:
        """Whether the model scores trees, and not paths in batches."""
        return self.tree_attention is not None

    @property
    def keeps_ranks_in_step(self) -> bool:
        """Whether any branches take exactly one forward pass, as sharded weights require."""
        return self.takes_trees or self.batching == "padded"

    @property
    def device(self) -> torch.device:
        """The device that computes; sharded weights may be stored on another."""
        return torch.device(self.ranks.device) if self.ranks else self.model.device

    def branch_logps(self, branches: Sequence[Branch], layout: Layout | None = None) -> Tensor:
        """Summed log-probability of each branch's targets, in nats, from one forward pass.

        layout: of the same branches, if it was built before.
        Returns (branches,) fp32, with gradient if gradients are enabled.
        """
        if not branches:
            return torch.zeros(0, device=self.device)
        layout = layout or self.build_layout(branches)
        if self.takes_trees:
            logps = self.forest_logps(layout)
        elif self.batching == "alone":
            logps = self.alone_logps(branches)
        else:
            logps = self._logps_of_batches(layout.batches)
        branch_of_target = torch.from_numpy(layout.forest.target_branch).to(logps.device)
        sums = torch.zeros(len(branches), device=logps.device)
        return sums.index_add(0, branch_of_target, logps)

    def build_layout(self, branches: Sequence[Branch]) -> Layout:
        """The layout of the branches' forest, on the device.

        It needs no model, so a thread can build the next one during a forward pass.
        """
        forest = trees.build(branches)
        plan = TreeLayout.of(forest, self.device)
        if self.tree_attention == VARLEN:
            # Computed and cached here, for all layers.
            _ = plan.gather
        ids = to_device(forest.tokens, self.device)[None]
        if self.takes_trees:
            return Layout(forest, ids, plan)
        return Layout(forest, ids, plan, self._batches(branches, self.batching, len(forest)))

    def _batches(
        self, branches: Sequence[Branch], batching: Batching, max_tokens: int
    ) -> list[Batch]:
        """The batches of some branches; one batch for sharded ranks, which keeps them in step.

        max_tokens: of the batches that are not sharded.
        """
        return batches.build(branches, batching, None if self.ranks else max_tokens)

    def forest_logps(self, layout: Layout) -> Tensor:
        """Log-probability of each target of the forest, in nats.  -> (targets,) fp32"""
        return self.scorer(layout.ids, layout.plan.positions[None], layout.plan, layout.forest)

    def batched_logps(self, branches: Sequence[Branch], batching: Batching) -> Tensor:
        """The same numbers, from batches of paths.  -> (targets,) fp32"""
        n_tokens = sum(len(b.ids) for b in branches)
        return self._logps_of_batches(self._batches(branches, batching, n_tokens))

    def _logps_of_batches(self, parts: Sequence[Batch]) -> Tensor:
        """Log-probability of each target of all batches, in nats.  -> (targets,) fp32"""
        logps = []
        order = []
        weight = self.router_loss.weight if self.router_loss else 0.0
        n_tokens = sum(int(batch.lengths.sum()) for batch in parts)
        for batch in parts:
            ids = to_device(batch.ids, self.device)
            if self.router_loss:
                self.router_loss.weight = weight * float(batch.lengths.sum()) / n_tokens
            logps.append(self.scorer(ids, targets=batch))
            order.append(batch.targets)
        if self.router_loss:
            self.router_loss.weight = weight
        place = np.argsort(np.concatenate(order))
        return torch.cat(logps)[torch.from_numpy(place).to(self.device)]

    def alone_logps(self, branches: Sequence[Branch]) -> Tensor:
        """The same numbers, one branch at a time, with the model's attention and full logits.

        Returns (targets,) fp32.
        """
        parts = []
        for branch in branches:
            ids = torch.tensor([branch.ids], device=self.device)
            logits = self.scorer(ids)[0].float()  # (tokens, vocab)
            rows = logits[list(branch.target_positions)]
            tokens = torch.tensor(branch.target_tokens, device=rows.device)
            parts.append(rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        return torch.cat(parts)

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Branch]], max_tokens: int) -> Iterator[Tensor]:
        """Yields the branch log-probabilities of each group, in nats, without gradient.

        Groups are packed to at most `max_tokens` tokens per forward pass.
        Each tensor is (branches of the group,) fp32, on the CPU.
        Raises EngineError if a pack does not fit into the memory of the device.
        """
        packs = trees.pack(groups, max_tokens)
        for low, high in packs:
            branches = [b for group in groups[low:high] for b in group]
            layout = self.build_layout(branches)
            try:
                logps = self.branch_logps(branches, layout).cpu()
            except torch.OutOfMemoryError as error:
                raise EngineError(
                    f"out of memory with {max_tokens} tokens per pack; lower --max-tokens-per-pack"
                ) from error
            self.meter.count(self._n_computed_tokens(branches, layout))
            yield from logps.split([len(group) for group in groups[low:high]])
        if self.ranks:
            # Every rank of a sharded model takes part in as many passes as the busiest rank.
            for _ in range(len(packs), max(self.ranks.all_gather(len(packs)))):
                self.branch_logps([DUMMY_BRANCH])
        self.reshard()

    def _n_computed_tokens(self, branches: Sequence[Branch], layout: Layout) -> int:
        """Tokens that the model computes for the branches."""
        if self.takes_trees:
            return len(layout.forest.tokens)
        if layout.batches:
            return sum(batch.ids.size for batch in layout.batches)
        return sum(len(b.ids) for b in branches)

    def reshard(self) -> None:
        """Returns the outermost weights to their shards, after passes without a backward pass.

        An optimizer must be created on shards. DeepSpeed does this after every pass.
        """
        if self.ranks and not self.ranks.zero:
            self.scorer.reshard()

    @contextmanager
    def plain_attention_mode(self) -> Iterator[None]:
        """Restores the model's plain attention to whole sequences inside the context.

        Generation needs it.
        """
        self.model.set_attn_implementation(self.plain_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(self.tree_attention or self.plain_attention)


def context_length(config: Any) -> int:
    """The number of positions of a model, from its config; UNLIMITED if it has no limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", UNLIMITED))
