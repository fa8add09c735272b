"""A policy from a model spec: tokenizer, weights, dtype, and the probe of how it is scored."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils.logging import disable_progress_bar

from scir_cli.engine import checkpoints, model_files, tree_attention
from scir_cli.engine.batches import Batching
from scir_cli.engine.chat import Chat
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.hardware import resolve_device, resolve_dtype, warn_of_emulation
from scir_cli.engine.policy import Policy
from scir_cli.engine.probe import select_batching, select_tree_attention
from scir_cli.engine.throughput import Meter
from scir_cli.errors import ConfigError, ModelError, ScirError, install_hint, warn
from scir_cli.settings import ModelSettings, SplitSettings

#: What the user reads about a model that takes no trees, by its batching.
_SLOWER: dict[Batching, str] = {
    "padded": "cannot score token trees ({reason}); it is scored in padded batches: "
    "same results, slower",
    "equal": "cannot score token trees ({reason}), and padding changes its results; it is scored "
    "in batches of equal length: same results, slower",
    "alone": "cannot score token trees ({reason}), and batches change its results; it is scored "
    "one branch at a time: same results, much slower",
}

#: Tensors that an error names.
N_NAMED = 3

#: A text that a tokenizer must decode to itself.
ROUND_TRIP_TEXT = "Is 2 + 2 = 4?\nYes, it's so."


def load(
    settings: ModelSettings,
    spec: str | None = None,
    device: str | None = None,
    *,
    chat: Chat | None = None,
    key: str | None = None,
    meter: Meter | None = None,
    adapt: Callable[[Any], Any] | None = None,
    ranks: DistributedContext | None = None,
    cpu_offload: bool = False,
) -> Policy:
    """The policy of a model spec, on its device, in eval mode and without dropout.

    spec: by default settings.model. device: by default settings.device.
    chat, key: tokenizer and weights key of this model, if they are loaded already
    (lazy_policy.py); if not, the tokenizer is loaded and the weights are hashed.
    meter: counts what the policy computes. adapt: adds adapters to the model.
    ranks: the weights are sharded over them, and only rank 0 reads the weights.
    Raises ModelError if the model is missing or damaged.
    """
    path = model_files.resolve(spec or settings.model)
    if chat is None:
        chat = load_chat(path, settings)
    if key is None:
        key = weights_key(model_files.digest(path), settings, chat)

    target = "cpu" if ranks else device or resolve_device(settings.device)
    warn_of_emulation(resolve_dtype(settings.dtype, settings.device), settings.device)
    empty = ranks is not None and not ranks.is_main
    model = load_model(path, settings, target, empty=empty)
    plain_attention = model.config._attn_implementation
    adapted = adapt(model) if adapt else model
    policy = Policy(adapted, chat, key, path, plain_attention, ranks=ranks, meter=meter or Meter())
    if ranks:
        policy.scorer = ranks.shard(policy.scorer, policy.scorer.blocks, cpu_offload)

    tree_attention.register()
    policy.tree_attention = select_tree_attention(policy)
    if not policy.takes_trees:
        policy.batching = select_batching(policy)
        warn(f"{path.name} {_SLOWER[policy.batching].format(reason=policy.tree_refusal)}")
    policy.reshard()
    return policy


def load_model(path: Path, settings: ModelSettings, device: str, *, empty: bool = False) -> Any:
    """The model in a folder, in eval mode and without dropout.

    empty: allocates memory for the weights without reading them.
    Raises ModelError if the model is damaged, ConfigError if a package for it is missing.
    """
    # transformers shows its progress bar on stderr even in a pipe.
    disable_progress_bar()
    try:
        base = model_files.base_model_path(path)
        if base != path:
            model = load_model(base, settings, device, empty=empty)
            return model if empty else _merge_adapter(model, path, settings)
        model = _load_whole_model(path, settings, device, empty)
    except ScirError:
        raise
    # A damaged config or file can make transformers raise anything.
    except Exception as error:
        raise ModelError(f"the model in {path} cannot be loaded: {first_line(error)}") from error

    # A quantized model is loaded onto its device.
    if settings.quantization == "none":
        model.to(device)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "quant_state"):
            # In eval mode bitsandbytes repacks the weights for a CPU, in a form without a
            # backward pass.
            module.training = True
    # Sampling settings are this package's alone.
    model.generation_config = GenerationConfig()
    return model


def load_config(path: Path, settings: ModelSettings) -> Any:
    """The config in a folder that holds no adapter. Raises ModelError if it is damaged."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The class of a library's error and the first line of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _load_whole_model(path: Path, settings: ModelSettings, device: str, empty: bool) -> Any:
    """The model in a folder that holds no adapter, as transformers loads it."""
    dtype = resolve_dtype(settings.dtype, settings.device)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    config = load_config(path, settings)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        # The SDPA attention of transformers 5.17 ignores the cap without an error.
        options["attn_implementation"] = "eager"
    plain = checkpoints.dequantizer(config)
    if plain is not None:
        _check_not_quantized_twice(settings)
        options["quantization_config"] = plain
    elif settings.quantization != "none":
        options["quantization_config"] = nf4_config(dtype)
        options["device_map"] = {"": device}
    kind = checkpoints.model_class(config)
    if empty:
        return _empty_model(kind, config, dtype, device, settings)

    options["output_loading_info"] = True
    model, loaded = kind.from_pretrained(path, dtype=dtype, config=config, **options)
    _check_no_tensor_is_missing(path, loaded)
    if plain is not None:
        _forget_quantization(model)
    checkpoints.freeze_other_parts(model)
    return model


