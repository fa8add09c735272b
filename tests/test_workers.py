"""Several processes over the parts: the rows of one process, whoever dies and whenever."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import PROMPTS, generate, run, without_backend

from scir_cli import config, processes, workers
from scir_cli.data import dataset
from scir_cli.engine.throughput import Meter
from scir_cli.errors import ConfigError, DataError, EngineError
from scir_cli.settings import BackendSettings
from scir_cli.workers.processes import visible_devices

KILLS = int(os.environ.get("SCIR_KILLS", "1"))


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(tiny_llama: Path, prompts: Path, tmp_path: Path):
    work = []
    for name, n in (("one", 1), ("two", 2)):
        manifest = generate(tiny_llama, prompts, tmp_path / name, "transformers", workers=n)
        assert manifest["rows_in"] == manifest["rows_out"] == 2 * PROMPTS
        work.append([manifest["work"][key] for key in ("tokens_read", "tokens_sampled")])
    assert work[0] == work[1]
    assert dataset.read_dataset(tmp_path / "one").equals(dataset.read_dataset(tmp_path / "two"))
    common = {
        "model": str(tiny_llama),
        "input": str(tmp_path / "one"),
        "reward_models": ["judge"],
        "rows_per_part": 8,
    }
    for name, n in (("j1", 1), ("j2", 2)):
        run("judge", **common, output_dir=tmp_path / name, workers=n)
    assert dataset.read_dataset(tmp_path / "j1").equals(dataset.read_dataset(tmp_path / "j2"))


@pytest.mark.slow
def test_a_dead_workers_part_is_taken_over(tiny_llama: Path, prompts: Path, tmp_path: Path):
    generate(tiny_llama, prompts, tmp_path / "died", "failing_backends:DiesOnce", workers=2)
    assert (tmp_path / "died" / "died").exists()
    generate(tiny_llama, prompts, tmp_path / "whole", "fake")
    assert without_backend(dataset.read_dataset(tmp_path / "died")) == without_backend(
        dataset.read_dataset(tmp_path / "whole")
    )


@pytest.mark.slow
def test_a_part_that_fails_three_times_stops_the_run_by_name_and_the_others_are_kept(
    tiny_llama: Path, prompts: Path, tmp_path: Path
):
    with pytest.raises(
        EngineError,
        match=(
            r"data-00003\.arrow failed 3 times, last because MemoryError: out of memory; "
            r"finished"
        ),
    ):
        generate(tiny_llama, prompts, tmp_path / "out", "failing_backends:DiesAtSeven", workers=2)
    kept = {path.name for path in (tmp_path / "out").glob("data-*.arrow")}
    assert {"data-00000.arrow", "data-00001.arrow", "data-00002.arrow"} <= kept
    assert "data-00003.arrow" not in kept


@pytest.mark.slow
def test_what_is_the_users_to_repair_stops_the_run_at_once(
    tiny_llama: Path, prompts: Path, tmp_path: Path
):
    with pytest.raises(DataError, match="these data are wrong"):
        generate(tiny_llama, prompts, tmp_path / "out", "failing_backends:IsWrong", workers=2)


def test_each_worker_has_gpus_of_its_own_and_too_few_are_an_error(monkeypatch: pytest.MonkeyPatch):
    def devices(**values: Any) -> Any:
        settings = config.build(
            BackendSettings, {"model": "m", "output_dir": "o", **values}, where="test"
        )
        return visible_devices(settings)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert devices(workers=4) == ["2", "3", "5", "7"]
    assert devices(workers=2, tensor_parallel_size=2) == ["2,3", "5,7"]
    assert devices(workers=2, device="cpu") == [None, None]
    with pytest.raises(ConfigError, match="needs 8 GPUs, but 4 are available; pass --workers 2$"):
        devices(workers=4, tensor_parallel_size=2)
    assert devices(workers="auto") == ["2", "3", "5", "7"]
    assert devices(workers="auto", tensor_parallel_size=3) == ["2,3,5"]
    assert devices(workers="auto", device="cpu") == [None]
    with pytest.raises(
        ConfigError, match="needs 5 GPUs, but 4 are available; lower --tensor-parallel-size$"
    ):
        devices(workers="auto", tensor_parallel_size=5)


def test_workers_is_a_number_or_auto_and_no_row_depends_on_it(
    monkeypatch: pytest.MonkeyPatch,
):
    def settings(value: Any) -> BackendSettings:
        return config.build(
            BackendSettings, {"model": "m", "output_dir": "o", "workers": value}, where="test"
        )

    assert [settings(value).workers for value in ("3", 2, "auto")] == [3, 2, "auto"]
    assert settings("auto").plan() == settings(1).plan()
    for wrong in ("0", "-1", "all", 1.5, True):
        with pytest.raises(ConfigError, match="^test: 'workers' is .*: expected a .*, or auto$"):
            settings(wrong)
    with pytest.raises(ConfigError, match="expected a number from 1 to 1024, or auto$"):
        settings("1025")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    meter = Meter()
    assert (
        workers.distribute_parts("m:f", settings("auto"), meter) is not None
        and meter.processes == 3
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (
        workers.distribute_parts("m:f", settings("auto"), Meter()) is None
    )  # on a CPU this process does the work


PARENT = """
import multiprocessing, os, signal, sys, time
from scir_cli.processes import exit_with_parent

def child(parent):
    exit_with_parent(parent, signal.SIGKILL)
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=child, args=(os.getpid(),)).start()
    time.sleep(600)
