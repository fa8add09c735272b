"""A pool of worker processes on this machine, each with GPUs of its own."""

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
    """CUDA_VISIBLE_DEVICES of each worker; None for a worker without GPUs. Raises ConfigError for too few GPUs."""
    import torch

    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d] or [
        str(i) for i in range(torch.cuda.device_count())
    ]
    if not visible or not pool.uses_gpus(settings):
        return [None] * pool.n_workers(settings, 0)
    each = settings.tensor_parallel_size
    return [
        ",".join(visible[i * each : (i + 1) * each])
        for i in range(pool.n_workers(settings, len(visible)))
    ]


@dataclass
class Worker:
    process: Any
    pipe: Connection
    part: PartTask | None = None
    busy: bool = True  # also while it starts

    def end(self) -> None:
        """Ends a busy process; a free one ends by itself when its pipe closes."""
        if self.busy:
            self.process.terminate()
        self.pipe.close()


class LocalProcesses:
    """A pool (pool.WorkerPool) of one process per entry of `devices`, its CUDA_VISIBLE_DEVICES."""

    def __init__(self, job: WorkerJob, devices: Sequence[str | None]) -> None:
        self.job = job
        self.devices = devices
        self.workers: dict[int, Worker] = {}

    def wait(self) -> list[WorkerMessage]:
        for number in range(len(self.devices)):
            if number not in self.workers:
                self.workers[number] = self._start(number)
        ready = wait([worker.pipe for worker in self.workers.values()])
        return [
            self._receive(number, worker)
            for number, worker in list(self.workers.items())
            if worker.pipe in ready
        ]

    def assign(self, worker: int, part: PartTask) -> None:
        target = self.workers[worker]
        target.part = part
        target.busy = True
        with contextlib.suppress(OSError):  # it died while it was free: `wait` reports that
            target.pipe.send(part)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.end()
        for worker in self.workers.values():
            worker.process.join()

    def _start(self, number: int) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, os.getpid(), self.job, self.devices[number], len(self.devices))
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=arguments, name=f"worker {number}"
        )
        process.start()
        # Without this, the worker's death would not end our reading.
        theirs.close()
        return Worker(process, ours)

    def _receive(self, number: int, worker: Worker) -> WorkerMessage:
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
    """The process of a worker: sends None when it is ready, then the result of each part, and ends after an error."""
    exit_with_parent(parent, signal.SIGKILL)
    # Ctrl-C is for the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    result: Meter | ScirError | None = None
    with contextlib.suppress(EOFError, ConnectionError), closing(PartWriter(job)) as writer:
        while not isinstance(result, ScirError):
            pipe.send(result)
            result = writer.write(pipe.recv())
        pipe.send(result)