def _empty_model(
    kind: Any, config: Any, dtype: torch.dtype, device: str, settings: ModelSettings
) -> Any:
    """A model whose weights have memory and no values.  kind: class of transformers"""
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, **options)
    model.to_empty(device=device).tie_weights()
    checkpoints.freeze_other_parts(model)
    return model


def _check_not_quantized_twice(settings: ModelSettings) -> None:
    """Raises ConfigError if a quantized checkpoint is to be quantized again."""
    if settings.quantization != "none":
        raise ConfigError(
            f"--quantization {settings.quantization} does not support a checkpoint that is "
            "quantized already: leave it out, or pass the checkpoint in bf16"
        )


def _forget_quantization(model: Any) -> None:
    """Makes a dequantized model a plain one, which is saved and loaded as such."""
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in model.__dict__:
            delattr(model, name)


def _check_no_tensor_is_missing(path: Path, loaded: dict[str, Any]) -> None:
    """Raises ModelError if transformers filled tensors with random numbers.

    loaded: what `from_pretrained` says about loading.
    """
    missing = sorted(loaded["missing_keys"])
    if missing:
        more = f" and {len(missing) - N_NAMED} more" if len(missing) > N_NAMED else ""
        raise ModelError(
            f"the weights in {path} lack {', '.join(missing[:N_NAMED])}{more}; "
            "download or write the model again"
        )


def _merge_adapter(model: Any, adapter: Path, settings: ModelSettings) -> Any:
    """The model with a LoRA adapter added into its weights.

    Raises ConfigError if the model is quantized or peft is missing, ModelError if a tensor is.
    """
    if settings.quantization != "none":
        raise ConfigError(
            f"--quantization {settings.quantization} does not support a model that is an adapter "
            f"({adapter}); pass the folder of the merged model"
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(
            f"the adapter {adapter} needs the package peft: {install_hint('lora')}"
        ) from error
    with warnings.catch_warnings():
        # peft only warns about tensors that it fills with new ones.
        warnings.filterwarnings("error", message="(?s).*missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, adapter)
        except UserWarning as warning:
            raise ModelError(f"the adapter {adapter} is incomplete: {warning}") from warning
    merged = adapted.merge_and_unload()
    # An adapter trained on this model refers to it by this name.
    merged.name_or_path = str(adapter)
    return merged.eval()


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's weights (arXiv 2305.14314): NF4 with quantized constants, computed in `dtype`.

    Raises ConfigError if bitsandbytes is missing.
    """
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


def load_chat(path: Path, settings: ModelSettings) -> Chat:
    """The tokenizer in a model folder, with its chat template and end tokens.

    Raises ModelError as `load_tokenizer` does, and if the template renders no conversation.
    """
    tokenizer = load_tokenizer(path, settings)
    think_end = settings.think_end if isinstance(settings, SplitSettings) else None
    kwargs = settings.chat_template_kwargs or {}
    chat = Chat(tokenizer, end_ids(path, tokenizer), kwargs, think_end)
    chat.check()
    return chat


def load_tokenizer(path: Path, settings: ModelSettings) -> Any:
    """The tokenizer in a model folder; that of the base model if an adapter has none.

    Raises ModelError if the tokenizer is damaged, or has no chat template or end token.
    """
    if not (path / "tokenizer_config.json").is_file():
        base = model_files.base_model_path(path)
        if base != path:
            return load_tokenizer(base, settings)
    trust = settings.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    # The Rust library of tokenizers raises plain exceptions.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded: {first_line(error)}"
        ) from error

    if settings.chat_template is not None:
        tokenizer.chat_template = _read_chat_template(settings.chat_template)
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {path} has no chat template; "
            "pass one with --chat-template FILE.jinja"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {path} has no end-of-sequence token; "
            "set eos_token in its tokenizer_config.json"
        )
    ids = tokenizer(ROUND_TRIP_TEXT, add_special_tokens=False)["input_ids"]
    if str(tokenizer.decode(ids)).strip() != ROUND_TRIP_TEXT:
        warn(
            f"the tokenizer in {path} failed a round trip: decode(encode(text)) != text; "
            "check its tokenizer.json"
        )
    return tokenizer


def _read_chat_template(path: Path) -> str:
    """The text of a Jinja template. Raises ModelError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}") from error


def end_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer, from the tokenizer and the model's generation config."""
    ids = {tokenizer.eos_token_id}
    path = model_files.base_model_path(path)
    if (path / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(i for i in ids if i is not None)


def weights_key(weights_digest: str, settings: ModelSettings, chat: Chat) -> str:
    """16 hex digits that name weights with their precision, tokenizer and template.

    A reference log-probability is valid under this key only.
    weights_digest: of `model_files.digest`.
    """
    dtype = resolve_dtype(settings.dtype, settings.device)
    parts = [weights_digest, str(dtype), chat.template_digest()]
    if settings.quantization != "none":
        parts.append(settings.quantization)
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
