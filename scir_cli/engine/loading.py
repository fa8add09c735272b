"""A policy from a model spec: tokenizer, weights, dtype, and the tree-attention probe."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils.logging import disable_progress_bar

from scir_cli.engine import model_files, trees
from scir_cli.engine.chat import Chat
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.policy import Policy
from scir_cli.engine.throughput import Meter
from scir_cli.engine.tree_attention import TreeLayout, candidates, register
from scir_cli.errors import ConfigError, ModelError, install_hint, warn
from scir_cli.settings import ModelSettings


def load(
    settings: ModelSettings, spec: str | None = None, device: str | None = None, *,
    chat: Chat | None = None, key: str | None = None, meter: Meter | None = None,
    adapt: Callable[[Any], Any] | None = None, ranks: DistributedContext | None = None, cpu_offload: bool = False,
) -> Policy:  # fmt: skip
    """The policy a model spec names (`settings.model` by default), on its device, in eval mode and without dropout.

    chat, key: of this model, if they are known already (lazy_policy.py); else the tokenizer is loaded and the weights hashed.
    meter: counts what the policy computes. adapt: puts adapters on the model.
    ranks: shards the weights over them; only the first reads the weights.
    Raises ModelError.
    """
    path = model_files.resolve(spec or settings.model)
    if chat is None:
        tokenizer = load_tokenizer(path, settings)
        chat = Chat(tokenizer, end_ids(path, tokenizer))
    if key is None:
        key = weights_key(model_files.digest(path), settings, chat)
    target = "cpu" if ranks else device or resolve_device(settings.device)
    model = load_model(path, settings, target, empty=ranks is not None and not ranks.is_main)
    plain_attention = model.config._attn_implementation
    adapted = adapt(model) if adapt else model
    policy = Policy(adapted, chat, key, path, plain_attention, ranks=ranks, meter=meter or Meter())
    if ranks:
        policy.scorer = ranks.shard(policy.scorer, policy.scorer.blocks, cpu_offload)
    register()
    policy.tree_attention = _tree_attention(policy)
    policy.reshard()
    if not policy.takes_trees:
        warn(
            f"{path.name} cannot score token trees; it is scored one branch at a time, with the same numbers, slower"
        )
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
        if (base := model_files.base_model_path(path)) != path:
            model = load_model(base, settings, device, empty=empty)
            return model if empty else _adapted(model, path, settings)
        config = AutoConfig.from_pretrained(path, **trust)
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            trust["attn_implementation"] = (
                "eager"  # transformers 5.17's SDPA leaves the cap out without a word
            )
        if settings.quantization != "none":
            trust |= {"quantization_config": nf4_config(dtype), "device_map": {"": device}}
        if empty:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)
            model.to_empty(device=device).tie_weights()
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, config=config, **trust)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the model in {path} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
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
        raise ConfigError(
            f"--quantization {settings.quantization} has no room for the adapter {adapter}; take the whole model"
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            f"the adapter {adapter} needs the package peft: {install_hint('lora')}"
        ) from error
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.name_or_path = str(adapter)  # which adapters trained on it will name
    return merged.eval()


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's weights (arXiv 2305.14314): NF4 with quantised constants, computed in `dtype`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--quantization 4bit needs the package bitsandbytes: {install_hint('qlora')}"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
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
    tolerance = (
        1e-3 if policy.model.dtype == torch.float32 else 0.03
    )  # of a log-probability: bf16 keeps 8 bits of a logit of 10
    for name in candidates(policy.device, policy.model.dtype):
        layout = policy.build_layout(branches)
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


def _fits_trees(config: Any, plan: TreeLayout) -> bool:
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
    if (
        not (path / "tokenizer_config.json").is_file()
        and (base := model_files.base_model_path(path)) != path
    ):
        return load_tokenizer(base, settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"the chat template {settings.chat_template} cannot be read: {error}"
            ) from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {path} has no chat template; give one with --chat-template FILE.jinja"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {path} has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    probe = "Is 2 + 2 = 4?\nYes, it's so."
    if (
        str(tokenizer.decode(tokenizer(probe, add_special_tokens=False)["input_ids"])).strip()
        != probe
    ):
        warn(
            f"the tokenizer in {path} does not give a plain sentence back; is its tokenizer.json read as it should be?"
        )
    return tokenizer


def end_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: the tokenizer's, and those of the model's generation config."""
    ids = {tokenizer.eos_token_id}
    path = model_files.base_model_path(path)
    if (path / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(more) if isinstance(more, list) else {more}
    return frozenset(i for i in ids if i is not None)


def resolve_device(name: str) -> str:
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """bf16 or fp32; auto is bf16 where the hardware computes in it: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else torch.float32
    )


def weights_key(weights_digest: str, settings: ModelSettings, chat: Chat) -> str:
    """16 hex digits naming weights, precision, tokenizer and template: a reference log-probability is valid under this key only.

    weights_digest: of `model_sources.digest`.
    """
    parts = [
        weights_digest,
        str(resolve_dtype(settings.dtype, settings.device)),
        chat.template_digest(),
    ]
    parts += [settings.quantization] if settings.quantization != "none" else []
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
