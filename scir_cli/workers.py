"""Several processes over the parts of one dataset: each has devices of its own, takes a part, writes it, and asks for the next.

A part depends on the plan alone, so any worker may make it, and the one that died is made again by whoever is free. Nothing is shared but the
folder: parts do not travel between processes. Out on purpose: other machines.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from scir_cli import store
from scir_cli.config import BackendSettings
from scir_cli.errors import ConfigError, EngineError, ScirError
from scir_cli.meter import Meter
from scir_cli.store import Todo

FAILURES = 3  # of one part, after which it is the part's fault and not the worker's
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass
class Worker:
    process: Any
    pipe: Connection
    todo: Todo

    def give(self, todo: Todo) -> None:
        self.todo = todo
        self.pipe.send(todo)


def share(target: str, settings: BackendSettings, meter: Meter) -> Callable[[str, list[Todo], Callable[[int], None]], None] | None:
    """How `store.write_dataset` has its parts made by settings.data_parallel processes; None where one process does.

    target: "module:function" that makes of the settings what makes a part, in the worker. meter: what they compute is added to it. Raises ConfigError where there are too few GPUs.
    """
    if settings.data_parallel == 1:
        return None
    devices = _devices(settings)
    meter.processes = settings.data_parallel
    return lambda kind, todo, advance: _run(target, settings, devices, kind, todo, advance, meter)


def _devices(settings: BackendSettings) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None where the work is not on GPUs."""
    import torch

    n, each = settings.data_parallel, settings.tensor_parallel_size
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d] or [
        str(i) for i in range(torch.cuda.device_count())
    ]
    if settings.device == "cpu" or settings.backend == "openai" or not visible:
        return [None] * n
    if settings.device != "auto" and settings.device != "cuda":
        raise ConfigError(f"--data-parallel gives each process a GPU of its own; leave --device {settings.device} out")
    if len(visible) < n * each:
        raise ConfigError(
            f"--data-parallel {n} with --tensor-parallel-size {each} needs {n * each} GPUs, and {len(visible)} are visible"
        )
    return [",".join(visible[i * each : (i + 1) * each]) for i in range(n)]


def _run(
    target: str,
    settings: Any,
    devices: Sequence[str | None],
    kind: str,
    todo: list[Todo],
    advance: Callable[[int], None],
    meter: Meter,
) -> None:
    """Raises EngineError once a part has failed three times, and at once what a worker says is the user's to repair."""
    waiting, failures = deque(todo), Counter[str]()
    workers: dict[int, Worker] = {}
    try:
        while waiting or workers:
            for slot, visible in enumerate(devices):
                if slot not in workers and waiting:
                    workers[slot] = _start((target, settings, kind, visible, len(devices)), waiting.popleft())
            for pipe in wait([worker.pipe for worker in workers.values()]):
                slot, worker = next((slot, worker) for slot, worker in workers.items() if worker.pipe is pipe)
                why = _outcome(worker, meter)
                if why is None:
                    advance(worker.todo.high - worker.todo.low)
                    if waiting:
                        worker.give(waiting.popleft())
                        continue
                _end(workers.pop(slot))
                if why is not None:
                    failures[worker.todo.path.name] += 1
                    waiting.insert(1, worker.todo)  # for one that is running: who replaces the dead starts with another part
                    if failures[worker.todo.path.name] == FAILURES:
                        raise EngineError(
                            f"{worker.todo.path} failed {FAILURES} times, last because {why}; finished parts are kept, the same command goes on from there"
                        )
    finally:
        for worker in workers.values():
            worker.process.terminate()
            _end(worker)


def _start(arguments: tuple[Any, ...], todo: Todo) -> Worker:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, os.getpid(), *arguments))
    process.start()
    theirs.close()  # so that its death ends our reading
    worker = Worker(process, ours, todo)
    worker.give(todo)
    return worker


def _outcome(worker: Worker, meter: Meter) -> str | None:
    """None where the part is on disk, else why it is not."""
    try:
        said = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        return f"its process ended with status {worker.process.exitcode}"
    if isinstance(said, ScirError) and not isinstance(said, EngineError):
        raise said
    if isinstance(said, ScirError):
        return str(said)
    meter.add(said)
    return None


def _end(worker: Worker) -> None:
    worker.pipe.close()
    worker.process.join()


def _work(pipe: Connection, parent: int, target: str, settings: Any, kind: str, visible: str | None, n: int) -> None:
    """A worker: says what it computed for a part that is written, or what went wrong, and then ends: what failed may have left it unwell."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver too, which ends its workers
    if os.getppid() != parent:  # it died before that call
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    module, _, function = target.partition(":")
    try:
        with closing(getattr(importlib.import_module(module), function)(settings)) as make:
            while True:
                todo = pipe.recv()
                store.write_part(todo.path, kind, make(todo.low, todo.high))
                pipe.send(make.meter.take())
    except EOFError:
        return
    except ScirError as error:
        pipe.send(error)
    except Exception as error:  # out of memory, say: another try, by another process, may go well
        pipe.send(EngineError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
