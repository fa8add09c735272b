"""LoRA adapters: put on a model before it is trained, and merged into its weights after."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from scir_cli.data import files
from scir_cli.engine import loading
from scir_cli.engine.model_files import BASE_DIGEST_FILE
from scir_cli.engine.policy import Policy
from scir_cli.errors import ConfigError, install_hint
from scir_cli.settings import TrainSettings


def add_adapters(model: Any, settings: TrainSettings) -> Any:
    """The model with new LoRA adapters, which change nothing until they are trained. Raises ConfigError without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"--lora-rank needs the package peft: {install_hint('lora')}") from error
    # The same adapters on every rank.
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        target_modules=settings.lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft's own warning, of transformers 5.23
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return get_peft_model(model, config)


def save_adapter(policy: Policy, folder: Path, weights_digest: str) -> None:
    """Writes the policy's adapters and the digest of the weights they belong to."""
    with warnings.catch_warnings():
        # peft looks for a config in the model it was trained on, and an adapter's folder has none.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        policy.model.save_pretrained(folder)
    files.write_json(folder / BASE_DIGEST_FILE, {"digest": weights_digest})


def merge_adapter(policy: Policy, settings: TrainSettings, adapter: Path) -> Any:
    """The model with its adapters added into its weights.

    adapter: the folder that `save_adapter` wrote. A model held in 4 bits is read again, as it was before it was quantized.
    """
    if settings.quantization == "none":
        return policy.model.merge_and_unload()
    from peft import PeftModel

    whole = loading.load_model(
        policy.path, settings.model_copy(update={"quantization": "none"}), "cpu"
    )
    return PeftModel.from_pretrained(whole, adapter).merge_and_unload()
