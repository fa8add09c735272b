"""The engine: a model that scores token trees, with gradients for training and without for judging and evaluation.

`Policy.branch_logps` is the only way a log-probability enters this program. A forest (trees.py) goes through the model's own layers once, with
attention replaced (attention.py), and only hidden states that have targets meet the vocabulary (head.py). A model that cannot take trees is found out
by scoring a small forest both ways when it is loaded, and is scored branch by branch from then on.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from scir_cli import attention, model_sources, trees
from scir_cli.attention import Plan
from scir_cli.chat import Chat
from scir_cli.config import ModelSettings
from scir_cli.errors import ConfigError, EngineError, ModelError, install_hint, warn
from scir_cli.head import Finish, target_logps
from scir_cli.meter import Meter
from scir_cli.parallel import Ranks
from scir_cli.trees import Branch, Forest

NOTHING = trees.continuation([0], [0])  # scored by a rank that has run out, while others of a sharded model have not


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
        self, ids: Tensor, positions: Tensor | None = None, plan: Plan | None = None, forest: Forest | None = None
    ) -> Tensor:
        """ids, positions: (1, tokens) -> (targets,) nats, fp32; without a forest, the whole model's logits of one sequence: (1, tokens, vocab)"""
        if forest is None:
            return self.core(input_ids=ids, use_cache=False).logits
        hidden = self.core.base_model(input_ids=ids, position_ids=positions, use_cache=False, plan=plan).last_hidden_state[0]
        return target_logps(hidden, self.core.get_output_embeddings(), Finish.of(self.core.config.get_text_config()), forest)


@dataclass(frozen=True)
class Layout:
    """A forest made ready for a model on its device."""

    forest: Forest
    ids: Tensor  # (1, tokens)
    plan: Plan


