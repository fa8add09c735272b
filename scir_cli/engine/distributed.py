"""Several processes as one trainer, on torch's own collectives.

    ddp    every rank holds the whole model; gradients are summed once per step
    fsdp   parameters, gradients and optimizer state are sharded, on the device or on the CPU
           (FSDP2: torch's fully_shard, layer by layer)
    zero   DeepSpeed's ZeRO instead, if accelerate's plugin selects it (deepspeed_zero.py)

Ranks are read from torchrun's variables, so torchrun, `accelerate launch` and
`scir train --num-processes` (`launch` below) work alike.
Left out: overlapping ddp's single sum with the backward pass.
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

#: Elements of gradients that are summed in one collective.
BUCKET_ELEMENTS = 2**25

#: Set in processes whose parent prints the result.
LAUNCHED = "SCIR_LAUNCHED"

#: Seconds between two checks of the processes of `launch`.
POLL_SECONDS = 0.1


class DistributedContext:
    """The ranks of a run, and the collectives between them.

    Without torchrun's variables there is one rank, and each collective returns its argument.
    Raises ConfigError for a plugin of accelerate that is not supported.
    """

    def __init__(self, cuda: bool) -> None:
        """Reads torchrun's variables, and starts the process group if there are several ranks."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.sharded = False
        #: DeepSpeed's config, if accelerate's DeepSpeed plugin is on.
        self.zero = deepspeed_zero.deepspeed_config(cuda)
        for plugin in ("FSDP", "Megatron_LM"):
            if os.environ.get(f"ACCELERATE_USE_{plugin.upper()}", "").lower() == "true":
                raise ConfigError(
                    f"accelerate's {plugin} plugin is not supported: launch without it and pass "
                    "--sharding fsdp, and --cpu-offload if memory is short"
                )
        if self.size > 1 or self.zero:
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.device = "cuda" if cuda else "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order. Collective: every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_from_main(self, value: Any) -> Any:
        """The value of rank 0. Collective: every rank must call it."""
        return self.all_gather(value)[0]

    def assign(self, loads: Sequence[int]) -> list[int]:
        """The indices of the loads that this rank takes, ascending.

        The heaviest load is assigned first, each to the rank with the smallest total so far.
        Every rank computes the same assignment.
        """
        heaviest_first = sorted(range(len(loads)), key=lambda i: -loads[i])
        totals = [0] * self.size
        assigned = []
        for index in heaviest_first:
            rank = totals.index(min(totals))
            totals[rank] += loads[index]
            if rank == self.rank:
                assigned.append(index)
        return sorted(assigned)

    @property
    def shards_weights(self) -> bool:
        """Whether DeepSpeed shards the weights as well (ZeRO-3)."""
        return self.zero is not None and self.zero["zero_optimization"]["stage"] == 3

    def shard(
        self, scorer: nn.Module, blocks: Iterable[nn.Module], cpu_offload: bool = False
    ) -> Any:
        """Shards a model over the ranks, and returns the module that scores from then on.

        FSDP2 shards every block by itself, and the rest (embeddings, head) with the scorer. Only
        rank 0 needs to hold the weights: they leave it block by block, so no device holds more than
        its shards and one whole block (or the embeddings and head). DeepSpeed moves all weights to
        the device before it shards them.
        Collective: every rank must call it.
        Raises ModelError if the weights do not have the shapes and types of the model's config.
        """
        mesh = init_device_mesh(self.device, (self.size,))
        self._check_shapes(scorer)
        self._broadcast_buffers(scorer)
        if self.zero:
            return deepspeed_zero.initialize_engine(self.zero, self.size, scorer)

        offload = OffloadPolicy()
        if cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device == "cuda")
        for module in [*blocks, scorer]:
            for parameter in module.parameters():
                # Of the scorer, the parameters of the blocks are sharded already.
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(self.device)
                    dist.broadcast(parameter.data, 0)
            fully_shard(module, mesh=mesh, offload_policy=offload)
        self.sharded = True
        return scorer

    def _check_shapes(self, scorer: nn.Module) -> None:
        """Raises ModelError if a parameter's name, shape or type differs from rank 0's."""
        parameters = [(name, p.shape, p.dtype) for name, p in scorer.named_parameters()]
        if parameters != self.broadcast_from_main(parameters):
            raise ModelError(
                "the weights of this model do not have the shapes and types of its config: "
                "train it with --sharding ddp"
            )

    def _broadcast_buffers(self, scorer: nn.Module) -> None:
        """Copies the buffers of rank 0 to every rank."""
        buffers = list(scorer.buffers())
        values = self.broadcast_from_main([b.cpu() for b in buffers])
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)

    def sum_gradients(self, params: Sequence[Tensor]) -> None:
        """Sums the gradient of every parameter over the ranks.

        A gradient that no rank has stays None. Sharded gradients are summed already.
        Collective: every rank must call it.
        """
        if self.size == 1 or self.sharded:
            return
        device = params[0].device
        has_gradient = [p.grad is not None for p in params]
        ranks_with_gradient = torch.tensor(has_gradient, dtype=torch.int32, device=device)
        dist.all_reduce(ranks_with_gradient)

        gradients = []
        for p, n in zip(params, ranks_with_gradient.tolist(), strict=True):
            if n:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                gradients.append(p.grad)

        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            parts = flat.split([g.numel() for g in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        """Ends the process group, if it was started."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Consecutive tensors of one dtype, in buckets of at most BUCKET_ELEMENTS elements.

    A larger tensor is a bucket by itself.
    """
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
    """The full tensor on the CPU, of a tensor that may be sharded; other values as they are.

    Collective: every rank must call it. Ranks with keep=False get None.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if hasattr(value, "ds_id"):
        value = deepspeed_zero.gather_parameter(value)
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """A full tensor on the device of `other`; only this rank's shard if `other` is sharded."""
    if isinstance(other, DTensor):
        value = value.to(other.device, other.dtype)
        return distribute_tensor(value, other.device_mesh, other.placements)
    return value.to(other.device)


def launch(arguments: Sequence[str], n: int) -> None:
    """Runs `scir ARGUMENTS` in n processes of this machine, as the ranks of one run.

    When one fails, the others are ended.
    Raises ChildReportedError if rank 0 has printed an error, and StageFailed for any other failure.
    """
    command = [sys.executable, "-m", "scir_cli", *arguments]
    variables = _launch_variables(n)
    processes = []
    for rank in range(n):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **variables, **of_rank},
                stdout=subprocess.DEVNULL,
                preexec_fn=exit_with_parent,
            )
        )
    try:
        _wait_for_first_failure(processes)
    finally:
        for process in processes:
            process.terminate()
        codes = [process.wait() for process in processes]

    # With status 1 or 2, rank 0 has printed its error.
    if codes[0] in (1, 2):
        raise ChildReportedError(codes[0])
    if any(codes):
        raise StageFailed(
            f"the {n} processes ended with status {codes}; checkpoints are kept, "
            "run the same command again to continue"
        )


def _launch_variables(n: int) -> dict[str, str]:
    """The environment variables that the n ranks on this machine have in common."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // n)
    return {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _wait_for_first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Returns when one process has failed, or all have ended."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(POLL_SECONDS)


class ChildReportedError(StageFailed):
    """A child process has printed its error on stderr; only its exit status is passed on."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.exit_code = status