"""


def test_a_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    # The pipe closes when its last writer, the child, has ended.
    assert parent.stdout.read() == ""
    parent.stdout.close()


def test_a_child_ends_with_its_parent_only_where_the_system_can_do_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        "ctypes.CDLL", lambda name: object()
    )  # a C library without prctl, as on macOS
    processes.exit_with_parent(
        parent=-1
    )  # with prctl, a parent that is not ours would end this process


def in_session(session: int, words: tuple[str, ...] = ("",)) -> list[int]:
    """Processes of a session whose command line holds one of the words, read from /proc.

    The driver, its workers, and Ray's of its own cluster.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if (
            int(fields[3]) == session
            and fields[0] != "Z"
            and any(word in command for word in words)
        ):
            found.append(int(path.parent.name))
    return found


VICTIMS = {
    "worker": ("spawn_main",),
    "actor": ("ray::Actor",),
    "head": ("gcs_server", "raylet/raylet"),
}
#: One thread each, or sums are rounded otherwise; and no minute's wait for a head that is gone.
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    "OMP_NUM_THREADS": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_worker_niceness": "0",
    "RAY_ADDRESS": "local",
}
CASES = [
    pytest.param(
        stage,
        victim,
        marks=[] if (stage, victim) == ("generate", "driver") else [pytest.mark.soak],
    )
    for stage in ("generate", "judge")
    for victim in ("worker", "driver", "actor", "ray-driver", "head")
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "victim"), CASES)
def test_sigkill_at_random_times_leaves_the_rows_of_an_undisturbed_run(
    tiny_llama: Path, prompts: Path, tmp_path: Path, stage: str, victim: str
):
    """One kill each; with SCIR_KILLS=N as many.

    A worker or actor, whose part is made again while the run goes on; or the driver or Ray's head,
    after which the command is run again.
    """
    options = ["--device", "cpu", "--dtype", "fp32", "--workers", "2", "--rows-per-part", "1"]
    if victim in ("actor", "ray-driver", "head"):
        options += ["--workers-on", "ray"]
    if stage == "generate":
        options += [
            "-i",
            str(prompts),
            "--n",
            "2",
            "--max-new-tokens",
            "6",
            "--backend",
            "failing_backends:Slow",
        ]
        generate(tiny_llama, prompts, tmp_path / "whole", "fake", rows_per_part=1)
    else:
        generate(tiny_llama, prompts, tmp_path / "candidates", "fake", n=4)
        options += [
            "-i",
            str(tmp_path / "candidates"),
            "--reward-models",
            "rationale",
            "--rationale-max-tokens",
            "100",
        ]
    command = [sys.executable, "-m", "scir_cli", stage, "-m", str(tiny_llama), *options, "-o"]
    if stage == "judge":
        subprocess.run(
            [*command, str(tmp_path / "whole")], check=True, env=ENV, capture_output=True
        )
    folders = killed(command, victim, tmp_path)
    whole = dataset.read_dataset(tmp_path / "whole")
    for folder in folders:
        table, name = (
            dataset.read_dataset(folder),
            {"generate": "candidate_id", "judge": "pair_id"}[stage],
        )
        assert len(set(table[name].to_pylist())) == table.num_rows == whole.num_rows > PROMPTS
        assert (
            table.equals(whole)
            if stage == "judge"
            else without_backend(table) == without_backend(whole)
        )


def killed(command: list[str], victim: str, folder: Path) -> list[Path]:
    """Folders that the command has finished, though KILLS victims were killed up to half a second
    after a part was written.
    """
    env = {
        **ENV,
        "SCIR_SLOW": "2" if victim == "head" else "0.2",
    }  # else a run may be through before its head is missed
    once_a_run = victim not in ("worker", "actor")
    draw, kills, folders = random.Random(0), 0, [folder / "killed-0"]
    while kills < KILLS or not (folders[-1] / "manifest.json").exists():
        if (folders[-1] / "manifest.json").exists():
            folders.append(folder / f"killed-{len(folders)}")
        out, shot = folders[-1], 0
        driver = subprocess.Popen(
            [*command, str(out)],
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=env,
            text=True,
        )
        for _ in range(min(KILLS - kills, 1 if once_a_run else 4)):
            wait_for_a_part(out, driver)
            time.sleep(draw.uniform(0, 0.5))
            alive = (
                [driver.pid]
                if victim.endswith("driver")
                else in_session(driver.pid, VICTIMS[victim])
            )
            if driver.poll() is not None or not alive:
                break
            shot += 1
            os.kill(draw.choice(alive), signal.SIGKILL)
        kills += shot
        _, said = driver.communicate()
        if driver.returncode not in (0, -signal.SIGKILL if victim.endswith("driver") else 0):
            why = (
                "the Ray cluster was lost" if victim == "head" else "failed 3 times"
            )  # three kills may meet one part
            assert shot and driver.returncode == 1 and why in said and said.count("\n") == 1, said
        until = time.monotonic() + 60
        while in_session(
            driver.pid, ("spawn_main", "scir_cli", "ray::Actor")
        ):  # Ray's own agents take their time
            assert time.monotonic() < until, "a worker outlived its driver"
            time.sleep(0.01)
        print(
            victim,
            out.name,
            shot,
            driver.returncode,
            len(list(out.glob("data-*.arrow"))),
            flush=True,
        )
    return folders


def wait_for_a_part(out: Path, driver: Any) -> None:
    """Until one more part is written, or the driver has ended."""
    done = len(list(out.glob("data-*.arrow")))
    until = time.monotonic() + 300
    while len(list(out.glob("data-*.arrow"))) == done and driver.poll() is None:
        assert time.monotonic() < until, "no part was written for five minutes"
        time.sleep(0.002)
