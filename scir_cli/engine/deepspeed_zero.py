"""DeepSpeed's ZeRO, as accelerate's plugin configures it.

It shards optimizer state (stage 1), gradients (2) and weights (3) over ranks.
Clipping, precision and batch sizes in DeepSpeed's config are set from this package's settings,
and the trainer decides when a step ends.
DeepSpeed averages gradients over ranks; the trainer scales for that, as it does under FSDP.
State is saved and restored as whole tensors, parameter by parameter.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scir_cli.errors import ConfigError, install_hint

#: State of AdamW per parameter, by torch's names.
MOMENTS = ("exp_avg", "exp_avg_sq")

#: What torch 2.13 reports about calls that DeepSpeed makes.
DEPRECATION = ".* is deprecated. Please use"


def deepspeed_config(cuda: bool) -> dict[str, Any] | None:
    """The config of accelerate's DeepSpeed plugin, or None if the plugin is not in use.

    Raises ConfigError if the process has no launcher, DeepSpeed is missing, or the config is wrong.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return None
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate's DeepSpeed plugin is on, but this process has no launcher: "
            "use accelerate launch or --num-processes; or use --sharding fsdp without the plugin, "
            "which is torch's equivalent of ZeRO-3"
        )
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "accelerate's DeepSpeed plugin needs the package deepspeed: "
            f"{install_hint('deepspeed')}"
        ) from error
    from accelerate.utils import DeepSpeedPlugin

    for handler in deepspeed.utils.logger.handlers:
        handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", DEPRECATION, FutureWarning, "torch.distributed")
    if not cuda:
        # Use gloo as it is, instead of a C++ extension that has to be compiled first.
        deepspeed.ops.__compatible_ops__ = {}
    try:
        return validate_config(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"accelerate's DeepSpeed plugin: {error}") from error


def validate_config(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config without its entries of 'auto'.

    Raises ConfigError for a stage other than 1, 2 or 3, and for an optimizer or scheduler.
    """
    settled = _drop_auto(config)
    stage = settled["zero_optimization"].get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"the DeepSpeed config has ZeRO stage {stage}, and scir supports stages 1, 2 and 3; "
            "launch without DeepSpeed for data parallelism"
        )
    for name in ("optimizer", "scheduler"):
        if settled.get(name):
            raise ConfigError(
                f"the DeepSpeed config sets the {name}: leave it out, and use the settings of "
                "scir train (--learning-rate, --schedule …)"
            )
    return settled


def _drop_auto(config: dict[str, Any]) -> dict[str, Any]:
    settled = {}
    for name, value in config.items():
        if isinstance(value, dict):
            settled[name] = _drop_auto(value)
        elif value != "auto":
            settled[name] = value
    return settled


def initialize_engine(
    config: dict[str, Any],
    n_ranks: int,
    module: nn.Module,
    optimizer: Any = None,
    max_grad_norm: float = 0.0,
) -> Any:
    """DeepSpeed's engine around a module, on its device.

    Without an optimizer, the engine is for scoring only.
    """
    import deepspeed

    zero_optimization = config["zero_optimization"]
    if zero_optimization["stage"] == 1:
        # Stage 1 cannot overlap communication if accumulation is not managed by DeepSpeed.
        zero_optimization = zero_optimization | {"overlap_comm": False}
    bf16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
    fixed = {
        "train_batch_size": n_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A step may have any number of backward passes.
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_optimization,
    }
    initialized = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={**config, **fixed},
    )
    return initialized[0]


def release_engine(engine: Any) -> nn.Module:
    """The module of an engine for scoring, ready for another engine; its weights stay sharded."""
    engine.empty_partition_cache()
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    return engine.module


class ZeroAdamW:
    """The trainer's optimizer under DeepSpeed: AdamW on each rank's shard of fp32 copies.

    score: any forward pass with gradient. max_norm: gradients are clipped to this norm.
    options: of torch's AdamW.
    """

    def __init__(
        self,
        ranks: Any,
        scorer: nn.Module,
        params: Sequence[Any],
        score: Callable[[], Tensor],
        max_norm: float,
        **options: Any,
    ) -> None:
        """Places DeepSpeed's engine around the scorer, and sets ranks.sharded."""
        self.params = list(params)
        self.score = score
        module = release_engine(scorer) if ranks.shards_weights else scorer
        adamw = torch.optim.AdamW(self.params, **options)
        self.engine = initialize_engine(ranks.zero, ranks.size, module, adamw, max_norm)
        ranks.sharded = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer, with their learning rates."""
        return self.engine.optimizer.param_groups

    def zero_grad(self) -> None:
        """Does nothing: a DeepSpeed step leaves no gradients."""

    def update(self, max_norm: float) -> float:
        """Ends a step, and returns the gradient's norm before clipping.

        DeepSpeed clips, and skips a step with a gradient that is not finite; the norm is then NaN.
        """
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if self.engine.was_step_applied() and norm >= 0 else float("nan")

    def whole(self, keep: bool) -> dict[str, Any]:
        """The full state as tensors on the CPU: fp32 weights and moments, by parameter.

        Collective: every rank must call it. Ranks with keep=False get empty lists.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = next(iter(self.engine.optimizer.optimizer.state.values()))["step"]
        master = []
        moments = []
        for p in self.params:
            weights = safe_get_full_fp32_param(p)
            averages = [safe_get_full_optimizer_state(p, name) for name in MOMENTS]
            if not keep:
                continue
            master.append(_copy_to_cpu(weights, p))
            state = {"step": step.to("cpu", copy=True)}
            for name, average in zip(MOMENTS, averages, strict=True):
                state[name] = _copy_to_cpu(average, p)
            moments.append(state)
        return {"master": master, "moments": moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Loads the state that `whole` returned, under any number of ranks.

        A first step with a learning rate of zero makes DeepSpeed allocate the state to fill.
        """
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        group = self.param_groups[0]
        learning_rate = group["lr"]
        group["lr"] = 0.0
        (self.score().sum() * 0).backward()
        self.engine.step()
        self.param_groups[0]["lr"] = learning_rate

        for p, master, moments in zip(self.params, state["master"], state["moments"], strict=True):
            with torch.no_grad(), zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(master)
            safe_set_full_fp32_param(p, master.to(p.device))
            for name in MOMENTS:
                value = moments[name] if moments else torch.zeros_like(master)
                safe_set_full_optimizer_state(p, value.to(p.device), name)

        steps = [float(moments["step"]) for moments in state["moments"] if moments]
        for sharded in self.engine.optimizer.optimizer.state.values():
            sharded["step"].fill_(max(steps, default=0.0))


def _copy_to_cpu(value: Tensor, parameter: Any) -> Tensor:
    """A copy on the CPU, in the shape of the whole parameter."""
    shape = parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape
    return value.to("cpu", copy=True).view(shape)


def gather_parameter(parameter: Any) -> Tensor:
    """The full tensor of a weight that ZeRO-3 shards. Collective: every rank must call it."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
