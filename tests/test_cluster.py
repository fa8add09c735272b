"""Workers as actors of a Ray cluster, a real one on this machine.

The rows of one process, whoever dies.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PROMPTS, generate, run, without_backend

from scir_cli import recipe, workers
from scir_cli.backends.fake import FakeBackend
from scir_cli.backends.transformers import TransformersBackend
from scir_cli.config import build
from scir_cli.data import dataset
from scir_cli.errors import ConfigError, DataError, EngineError
from scir_cli.settings import GenerateSettings
from scir_cli.workers import on_ray
from scir_cli.workers.pool import WorkerJob

RAY = {"workers_on": "ray", "workers": 2}


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of one node with room for two actors, found as one finds any.

    Its processes end with the tests.
    """
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # where it says that it is there, to nobody else
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(
            "RAY_worker_niceness", "0"
        )  # 15 by default: beside other work, a test would take minutes
        head = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )
        patch.setenv("RAY_ADDRESS", head.address)
        yield
        head.shutdown()


def once(settings: Any, number: int) -> bool:
    """Kills a process, the first time it is asked to in a run, and says whether it did."""
    flag = Path(settings.output_dir) / "died"
    if flag.exists():
        return False
    flag.touch()
    os.kill(number, signal.SIGKILL)
    return True


class DiesOnce(TransformersBackend):
    def __init__(self, model: Any, sampling: Any, settings: Any) -> None:
        super().__init__(model, sampling, settings)
        self.settings = settings

    def generate(self, requests: Any) -> Any:
        once(self.settings, os.getpid())
        return super().generate(requests)


class LosesRay(FakeBackend):
    """Its actor's parent is the raylet; the actor ends a little later."""

    def __init__(self, model: Any, sampling: Any, settings: Any) -> None:
        super().__init__(model, sampling)
        self.settings, self.made = settings, 0

    def generate(self, requests: Any) -> Any:
        self.made += 1
        if self.made > 3 and once(self.settings, os.getppid()):
            time.sleep(60)
        return super().generate(requests)


def test_actors_write_the_rows_of_one_process_though_one_of_them_dies(
    ray: None, tiny_llama: Path, prompts: Path, tmp_path: Path
):
    generate(tiny_llama, prompts, tmp_path / "one", "transformers")
    manifest = generate(tiny_llama, prompts, tmp_path / "two", "test_cluster:DiesOnce", **RAY)
    assert (tmp_path / "two" / "died").exists()
    assert manifest["rows_in"] == manifest["rows_out"] == 2 * PROMPTS
    assert without_backend(dataset.read_dataset(tmp_path / "two")) == without_backend(
        dataset.read_dataset(tmp_path / "one")
    )


@pytest.mark.soak
def test_a_recipe_chooses_the_executor_of_a_stage(
    ray: None,
    tiny_llama: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # as Ray sets it: with another number, sums are rounded otherwise
    (tmp_path / "recipe.yaml").write_text(
        f"""
all: {{model: {tiny_llama}, rows_per_part: 20}}
steps:
  - generate: {{input: {prompts}, n: 2, max_new_tokens: 6, output_dir: "{{out}}/candidates"}}
  - judge: {{input: "{{out}}/candidates", reward_models: [judge], workers_on: ray,
             output_dir: "{{out}}/judged"}}
"""
    )
    first, second = recipe.load(tmp_path / "recipe.yaml", tmp_path)
    assert "--workers-on" not in first.arguments
    assert second.arguments[second.arguments.index("--workers-on") + 1] == "ray"
    for step in (first, second):
        run(step.stage, **step.settings)
    run(
        "judge",
        **{
            **second.settings,
            "workers_on": "local",
            "workers": 2,
            "output_dir": tmp_path / "local",
        },
    )
    assert (tmp_path / "judged" / "ray.log").exists() and not (
        tmp_path / "local" / "ray.log"
    ).exists()
    assert dataset.read_dataset(tmp_path / "judged").equals(
        dataset.read_dataset(tmp_path / "local")
    )


@pytest.mark.soak
def test_what_a_part_or_the_user_did_wrong_stops_the_run_as_it_does_on_one_machine(
    ray: None,
    tiny_llama: Path,
    prompts: Path,
    tmp_path: Path,
):
    with pytest.raises(
        EngineError,
        match=(
            r"data-00003\.arrow failed 3 times, last because MemoryError: out of memory; "
            r"finished"
        ),
    ):
        generate(
            tiny_llama,
            prompts,
            tmp_path / "fails",
            "failing_backends:DiesAtSeven",
            workers_on="ray",
        )
    assert (tmp_path / "fails" / "data-00002.arrow").exists()
    with pytest.raises(DataError, match="^these data are wrong$"):
        generate(
            tiny_llama, prompts, tmp_path / "wrong", "failing_backends:IsWrong", workers_on="ray"
        )


def test_a_lost_cluster_ends_the_run_with_one_line_and_the_next_goes_on(
    ray: None,
    tiny_llama: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(
        EngineError,
        match=r"the Ray cluster was lost \(its log is .*ray\.log\); finished parts are kept",
    ):
        generate(tiny_llama, prompts, tmp_path / "lost", "test_cluster:LosesRay", workers_on="ray")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "lost").glob("data-*.arrow")}
    assert 3 <= len(kept) < PROMPTS / 2
    monkeypatch.setenv("RAY_ADDRESS", "local")
    generate(tiny_llama, prompts, tmp_path / "lost", "test_cluster:LosesRay", workers_on="ray")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    generate(tiny_llama, prompts, tmp_path / "whole", "fake")
    assert without_backend(dataset.read_dataset(tmp_path / "lost")) == without_backend(
        dataset.read_dataset(tmp_path / "whole")
    )


def test_without_ray_one_line_names_the_extra(
    tiny_llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"^--workers-on ray needs the package ray: pip install 'scir-cli\[ray\]'$",
    ):
        generate(tiny_llama, prompts, tmp_path / "out", "fake", workers_on="ray")


def test_an_actor_has_gpus_where_the_cluster_has_any_and_too_few_are_an_error():
    def staff(there: int, **values: Any) -> tuple[int, int]:
        given = {"model": "m", "input": "i", "output_dir": "o", "workers": 4, **values}
        return on_ray.worker_and_gpu_counts(build(GenerateSettings, given, where="test"), there)

    assert [staff(0), staff(4), staff(8, tensor_parallel_size=2), staff(8, device="cpu")] == [
        (4, 0),
        (4, 1),
        (4, 2),
        (4, 0),
    ]
    assert staff(8, backend="openai") == (4, 0)
    with pytest.raises(ConfigError, match="needs 4 GPUs, but 3 are available"):
        staff(3)
    auto = {"workers": "auto"}
    assert [staff(0, **auto), staff(12, **auto), staff(13, tensor_parallel_size=4, **auto)] == [
        (1, 0),
        (12, 1),
        (3, 4),
    ]
    assert staff(12, device="cpu", **auto) == (1, 0)
    with pytest.raises(
        ConfigError,
        match="--workers 1 with --tensor-parallel-size 4 needs 4 GPUs, but 2 are available",
    ):
        staff(2, tensor_parallel_size=4, **auto)


def test_a_node_without_the_folder_of_the_command_is_named(tmp_path: Path):
    problem = on_ray.Actor(WorkerJob("", None, "")).check_in(str(tmp_path / "absent"))  # type: ignore[arg-type]
    assert isinstance(problem, ConfigError) and "absent is not on" in str(problem)
