"""An experiment with power, on one accelerator: pilot seeds choose the loop's settings, then fresh
seeds run all methods, in several processes, until the time is over.

    python benchmarks/study/powered.py --experiment powered-real --out /tmp/study --results DIR \\
        --pilot 900 901 --seeds 30 31 32 33 34 35 36 37 38 39 --processes 12 --minutes 9
    python benchmarks/study/powered.py --differences DIR/powered-real.json

The power rule, fixed before any seed runs: on each pilot seed `srlm` and `oracle` run with every
setting of POWER_GRID; the one with the largest difference oracle less srlm, relative to its spread
over seeds (`strengths`), is taken for all methods and seeds.

A job makes M_1 of a seed, or runs a few methods of a seed that share judgments. Processes claim
jobs in the order of the list, so that seeds end one after the other. A job's figures are written
after each cell; what is finished is not done again by a second run. DIR gets the results as run.py
writes them, pilot.json (all pilot cells, and the choice) and powered.log.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from scir_cli.data import files
from study import run as study
from study.experiments import EXPERIMENTS, POWER_GRID, WORLDS, Method, Setup
from study.world import Gold

Json = dict[str, Any]
#: The figures by which pilot seeds choose, and the primary ones of the fresh seeds.
PRIMARY = ("implicit_accuracy", "unseen_implicit_accuracy", "forced_choice", "unseen_forced_choice")
SECONDARY = (
    "judge_accuracy",
    "unseen_judge_accuracy",
    "agreement",
    "unseen_agreement",
    "flip_rate",
    "unseen_flip_rate",
)
COMPARED = [
    (ours, rival)
    for ours in ("consensus", "consensus-judge", "oracle", "oracle-judge")
    for rival in ("srlm-soft", "scir", "srlm")
] + [("own verdicts as target", "srlm-soft"), ("consensus-judge", "own verdicts as target")]
#: Smallest spread of a difference: the standard error of an accuracy on 300 pairs is 0.02 to 0.03.
LEAST_SPREAD = 0.02
PILOT_METHODS = ("srlm", "oracle")
#: Methods whose judgments have the same reward models, so that a job computes them once.
TOGETHER = (
    ("srlm", "scir"),
    ("srlm-soft", "own verdicts as target"),
    ("consensus", "consensus-judge"),
    ("oracle", "oracle-judge"),
)
#: Share of the time after which the pilot decides on what it has.
PILOT_SHARE = 0.4
POLL_SECONDS = 0.3
ATTEMPTS = 3


# ------------------------------ the power rule


def strengths(differences: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
    """How far oracle is above srlm with each setting, in units of its spread over seeds.

    differences: per setting, figure -> oracle less srlm on each pilot seed (at least one).
    A figure's spread is the standard deviation over seeds, pooled over the settings, and at least
    LEAST_SPREAD; a setting's strength is its mean difference over the spread, averaged over
    figures.
    """
    spreads = {}
    for figure in differences[0]:
        squares = [
            (d - statistics.fmean(of[figure])) ** 2 for of in differences for d in of[figure]
        ]
        degrees = sum(len(of[figure]) - 1 for of in differences)
        pooled = math.sqrt(sum(squares) / degrees) if degrees else 0.0
        spreads[figure] = max(pooled, LEAST_SPREAD)
    return [
        statistics.fmean(statistics.fmean(of[f]) / spreads[f] for f in spreads)
        for of in differences
    ]


def choose(records: Mapping[int, Sequence[Json]]) -> Json:
    """The setting that the pilot's records choose, and why.

    records: setting -> records of its pilot cells; only those after the last iteration count, and
    only settings with a seed that has both methods. The first setting where there is none.
    """
    differences: dict[int, dict[str, list[float]]] = {}
    for setting, own in sorted(records.items()):
        last = max((r["iteration"] for r in own), default=0)
        by_method: dict[str, dict[int, Json]] = {
            method: {r["seed"]: r for r in own if (r["method"], r["iteration"]) == (method, last)}
            for method in PILOT_METHODS
        }
        srlm, oracle = (by_method[method] for method in PILOT_METHODS)
        if seeds := sorted(srlm.keys() & oracle.keys()):
            differences[setting] = {
                figure: [oracle[s][figure] - srlm[s][figure] for s in seeds] for figure in PRIMARY
            }
    found = (
        dict(zip(differences, strengths([*differences.values()]), strict=True))
        if differences
        else {}
    )
    chosen = max(found, key=lambda setting: (found[setting], -setting), default=0)
    return {"setting": chosen, "strengths": found, "oracle less srlm": differences}


# ------------------------------ jobs


@dataclass(frozen=True)
class Job:
    """M_1 of a seed (no methods), or methods on a seed; setting: of POWER_GRID, None: the chosen
    one.
    """

    seed: int
    methods: tuple[str, ...] = ()
    setting: int | None = None

    @property
    def name(self) -> str:
        what = "+".join(self.methods) or "M_1"
        return f"{self.seed} {what}" + ("" if self.setting is None else f" setting {self.setting}")


def jobs(pilot: Sequence[int], seeds: Sequence[int], processes: int) -> list[Job]:
    """All jobs in the order in which they are claimed.

    The first M_1 of fresh seeds are made beside the pilot's, by processes that would be idle; the
    next ones one seed's jobs after the other, long before they are needed.
    """
    early = max(0, processes - len(pilot))
    first = [Job(seed) for seed in [*pilot, *seeds[:early]]]
    tried = [
        Job(seed, (method,), setting)
        for seed in pilot
        for setting in range(len(POWER_GRID))
        for method in PILOT_METHODS
    ]
    # What fits beside the last cells of the pilot
    more = seeds[early : early + processes // 2]
    rest = iter(seeds[early + len(more) :])
    fresh: list[Job] = []
    for seed in seeds:
        fresh += [Job(seed, methods) for methods in TOGETHER]
        fresh += [Job(later) for later in [next(rest, None)] if later is not None]
    return [*first, *tried, *map(Job, more), *fresh]


@dataclass(frozen=True)
class Place:
    """The folders of an experiment, and what is done in them."""

    experiment: str
    out: Path
    given: Setup
    methods: tuple[Method, ...]

    @classmethod
    def of(cls, experiment: str, out: Path, tiny: bool = False) -> Place:
        """tiny: a rehearsal with two steps and few pairs."""
        setup, methods = EXPERIMENTS[experiment]
        return cls(experiment, out, rehearsal(setup) if tiny else setup, tuple(methods))

    def setup(self, setting: int | None) -> Setup:
        """The setup with a setting of POWER_GRID, or with the chosen one."""
        if setting is None:
            setting = files.read_json(self.choice)["setting"]
        return dataclasses.replace(self.given, loop=self.given.loop | POWER_GRID[setting])

    @property
    def choice(self) -> Path:
        return self.out / "choice.json"

    def folder(self, setting: int | None) -> Path:
        """The experiment's folder, beside those of its worlds."""
        pilot = "" if setting is None else f"-pilot-{setting}"
        return self.out / f"{self.experiment}{pilot}"

    def results(self, job: Job) -> list[Path]:
        """The files that a job writes."""
        if not job.methods:
            return [study.place_of(self.out, self.given, job.seed) / "m1.json"]
        cells = self.folder(job.setting) / "cells"
        return [cells / f"{method}-{job.seed}.json" for method in job.methods]

    def mark(self, kind: str, job: Job) -> Path:
        """claims/JOB or failed/JOB."""
        return self.out / kind / job.name

    def done(self, job: Job) -> bool:
        return all(path.exists() for path in self.results(job))

    def over(self, job: Job) -> bool:
        """Whether nobody has to do anything for a job: it is done, it or its M_1 has failed, or it
        is of the pilot and the choice is made.
        """
        if job.setting is not None and self.choice.exists():
            return True
        failed = self.mark("failed", job).exists()
        return failed or self.mark("failed", Job(job.seed)).exists() or self.done(job)

    def ready(self, job: Job) -> bool:
        """Whether what a job needs is there: M_1 of its seed, and the choice."""
        chosen = job.setting is not None or self.choice.exists()
        return not job.methods or (chosen and self.done(Job(job.seed)))

    def claim(self, job: Job) -> bool:
        """Takes a job for this process; False if another one has it."""
        try:
            os.close(os.open(self.mark("claims", job), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def pilot_records(self, todo: Sequence[Job]) -> dict[int, list[Json]]:
        """setting -> the records of its finished cells."""
        found: dict[int, list[Json]] = {}
        for job in todo:
            if job.setting is not None:
                records = found.setdefault(job.setting, [])
                for path in self.results(job):
                    if path.exists():
                        records += files.read_json(path)["records"]
        return found


def rehearsal(setup: Setup) -> Setup:
    """A setup that a CPU runs in minutes, and whose figures mean nothing."""
    short = {"max_steps": 1, "batch_size": 1}
    small = {"words": (12, 24), "n_seed": 12, "n_seed_pairs": 24, "n_pairs": 2, "n_heldout": 2}
    return dataclasses.replace(
        setup,
        size=dataclasses.replace(setup.size, **small),
        dtype="fp32",
        max_new_tokens=4,
        base=setup.base | short,
        tune=setup.tune | short,
        loop=setup.loop | short,
    )


# ------------------------------ a process


def work(place: Place, todo: Sequence[Job]) -> None:
    """Does jobs, the first that is free and ready, until all are over.

    A job that fails is written down, and tried again only where the processes' shared memory ran
    out.
    """
    kind, size = WORLDS[place.given.world], place.given.size
    gold = Gold(("evaluation", "oracle", "external"), kind.scorer(size))
    while open_jobs := [job for job in todo if not place.over(job)]:
        job = next((j for j in open_jobs if place.ready(j) and place.claim(j)), None)
        if job is None:
            time.sleep(POLL_SECONDS)
            continue
        started = time.monotonic()
        for attempt in range(ATTEMPTS):
            try:
                do(place, job, gold)
                break
            except Exception as error:
                text = traceback.format_exc()
                again = "out of memory" in str(error).lower() and attempt + 1 < ATTEMPTS
            print(f"{'again' if again else 'failed'}: {job.name}\n{text}", flush=True)
            free_memory()
            if not again:
                place.mark("failed", job).write_text(text, encoding="utf-8")
                break
        print(f"{job.name}: {time.monotonic() - started:.1f} s", flush=True)


def do(place: Place, job: Job, gold: Gold) -> None:
    """One job; a cell's file is written as soon as it is done, and its models are deleted."""
    world = study.place_of(place.out, place.given, job.seed)
    if not job.methods:
        study.prepare(world, place.given, job.seed, gold)
        return
    setup, folder = place.setup(job.setting), place.folder(job.setting)
    made: dict[str, Path] = {}
    for name, path in zip(job.methods, place.results(job), strict=True):
        if path.exists():
            continue
        method = next(m for m in place.methods if m.name == name)
        started = time.monotonic()
        shutil.rmtree(folder / f"{name}-{job.seed}", ignore_errors=True)
        records = study.run_cell(folder, world, method, setup, job.seed, gold, made)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {"records": records, "seconds": time.monotonic() - started})
        free_memory()
    for name in job.methods:
        shutil.rmtree(folder / f"{name}-{job.seed}", ignore_errors=True)


def free_memory() -> None:
    """Returns what this process's allocator holds to the device, for the other processes."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------ all of it


def conduct(place: Place, given: argparse.Namespace) -> None:
    """Starts the processes, makes the choice, and collects results until all jobs or the time are
    over.
    """
    started, todo = time.monotonic(), jobs(given.pilot, given.seeds, given.processes)
    for kind in ("claims", "failed"):  # of a run before
        shutil.rmtree(place.out / kind, ignore_errors=True)
        (place.out / kind).mkdir(parents=True)
    given.results.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    log = (given.results / "powered.log").open("ab")
    workers = [
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(given.processes)
    ]
    try:
        n_done = -1
        while any(worker.poll() is None for worker in workers):
            passed = (time.monotonic() - started) / 60
            if passed > given.minutes:
                break
            if not place.choice.exists():
                pilots = [job for job in todo if job.setting is not None]
                late = passed > PILOT_SHARE * given.minutes
                if late or all(place.over(job) for job in pilots):
                    files.write_json(place.choice, choose(place.pilot_records(todo)))
            if n_done != (n_done := sum(place.done(job) for job in todo)):
                report(place, todo, given, started)
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        log.close()
        report(place, todo, given, started)


def report(place: Place, todo: Sequence[Job], given: argparse.Namespace, started: float) -> None:
    """Writes what there is: pilot.json, and the experiment's results once a setting is chosen."""
    choice = files.read_json(place.choice) if place.choice.exists() else None
    files.write_json(
        given.results / "pilot.json",
        {
            "grid": POWER_GRID,
            "choice": choice,
            "seconds": round(time.monotonic() - started, 1),
            "jobs done": sum(place.done(job) for job in todo),
            "failed": sorted(path.name for path in (place.out / "failed").iterdir()),
            "records": place.pilot_records(todo),
        },
    )
    if choice:
        study.collect(
            place.experiment,
            place.folder(None),
            given.seeds,
            place.methods,
            place.setup(None),
            given.results,
        )


def differences(result: Json) -> str:
    """Primary and secondary differences of an experiment, paired by seed, with 95 % intervals."""
    from study import report as page

    records = result["records"]
    last = page.last_iteration(records)
    lines = []
    for ours, rival in COMPARED:
        for figure in (*PRIMARY, *SECONDARY):
            if paired := page.paired(records, ours, rival, last, figure):
                mean, low, high = page.interval(paired)
                lines.append(
                    f"{ours} less {rival}: {figure} {mean:+.3f} [{low:+.3f}, {high:+.3f}] "
                    f"({len(paired)} seeds)"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="powered-real")
    parser.add_argument("--out", type=Path, default=Path("runs/powered"))
    parser.add_argument("--results", type=Path, default=study.HERE / "results")
    parser.add_argument("--pilot", type=int, nargs="+", default=[900, 901])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(30, 54)])
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true", help="two steps, few pairs: a rehearsal")
    parser.add_argument("--differences", type=Path, help="print those of this file, and do nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.differences:
        print(differences(files.read_json(given.differences)))
        return
    place = Place.of(given.experiment, given.out.absolute(), given.tiny)
    if given.worker:
        work(place, jobs(given.pilot, given.seeds, given.processes))
    else:
        conduct(place, given)


if __name__ == "__main__":
    main()
