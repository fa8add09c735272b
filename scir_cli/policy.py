"""The engine: a model that scores token trees, with gradients for training and without for judging and evaluation.

`Policy.branch_logps` is the only way a log-probability enters this program. A forest (trees.py) goes through the model's own layers once, with
attention replaced through transformers' interface: a segment's queries see their ancestors' keys and their own, causally. No model is patched and
no model name is looked at; a model that cannot take trees is found out by scoring a small forest both ways when it is loaded, and is scored
branch by branch from then on. Only hidden states that have targets are projected to the vocabulary, in chunks that are recomputed in backward.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from scir_cli import model_sources, trees
from scir_cli.chat import Chat
from scir_cli.config import ModelSettings
from scir_cli.errors import ModelError, warn
from scir_cli.trees import Branch, Forest

TREE_ATTENTION = "scir_tree"
HEAD_CHUNK_ELEMENTS = 2**24  # logits held at once in the head: 64 MiB in fp32


# ---------------------------------------------------------------------------------------------------------------------- attention on trees


@dataclass
class Plan:
    """A forest as attention sees it. Masks are made once a forest and window, and serve every layer."""

    sizes: list[int]  # tokens of each segment
    ancestors: list[tuple[int, ...]]
    positions: Tensor  # (tokens,)
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, forest: Forest, device: torch.device) -> Plan:
        sizes = [s.end - s.start for s in forest.segments]
        return cls(sizes, [s.ancestors for s in forest.segments], torch.from_numpy(forest.positions).to(device))

    def mask(self, window: int | None) -> list[Tensor]:
        """Per segment, which of its keys (ancestors, then itself) each query may see.  # (queries, keys) bool"""
        if window not in self.masks:
            runs = self.positions.split(self.sizes)
            keys = [torch.cat([*(runs[a] for a in up), own]) for up, own in zip(self.ancestors, runs, strict=True)]
            # along one path, k <= q < subtree_end[k] is position[k] <= position[q]
            ages = [own[:, None] - key[None, :] for own, key in zip(runs, keys, strict=True)]
            self.masks[window] = [(age >= 0) if window is None else (age >= 0) & (age < window) for age in ages]
        return self.masks[window]


def tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (1, key heads, tokens, head size)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a forest, as transformers' attention interface wants it.  -> (1, tokens, heads, head size)"""
    assert plan is not None, "the model does not hand keywords on to attention"
    queries, keys, values = (x.split(plan.sizes, dim=2) for x in (query, key, value))
    out = []
    for own, (up, mask) in enumerate(zip(plan.ancestors, plan.mask(sliding_window), strict=True)):
        k = torch.cat([*(keys[a] for a in up), keys[own]], dim=2)
        v = torch.cat([*(values[a] for a in up), values[own]], dim=2)
        out.append(_attend(queries[own], k, v, mask, scaling, softcap))
    return torch.cat(out, dim=2).transpose(1, 2), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scaling or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)  # Gemma 2's soft-capping, which SDPA cannot do
    return scores.float().masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v


def register_tree_attention() -> None:
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    AttentionMaskInterface.register(TREE_ATTENTION, lambda *args, **kwargs: None)


# ---------------------------------------------------------------------------------------------------------------------- the head


