"""Several workers over the parts of one dataset: each has devices of its own, takes a part, writes it, and asks for the next.

A part depends on the plan alone, so any worker may make it, and the one that died is made again by whoever is free. Nothing is shared but the
folder: parts do not travel between workers. Here are the loop and the processes of one machine; a cluster's are in cluster.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

from scir_cli import store
from scir_cli.config import BackendSettings
from scir_cli.errors import ConfigError, EngineError, ScirError
from scir_cli.meter import Meter
from scir_cli.store import Todo

FAILURES = 3  # of one part, after which it is the part's fault and not the worker's
PR_SET_PDEATHSIG = 1  # of prctl(2)

Share = Callable[[str, list[Todo], Callable[[int], None]], None]
Done = Callable[[int, Meter | None], None]  # told of each part that is written: its rows, what was computed for it


class Job(NamedTuple):
    """What a worker has to know. target: "module:function" that makes of the settings what makes a part."""

    target: str
    settings: BackendSettings
    kind: str


class Said(NamedTuple):
    """What a worker says: that it has come (no part, nothing), what it computed for a part that is on disk, or what went wrong; who has failed comes again."""

    worker: int
    todo: Todo | None
    said: Meter | ScirError | None


class Crew(Protocol):
    def wait(self) -> list[Said]:
        """What workers say, of one at least."""

    def give(self, worker: int, todo: Todo) -> None:
        """A part for a worker that is free."""

    def close(self) -> None:
        """Ends them all."""


def share(target: str, settings: BackendSettings, meter: Meter) -> Share | None:
    """How `store.write_dataset` has its parts made by settings.workers workers; None where this process does.

    target: as Job has it. meter: what they compute is added to it. Raises ConfigError where there are too few GPUs, or no Ray.
    """
    if settings.workers_on == "ray":
        if find_spec("ray") is None:
            raise ConfigError("--workers-on ray needs the package ray: pip install 'scir[ray]'")
        from scir_cli import cluster

        def staffed(actors: int) -> None:
            meter.processes = actors

        return lambda kind, todo, advance: cluster.run(Job(target, settings, kind), todo, _counted(advance, meter), staffed)
    if settings.workers == 1:
        return None
    devices = _devices(settings)
    if len(devices) == 1:
        return None
    meter.processes = len(devices)
    return lambda kind, todo, advance: run(
        Processes(Job(target, settings, kind), devices[: len(todo)]), todo, _counted(advance, meter)
    )


def _counted(advance: Callable[[int], None], meter: Meter) -> Done:
    def done(rows: int, work: Meter | None) -> None:
        if work is not None:
            meter.add(work)
        advance(rows)

    return done


def on_gpus(settings: BackendSettings) -> bool:
    """Whether workers want GPUs where there are any."""
    if settings.device == "cpu" or settings.backend == "openai":
        return False
    if settings.device != "auto" and settings.device != "cuda":
        raise ConfigError(f"--workers gives each worker a GPU of its own; leave --device {settings.device} out")
    return True


def count(settings: BackendSettings, gpus: int) -> int:
    """Workers there are to be: `auto` is as many as the GPUs are enough for, and one where there are none. Raises ConfigError where they are too few."""
    each = settings.tensor_parallel_size
    n = max(1, gpus // each) if settings.workers == "auto" else settings.workers
    if gpus and gpus < n * each:
        step = f"give --workers {gpus // each}" if gpus >= each else "lower --tensor-parallel-size"
        raise ConfigError(f"--workers {n} with --tensor-parallel-size {each} needs {n * each} GPUs, and there are {gpus}; {step}")
    return n


def _devices(settings: BackendSettings) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None where the work is not on GPUs."""
    import torch

    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d] or [
        str(i) for i in range(torch.cuda.device_count())
    ]
    if not visible or not on_gpus(settings):
        return [None] * count(settings, 0)
    each = settings.tensor_parallel_size
    return [",".join(visible[i * each : (i + 1) * each]) for i in range(count(settings, len(visible)))]


