"""DeepSpeed's ZeRO as accelerate's plugin configures it: optimizer state (stage 1), gradients (2) and weights (3) shared out over ranks.

Clipping, precision and batch sizes in DeepSpeed's config are put there from this package's settings, and a step ends when the trainer says so. Gradients
are averaged over ranks by DeepSpeed; the trainer scales for that, as it does under FSDP. State goes in and out as whole tensors, parameter by parameter.
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

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(cuda: bool) -> dict[str, Any] | None:
    """The config that accelerate's DeepSpeed plugin holds, or None where it is not used. Raises ConfigError."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return None
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate's DeepSpeed plugin is asked for in a process that nothing has launched: use accelerate launch or --num-processes; "
            "or --sharding fsdp without the plugin, which is ZeRO-3 by torch itself"
        )
    try:
        import deepspeed
    except ImportError as error:
        needs = "accelerate's DeepSpeed plugin needs the package deepspeed"
        raise ConfigError(f"{needs}: {install_hint('deepspeed')}") from error
    from accelerate.utils import DeepSpeedPlugin

    for handler in deepspeed.utils.logger.handlers:
        handler.setStream(sys.stderr)
    old = ".* is deprecated. Please use"  # what torch 2.13 says of DeepSpeed's calls
    warnings.filterwarnings("ignore", old, FutureWarning, "torch.distributed")
    if not cuda:
        deepspeed.ops.__compatible_ops__ = {}  # gloo as it is, rather than a C++ extension that is built while one waits
    try:
        return validate_config(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"accelerate's DeepSpeed plugin: {error}") from error


def validate_config(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config without what is 'auto'. Raises ConfigError where it asks for what is not done."""
    given = _drop_auto(config)
    stage = given["zero_optimization"].get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"DeepSpeed's ZeRO has stages 1, 2 and 3, and its config says {stage}; launch without DeepSpeed for data parallelism"
        )
    for name in ("optimizer", "scheduler"):
        if given.get(name):
            raise ConfigError(
                f"the DeepSpeed config brings a {name} of its own: leave it out, train's settings are --learning-rate, --schedule …"
            )
    return given


def _drop_auto(config: dict[str, Any]) -> dict[str, Any]:
    found = {
        name: _drop_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
    }
    return {name: value for name, value in found.items() if value != "auto"}


def engine(
    config: dict[str, Any],
    size: int,
    module: nn.Module,
    optimizer: Any = None,
    max_grad_norm: float = 0.0,
) -> Any:
    """DeepSpeed's engine around a module, on its device; without an optimizer, for scoring alone."""
    import deepspeed

    stage = config["zero_optimization"]["stage"]
    bf16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
    fixed = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step may have any number of backward passes
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": config["zero_optimization"]
        | ({"overlap_comm": False} if stage == 1 else {}),  # stage 1 cannot, unmanaged
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config={**config, **fixed})[0]


def release_engine(engine: Any) -> nn.Module:
    """The module of an engine for scoring, free for another; its weights stay shared out."""
    engine.empty_partition_cache()
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    return engine.module


class ZeroAdamW:
    """The trainer's optimizer where DeepSpeed steps: AdamW on each rank's part of fp32 copies. `score`: any forward pass with gradient."""

    def __init__(
        self,
        ranks: Any,
        scorer: nn.Module,
        params: Sequence[Any],
        score: Callable[[], Tensor],
        max_norm: float,
        **options: Any,
    ) -> None:
        self.params, self.score = list(params), score
        module = release_engine(scorer) if ranks.shards_weights else scorer
        self.engine = engine(
            ranks.zero, ranks.size, module, torch.optim.AdamW(self.params, **options), max_norm
        )
        ranks.sharded = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def zero_grad(self) -> None:
        """Nothing to do: a step leaves no gradient, and none is begun again."""

    def update(self, max_norm: float) -> float:
        """Ends a step, which DeepSpeed clips; the norm before that. One that is not finite is not taken."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if self.engine.was_step_applied() and norm >= 0 else float("nan")

    def whole(self, keep: bool) -> dict[str, Any]:
        """All state as one process would have it; every rank has to ask."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = next(iter(self.engine.optimizer.optimizer.state.values()))["step"]
        master, moments = [], []
        for p in self.params:
            values = [
                safe_get_full_fp32_param(p),
                *(safe_get_full_optimizer_state(p, name) for name in MOMENTS),
            ]
            if keep:
                values = [
                    value.to("cpu", copy=True).view(p.ds_shape if hasattr(p, "ds_id") else p.shape)
                    for value in values
                ]
                master.append(values[0])
                moments.append(
                    {
                        "step": step.to("cpu", copy=True),
                        **dict(zip(MOMENTS, values[1:], strict=True)),
                    }
                )
        return {"master": master, "moments": moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes on `whole` state, of any number of ranks, after a step that changes nothing and makes the places for it."""
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        rate, self.param_groups[0]["lr"] = self.param_groups[0]["lr"], 0.0
        (self.score().sum() * 0).backward()
        self.engine.step()
        self.param_groups[0]["lr"] = rate
        for p, master, moments in zip(self.params, state["master"], state["moments"], strict=True):
            with torch.no_grad(), zero.GatheredParameters([p], modifier_rank=0):
                p.copy_(master)
            safe_set_full_fp32_param(p, master.to(p.device))
            for name in MOMENTS:
                value = moments[name] if moments else torch.zeros_like(master)
                safe_set_full_optimizer_state(p, value.to(p.device), name)
        done = max((float(moments["step"]) for moments in state["moments"] if moments), default=0.0)
        for held in self.engine.optimizer.optimizer.state.values():
            held["step"].fill_(done)


def gather_parameter(parameter: Any) -> Tensor:
    """A weight of ZeRO-3 as one process would have it."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
