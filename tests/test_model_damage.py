"""Damage to a model or a checkpoint is noticed before it is used, and said in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import run, train
from safetensors.torch import load_file, save_file
from toy import make_adapter, make_model

from scir_cli import config, registry
from scir_cli.data import dataset, files, folders, readers
from scir_cli.data.files import read_json
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import ConfigError, DataError, ModelError, ScirError, TrainingError
from scir_cli.settings import ModelSettings
from scir_cli.stages import overwrite
from scir_cli.training import checkpoints
from scir_cli.training.trainer import Trainer


def load(folder: Path) -> None:
    settings = ModelSettings(model=str(folder), output_dir=Path("o"), device="cpu", dtype="fp32")
    LazyPolicy(settings, str(folder)).load()


def flip(file: Path, place: float = 0.5) -> None:
    """Flips a bit; place: where in the file, from 0 to 1."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def flip_weights(folder: Path) -> None:
    flip(folder / "model.safetensors", 0.9)


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def zero_weights(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(bytes(size))


def zero_the_end(folder: Path) -> None:
    """As a machine leaves it that lost power before the last pages were on disk."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4096] + bytes(4096))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def take_other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    other = {name: weight + 1 for name, weight in weights.items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})


def flip_config(folder: Path) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    changed = text.replace('"num_attention_heads": 4', '"num_attention_heads": 2')
    assert changed != text
    (folder / "config.json").write_text(changed, encoding="utf-8")


def flip_tokenizer(folder: Path) -> None:
    flip(folder / "tokenizer.json")


def remove_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


DAMAGE = [
    flip_weights,
    truncate_weights,
    zero_weights,
    zero_the_end,
    remove_weights,
    take_other_weights,
    flip_config,
    flip_tokenizer,
    remove_generation_config,
]


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    train(world, world / "trained", objective="dpo", max_steps=2)
    return world / "trained"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_of_ours_is_refused_and_written_again_by_its_own_command(
    damage: Callable[[Path], None],
    trained: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    shutil.copytree(trained, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ModelError, match="damaged|missing|no weights"):
        load(tmp_path / "m")

    undisturbed = read_json(trained / "manifest.json")
    again = train(world, tmp_path / "m", objective="dpo", max_steps=2)
    assert "it is written again" in capsys.readouterr().err
    assert "reused" not in again
    assert again["digest"] == undisturbed["digest"]
    assert again["files"] == undisturbed["files"]
    load(tmp_path / "m")
    assert train(world, tmp_path / "m", objective="dpo", max_steps=2)["reused"]


def test_a_stray_file_of_weights_changes_neither_the_digest_nor_the_model(
    trained: Path, world: Path, tmp_path: Path
):
    shutil.copytree(trained, tmp_path / "m")
    shutil.copy(world / "base" / "model.safetensors", tmp_path / "m" / "model-copy.safetensors")
    settings = ModelSettings(model=str(tmp_path), output_dir=Path("o"), device="cpu", dtype="fp32")
    keys = [LazyPolicy(settings, str(folder)).weights_key for folder in (trained, tmp_path / "m")]
    assert keys[0] == keys[1]


def test_a_model_card_may_be_edited(trained: Path, world: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("mine", encoding="utf-8")
    load(tmp_path / "m")
    assert train(world, tmp_path / "m", objective="dpo", max_steps=2)["reused"]
    assert (tmp_path / "m" / "README.md").read_text(encoding="utf-8") == "mine"


def test_the_files_of_a_model_have_the_mode_of_new_files_and_no_draft_is_left(
    trained: Path, tmp_path: Path
):
    (tmp_path / "new").touch()
    mode = (tmp_path / "new").stat().st_mode
    names = [entry["file"] for entry in read_json(trained / "manifest.json")["files"]]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (trained / name).stat().st_mode == mode, name
    assert [path.name for path in trained.iterdir() if path.name.startswith(".")] == [".lock"]


def test_a_damaged_adapter_is_refused_and_a_model_beside_it_is_not(world: Path, tmp_path: Path):
    train(world, tmp_path / "m", objective="dpo", max_steps=2, lora={"rank": 2})
    load(tmp_path / "m" / "adapter")
    flip(tmp_path / "m" / "adapter" / "adapter_model.safetensors", 0.9)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is damaged: its digest"):
        load(tmp_path / "m" / "adapter")
    load(tmp_path / "m")
    assert "reused" not in train(
        world, tmp_path / "m", objective="dpo", max_steps=2, lora={"rank": 2}
    )


def test_a_damaged_record_of_an_adapter_is_one_line(world: Path, tmp_path: Path):
    train(world, tmp_path / "m", objective="dpo", max_steps=1, lora={"rank": 2})
    record = tmp_path / "m" / "adapter" / "base.json"
    written = record.read_text(encoding="utf-8")
    for text, problem in (
        (written.replace('"digest"', '"digesu"', 1), "its checksum is not that of its content"),
        (written.replace("adapter_model", "adapter_mode1", 1), "its checksum is not"),
        (json.dumps({"files": []}), "it is no record of an adapter"),
    ):
        assert text != written
        record.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=f"base.json is damaged: {problem}"):
            load(tmp_path / "m" / "adapter")


# ------------------------------------------------------------------ models of others


def in_shards(folder: Path) -> list[Path]:
    """Splits the weights of a model into files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    paths = []
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        path = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in chosen}, path, {"format": "pt"})
        places |= dict.fromkeys(chosen, path.name)
        paths.append(path)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return paths


