"""The loop that hands the parts of one dataset to a pool of workers, and what a worker does with a part.

A part depends on the plan alone, so any worker can make it, and a part whose worker died is made again by a free one.
Workers share nothing but the output folder: parts do not travel between processes.
The pools themselves are in local_processes.py (one machine) and cluster.py (Ray).
"""

from __future__ import annotations

import importlib
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from scir_cli import backends
from scir_cli.data import dataset
from scir_cli.data.dataset import PartTask
from scir_cli.engine.throughput import Meter
from scir_cli.errors import ConfigError, EngineError, ScirError
from scir_cli.settings import BackendSettings

#: Failures of one part after which the part is at fault and not the worker.
MAX_FAILURES = 3

#: Called for each part that is on disk, with its input rows and what was computed for it.
OnPartDone = Callable[[int, Meter | None], None]


class WorkerJob(NamedTuple):
    """What a worker needs to make parts.

    target: "module:function", which takes the settings and returns the callable that makes a part.
    kind: dataset kind of the parts.
    """

    target: str
    settings: BackendSettings
    kind: str


class WorkerMessage(NamedTuple):
    """A message from a worker: ready (part and result are None), a finished part, or an error.

    result: what was computed for the part, or the error. A worker that failed starts again and reports ready again.
    """

    worker: int
    part: PartTask | None
    result: Meter | ScirError | None


class WorkerPool(Protocol):
    def wait(self) -> list[WorkerMessage]:
        """The messages that have arrived; blocks until there is at least one."""

    def assign(self, worker: int, part: PartTask) -> None:
        """Sends a part to a free worker."""

    def close(self) -> None:
        """Ends all workers."""


def uses_gpus(settings: BackendSettings) -> bool:
    """Whether each worker takes GPUs, if there are any. Raises ConfigError for one chosen GPU."""
    if settings.device == "cpu" or not backends.load(settings.backend).uses_gpus:
        return False
    if settings.device != "auto" and settings.device != "cuda":
        raise ConfigError(
            f"--workers gives each worker a GPU of its own; leave --device {settings.device} out"
        )
    return True


def n_workers(settings: BackendSettings, gpus: int) -> int:
    """The number of workers for this many GPUs; `auto` is as many as the GPUs allow, and one without GPUs.

    Raises ConfigError if there are fewer GPUs than the workers need.
    """
    each = settings.tensor_parallel_size
    n = max(1, gpus // each) if settings.workers == "auto" else settings.workers
    if gpus and gpus < n * each:
        step = f"give --workers {gpus // each}" if gpus >= each else "lower --tensor-parallel-size"
        raise ConfigError(
            f"--workers {n} with --tensor-parallel-size {each} needs {n * each} GPUs, and there are {gpus}; {step}"
        )
    return n


def run(pool: WorkerPool, parts: list[PartTask], on_done: OnPartDone) -> None:
    """Has the pool make all parts, and closes it.

    Raises EngineError when a part has failed MAX_FAILURES times, and any other error of a worker at once.
    """
    waiting = deque(parts)
    free: set[int] = set()
    failures: Counter[str] = Counter()
    left = len(parts)
    with closing(pool):
        while left:
            for worker, part, result in pool.wait():
                if not isinstance(result, ScirError):
                    free.add(worker)
                    if part is not None:
                        left -= 1
                        on_done(part.high - part.low, result)
                    continue
                free.discard(worker)
                if part is not None:
                    # Second in line, for a worker that is running: the replacement of a dead one starts with another part.
                    waiting.insert(1, part)
                _count_failure(
                    failures, f"worker {worker}" if part is None else str(part.path), result
                )
            while free and waiting:
                pool.assign(free.pop(), waiting.popleft())


def _count_failure(failures: Counter[str], name: str, error: ScirError) -> None:
    """Counts an engine failure of a part or worker; raises one too many, and every other error."""
    if not isinstance(error, EngineError):
        raise error
    failures[name] += 1
    if failures[name] == MAX_FAILURES:
        raise EngineError(
            f"{name} failed {MAX_FAILURES} times, last because {error}; "
            "finished parts are kept, the same command goes on from there"
        )


class PartWriter:
    """Makes and writes parts in a worker; the model is opened with the first part."""

    def __init__(self, job: WorkerJob) -> None:
        self.job = job
        self.opened = ExitStack()

    @cached_property
    def make(self) -> Any:
        """The callable that makes a part, with its `meter` and `close`."""
        module, _, function = self.job.target.partition(":")
        make = getattr(importlib.import_module(module), function)(self.job.settings)
        self.opened.callback(make.close)
        return make

    def write(self, part: PartTask) -> Meter | ScirError:
        """What was computed, once the part is on disk, or the error.

        After an error the process should end: its state is unknown.
        """
        try:
            dataset.write_part(part, self.job.kind, self.make(part.low, part.high))
            return self.make.meter.pop()  # type: ignore[no-any-return]
        except ScirError as error:
            return error
        except Exception as error:  # out of memory, for example: another process may succeed
            return EngineError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def close(self) -> None:
        self.opened.close()
