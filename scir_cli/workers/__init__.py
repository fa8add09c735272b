"""Which workers make the parts of a dataset: none but this process, processes of this machine, or actors of a Ray cluster.

The loop is in pool.py, the processes in local_processes.py, the actors in cluster.py.
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

#: Makes the parts of a dataset kind elsewhere; its last argument is called with the input rows of each part on disk.
Share = Callable[[str, list[PartTask], Callable[[int], None]], None]


def distribute_parts(target: str, settings: BackendSettings, meter: Meter) -> Share | None:
    """How `store.write_dataset` has its parts made by settings.workers workers; None if this process makes them.

    target: as in WorkerJob. meter: what the workers compute is added to it.
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

    def on_this_machine(kind: str, parts: list[PartTask], advance: Callable[[int], None]) -> None:
        processes = LocalProcesses(WorkerJob(target, settings, kind), devices[: len(parts)])
        pool.run(processes, parts, _counted(advance, meter))

    return on_this_machine


def _on_ray(target: str, settings: BackendSettings, meter: Meter) -> Share:
    def on_start(n_actors: int) -> None:
        meter.processes = n_actors

    def on_cluster(kind: str, parts: list[PartTask], advance: Callable[[int], None]) -> None:
        on_ray.run(WorkerJob(target, settings, kind), parts, _counted(advance, meter), on_start)

    return on_cluster


def _counted(advance: Callable[[int], None], meter: Meter) -> OnPartDone:
    def on_done(rows: int, work: Meter | None) -> None:
        if work is not None:
            meter.add(work)
        advance(rows)

    return on_done
