"""The workers of workers.py as actors of a Ray cluster: Ray places them and starts them again, elsewhere where their node is gone.

The parts themselves go through the shared folder and never through Ray. What talks to Ray is a child process: Ray ends the process that does when
its head or raylet is lost, and writes to its terminal. Out on purpose: starting a cluster of several machines, which is Slurm's or Kubernetes' work.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from scir_cli import places, workers
from scir_cli.config import BackendSettings
from scir_cli.errors import ConfigError, EngineError, ScirError
from scir_cli.store import Todo
from scir_cli.workers import Done, Job, Maker, Said


def run(job: Job, todo: list[Todo], done: Done, staffed: Callable[[int], None]) -> None:
    """As workers.run does, on the cluster that is there, else on one of this machine. staffed: told how many actors there are to be."""
    if not todo:
        return
    log = places.log(job.settings.output_dir, "ray.log")
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_drive, args=(theirs, os.getpid(), job, todo, str(log)))
    child.start()
    theirs.close()  # so that its death ends our reading
    try:
        while (said := ours.recv()) is not None:
            if isinstance(said, ScirError):
                raise said
            if isinstance(said, int):
                staffed(said)
            else:
                done(*said)
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


def _drive(pipe: Connection, parent: int, job: Job, todo: list[Todo], log: str) -> None:
    """The child: sends how many actors there are to be, the rows of each part that is written and what was computed for it; at the end None, or what
    stopped it."""
    workers.stay_with(parent)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        actors = Actors(job, len(todo))
        pipe.send(len(actors.actors))
        workers.run(actors, todo, lambda rows, work: pipe.send((rows, work)))
        pipe.send(None)
    except ScirError as error:
        pipe.send(error)
    except Exception as error:  # Ray raises whatever its parts raise; its traceback goes to the log, one line to the parent
        pipe.send(EngineError(f"Ray failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}; its log is {log}"))
        raise


class Actor(Maker):
    def come(self, folder: str) -> ScirError | None:
        """Says that it is there, in the folder where the command was given: paths mean what they mean there."""
        try:
            os.chdir(folder)
        except OSError:
            return ConfigError(f"{folder} is not on {socket.gethostname()}; the nodes of a cluster need the folders of the command")
        return None


class Actors:
    """A crew (workers.Crew)."""

    def __init__(self, job: Job, parts: int) -> None:
        self.ray: Any = importlib.import_module("ray")
        # no address="auto": that takes any cluster it finds, another command's own too
        self.ray.init(log_to_driver=False, logging_level="ERROR")
        n, gpus = worker_and_gpu_counts(job.settings, int(self.ray.cluster_resources().get("GPU", 0)))
        kind = self.ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, scheduling_strategy="SPREAD")(Actor)
        self.actors = [kind.remote(job) for _ in range(min(n, parts))]
        self.asked: dict[Any, tuple[int, Todo | None]] = {}
        for number in range(len(self.actors)):
            self._call(number)

    def wait(self) -> list[Said]:
        ready, _ = self.ray.wait(list(self.asked))
        return [self._said(reference, *self.asked.pop(reference)) for reference in ready]

    def give(self, worker: int, todo: Todo) -> None:
        self.asked[self.actors[worker].write.remote(todo)] = worker, todo

    def close(self) -> None:
        self.ray.shutdown()

    def _call(self, number: int) -> None:
        """Asks whether it is there, for as long as Ray takes to place it."""
        self.asked[self.actors[number].come.options(max_task_retries=-1).remote(os.getcwd())] = number, None

    def _said(self, reference: Any, number: int, todo: Todo | None) -> Said:
        try:
            said = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            print(error, file=sys.stderr, flush=True)  # to the log
            if todo is None:  # an actor is waited for as long as there is a cluster; shutting down a lost one may hang
                os._exit(1)
            said = EngineError(f"its actor ended ({type(error).__name__})")
        else:
            if isinstance(said, ScirError):  # it may be unwell
                self.ray.kill(self.actors[number], no_restart=False)
        if isinstance(said, ScirError):
            self._call(number)
        return Said(number, todo, said)


def worker_and_gpu_counts(settings: BackendSettings, cluster_gpus: int) -> tuple[int, int]:
    """The number of actors and of GPUs per actor, on a cluster with `cluster_gpus` GPUs."""
    usable = cluster_gpus if cluster_gpus and workers.on_gpus(settings) else 0
    return workers.count(settings, usable), settings.tensor_parallel_size if usable else 0
