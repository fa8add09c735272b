"""Assigns the parts of one dataset to a pool of workers, and writes a part in a worker.

A part depends on the plan alone, so any worker can write it. If a worker dies, a free worker
writes its part again.
Workers share only the output folder: parts are not sent between processes.
The pools are in processes.py (one machine) and on_ray.py (Ray).
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

#: A part or worker that fails this many times ends the run.
MAX_FAILURES = 3

#: Called for each part that is on disk, with its number of input rows and the work done for it.
OnPartDone = Callable[[int, Meter | None], None]


class WorkerJob(NamedTuple):
    """The description of the parts that a worker has to write.

    target: "module:function", which takes the settings and returns the callable that computes a
    part.
    kind: the dataset kind of the parts.
    """

    target: str
    settings: BackendSettings
    kind: str


class WorkerMessage(NamedTuple):
    """A message from a worker: ready (part and result are None), a finished part, or an error.

    result: the work done for the part, or the error.
    A worker that failed restarts and reports ready again.
    """

    worker: int
    part: PartTask | None
    result: Meter | ScirError | None


class WorkerPool(Protocol):
    """Workers that are identified by numbers, and report by messages."""

    def wait(self) -> list[WorkerMessage]:
        """The messages that have arrived; blocks until there is at least one."""

    def assign(self, worker: int, part: PartTask) -> None:
        """Sends a part to a free worker."""

    def close(self) -> None:
        """Ends all workers."""


def uses_gpus(settings: BackendSettings) -> bool:
    """Whether each worker uses GPUs, if any are available.

    Raises ConfigError if --device names one GPU.
    """
    if settings.device == "cpu" or not backends.load(settings.backend).uses_gpus:
        return False
    if settings.device != "auto" and settings.device != "cuda":
        raise ConfigError(
            f"--workers assigns a different GPU to each worker; remove --device {settings.device}"
        )
    return True


def n_workers(settings: BackendSettings, gpus: int) -> int:
    """The number of workers for this many GPUs.

    `auto` is as many as the GPUs allow, and one without GPUs.
    Raises ConfigError if there are fewer GPUs than the workers need.
    """
    each = settings.tensor_parallel_size
    n = max(1, gpus // each) if settings.workers == "auto" else settings.workers
    if gpus and gpus < n * each:
        if gpus >= each:
            advice = f"pass --workers {gpus // each}"
        else:
            advice = "lower --tensor-parallel-size"
        raise ConfigError(
            f"--workers {n} with --tensor-parallel-size {each} needs {n * each} GPUs, "
            f"but {gpus} are available; {advice}"
        )
    return n


def run(pool: WorkerPool, parts: list[PartTask], on_done: OnPartDone) -> None:
    """Has the pool write all parts, and closes it.

    on_done: called once per part that is on disk.
    Raises EngineError if a part or worker fails MAX_FAILURES times, and any other error of a
    worker at once.
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
                    # Second in line, for a worker that is running: the replacement of a dead one
                    # starts with another part.
                    waiting.insert(1, part)
                name = f"worker {worker}" if part is None else str(part.path)
                _count_failure(failures, name, result)
            while free and waiting:
                pool.assign(free.pop(), waiting.popleft())


def _count_failure(failures: Counter[str], name: str, error: ScirError) -> None:
    """Counts a failure of a part or worker.

    Raises EngineError at failure number MAX_FAILURES, and every other error at once.
    """
    if not isinstance(error, EngineError):
        raise error
    failures[name] += 1
    if failures[name] == MAX_FAILURES:
        raise EngineError(
            f"{name} failed {MAX_FAILURES} times, last because {error}; "
            "finished parts are kept, run the same command again to continue"
        )


class PartWriter:
    """Computes and writes parts in a worker; the model is loaded with the first part."""

    def __init__(self, job: WorkerJob) -> None:
        self.job = job
        self.exit_stack = ExitStack()

    @cached_property
    def make(self) -> Any:
        """The callable that computes a part, with its `meter` and `close`."""
        module_name, _, function_name = self.job.target.partition(":")
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        make = function(self.job.settings)
        self.exit_stack.callback(make.close)
        return make

    def write(self, part: PartTask) -> Meter | ScirError:
        """Writes a part and returns the work done for it, or the error.

        After an error the process should end: its state is unknown.
        """
        try:
            dataset.write_part(part, self.job.kind, self.make(part.low, part.high))
            return self.make.meter.pop()  # type: ignore[no-any-return]
        except ScirError as error:
            return error
        except Exception as error:
            # Out of memory, for example: another process may succeed.
            lines = str(error).splitlines()
            reason = lines[0] if lines else ""
            return EngineError(f"{type(error).__name__}: {reason}")

    def close(self) -> None:
        """Closes the callable that computes parts, if it was created."""
        self.exit_stack.close()
