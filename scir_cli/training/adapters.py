"""LoRA adapters: added to a model before training, merged into its weights after it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from scir_cli.data import file_lists, manifests
from scir_cli.engine import checkpoints, loading
from scir_cli.engine.policy import Policy
from scir_cli.engine.weight_files import BASE_DIGEST_FILE
from scir_cli.errors import ConfigError, install_hint, warn
from scir_cli.settings import TrainSettings


def add_adapters(model: Any, settings: TrainSettings) -> Any:
    """The model with new LoRA adapters, which have no effect until they are trained.

    Raises ConfigError if peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"--lora-rank needs the package peft: {install_hint('lora')}") from error
    # The same adapters on every rank
    torch.manual_seed(settings.seed)
    excluded = checkpoints.freeze_other_parts(model)
    if settings.lora.target_modules == "all-linear":
        excluded += checkpoints.unadaptable(model)
    config = LoraConfig(
        exclude_modules=excluded or None,
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        target_modules=settings.lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft calls a function that transformers 5.23 deprecates.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        # peft gives experts a rank of their own, and they get no adapters here.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        adapted = get_peft_model(model, config)
    _tell_of_experts(adapted.get_base_model())
    return adapted


def _tell_of_experts(model: Any) -> None:
    """Prints one line if the weights of experts get no adapters."""
    experts = checkpoints.expert_weights(model)
    size = sum(p.numel() for p in experts.values())
    if experts:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in experts}))
        share = size / sum(p.numel() for p in model.parameters())
        warn(
            f"LoRA adapts linear modules; the experts' weights ({names}, {share:.0%} of the model) "
            "are none: they get no adapters and are not stored in 4 bits"
        )


def save_adapter(policy: Policy, folder: Path, weights_digest: str) -> None:
    """Writes the policy's adapters, their digests, and that of the weights they belong to."""
    with warnings.catch_warnings():
        # peft looks for the config of the base model, and an adapter's folder has none.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        policy.model.save_pretrained(folder)
    written = [file for file in folder.iterdir() if file.name != "README.md"]
    entries = file_lists.describe(folder, written)
    record = {"digest": weights_digest, "files": entries}
    manifests.write_checked(folder / BASE_DIGEST_FILE, record)


def merge_adapter(policy: Policy, settings: TrainSettings, adapter: Path) -> Any:
    """The model with its adapters added into its weights.

    adapter: the folder that `save_adapter` wrote.
    A model in 4 bits is loaded again in full precision: the adapters are added to those weights.
    """
    if settings.quantization == "none":
        return policy.model.merge_and_unload()
    from peft import PeftModel

    unquantized = settings.model_copy(update={"quantization": "none"})
    base = loading.load_model(policy.path, unquantized, "cpu")
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()
