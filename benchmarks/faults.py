"""What `scir` does about damage, bad inputs, hostile texts, failing disks, signals, odd terminals.

    python benchmarks/faults.py --jobs 2 --json faults.json
    python benchmarks/faults.py --write docs/reliability.md

Each case is a command line in a forked process and a folder of its own, drawn from a seed. A case
ends in one of

    right      status 0, and the rows, weights or figures of an undisturbed run
    read       status 0 on a file of the user, which has no digest to compare with
    refused    status 1 or 2 and one line that begins with "scir: error:"

or it is a fault: silent (status 0 and another result), unexpected (an exception that scir does not
foresee), crash (a signal), hang (over the limit of seconds), memory (over the limit of growth), raw
(a control character on the terminal), words (a failure without its one line). The status is 1 if
there is a fault. Cases are in fault_cases.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

Json = dict[str, Any]

ACCEPTED = ("right", "read", "refused")
FAULTS = ("silent", "unexpected", "crash", "hang", "memory", "raw", "words")

#: Seconds of one command, and growth of its memory in MB
LIMIT_S = 60.0
LIMIT_MB = 1024

#: Status of a process that an exception ended
ESCAPED = 99


@dataclass(frozen=True)
class Ran:
    """A command that ended: its status (a signal is negative), output, seconds and growth."""

    status: int
    out: str
    err: str
    seconds: float
    grown_mb: float

    @property
    def fault(self) -> str | None:
        """What is wrong with how it ended, whatever it was to do; None if nothing is."""
        text = self.out + self.err
        errors = [line for line in self.err.splitlines() if line.startswith("scir: error:")]
        if self.seconds > LIMIT_S:
            return "hang"
        if self.status < 0:
            return "crash"
        if self.grown_mb > LIMIT_MB:
            return "memory"
        if self.status == ESCAPED or "Traceback" in text or "(unexpected; " in text:
            return "unexpected"
        if any(ord(c) < 32 and c not in "\n\t\r" for c in text) or "\x7f" in text:
            return "raw"
        if self.status in (1, 2) and len(errors) < 1:
            return "words"
        if self.status not in (0, 1, 2):
            return "words"
        return None

    @property
    def said(self) -> str:
        """The last line on stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


def start(words: Sequence[str], folder: Path, before: Callable[[], Any] | None) -> int:
    """Starts `scir WORDS` in a forked process with its output in files; returns its id.

    before: called in that process first.
    """
    process = os.fork()
    if process:
        return process
    status = ESCAPED
    began = False
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(folder / f".{name}", flags, 0o600), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        sys.argv = ["scir", *words]
        if before:
            before()
        from scir_cli import cli

        began = True
        cli.main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not began:
            os._exit(130)
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def finish(process: int, folder: Path, started: float, limit: float = LIMIT_S) -> Ran:
    """Waits for a process of `start`, and ends it after `limit` seconds."""
    while True:
        ended, code, usage = os.wait4(process, os.WNOHANG)
        seconds = time.monotonic() - started
        if ended:
            break
        if seconds > limit:
            os.kill(process, signal.SIGKILL)
            _, code, usage = os.wait4(process, 0)
            break
        time.sleep(0.005)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, err = (
        (folder / f".{name}").read_text(encoding="utf-8", errors="replace")
        for name in ("stdout", "stderr")
    )
    grown = (usage.ru_maxrss - own) / 1024
    return Ran(os.waitstatus_to_exitcode(code), out, err, seconds, grown)


def scir(line: str | Sequence[str], folder: Path, before: Callable[[], Any] | None = None) -> Ran:
    """Runs a command line in a folder to its end."""
    words = line.split() if isinstance(line, str) else list(line)
    started = time.monotonic()
    return finish(start(words, folder, before), folder, started)


@dataclass(frozen=True)
class Case:
    """A case: its group, what is done, and a function that does it and returns its outcome.

    work: gets a copy of the world and draws from `random`; returns (outcome, what was said).
    """

    group: str
    name: str
    work: Callable[[Path, random.Random], tuple[str, str]]


def judge(ran: Ran, same: Callable[[], bool] | None) -> tuple[str, str]:
    """The outcome of a command. same: whether the result is that of an undisturbed run; None:
    nobody can know.
    """
    if ran.fault:
        return ran.fault, ran.err[-2000:] or str(ran.status)
    if ran.status:
        return "refused", ran.said
    if same is None:
        return "read", ""
    return ("right", "") if same() else ("silent", "status 0, and another result")


