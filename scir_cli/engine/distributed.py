"""Several processes as one trainer, on torch's own collectives: who am I, what do the others have, whose part is this.

    ddp    every rank holds the whole model; gradients are summed once a step
    fsdp   parameters, gradients and optimizer state are sharded (FSDP2: torch's fully_shard, layer by layer), on the device or on the CPU
    zero   DeepSpeed's ZeRO in place of either, where accelerate's plugin asks for it (zero.py)

Ranks come from torchrun's variables, so torchrun, `accelerate launch` and `scir train --num-processes` (`launch` below) are all the same here.
Left out: hiding ddp's one sum behind the backward pass.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scir_cli.engine import deepspeed_zero
from scir_cli.errors import ConfigError, ModelError, StageFailed
from scir_cli.processes import exit_with_parent

BUCKET_ELEMENTS = 2**25  # gradients summed in one go
LAUNCHED = "SCIR_LAUNCHED"  # set in processes whose parent prints the result


class DistributedContext:
    """The processes of a run. Without torchrun's variables this is the only one, and every method gives back what it got."""

    def __init__(self, cuda: bool) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.sharded = False
        self.zero = deepspeed_zero.deepspeed_config(cuda)  # DeepSpeed's config
        for plugin in ("FSDP", "Megatron_LM"):
            if os.environ.get(f"ACCELERATE_USE_{plugin.upper()}", "").lower() == "true":
                raise ConfigError(
                    f"accelerate's {plugin} plugin is not used here: launch without it and give --sharding fsdp, with --cpu-offload if need be"
                )
        if self.size > 1 or self.zero:
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.device = "cuda" if cuda else "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """What every rank has, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_from_main(self, value: Any) -> Any:
        """What rank 0 has."""
        return self.all_gather(value)[0]

    def assign(self, loads: Sequence[int]) -> list[int]:
        """Which of these loads are this rank's: the heaviest first, each to the rank with the least so far. The same on every rank."""
        total, share = [0] * self.size, []
        for index in sorted(range(len(loads)), key=lambda i: -loads[i]):
            rank = total.index(min(total))
            total[rank] += loads[index]
            if rank == self.rank:
                share.append(index)
        return sorted(share)

    @property
    def shards_weights(self) -> bool:
        """Whether DeepSpeed shares out the weights themselves."""
        return self.zero is not None and self.zero["zero_optimization"]["stage"] == 3

    def shard(
        self, scorer: nn.Module, blocks: Iterable[nn.Module], cpu_offload: bool = False
    ) -> Any:
        """FSDP2: every block of the model by itself, then the rest (embeddings, head) with the module that scores; or ZeRO-3. Gives back what scores.

        Only the first rank needs to hold the weights; a block's leave it when the block is sharded. While it
        loads, no device holds more than its shards and one whole block (or the embeddings and head). DeepSpeed moves all of it there first.
        """
        mesh = init_device_mesh(self.device, (self.size,))
        offload = (
            CPUOffloadPolicy(pin_memory=self.device == "cuda") if cpu_offload else OffloadPolicy()
        )
        forms = [(name, p.shape, p.dtype) for name, p in scorer.named_parameters()]
        if forms != self.broadcast_from_main(forms):
            raise ModelError(
                "this model's weights do not have the shapes and types that its config says: train it with --sharding ddp"
            )
        for buffer, value in zip(
            scorer.buffers(),
            self.broadcast_from_main([b.cpu() for b in scorer.buffers()]),
            strict=True,
        ):
            buffer.copy_(value)
        if self.zero:
            return deepspeed_zero.engine(self.zero, self.size, scorer)
        for module in [*blocks, scorer]:
            for parameter in module.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(self.device)
                    dist.broadcast(parameter.data, 0)
            fully_shard(module, mesh=mesh, offload_policy=offload)
        self.sharded = True
        return scorer

    def sum_gradients(self, params: Sequence[Tensor]) -> None:
        """Adds up every parameter's gradient over ranks; one that no rank has stays None. Sharded gradients are summed already."""
        if self.size == 1 or self.sharded:
            return
        have = torch.tensor(
            [p.grad is not None for p in params], dtype=torch.int32, device=params[0].device
        )
        dist.all_reduce(have)
        gradients = []
        for p, n in zip(params, have.tolist(), strict=True):
            if n:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                gradients.append(p.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    n = BUCKET_ELEMENTS
    for tensor in tensors:
        if n + tensor.numel() > BUCKET_ELEMENTS or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            n = 0
        buckets[-1].append(tensor)
        n += tensor.numel()
    return buckets


def full_tensor(value: Any, keep: bool = True) -> Any:
    """A tensor as one process would have it, on the CPU; every rank has to ask, and one that will not `keep` it gets None. Anything else as it is."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if hasattr(value, "ds_id"):
        value = deepspeed_zero.gather_parameter(value)
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor in the place of `other`: on its device, or this rank's shard of it."""
    if isinstance(other, DTensor):
        return distribute_tensor(
            value.to(other.device, other.dtype), other.device_mesh, other.placements
        )
    return value.to(other.device)


def launch(arguments: Sequence[str], n: int) -> None:
    """Runs `scir ARGUMENTS` in n processes that are ranks of one another; raises StageFailed when one fails, and ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: "1",
    }
    shared["OMP_NUM_THREADS"] = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n))
    )
    command = [sys.executable, "-m", "scir_cli", *arguments]
    own = [
        {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)
    ]
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, preexec_fn=exit_with_parent)
        for env in own
    ]
    try:
        while any(process.poll() is None for process in processes) and not any(
            process.returncode for process in processes
        ):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait() for process in processes]
    if codes[0] in (1, 2):  # its own line has said why
        raise ChildReportedError(codes[0])
    if any(codes):
        raise StageFailed(
            f"the {n} processes ended with status {codes}; checkpoints are kept, the same command goes on from there"
        )


class ChildReportedError(StageFailed):
    """A child process has printed its error on stderr; only its exit status is passed on."""

    def __init__(self, status: int) -> None:
        super().__init__("")
        self.exit_code = status