def run(crew: Crew, todo: list[Todo], done: Done) -> None:
    """Raises EngineError once a part has failed three times, and at once what a worker says is the user's to repair."""
    waiting, free, failures, left = deque(todo), set[int](), Counter[str](), len(todo)
    with closing(crew):
        while left:
            for worker, part, said in crew.wait():
                if not isinstance(said, ScirError):
                    free.add(worker)
                    if part is not None:
                        left -= 1
                        done(part.high - part.low, said)
                    continue
                free.discard(worker)
                name = f"worker {worker}"
                if part is not None:
                    name = str(part.path)
                    waiting.insert(1, part)  # for one that is running: who replaces the dead starts with another part
                failures[name] += 1
                if not isinstance(said, EngineError):
                    raise said
                if failures[name] == FAILURES:
                    raise EngineError(
                        f"{name} failed {FAILURES} times, last because {said}; finished parts are kept, the same command goes on from there"
                    )
            while free and waiting:
                crew.give(free.pop(), waiting.popleft())


class Maker:
    """Writes parts, in a worker; what makes them is opened with the first."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def make(self) -> Any:
        module, _, function = self.job.target.partition(":")
        return getattr(importlib.import_module(module), function)(self.job.settings)

    def write(self, todo: Todo) -> Meter | ScirError:
        """What was computed, once the part is on disk, else what went wrong; after that the process should end, it may be unwell."""
        try:
            store.write_part(todo, self.job.kind, self.make(todo.low, todo.high))
            return self.make.meter.take()  # type: ignore[no-any-return]
        except ScirError as error:
            return error
        except Exception as error:  # out of memory, say: another try, by another process, may go well
            return EngineError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def close(self) -> None:
        if "make" in vars(self):
            self.make.close()


# ---------------------------------------------------------------------------------------------------------------- processes of this machine


@dataclass
class Worker:
    process: Any
    pipe: Connection
    todo: Todo | None = None
    busy: bool = True  # on its way, too

    def end(self) -> None:
        """A free one ends by itself when nobody asks it any more."""
        if self.busy:
            self.process.terminate()
        self.pipe.close()


class Processes:
    """devices: CUDA_VISIBLE_DEVICES of each."""

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        self.job, self.devices = job, devices
        self.workers: dict[int, Worker] = {}

    def wait(self) -> list[Said]:
        for number in range(len(self.devices)):
            if number not in self.workers:
                self.workers[number] = self._start(number)
        ready = wait([worker.pipe for worker in self.workers.values()])
        return [self._said(number, worker) for number, worker in list(self.workers.items()) if worker.pipe in ready]

    def give(self, worker: int, todo: Todo) -> None:
        one = self.workers[worker]
        one.todo, one.busy = todo, True
        with contextlib.suppress(OSError):  # it died while it was free: `wait` will say so
            one.pipe.send(todo)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.end()
        for worker in self.workers.values():
            worker.process.join()

    def _start(self, number: int) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, os.getpid(), self.job, self.devices[number], len(self.devices))
        process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments, name=f"worker {number}")
        process.start()
        theirs.close()  # so that its death ends our reading
        return Worker(process, ours)

    def _said(self, number: int, worker: Worker) -> Said:
        todo, worker.todo, worker.busy = worker.todo, None, False
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            said = EngineError(f"its process ended with status {worker.process.exitcode}")
        if isinstance(said, ScirError):
            worker.end()
            worker.process.join()
            del self.workers[number]
        return Said(number, todo, said)


def stay_with(parent: int) -> None:
    """In a child: it ends with its parent, however that dies, and leaves Ctrl-C to it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:  # it died before that call
        os._exit(1)


def _work(pipe: Connection, parent: int, job: Job, visible: str | None, n: int) -> None:
    """A worker's process: says None when it has come, what it computed for each part that is written, or what went wrong, and then ends."""
    stay_with(parent)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    said: Meter | ScirError | None = None
    with contextlib.suppress(EOFError, ConnectionError), closing(Maker(job)) as maker:
        while not isinstance(said, ScirError):
            pipe.send(said)
            said = maker.write(pipe.recv())
        pipe.send(said)
