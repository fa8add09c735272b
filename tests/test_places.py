"""Datasets at URLs, through fsspec: the rows and promises of a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers import run

from scir_cli import config, settings
from scir_cli.data import dataset, files, storage
from scir_cli.data.dataset import Part, PartTask
from scir_cli.errors import ConfigError, DataError, PlanMismatch, StoreError

PROMPTS = "".join(json.dumps({"prompt": f"Tell me of number {i}."}) + "\n" for i in range(6))


@pytest.fixture(params=["memory://scir", "file://{}/scir"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place for files: one that puts them whole, and one that has to rename them."""
    where = request.param.format(tmp_path)
    storage.to_path(f"{where}/prompts.jsonl").parent.mkdir(parents=True, exist_ok=True)
    storage.to_path(f"{where}/prompts.jsonl").write_text(PROMPTS)
    yield where
    fsspec.filesystem("memory").rm("/scir", recursive=True) if where.startswith("memory") else None


def generate(model: Path, out: Any, source: Any, **values: Any) -> dict[str, Any]:
    common = {"n": 2, "max_new_tokens": 4, "rows_per_part": 2, "backend": "fake"}
    return run(
        "generate", model=str(model), input=str(source), output_dir=str(out), **{**common, **values}
    )


def test_a_chain_of_stages_at_a_url_gives_the_rows_of_folders_and_resumes(
    tiny_llama: Path, url: str, tmp_path: Path
):
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    for base in (url, tmp_path):
        generate(tiny_llama, f"{base}/candidates", f"{base}/prompts.jsonl")
        run(
            "judge",
            model=str(tiny_llama),
            input=f"{base}/candidates",
            output_dir=f"{base}/judged",
            reward_models=["judge"],
        )
        run(
            "filter",
            input=f"{base}/judged",
            output_dir=f"{base}/preferences",
            rule="judge",
            keep_cut=True,
            trl_jsonl=True,
        )
    for name in ("candidates", "judged", "preferences"):
        there = dataset.read_dataset(storage.to_path(f"{url}/{name}"))
        assert there.num_rows and there.equals(dataset.read_dataset(tmp_path / name))
    assert (
        storage.to_path(f"{url}/preferences/trl.jsonl").read_text()
        == (tmp_path / "preferences" / "trl.jsonl").read_text()
    )
    out = storage.to_path(f"{url}/candidates")
    assert generate(tiny_llama, out, f"{url}/prompts.jsonl")["reused"]
    (out / "data-00001.arrow").unlink()
    assert generate(tiny_llama, out, f"{url}/prompts.jsonl")["rows_out"] == 12
    assert (out / "data-00001.arrow").exists()
    with pytest.raises(PlanMismatch, match=r"settings\.seed was 0, now 1"):
        generate(tiny_llama, out, f"{url}/prompts.jsonl", seed=1)
    assert "reused" not in generate(tiny_llama, out, f"{url}/prompts.jsonl", seed=1, overwrite=True)
    with pytest.raises(DataError, match="not a finished dataset"):
        (out / "manifest.json").unlink()
        dataset.read_dataset(out)


def test_what_fails_while_it_is_written_leaves_nothing(url: str):
    path = storage.to_path(f"{url}/part")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in path.parent.iterdir()] == ["prompts.jsonl"]


def test_a_url_that_is_not_available_is_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"^nosuch://x: .*nosuch"):
        storage.to_path("nosuch://x")
    with pytest.raises(ConfigError, match="only datasets may be at URLs"):
        given = {"model": "m", "input": "i", "output_dir": "memory://m", "reward_reference": "r"}
        config.build(settings.TrainSettings, given, where="test")
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(
        ConfigError,
        match=r"^s3://bucket/x needs a package that is missing: pip install 'scir-cli\[remote\]'$",
    ):
        storage.to_path("s3://bucket/x")


def test_a_worker_that_outlives_its_run_leaves_nothing_behind(tmp_path: Path):
    seen: list[PartTask] = []

    def elsewhere(kind: str, todo: list[PartTask], advance: Any) -> None:
        seen.extend(todo)
        dataset.write_part(todo[0], kind, Part([], 0))

    dataset.write_dataset(
        tmp_path / "out",
        "prompts",
        {"stage": "x"},
        [(0, 0)],
        lambda low, high: Part([], 0),
        share=elsewhere,
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(StoreError, match=r"cannot write .*data-00000\.arrow"):
        dataset.write_part(seen[0], "prompts", Part([], 0))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
