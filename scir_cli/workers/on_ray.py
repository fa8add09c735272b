"""A pool of workers as actors of a Ray cluster: Ray places them and restarts them, on another node if theirs is lost.

Parts are written to the shared folder and never travel through Ray. A child process talks to Ray: Ray ends the process
that does so when its head or raylet is lost, and writes to its terminal.
Left out: starting a cluster of several machines, which Slurm or Kubernetes does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from scir_cli.data import storage
from scir_cli.data.dataset import PartTask
from scir_cli.errors import ConfigError, EngineError, ScirError
from scir_cli.processes import exit_with_parent
from scir_cli.settings import BackendSettings
from scir_cli.workers import pool
from scir_cli.workers.pool import OnPartDone, PartWriter, WorkerJob, WorkerMessage


def run(
    job: WorkerJob, parts: list[PartTask], on_done: OnPartDone, on_start: Callable[[int], None]
) -> None:
    """Has Ray actors make all parts: on the cluster that RAY_ADDRESS or `ray start` provides, else on one of this machine.

    on_start: called with the number of actors. Raises as pool.run does, and EngineError if the cluster is lost.
    """
    if not parts:
        return
    log = storage.log_path(job.settings.output_dir, "ray.log")
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_drive, args=(theirs, os.getpid(), job, parts, str(log))
    )
    child.start()
    # Without this, the child's death would not end our reading.
    theirs.close()
    try:
        while (message := ours.recv()) is not None:
            if isinstance(message, ScirError):
                raise message
            if isinstance(message, int):
                on_start(message)
            else:
                on_done(*message)
    except (EOFError, OSError) as error:
        raise EngineError(
            f"the Ray cluster was lost (its log is {log}); finished parts are kept, the same command goes on from there"
        ) from error
    finally:
        ours.close()
        child.terminate()
        child.join(30)
        if child.is_alive():
            child.kill()
            child.join()


def _drive(pipe: Connection, parent: int, job: WorkerJob, parts: list[PartTask], log: str) -> None:
    """The child process: sends the number of actors, (rows, work) of each written part, and at the end None or the error."""
    exit_with_parent(parent, signal.SIGKILL)
    # Ctrl-C is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        actors = Actors(job, len(parts))
        pipe.send(len(actors.actors))
        pool.run(actors, parts, lambda rows, work: pipe.send((rows, work)))
        pipe.send(None)
    except ScirError as error:
        pipe.send(error)
    except Exception as error:  # Ray raises whatever its parts raise; its traceback goes to the log, one line to the parent
        pipe.send(
            EngineError(
                f"Ray failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}; its log is {log}"
            )
        )
        raise


class Actor(PartWriter):
    def check_in(self, folder: str) -> ScirError | None:
        """Changes to the folder of the command, against which its paths are relative; an error if the node lacks it."""
        try:
            os.chdir(folder)
        except OSError:
            return ConfigError(
                f"{folder} is not on {socket.gethostname()}; the nodes of a cluster need the folders of the command"
            )
        return None


class Actors:
    """A pool (pool.WorkerPool) of Ray actors, at most one per part."""

    def __init__(self, job: WorkerJob, n_parts: int) -> None:
        self.ray: Any = importlib.import_module("ray")
        # no address="auto": that takes any cluster it finds, another command's own too
        self.ray.init(log_to_driver=False, logging_level="ERROR")
        n, gpus = worker_and_gpu_counts(
            job.settings, int(self.ray.cluster_resources().get("GPU", 0))
        )
        kind = self.ray.remote(
            num_cpus=1, num_gpus=gpus, max_restarts=-1, scheduling_strategy="SPREAD"
        )(Actor)
        self.actors = [kind.remote(job) for _ in range(min(n, n_parts))]
        self.pending: dict[Any, tuple[int, PartTask | None]] = {}
        for number in range(len(self.actors)):
            self._call(number)

    def wait(self) -> list[WorkerMessage]:
        ready, _ = self.ray.wait(list(self.pending))
        return [self._receive(reference, *self.pending.pop(reference)) for reference in ready]

    def assign(self, worker: int, part: PartTask) -> None:
        self.pending[self.actors[worker].write.remote(part)] = worker, part

    def close(self) -> None:
        self.ray.shutdown()

    def _call(self, number: int) -> None:
        """Waits for an actor to check in, for as long as Ray takes to place it."""
        self.pending[
            self.actors[number].check_in.options(max_task_retries=-1).remote(os.getcwd())
        ] = number, None

    def _receive(self, reference: Any, number: int, part: PartTask | None) -> WorkerMessage:
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            print(error, file=sys.stderr, flush=True)  # to the log
            # Ray retries a check-in as long as there is a cluster, so the cluster is lost; to shut a lost one down may hang.
            if part is None:
                os._exit(1)
            result = EngineError(f"its actor ended ({type(error).__name__})")
        else:
            # The state of an actor that failed is unknown.
            if isinstance(result, ScirError):
                self.ray.kill(self.actors[number], no_restart=False)
        if isinstance(result, ScirError):
            self._call(number)
        return WorkerMessage(number, part, result)


def worker_and_gpu_counts(settings: BackendSettings, gpus: int) -> tuple[int, int]:
    """The number of actors for a cluster of this many GPUs, and the GPUs of each actor."""
    usable = gpus if gpus and pool.uses_gpus(settings) else 0
    return pool.n_workers(settings, usable), settings.tensor_parallel_size if usable else 0
