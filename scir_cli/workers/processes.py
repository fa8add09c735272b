"""A pool of worker processes on this machine; no two of them share a GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from scir_cli.data.dataset import PartTask
from scir_cli.engine.throughput import Meter
from scir_cli.errors import EngineError, ScirError
from scir_cli.processes import exit_with_parent
from scir_cli.settings import BackendSettings
from scir_cli.workers import pool
from scir_cli.workers.pool import PartWriter, WorkerJob, WorkerMessage


def visible_devices(settings: BackendSettings) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None for a worker without GPUs.

    Raises ConfigError if there are too few GPUs.
    """
    import torch

    variable = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = [device for device in variable.split(",") if device]
    if not visible:
        visible = [str(i) for i in range(torch.cuda.device_count())]
    if not visible or not pool.uses_gpus(settings):
        return [None] * pool.n_workers(settings, 0)

    each = settings.tensor_parallel_size
    devices: list[str | None] = []
    for i in range(pool.n_workers(settings, len(visible))):
        share = visible[i * each : (i + 1) * each]
        devices.append(",".join(share))
    return devices


@dataclass
class Worker:
    """A worker process, the pipe to it and the part that it computes."""

    process: Any
    pipe: Connection
    part: PartTask | None = None
    #: Whether it computes a part or starts.
    busy: bool = True

    def end(self) -> None:
        """Ends a busy process; a free one ends by itself when its pipe closes."""
        if self.busy:
            self.process.terminate()
        self.pipe.close()


class LocalProcesses:
    """A pool (pool.WorkerPool) of one process per entry of `devices`.

    devices: CUDA_VISIBLE_DEVICES of each process; None leaves it unset.
    """

    def __init__(self, job: WorkerJob, devices: Sequence[str | None]) -> None:
        self.job = job
        self.devices = devices
        self.workers: dict[int, Worker] = {}

    def wait(self) -> list[WorkerMessage]:
        """Starts the processes that are missing, and returns the messages that have arrived.

        Blocks until there is at least one message.
        """
        for number in range(len(self.devices)):
            if number not in self.workers:
                self.workers[number] = self._start(number)
        pipes = [worker.pipe for worker in self.workers.values()]
        ready = wait(pipes)
        messages = []
        # `_receive` removes workers that failed.
        for number, worker in list(self.workers.items()):
            if worker.pipe in ready:
                messages.append(self._receive(number, worker))
        return messages

    def assign(self, worker: int, part: PartTask) -> None:
        """Sends a part to a free worker."""
        target = self.workers[worker]
        target.part = part
        target.busy = True
        # If the worker died while it was free, `wait` reports that.
        with contextlib.suppress(OSError):
            target.pipe.send(part)

    def close(self) -> None:
        """Ends all workers, and waits for their processes."""
        for worker in self.workers.values():
            worker.end()
        for worker in self.workers.values():
            worker.process.join()

    def _start(self, number: int) -> Worker:
        """Starts a worker process."""
        parent_pipe, child_pipe = multiprocessing.Pipe()
        device = self.devices[number]
        arguments = (child_pipe, os.getpid(), self.job, device, len(self.devices))
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_work, args=arguments, name=f"worker {number}")
        process.start()
        # While this copy is open, `recv` would not end when the worker dies.
        child_pipe.close()
        return Worker(process, parent_pipe)

    def _receive(self, number: int, worker: Worker) -> WorkerMessage:
        """The message of a worker that has sent one or has died; ends and removes a failed one."""
        part = worker.part
        worker.part = None
        worker.busy = False
        result: Meter | ScirError | None
        try:
            result = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            result = EngineError(f"its process ended with status {worker.process.exitcode}")
        if isinstance(result, ScirError):
            worker.end()
            worker.process.join()
            del self.workers[number]
        return WorkerMessage(number, part, result)


def _work(pipe: Connection, parent: int, job: WorkerJob, visible: str | None, n: int) -> None:
    """Runs a worker in its process.

    Sends None when it is ready, then the result of each part, and ends after an error.
    visible: its CUDA_VISIBLE_DEVICES. n: the number of workers, which share the CPU cores.
    """
    exit_with_parent(parent, signal.SIGKILL)
    # Ctrl-C is for the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threads = max(1, (os.cpu_count() or 1) // n)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    result: Meter | ScirError | None = None
    with contextlib.suppress(EOFError, ConnectionError), closing(PartWriter(job)) as writer:
        while not isinstance(result, ScirError):
            pipe.send(result)
            result = writer.write(pipe.recv())
        pipe.send(result)