def test_a_model_in_shards_is_loaded(tmp_path: Path):
    in_shards(make_model(tmp_path / "m"))
    load(tmp_path / "m")


def test_shards_that_are_missing_truncated_swapped_or_zero_are_refused(tmp_path: Path):
    make_model(tmp_path / "m")
    first, second = in_shards(tmp_path / "m")
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(ModelError, match=f"lacks {first.name}, which its index names"):
        load(tmp_path / "m")
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", bytes(len(whole))):
        first.write_bytes(content)
        with pytest.raises(ModelError, match=f"{first.name} is damaged or truncated"):
            load(tmp_path / "m")
    first.write_bytes(second.read_bytes())
    with pytest.raises(ModelError, match=f"{first.name} does not hold .*, as .*index.json says"):
        load(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_its_map_is_refused(text: str, tmp_path: Path):
    in_shards(make_model(tmp_path / "m"))
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        load(tmp_path / "m")


def test_missing_tensors_are_an_error_that_names_them(tmp_path: Path):
    make_model(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model.layers.0.mlp.up_proj.weight; download"):
        load(tmp_path / "m")


def test_a_tied_head_is_not_missing(tmp_path: Path):
    load(make_model(tmp_path / "m", tie_word_embeddings=True))


def test_an_adapter_without_one_of_its_matrices_is_refused(tmp_path: Path):
    make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", tmp_path / "base")
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match="the adapter .* is incomplete: .*lora_B"):
        load(adapter)


def test_an_archive_of_torch_that_is_truncated_is_refused(tmp_path: Path):
    make_model(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    path = tmp_path / "m" / "pytorch_model.bin"
    torch.save(weights, path)
    load(tmp_path / "m")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], bytes(len(content)), b""):
        path.write_bytes(damaged)
        with pytest.raises(ModelError):
            load(tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"model": 3}', '{"vocab_size": "x"}'])
def test_a_small_file_of_another_model_that_holds_something_else_is_one_line(
    name: str, text: str, tmp_path: Path
):
    make_model(tmp_path / "m")
    (tmp_path / "m" / name).write_text(text, encoding="utf-8")
    with pytest.raises(ScirError) as error:
        load(tmp_path / "m")
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------ weights that are not finite


def test_weights_that_are_not_finite_after_the_last_step_are_not_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    optimize = Trainer.train

    def spoiled(trainer: Trainer, *args: Any) -> Any:
        """As if the last step had been taken, and had spoiled a weight."""
        trainer.step = trainer.n_steps
        with torch.no_grad():
            trainer.params[0][0] = float("nan")
        return optimize(trainer, *args)

    monkeypatch.setattr(Trainer, "train", spoiled)
    with pytest.raises(TrainingError, match="after step 1, weights are not finite: model.embed"):
        train(world, tmp_path / "m", objective="sft", max_steps=1)
    assert not (tmp_path / "m" / "manifest.json").exists()
    assert not list((tmp_path / "m").glob("*.safetensors"))


