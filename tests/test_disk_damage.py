"""Damage to files of a dataset is noticed before a row of it is used.

The same command mends it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scir_cli.data import dataset, folders, readers, schemas
from scir_cli.data.dataset import Part
from scir_cli.errors import DataError, PlanMismatch, StoreError

PLAN = {"stage": "generate", "seed": 0}
BOUNDS = [(0, 3), (3, 6), (6, 9)]


def rows(low: int, high: int) -> Part:
    prompts = [
        {
            "prompt_id": f"p{number}",
            "messages": [{"role": "user", "content": f"Say {number}."}],
            "subset": None,
            "extra": None,
        }
        for number in range(low, high)
    ]
    return Part(prompts, high - low)


def write(out: Path, plan: dict[str, Any] = PLAN, make: Any = rows, **options: Any) -> Any:
    return dataset.write_dataset(out, "prompts", plan, BOUNDS, make, **options)


def ids(out: Path) -> list[str]:
    return dataset.read_dataset(out, "prompts")["prompt_id"].to_pylist()


EXPECTED = [f"p{number}" for number in range(9)]


def flip_bit(out: Path) -> None:
    part = out / "data-00001.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def swap_parts(out: Path) -> None:
    (out / "data-00000.arrow").rename(out / "x")
    (out / "data-00001.arrow").rename(out / "data-00000.arrow")
    (out / "x").rename(out / "data-00001.arrow")


def replace_part(out: Path) -> None:
    shutil.copy(out / "data-00000.arrow", out / "data-00002.arrow")


def truncate(out: Path) -> None:
    part = out / "data-00002.arrow"
    part.write_bytes(part.read_bytes()[:-8])


def lose_end_mark(out: Path) -> None:
    os.truncate(out / "data-00001.arrow", (out / "data-00001.arrow").stat().st_size - 8)


def break_offsets(out: Path) -> None:
    """Offsets that point far outside the text, as a damaged disk could leave them."""
    part = out / "data-00000.arrow"
    content = bytearray(part.read_bytes())
    place = content.index(b"p0p1p2") - 64
    content[place : place + 64] = b"\x7f" * 64
    part.write_bytes(content)


def remove_part(out: Path) -> None:
    (out / "data-00001.arrow").unlink()


def cut_manifest(out: Path) -> None:
    path = out / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


def edit_figure(out: Path) -> None:
    path = out / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"rows_in": 9', '"rows_in": 8'), encoding="utf-8")


def edit_digest(out: Path) -> None:
    path = out / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["parts"][1]["digest"] = "0" * 32
    path.write_text(json.dumps(manifest), encoding="utf-8")


DAMAGE = [
    flip_bit,
    swap_parts,
    replace_part,
    truncate,
    lose_end_mark,
    break_offsets,
    remove_part,
    edit_digest,
    edit_figure,
    cut_manifest,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_dataset_is_refused_as_input_and_mended_by_its_own_command(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "o")
    damage(tmp_path / "o")
    with pytest.raises(DataError, match=r"damaged|No such file|not readable JSON"):
        ids(tmp_path / "o")
    assert "reused" not in write(tmp_path / "o")
    assert "is written again" in capsys.readouterr().err
    assert ids(tmp_path / "o") == EXPECTED


@pytest.mark.parametrize("damage", [flip_bit, swap_parts, replace_part, truncate, remove_part])
def test_a_part_that_was_damaged_before_a_resume_is_written_again(
    damage: Callable[[Path], None], tmp_path: Path
):
    def killed(low: int, high: int) -> Part:
        if low == 6 and not (tmp_path / "o" / "data-00002.arrow").exists():
            raise KeyboardInterrupt
        return rows(low, high)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "o", make=killed)
    if not (tmp_path / "o" / "data-00002.arrow").exists():
        shutil.copy(tmp_path / "o" / "data-00000.arrow", tmp_path / "o" / "data-00002.arrow")
    damage(tmp_path / "o")
    write(tmp_path / "o")
    assert ids(tmp_path / "o") == EXPECTED


def test_finished_parts_are_not_written_again(tmp_path: Path):
    made = []

    def counted(low: int, high: int) -> Part:
        made.append(low)
        if low == 6 and len(made) == 3:
            raise KeyboardInterrupt
        return rows(low, high)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "o", make=counted)
    write(tmp_path / "o", make=counted)
    assert made == [0, 3, 6, 6]
    remove_part(tmp_path / "o")
    write(tmp_path / "o", make=counted)
    assert made == [0, 3, 6, 6, 3]


def test_a_stray_part_is_not_read(tmp_path: Path):
    def stray(low: int, high: int) -> Part:
        if low == 6:
            shutil.copy(tmp_path / "o" / "data-00000.arrow", tmp_path / "o" / "data-00007.arrow")
        return rows(low, high)

    manifest = write(tmp_path / "o", make=stray)
    assert [part["file"] for part in manifest["parts"]] == [
        "data-00000.arrow",
        "data-00001.arrow",
        "data-00002.arrow",
    ]
    assert manifest["rows_in"] == manifest["rows_out"] == 9
    assert ids(tmp_path / "o") == EXPECTED


def test_an_overwrite_that_is_killed_at_any_moment_can_be_started_again(tmp_path: Path):
    """Clearing is broken off after each number of deletions."""
    write(tmp_path / "whole")
    n_files = len(list((tmp_path / "whole").iterdir()))
    unlink = Path.unlink
    for moment in range(n_files):
        out = tmp_path / f"o{moment}"
        write(out)
        left = [moment]

        def counted(path: Path, left: list[int] = left, **options: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            unlink(path, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", counted)
            with pytest.raises(KeyboardInterrupt):
                write(out, {**PLAN, "seed": 1}, overwrite=True)
        try:
            write(out, {**PLAN, "seed": 1})
        except PlanMismatch:
            write(out, {**PLAN, "seed": 1}, overwrite=True)
        assert ids(out) == EXPECTED


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_process(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def refuse(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "o")
    assert "offers no locks" in capsys.readouterr().err
    assert ids(tmp_path / "o") == EXPECTED


def test_a_lock_of_another_process_is_one(tmp_path: Path):
    write(tmp_path / "o")
    with (tmp_path / "o" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process is writing"):
            write(tmp_path / "o")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_part_without_permission_is_not_called_damaged(tmp_path: Path):
    write(tmp_path / "o")
    (tmp_path / "o" / "data-00001.arrow").chmod(0)
    with pytest.raises(DataError, match="cannot read .*data-00001.arrow: Permission denied"):
        ids(tmp_path / "o")


def test_a_part_of_another_schema_version_is_refused(tmp_path: Path):
    """Its digest fits, as if an older version had written the whole folder."""
    write(tmp_path / "p")
    part = tmp_path / "p" / "data-00001.arrow"
    with pa.ipc.open_stream(part.read_bytes()) as stream:
        table = stream.read_all()
    table = table.replace_schema_metadata({**table.schema.metadata, schemas.VERSION_KEY: b"1"})
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text(encoding="utf-8"))
    digests = [dataset.hashing.digest_part(tmp_path / "p" / p["file"]) for p in manifest["parts"]]
    for entry, digest in zip(manifest["parts"], digests, strict=True):
        entry["digest"] = digest
    manifest["digest"] = dataset.hashing.digest_json(digests)
    del manifest["checksum"]
    (tmp_path / "p" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match="with schema version 1"):
        dataset.open_dataset(tmp_path / "p")


def test_no_digest_file_stays_in_a_finished_folder(tmp_path: Path):
    write(tmp_path / "o")
    hidden = [path.name for path in (tmp_path / "o").iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"]
    assert folders.recorded_digest(tmp_path / "o" / "data-00000.arrow") is None


@pytest.mark.parametrize("lost", ["removed", "a folder", "a loop"])
def test_a_dataset_that_lost_its_plan_is_not_read_as_shards_of_others(lost: str, tmp_path: Path):
    write(tmp_path / "o")
    plan = tmp_path / "o" / "plan.json"
    plan.unlink()
    if lost == "a folder":
        plan.mkdir()
    elif lost == "a loop":
        plan.symlink_to(plan)
    data, dropped = readers.open_prompts(str(tmp_path / "o"))
    assert isinstance(data, dataset.Dataset)
    assert data.slice(0, 9)["prompt_id"].to_pylist() == EXPECTED and not dropped