def target_logps(hidden: Tensor, head: Any, finish: Any, forest: Forest) -> Tensor:
    """Log-probability of each target, in nats.  hidden: (tokens, width) -> (targets,) fp32

    A target's own logit is computed in fp32, its row's normaliser in the model's precision: verdict margins of 0.2 nat survive bf16.
    """
    device = hidden.device
    asked = np.stack([forest.target_hidden, forest.target_token], axis=1)
    pairs, place = np.unique(
        asked, axis=0, return_inverse=True
    )  # two answers that start alike ask for the same log-probability once
    rows, row_of = np.unique(pairs[:, 0], return_inverse=True)
    chunk = max(16, HEAD_CHUNK_ELEMENTS // head.weight.shape[0])
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for low in range(0, len(rows), chunk):
        first, last = np.searchsorted(row_of, [low, low + chunk])
        h = hidden[torch.from_numpy(rows[low : low + chunk]).to(device)]
        row = torch.from_numpy(row_of[first:last] - low).to(device)
        token = torch.from_numpy(pairs[first:last, 1]).to(device)
        inputs = (h, head, row, token, finish)
        parts.append(checkpoint(_chunk_logps, *inputs, use_reentrant=False) if torch.is_grad_enabled() else _chunk_logps(*inputs))
    return torch.cat(parts)[torch.from_numpy(place.reshape(-1)).to(device)]


def _chunk_logps(h: Tensor, head: Any, row: Tensor, token: Tensor, finish: Any) -> Tensor:
    """Log-probabilities of distinct (row, token) pairs.  h: (rows, width); row, token: (pairs,) -> (pairs,)"""
    logits = head(h).float()  # (rows, vocab)
    if type(head) is nn.Linear:  # with adapters on it, its own precision has to do
        exact = (h[row].float() * head.weight[token].float()).sum(-1)  # (pairs,)
        logits = logits.index_put((row, token), exact if head.bias is None else exact + head.bias[token].float())
    logits = finish(logits)
    return logits[row, token] - logits.logsumexp(-1)[row]


def head_finish(config: Any) -> Any:
    """What the model does to logits after its head, from its config: scale (Cohere, Granite), then soft-capping (Gemma)."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits * scale if scale != 1 else logits
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return finish


# ---------------------------------------------------------------------------------------------------------------------- the policy


@dataclass
class Policy:
    """A model with its tokenizer. `key` names these weights under this precision, tokenizer and template: what a reference is looked up by."""

    model: Any
    chat: Chat
    key: str
    path: Path
    plain_attention: str = "sdpa"  # what the model came with
    takes_trees: bool = True

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2**31))

    def branch_logps(self, branches: Sequence[Branch]) -> Tensor:
        """Summed log-probability of each branch's targets, nats, in one forward pass.  -> (branches,) fp32, with gradient where enabled"""
        if not branches:
            return torch.zeros(0, device=self.device)
        forest = trees.build(branches)
        logps = self._forest_logps(forest) if self.takes_trees else self._one_by_one(branches)
        index = torch.from_numpy(forest.target_branch).to(logps.device)
        return torch.zeros(len(branches), device=logps.device).index_add(0, index, logps)

    def _core(self) -> Any:
        """The causal language model itself, with or without adapters around it."""
        return (
            self.model.get_base_model()
            if hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
            else self.model
        )

    def _forest_logps(self, forest: Forest, plan: Plan | None = None) -> Tensor:
        core = self._core()
        ids, positions = (torch.from_numpy(x).to(self.device)[None] for x in (forest.tokens, forest.positions))
        plan = plan or Plan.of(forest, self.device)
        hidden = core.base_model(input_ids=ids, position_ids=positions, use_cache=False, plan=plan).last_hidden_state[0]
        return target_logps(hidden, core.get_output_embeddings(), head_finish(core.config.get_text_config()), forest)

    def _one_by_one(self, branches: Sequence[Branch]) -> Tensor:
        """The same numbers without trees: each branch by itself through the whole model, with the model's own attention.  # (targets,)"""
        parts = []
        for branch in branches:
            logits = self.model(input_ids=torch.tensor([branch.ids], device=self.device), use_cache=False).logits[0].float()
            rows = logits[list(branch.target_positions)]
            parts.append(rows.log_softmax(-1).gather(1, torch.tensor(branch.target_tokens, device=rows.device)[:, None])[:, 0])
        return torch.cat(parts)

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Branch]], max_tokens: int) -> Iterator[Tensor]:
        """Branch log-probabilities of each group, without gradient, packed to `max_tokens` a forward.  yields (branches of the group,)"""
        for low, high in trees.pack(groups, max_tokens):
            logps = self.branch_logps([b for group in groups[low:high] for b in group]).cpu()
            yield from logps.split([len(group) for group in groups[low:high]])

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Within it the model attends as it came, to whole sequences: for generation."""
        self.model.set_attn_implementation(self.plain_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(TREE_ATTENTION if self.takes_trees else self.plain_attention)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Within it a LoRA policy is its own frozen base."""
        with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
            yield


