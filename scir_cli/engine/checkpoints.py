"""What kind of checkpoint a folder holds: text only or multimodal, plain or quantized.

A multimodal checkpoint is loaded whole, so that it can be saved whole. Its text model reads and
writes; the rest is frozen, and adapters leave it alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from scir_cli.engine import weight_files
from scir_cli.errors import ModelError

#: Quantizations that transformers undoes when it loads a checkpoint.
DEQUANTIZED: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}

#: Files of a processor, which a server asks for beside the weights of a multimodal model.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)

#: Buffers that models compute by themselves, and that old checkpoints hold.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|position_ids$")


def model_class(config: Any) -> Any:
    """The class of transformers that loads a checkpoint with all its parts.

    A multimodal class if the config names one, even where a class for text alone would fit.
    Raises ModelError if there is none.
    """
    kind = type(config)
    names = set(config.architectures or ())
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        multimodal: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
        if multimodal.__name__ in names or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForImageTextToText
    remote = getattr(config, "auto_map", None) or {}
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        return AutoModelForCausalLM
    raise ModelError(
        f"a model of type {config.model_type} ({', '.join(sorted(names)) or 'no class named'}) "
        "does not write text in a way that is supported: pass a causal language model"
    )


def dequantizer(config: Any) -> Any:
    """The config that undoes a checkpoint's quantization; None if its weights are plain.

    Raises ModelError for a quantization that cannot be undone.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = str(getattr(quantization.get("quant_method"), "value", quantization["quant_method"]))
    if method not in DEQUANTIZED:
        raise ModelError(
            f"its weights are quantized ({method}), and only those of "
            f"{' and '.join(DEQUANTIZED)} are dequantized: pass the checkpoint in bf16, and "
            "--quantization 4bit if memory is short"
        )
    known = {k: v for k, v in quantization.items() if k not in ("quant_method", "dequantize")}
    return DEQUANTIZED[method](**known, dequantize=True)


def text_model(model: Any) -> nn.Module:
    """The part of a model that reads tokens, without its head and without what sees or hears."""
    tower: Any = model.get_decoder()
    if tower is not model and tower.get_output_embeddings() is not None:
        # Some wrappers keep a language model with its head.
        tower = tower.get_decoder()
    part: nn.Module = tower
    return part


def freeze_other_parts(model: Any) -> list[str]:
    """Freezes what is outside the text model and its head; names of the modules with weights.

    Empty for a model of text alone.
    """
    parts = [text_model(model), model.get_output_embeddings()]
    trained = {id(p) for part in parts for p in part.parameters()}
    frozen = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(id(p) in trained for p in own):
            for parameter in own:
                parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


@torch.no_grad()
def unadaptable(model: Any) -> list[str]:
    """Names of linear modules that are not called as such, so that an adapter has no effect there.

    Routers that return more than a product, products by groups, and the last matrix of a Mamba
    layer, whose kernel reads its weight.
    """
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        in_kernel = hasattr(parent, "A_log") and hasattr(parent, "D")
        if (in_kernel and name.endswith("out_proj")) or not _is_called_as_linear(module):
            names.append(name)
    return names


def _is_called_as_linear(module: nn.Linear) -> bool:
    """Whether a module of a subclass maps (1, inputs) to (1, outputs)."""
    if type(module) is nn.Linear or not module.weight.is_floating_point():
        return True
    try:
        result: Any = module(module.weight.new_zeros(1, module.in_features))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(result, Tensor) and result.shape == (1, module.out_features)


def expert_weights(model: Any) -> dict[str, nn.Parameter]:
    """The weights of the text model that are one tensor for all experts, by name.

    They are no linear modules: adapters and 4-bit quantization leave them as they are.
    """
    found = {}
    for name, module in text_model(model).named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2 and not isinstance(module, nn.Conv1d | nn.Conv2d):
                found[f"{name}.{own}"] = parameter
    return found


def left_out(path: Path, model: Any) -> list[str]:
    """Tensors of a checkpoint that a loaded model has no place for, as multi-token prediction.

    The model's class names them; they are not in a folder that is saved.
    """
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    names: list[str] = []
    for file in weight_files.weight_files(path):
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as tensors:
                names += tensors.keys()
    return sorted(name for name in names if _matches(name, ignored))


def _matches(name: str, patterns: list[re.Pattern[str]]) -> bool:
    """Whether a tensor is ignored, and is more than a buffer that models compute."""
    return not _COMPUTED.search(name) and any(p.search(name) for p in patterns)