def run_case(case: Case, world: Path, number: int, seed: int, parent: Path) -> tuple[str, str]:
    """Runs a case in a copy of the world, which is then removed."""
    folder = parent / f"case-{number}"
    shutil.copytree(world, folder, symlinks=True)
    try:
        return case.work(folder, random.Random(f"{seed} {case.group} {case.name}"))
    except Exception:
        # A fault of this benchmark: it must not pass as an outcome of the program.
        return "unexpected", "in the benchmark: " + traceback.format_exc()[-2000:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(cases: Sequence[Case], world: Path, seed: int, jobs: int, minutes: float) -> list[Json]:
    """Runs the cases, each in a forked process, `jobs` at a time; none begins after `minutes`."""
    end = time.monotonic() + 60 * minutes
    results: list[Json] = [{} for _ in cases]
    running: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        for number, case in [*enumerate(cases), *[(-1, None)] * jobs]:
            while running and (case is None or len(running) >= jobs):
                process, _ = os.wait()
                index = running.pop(process)
                outcome, said = json.loads((parent / f"{index}.json").read_text(encoding="utf-8"))
                done = cases[index]
                results[index] = {
                    "group": done.group,
                    "name": done.name,
                    "outcome": outcome,
                    "said": said,
                }
                if outcome not in ACCEPTED:
                    print(f"{outcome}: {done.group}: {done.name}: {said}", file=sys.stderr)
            if case is None or time.monotonic() > end:
                continue
            process = os.fork()
            if not process:
                result = run_case(case, world, number, seed, parent)
                (parent / f"{number}.json").write_text(json.dumps(result), encoding="utf-8")
                os._exit(0)
            running[process] = number
    return [result for result in results if result]


def drawn(cases: Sequence[Case], share: float, seed: int) -> list[Case]:
    """A share of the cases of each group, at least 12 or all, drawn from the seed."""
    chosen = []
    for group in dict.fromkeys(case.group for case in cases):
        members = [case for case in cases if case.group == group]
        n = min(len(members), max(12, round(share * len(members))))
        chosen += random.Random(f"{seed} {group}").sample(members, n)
    # In any order, so that a run that is cut short has cases of every group.
    random.Random(seed).shuffle(chosen)
    return chosen


def table(results: Sequence[Json]) -> str:
    """Cases and outcomes by group, as a Markdown table."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result["group"], Counter())[result["outcome"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    seen = [*ACCEPTED, *(name for name in FAULTS if counts["all"][name])]
    lines = [
        f"| cases | tried | {' | '.join(seen)} | faults |",
        f"|---|{'---:|' * (len(seen) + 2)}",
    ]
    for group, found in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        cells = [found.total(), *(found[name] for name in seen)]
        cells.append(sum(found[name] for name in FAULTS))
        lines.append(f"| {group} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the cases; 1 if one of them is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="groups by name, with commas")
    parser.add_argument("--share", type=float, default=1.0, help="of each group, drawn")
    parser.add_argument("--minutes", type=float, default=600.0, help="then no case begins")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a page whose table is renewed")
    options = parser.parse_args()

    os.environ.update(
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="80"
    )
    import fault_cases

    fault_cases.import_all()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        world = fault_cases.make_world(Path(name) / "world")
        cases = [
            case
            for case in fault_cases.cases(world)
            if not options.only or case.group in options.only.split(",")
        ]
        cases = drawn(cases, options.share, options.seed)
        results = run_all(cases, world, options.seed, options.jobs, options.minutes)
    seconds = round(time.monotonic() - started)
    text = table(results)
    print(text)
    n_faults = sum(result["outcome"] in FAULTS for result in results)
    print(f"{len(results)} cases in {seconds} s, seed {options.seed}: {n_faults} faults")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.write:
        date = time.strftime("%Y-%m-%d")
        command = (
            f"python benchmarks/faults.py --seed {options.seed} --share {options.share:g} "
            f"--jobs {options.jobs}"
        )
        common.write_page(options.write, "faults", f"`{command}`, {date}, {seconds} s:\n\n{text}")
    return int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
