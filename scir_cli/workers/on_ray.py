"""A pool of workers as actors of a Ray cluster.

Ray places the actors and restarts them, on another node if a node is lost.
Parts are written to the shared folder and are not sent through Ray.
A child process connects to Ray, because Ray ends the connected process if the head or raylet is
lost, and writes to its terminal.
Left out: starting a cluster of several machines, which Slurm or Kubernetes does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from scir_cli.data import storage
from scir_cli.data.dataset import PartTask
from scir_cli.errors import ConfigError, EngineError, ScirError, print_line
from scir_cli.processes import exit_with_parent
from scir_cli.settings import BackendSettings
from scir_cli.workers import pool
from scir_cli.workers.pool import OnPartDone, PartWriter, WorkerJob, WorkerMessage


def run(
    job: WorkerJob, parts: list[PartTask], on_done: OnPartDone, on_start: Callable[[int], None]
) -> None:
    """Has Ray actors write all parts.

    They run on the cluster of RAY_ADDRESS or `ray start`; if there is none, on a new one of this
    machine.
    on_start: called with the number of actors.
    Raises like pool.run, and EngineError if the cluster is lost.
    """
    if not parts:
        return
    log = storage.log_path(job.settings.output_dir, "ray.log")
    parent_pipe, child_pipe = multiprocessing.Pipe()
    arguments = (child_pipe, os.getpid(), job, parts, str(log))
    child = multiprocessing.get_context("spawn").Process(target=_drive, args=arguments)
    child.start()
    # While this copy is open, `recv` would not end when the child dies.
    child_pipe.close()
    try:
        while (message := parent_pipe.recv()) is not None:
            if isinstance(message, ScirError):
                raise message
            if isinstance(message, int):
                on_start(message)
            else:
                on_done(*message)
    except (EOFError, OSError) as error:
        raise EngineError(
            f"the Ray cluster was lost (its log is {log}); "
            "finished parts are kept, run the same command again to continue"
        ) from error
    finally:
        parent_pipe.close()
        child.terminate()
        child.join(30)
        if child.is_alive():
            child.kill()
            child.join()


def _drive(pipe: Connection, parent: int, job: WorkerJob, parts: list[PartTask], log: str) -> None:
    """Runs the pool in the child process.

    Sends the number of actors, then (rows, work) of each written part, then None or the error.
    log: the file for the output of Ray and of this process.
    """
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
    except Exception as error:
        # Ray raises errors of many types: the parent gets one line, and the log the traceback.
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        pipe.send(EngineError(f"Ray failed: {reason}; its log is {log}"))
        raise


class Actor(PartWriter):
    """A worker as a Ray actor."""

    def check_in(self, folder: str) -> ScirError | None:
        """Changes to the folder of the command; returns an error if the node does not have it.

        Paths of the command are relative to this folder.
        """
        try:
            os.chdir(folder)
        except OSError:
            return ConfigError(
                f"{folder} is not on {socket.gethostname()}; "
                "the nodes of a cluster need the folders of the command"
            )
        return None


class Actors:
    """A pool (pool.WorkerPool) of Ray actors, at most one per part."""

    def __init__(self, job: WorkerJob, n_parts: int) -> None:
        """Connects to Ray, and starts the actors and their check-ins.

        Raises ConfigError if the cluster has too few GPUs.
        """
        self.ray: Any = importlib.import_module("ray")
        # Not address="auto": that connects to any cluster, also to that of another command.
        self.ray.init(log_to_driver=False, logging_level="ERROR")
        cluster_gpus = int(self.ray.cluster_resources().get("GPU", 0))
        n, gpus = worker_and_gpu_counts(job.settings, cluster_gpus)
        remote = self.ray.remote(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=-1,
            scheduling_strategy="SPREAD",
        )
        actor_class = remote(Actor)
        self.actors = [actor_class.remote(job) for _ in range(min(n, n_parts))]
        #: The worker and part of each call that is running; a check-in has no part.
        self.pending: dict[Any, tuple[int, PartTask | None]] = {}
        for number in range(len(self.actors)):
            self._call(number)

    def wait(self) -> list[WorkerMessage]:
        """The messages that have arrived; blocks until there is at least one."""
        ready, _ = self.ray.wait(list(self.pending))
        messages = []
        for reference in ready:
            number, part = self.pending.pop(reference)
            messages.append(self._receive(reference, number, part))
        return messages

    def assign(self, worker: int, part: PartTask) -> None:
        """Sends a part to a free actor."""
        reference = self.actors[worker].write.remote(part)
        self.pending[reference] = worker, part

    def close(self) -> None:
        """Disconnects from the cluster, which ends the actors."""
        self.ray.shutdown()

    def _call(self, number: int) -> None:
        """Starts the check-in of an actor, which Ray retries until it has placed the actor."""
        check_in = self.actors[number].check_in.options(max_task_retries=-1)
        reference = check_in.remote(os.getcwd())
        self.pending[reference] = number, None

    def _receive(self, reference: Any, number: int, part: PartTask | None) -> WorkerMessage:
        """The message of a call that has ended; starts a new check-in if it failed.

        Ends the process if the cluster is lost.
        """
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            # stderr is the log.
            print_line(error)
            # Ray retries a check-in as long as the cluster exists, so the cluster is lost.
            # `ray.shutdown` may hang on a lost cluster.
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
    n = pool.n_workers(settings, usable)
    gpus_per_actor = settings.tensor_parallel_size if usable else 0
    return n, gpus_per_actor