def load(settings: ModelSettings, spec: str | None = None) -> Policy:
    """The policy a model spec names (`settings.model` by default), on its device, in eval mode and without dropout. Raises ModelError."""
    path = model_sources.resolve(spec or settings.model)
    dtype = resolve_dtype(settings.dtype, settings.device)
    device = settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(path, settings)
    disable_progress_bar()  # transformers' own, on stderr even in a pipe
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the model in {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model.to(device).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    chat = Chat(tokenizer, end_ids(path, tokenizer))
    model.generation_config = GenerationConfig()  # sampling settings are ours alone
    policy = Policy(model, chat, weights_key(path, settings, chat), path, model.config._attn_implementation)
    register_tree_attention()
    policy.takes_trees = _trees_agree(policy)
    if not policy.takes_trees:
        warn(f"{path.name} cannot score token trees; it is scored one branch at a time, with the same numbers, slower")
    return policy


@torch.no_grad()
def _trees_agree(policy: Policy) -> bool:
    """Whether a small forest scores the same through trees as branch by branch with the model's own attention."""
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    ids = [int(i) % vocabulary for i in np.random.default_rng(0).integers(0, 2**31, 24)]
    branches = [
        trees.continuation(ids[:8], ids[8:14]),
        trees.continuation(ids[:8], ids[14:20]),
        trees.verdict([*ids[:5], *ids[20:]], 1 % vocabulary),
    ]
    with policy.own_attention():
        plain = policy._one_by_one(branches)
    try:
        forest = trees.build(branches)
        plan = Plan.of(forest, policy.device)
        tree = policy._forest_logps(forest, plan)
        if not _fits_trees(policy.model.config.get_text_config(), plan):
            tree = torch.full_like(plain, math.nan)
    except (TypeError, AssertionError, AttributeError, RuntimeError, ValueError):
        tree = torch.full_like(plain, math.nan)
    tolerance = 1e-3 if policy.model.dtype == torch.float32 else 0.03  # of a log-probability: bf16 keeps 8 bits of a logit of 10
    agree = bool(((tree - plain).abs() <= tolerance * (1 + plain.abs())).all())
    if not agree:
        policy.model.set_attn_implementation(policy.plain_attention)
    return agree


def _fits_trees(config: Any, plan: Plan) -> bool:
    """Whether nothing in the config works beyond the probe's length in a way that trees do not follow.

    Rotary frequencies that change with the longest sequence of a batch, attention in chunks, a sliding window that attention is not told of.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in [rope, *rope.values()] if isinstance(r, dict)}
    window = getattr(config, "sliding_window", None)
    return (
        not kinds & {"dynamic", "longrope"}
        and not getattr(config, "attention_chunk_size", None)
        and (not window or window in plan.masks)
    )


def load_tokenizer(path: Path, settings: ModelSettings) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"the chat template {settings.chat_template} cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer in {path} has no chat template; give one with --chat-template FILE.jinja")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {path} has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    probe = "Is 2 + 2 = 4?\nYes, it's so."
    if str(tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"])).strip() != probe:
        warn(f"the tokenizer in {path} does not give a plain sentence back; is its tokenizer.json read as it should be?")
    return tokenizer


def end_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's, and those of the model's generation config."""
    ids = {tokenizer.eos_token_id}
    if (path / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(more) if isinstance(more, list) else {more}
    return frozenset(i for i in ids if i is not None)


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """bf16 or fp32; auto is bf16 where the hardware computes in it: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32


def weights_key(path: Path, settings: ModelSettings, chat: Chat) -> str:
    """16 hex digits naming weights, precision, tokenizer and template: a reference log-probability is valid under this key only."""
    parts = [model_sources.digest(path), str(resolve_dtype(settings.dtype, settings.device)), chat.template_digest()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