# ------------------------------------------------------------------ checkpoints


def damage_checkpoint(path: Path, kind: str) -> None:
    size = path.stat().st_size
    if kind == "flipped":
        flip(path, 0.7)
    elif kind == "truncated":
        os.truncate(path, size // 2)
    elif kind == "zero":
        path.write_bytes(bytes(size))
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        assert kind == "without its digest"
        (path.parent / f".{path.name}.xxh3").unlink()


KINDS = ["flipped", "truncated", "zero", "empty", "without its digest"]


class Stop(Exception):
    """Ends a run after a checkpoint, as a kill would."""


def stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    save = Trainer.save_checkpoint

    def save_and_stop(trainer: Trainer) -> None:
        save(trainer)
        if trainer.step == step:
            raise Stop

    monkeypatch.setattr(Trainer, "save_checkpoint", save_and_stop)


LONG = {"objective": "dpo", "max_steps": 5, "save_every": 1, "batch_size": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_damaged", [1, 2])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    kind: str,
    n_damaged: int,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    undisturbed = world / "undisturbed"
    if not undisturbed.exists():
        train(world, undisturbed, **LONG)
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(Stop):
            train(world, tmp_path / "m", **LONG)
    folder = tmp_path / "m" / "checkpoints"
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    assert [path.name for path in paths] == ["step-00000003.pt", "step-00000002.pt"]
    for path in paths[:n_damaged]:
        damage_checkpoint(path, kind)

    first = []
    optimize = Trainer.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:

        def noted(trainer: Trainer) -> None:
            first.append(trainer.step)
            optimize(trainer)

        patch.setattr(Trainer, "save_checkpoint", noted)
        manifest = train(world, tmp_path / "m", **LONG)
    assert first[0] == 4 - n_damaged - (n_damaged == 2)
    assert capsys.readouterr().err.count("is damaged; training continues from") == n_damaged
    assert manifest["digest"] == read_json(undisturbed / "manifest.json")["digest"]
    assert not folder.exists()


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = Trainer.save_checkpoint

    def spoil(trainer: Trainer) -> None:
        if trainer.step == 2:
            with torch.no_grad():
                trainer.params[0][0] = float("inf")
        save(trainer)

    monkeypatch.setattr(Trainer, "save_checkpoint", spoil)
    with pytest.raises(TrainingError, match="after step 2, weights are not finite"):
        train(world, tmp_path / "m", **LONG)
    names = [path.name for path in (tmp_path / "m" / "checkpoints").glob("step-*.pt")]
    assert names == ["step-00000001.pt"]


def test_an_interrupt_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints.save(tmp_path, 1, {"step": 1})

    def interrupted(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(tmp_path, 2, {"step": 2})
    newest = checkpoints.newest(tmp_path)
    assert newest
    assert checkpoints.load(newest) == {"step": 1}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".step-00000001.pt.xxh3",
        "step-00000001.pt",
    ]


def test_damaged_lines_of_the_log_are_left_out_on_resume(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(3, patch)
        with pytest.raises(Stop):
            train(world, tmp_path / "m", **LONG)
    log = tmp_path / "m" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = [*lines[:1], b"\xff\x00 half a line\n", b'{"kind": "train"}\n', b"[1]\n", *lines[1:]]
    log.write_bytes(b"".join(damaged) + b'{"step": 4, "kind": "tr')
    train(world, tmp_path / "m", **LONG)
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("holds a damaged line") == 3


# ------------------------------------------------------------------ reference log-probabilities


def test_stored_numbers_are_read_as_they_were_written_or_not_at_all(tmp_path: Path):
    path = tmp_path / "reference_logps-x.arrow"
    values = {"a": (-1.5, -2.25), "b": (-0.5, -3.0)}
    dataset.write_columns(path, values)
    assert dataset.read_columns(path) == values
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert dataset.read_columns(path) == {}
    path.write_bytes(content[:-1])
    assert dataset.read_columns(path) == {}
    path.unlink()
    assert dataset.read_columns(path) == {}
    dataset.write_columns(path, values)
    assert dataset.read_columns(path) == values


def test_two_trainings_may_store_values_for_one_dataset_at_the_same_time(tmp_path: Path):
    path = tmp_path / "reference_logps-x.arrow"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("first", encoding="utf-8")
        second.write_text("second", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "first"


def test_a_temporary_file_is_not_written_through_a_link_that_was_planted(tmp_path: Path):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / ".out.json.tmp").symlink_to(tmp_path / "mine")
    files.write_json(tmp_path / "out.json", {"a": 1})
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


def test_a_lock_does_not_empty_a_file_that_a_link_names(world: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ScirError, match=r"cannot write .*o"):
        run("check-consistency", input=str(world / "judged"), output_dir=tmp_path / "o")
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


def test_an_overwrite_removes_a_link_to_a_folder_and_not_the_folder(world: Path, tmp_path: Path):
    judged = str(world / "judged")
    run("check-consistency", input=judged, output_dir=tmp_path / "o")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "o" / "link").symlink_to(tmp_path / "mine")
    run("check-consistency", input=judged, output_dir=tmp_path / "o", overwrite=True)
    assert (tmp_path / "mine" / "file").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "o" / "link").exists()


# ------------------------------------------------------------------ files that are read


def test_damaged_offsets_of_a_saved_folder_are_refused_before_they_are_used(tmp_path: Path):
    datasets.Dataset.from_list(
        [{"prompt": f"Say {number}."} for number in range(2000)]
    ).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    content = bytearray(file.read_bytes())
    place = content.index(b"Say 0.Say 1.") - 4000
    content[place : place + 64] = b"\x7f" * 64
    file.write_bytes(content)
    with pytest.raises(DataError, match="saved cannot be read"):
        readers.open_prompts(str(tmp_path / "saved"))


def test_a_link_that_names_itself_is_one_line(tmp_path: Path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    settings = config.build(
        registry.STAGES["filter"].settings,
        {"input": str(tmp_path / "loop.jsonl"), "output_dir": tmp_path / "o"},
        where="test",
    )
    overwrite.check(settings, "test")
    with pytest.raises(ScirError):
        run("filter", input=str(tmp_path / "loop.jsonl"), output_dir=tmp_path / "o")


def test_an_overwrite_of_the_model_behind_two_adapters_is_refused(tmp_path: Path):
    make_model(tmp_path / "base")
    first = make_adapter(tmp_path / "first", tmp_path / "base")
    second = make_adapter(tmp_path / "second", tmp_path / "base")
    text = (second / "adapter_config.json").read_text(encoding="utf-8")
    text = text.replace(str(tmp_path / "base"), str(first))
    (second / "adapter_config.json").write_text(text, encoding="utf-8")
    for name in ("first", "base"):
        settings = ModelSettings(model=str(second), output_dir=tmp_path / name)
        with pytest.raises(ConfigError, match="is or holds the base model of model"):
            overwrite.check(settings, "test")


def test_what_lies_in_the_place_of_a_part_a_digest_or_a_checkpoint_is_no_exception(tmp_path: Path):
    out = tmp_path / "o"
    out.mkdir()
    (out / "data").mkdir()
    assert not folders.is_intact(out / "data", "0" * 32)
    folders.record_digest(out / "x", "0" * 32)
    (out / ".x.xxh3").write_bytes(b"\xff\xfe")
    assert not folders.is_intact(out / "x", folders.recorded_digest(out / "x") or "")
    (out / ".x.xxh3").unlink()
    (out / ".x.xxh3").mkdir()
    assert folders.recorded_digest(out / "x") is None
    folders.forget_digest(out / "x")
    assert not (out / ".x.xxh3").exists()
    checkpoints.save(out, 1, {"step": 1})
    (out / "checkpoints" / "step-00000002.pt").mkdir()
    newest = checkpoints.newest(out)
    assert newest
    assert newest.name == "step-00000001.pt"
