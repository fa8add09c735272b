"""Selects the workers that write the parts of a dataset.

They are this process alone, several processes on this machine, or actors of a Ray cluster.
The loop is in pool.py, the processes are in processes.py, and the actors in on_ray.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from scir_cli.data.dataset import PartTask
from scir_cli.engine.throughput import Meter
from scir_cli.errors import ConfigError, install_hint
from scir_cli.settings import BackendSettings
from scir_cli.workers import on_ray, pool
from scir_cli.workers.pool import OnPartDone, WorkerJob
from scir_cli.workers.processes import LocalProcesses, visible_devices

#: Called with the number of input rows of each part that is on disk.
Advance = Callable[[int], None]

#: Has workers write the given parts of a dataset kind.
Share = Callable[[str, list[PartTask], Advance], None]


def distribute_parts(target: str, settings: BackendSettings, meter: Meter) -> Share | None:
    """The function that has workers write parts; None if this process writes them.

    It is an argument of `dataset.write_dataset`. settings.workers is the number of workers.
    target: as in WorkerJob.
    meter: the work of all workers is added to it.
    Raises ConfigError if there are too few GPUs, or if Ray is missing.
    """
    if settings.workers_on == "ray":
        if find_spec("ray") is None:
            raise ConfigError(f"--workers-on ray needs the package ray: {install_hint('ray')}")
        return _on_ray(target, settings, meter)
    if settings.workers == 1:
        return None
    devices = visible_devices(settings)
    if len(devices) == 1:
        return None
    meter.processes = len(devices)

    def on_this_machine(kind: str, parts: list[PartTask], advance: Advance) -> None:
        job = WorkerJob(target, settings, kind)
        processes = LocalProcesses(job, devices[: len(parts)])
        pool.run(processes, parts, _counted(advance, meter))

    return on_this_machine


def _on_ray(target: str, settings: BackendSettings, meter: Meter) -> Share:
    """The function that has Ray actors write parts; arguments as of `distribute_parts`."""

    def on_start(n_actors: int) -> None:
        meter.processes = n_actors

    def on_cluster(kind: str, parts: list[PartTask], advance: Advance) -> None:
        job = WorkerJob(target, settings, kind)
        on_ray.run(job, parts, _counted(advance, meter), on_start)

    return on_cluster


def _counted(advance: Advance, meter: Meter) -> OnPartDone:
    """A callback that adds the work of a part to the meter and then calls `advance`."""

    def on_done(rows: int, work: Meter | None) -> None:
        if work is not None:
            meter.add(work)
        advance(rows)

    return on_done