@dataclass
class Policy:
    """A model with its tokenizer. `key` names these weights under this precision, tokenizer and template: what a reference is looked up by."""

    model: Any
    chat: Chat
    key: str
    path: Path
    plain_attention: str = "sdpa"  # what the model came with
    tree_attention: str | None = attention.SDPA  # None: it cannot take trees
    ranks: Ranks | None = None  # those its weights are sharded over: whatever one of them scores, all do at once
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
        layout = layout or self.lay_out(branches)
        logps = self._forest_logps(layout) if self.takes_trees else self._one_by_one(branches)
        index = torch.from_numpy(layout.forest.target_branch).to(logps.device)
        return torch.zeros(len(branches), device=logps.device).index_add(0, index, logps)

    def lay_out(self, branches: Sequence[Branch]) -> Layout:
        """The branches as their forest, on the device: all that a forward pass needs and a thread can do ahead of it."""
        forest = trees.build(branches)
        plan = Plan.of(forest, self.device)
        if self.tree_attention == attention.VARLEN:
            _ = plan.gather  # made here, and used in every layer
        return Layout(forest, attention.to_device(forest.tokens, self.device)[None], plan)

    def __post_init__(self) -> None:
        adapted = hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
        self.scorer: Any = TreeScorer(self.model.get_base_model() if adapted else self.model)  # with or without adapters around it

    def _forest_logps(self, layout: Layout) -> Tensor:
        return self.scorer(layout.ids, layout.plan.positions[None], layout.plan, layout.forest)

    def _one_by_one(self, branches: Sequence[Branch]) -> Tensor:
        """The same numbers without trees: each branch by itself through the whole model, with the model's own attention.  # (targets,)"""
        parts = []
        for branch in branches:
            logits = self.scorer(torch.tensor([branch.ids], device=self.device))[0].float()
            rows = logits[list(branch.target_positions)]
            parts.append(rows.log_softmax(-1).gather(1, torch.tensor(branch.target_tokens, device=rows.device)[:, None])[:, 0])
        return torch.cat(parts)

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Branch]], max_tokens: int) -> Iterator[Tensor]:
        """Branch log-probabilities of each group, without gradient, packed to `max_tokens` a forward.  yields (branches of the group,)"""
        packs = trees.pack(groups, max_tokens)
        for low, high in packs:
            branches = [b for group in groups[low:high] for b in group]
            layout = self.lay_out(branches)
            try:
                logps = self.branch_logps(branches, layout).cpu()
            except torch.OutOfMemoryError as error:
                raise EngineError(f"out of memory with {max_tokens} tokens a pack; lower --max-tokens-per-pack") from error
            self.meter.count(len(layout.forest.tokens) if self.takes_trees else sum(len(b.ids) for b in branches))
            yield from logps.split([len(group) for group in groups[low:high]])
        for _ in range(len(packs), max(self.ranks.gather(len(packs))) if self.ranks else 0):
            self.branch_logps([NOTHING])
        self.reshard()

    def reshard(self) -> None:
        """After passes without a backward: the outermost weights go back to their shards, which is what an optimizer must be given."""
        if self.ranks and not self.ranks.zero:  # DeepSpeed does so after every pass
            self.scorer.reshard()

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Within it the model attends as it came, to whole sequences: for generation."""
        self.model.set_attn_implementation(self.plain_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(self.tree_attention or self.plain_attention)


def load(
    settings: ModelSettings, spec: str | None = None, device: str | None = None, *,
    chat: Chat | None = None, key: str | None = None, meter: Meter | None = None,
    adapt: Callable[[Any], Any] | None = None, ranks: Ranks | None = None, cpu_offload: bool = False,
) -> Policy:  # fmt: skip
    """The policy a model spec names (`settings.model` by default), on its device, in eval mode and without dropout.

    chat, key: of this model, if they are known already (lazy_policy.py); else the tokenizer is loaded and the weights hashed.
    meter: counts what the policy computes. adapt: puts adapters on the model.
    ranks: shards the weights over them; only the first reads the weights.
    Raises ModelError.
    """
    path = model_sources.resolve(spec or settings.model)
    if chat is None:
        tokenizer = load_tokenizer(path, settings)
        chat = Chat(tokenizer, end_ids(path, tokenizer))
    if key is None:
        key = weights_key(model_sources.digest(path), settings, chat)
    target = "cpu" if ranks else device or resolve_device(settings.device)
    model = load_model(path, settings, target, empty=ranks is not None and not ranks.main)
    plain_attention = model.config._attn_implementation
    adapted = adapt(model) if adapt else model
    policy = Policy(adapted, chat, key, path, plain_attention, ranks=ranks, meter=meter or Meter())
    if ranks:
        policy.scorer = ranks.shard(policy.scorer, policy.scorer.blocks, cpu_offload)
    attention.register()
    policy.tree_attention = _tree_attention(policy)
    policy.reshard()
    if not policy.takes_trees:
        warn(f"{path.name} cannot score token trees; it is scored one branch at a time, with the same numbers, slower")
    return policy


def load_model(path: Path, settings: ModelSettings, device: str, *, empty: bool = False) -> Any:
    """The model in a folder, in eval mode and without dropout; `empty`: with memory for its weights and nothing in it.

    Raises ModelError.
    """
    dtype = resolve_dtype(settings.dtype, settings.device)
    disable_progress_bar()  # transformers' own, on stderr even in a pipe
    trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    try:
        model: Any
        if (base := model_sources.base(path)) != path:
            model = load_model(base, settings, device, empty=empty)
            return model if empty else _adapted(model, path, settings)
        config = AutoConfig.from_pretrained(path, **trust)
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            trust["attn_implementation"] = "eager"  # transformers 5.17's SDPA leaves the cap out without a word
        if settings.quantization != "none":
            trust |= {"quantization_config": four_bits(dtype), "device_map": {"": device}}
        if empty:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)
            model.to_empty(device=device).tie_weights()
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, config=config, **trust)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the model in {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    (model if settings.quantization != "none" else model.to(device)).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "quant_state"):
            module.training = True  # in eval mode bitsandbytes repacks the weights for a CPU, in a form without a backward pass
    model.generation_config = GenerationConfig()  # sampling settings are ours alone
    return model


def _adapted(model: Any, adapter: Path, settings: ModelSettings) -> Any:
    """The model with a LoRA adapter added into its weights. Raises ConfigError where it cannot be."""
    if settings.quantization != "none":
        raise ConfigError(f"--quantization {settings.quantization} has no room for the adapter {adapter}; take the whole model")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"the adapter {adapter} needs the package peft: {install_hint('lora')}") from error
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.name_or_path = str(adapter)  # which adapters trained on it will name
    return merged.eval()


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's weights (arXiv 2305.14314): NF4 with quantised constants, computed in `dtype`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"--quantization 4bit needs the package bitsandbytes: {install_hint('qlora')}")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@torch.no_grad()
def _tree_attention(policy: Policy) -> str | None:
    """The first attention with which a small forest scores the same as branch by branch with the model's own; None where there is none."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    ids = [int(i) % vocabulary for i in np.random.default_rng(0).integers(0, 2**31, 24)]
    branches = [
        trees.continuation(ids[:8], ids[8:14]),
        trees.continuation(ids[:8], ids[14:20]),
        trees.verdict([*ids[:5], *ids[20:]], 1 % vocabulary),
    ]
    plain = policy._one_by_one(branches)
    tolerance = 1e-3 if policy.model.dtype == torch.float32 else 0.03  # of a log-probability: bf16 keeps 8 bits of a logit of 10
    for name in attention.candidates(policy.device, policy.model.dtype):
        layout = policy.lay_out(branches)
        try:
            policy.model.set_attn_implementation(name)
            tree = policy._forest_logps(layout)
        except (TypeError, AssertionError, AttributeError, RuntimeError, ValueError, ImportError):
            continue
        if bool(((tree - plain).abs() <= tolerance * (1 + plain.abs())).all()) and _fits_trees(
            policy.model.config.get_text_config(), layout.plan
        ):
            return name
    policy.model.set_attn_implementation(policy.plain_attention)
    return None


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
        and (not window or window in plan.windows)
    )


def load_tokenizer(path: Path, settings: ModelSettings) -> Any:
    """The tokenizer in a model folder; an adapter's own, or its model's. Raises ModelError."""
    if not (path / "tokenizer_config.json").is_file() and (base := model_sources.base(path)) != path:
        return load_tokenizer(base, settings)
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
    path = model_sources.base(path)
    if (path / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(more) if isinstance(more, list) else {more}
    return frozenset(i for i in ids if i is not None)


def context_length(config: Any) -> int:
    """Positions a model has; without a limit, more than anybody asks for."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))


def resolve_device(name: str) -> str:
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """bf16 or fp32; auto is bf16 where the hardware computes in it: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32


def weights_key(weights_digest: str, settings: ModelSettings, chat: Chat) -> str:
    """16 hex digits naming weights, precision, tokenizer and template: a reference log-probability is valid under this key only.

    weights_digest: of `model_sources.digest`.
    """
    parts = [weights_digest, str(resolve_dtype(settings.dtype, settings.device)), chat.template_digest()]
    parts += [settings.quantization] if settings.quantization != "none" else []
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
