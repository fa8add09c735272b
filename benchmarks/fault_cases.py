"""The cases of faults.py: a small world, damage to it, and what each command has to do then."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import faults
import pyarrow as pa
from faults import Case, Ran, judge, scir

FP32 = "--dtype fp32 --device cpu"
TRAIN = f"train --objective dpo -m policy -i pairs.jsonl --batch-size 2 --save-every 1 {FP32}"

#: Command lines of the world, each with the folder that it writes.
COMMANDS = {
    "candidates": f"generate -m policy -i prompts.jsonl --n 2 --max-new-tokens 4 {FP32}",
    "judged": "judge -m policy --reward-reference base -i candidates "
    f"--reward-models judge,implicit,likelihood {FP32}",
    "consistency": "check-consistency -i judged --agree-on judge,implicit",
    "preferences": "filter -i judged --keep-unlabeled --keep-cut",
    "trained": f"{TRAIN} --learning-rate 1e-3",
    "lora": f"{TRAIN} --learning-rate 1e-3 --lora-rank 2",
}
PARTS = " --rows-per-part 2"
DATASETS = ("candidates", "judged", "consistency", "preferences")
MODELS = ("trained", "lora")

#: The stage that reads each folder, as a command line without its output folder.
READERS = {
    "candidates": COMMANDS["judged"] + PARTS,
    "judged": COMMANDS["preferences"] + PARTS,
    "preferences": f"train --objective scir --reward-reference base -m policy -i preferences "
    f"--batch-size 2 --max-steps 1 --penalty-weight 0.1 --learning-rate 1e-3 {FP32}",
    "trained": COMMANDS["candidates"].replace("-m policy", "-m trained") + PARTS,
    "lora/adapter": COMMANDS["candidates"].replace("-m policy", "-m lora/adapter") + PARTS,
}


def import_all() -> None:
    """Imports what commands import, so that a forked process does not have to."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401
    import torch

    from scir_cli import registry, stages

    torch.set_num_threads(1)
    for stage in registry.STAGES:
        stages.load(stage)


def line_of(folder: str) -> str:
    """The command line that writes a folder of the world."""
    parts = PARTS if folder in DATASETS else ""
    return f"{COMMANDS[folder]}{parts} -o {folder}"


def make_world(world: Path) -> Path:
    """Two models, inputs, every stage's output, and the outputs of those that read them."""
    world.mkdir()
    for seed, name in enumerate(("policy", "base")):
        common.make_model(world / name, "tiny", seed=seed)
    words = [(f"w{40 + i} w{60 + i}", f"w{80 + i}", f"w{100 + i} w{120 + i}") for i in range(6)]
    prompts = [{"prompt": prompt, "id": prompt} for prompt, _, _ in words]
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in words]
    write_rows(world / "prompts.jsonl", prompts)
    write_rows(world / "pairs.jsonl", pairs)
    for folder in COMMANDS:
        checked(scir(line_of(folder), world))
    for folder, line in READERS.items():
        checked(scir(f"{line} -o {result_of(folder)}", world))
    return world


def result_of(folder: str) -> str:
    """The folder that the reader of a folder writes."""
    return f"from-{folder.replace('/', '-')}"


def write_rows(path: Path, rows: list[Any]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def checked(ran: Ran) -> None:
    """Ends the benchmark if a command of the undisturbed world failed."""
    if ran.fault or ran.status:
        raise SystemExit(f"the undisturbed world cannot be made: {ran.err}")


# ------------------------------------------------------------------ what a folder holds


def content(folder: Path) -> dict[str, bytes]:
    """The files that make up the result in a folder: parts of a dataset, or files of a model.

    Read by this benchmark itself, from the manifest's list.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    names = [entry["file"] for entry in manifest.get("parts") or manifest["files"]]
    found = {}
    for name in names:
        if name.endswith(".arrow"):
            # Rows: the metadata of a part may hold a count in another order.
            table = pa.ipc.open_stream((folder / name).read_bytes()).read_all()
            found[name] = repr(table.to_pylist()).encode()
        elif not name.endswith("base.json"):
            found[name] = (folder / name).read_bytes()
    return found


def same_as(world: Path, name: str, folder: Path) -> Callable[[], bool]:
    """Whether a folder holds what the world's folder of this name holds."""
    expected = content(world / name)

    def same() -> bool:
        return content(folder) == expected

    return same


# ------------------------------------------------------------------ damage


def flip_bit(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def change_bytes(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(8):
        data[draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(data)


def truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def zero_the_end(file: Path, draw: random.Random) -> None:
    """As a machine leaves it that lost power."""
    data = file.read_bytes()
    start = draw.randrange(len(data))
    file.write_bytes(data[:start] + bytes(len(data) - start))


def append(file: Path, draw: random.Random) -> None:
    with file.open("ab") as sink:
        sink.write(draw.randbytes(draw.randrange(1, 64)))


def empty(file: Path, draw: random.Random) -> None:
    file.write_bytes(b"")


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def become_a_folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


def become_a_loop(file: Path, draw: random.Random) -> None:
    """A link that names itself."""
    file.unlink()
    file.symlink_to(file.name)


def repeat_a_range(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    low = draw.randrange(len(data))
    high = draw.randrange(low, len(data)) + 1
    file.write_bytes(data[:high] + data[low:])


def take_another(file: Path, draw: random.Random) -> None:
    """The content of another file of the same folder with the same ending."""
    others = [other for other in sorted(file.parent.glob(f"*{file.suffix}")) if other != file]
    others = [other for other in others if other.read_bytes() != file.read_bytes()]
    shutil.copy(draw.choice(others) if others else sys.executable, file)


def swap(file: Path, draw: random.Random) -> None:
    """Swaps two files of the same ending."""
    others = [other for other in sorted(file.parent.glob(f"*{file.suffix}")) if other != file]
    if not others:
        file.write_bytes(file.read_bytes()[::-1])
        return
    other = draw.choice(others)
    data = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)


#: Every kind, with whether only a digest can show it.
DAMAGE: dict[Callable[[Path, random.Random], None], bool] = {
    flip_bit: True,
    change_bytes: True,
    truncate: False,
    zero_the_end: True,
    append: True,
    empty: False,
    remove: False,
    become_a_folder: False,
    become_a_loop: False,
    repeat_a_range: True,
    take_another: True,
    swap: True,
}


def files_in(folder: Path) -> list[str]:
    """The files of an output folder that the program reads again."""
    unread = {"README.md", "state.json", "dataset_info.json", "metrics.jsonl"}
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.name not in unread:
            names.append(path.relative_to(folder).as_posix())
    return names


def damaged(names: list[str], times: int) -> Iterator[tuple[str, Any, int]]:
    """(file, damage, number) for each file and kind of damage, `times` times if it is random."""
    for name in names:
        for damage in DAMAGE:
            is_random = damage in (flip_bit, change_bytes, truncate, zero_the_end, repeat_a_range)
            for number in range(times if is_random else 1):
                yield name, damage, number


# ------------------------------------------------------------------ groups


def cases(world: Path) -> list[Case]:
    """All cases, group by group."""
    return [
        *damaged_inputs(world, 3),
        *damaged_outputs(world, 3),
        *damaged_resumes(world, 3),
        *damaged_checkpoints(world, 3),
        *models_of_others(world, 3),
        *user_files(world, 12),
        *recipes(world, 120),
        *settings(world),
        *hostile_texts(world),
        *failing_calls(world, 6),
        *signals(world, 12),
        *kills_at_changes(world),
        *two_at_once(world, 4),
        *environments(world),
    ]


def damaged_inputs(world: Path, times: int) -> Iterator[Case]:
    """A stage starts on a damaged folder of ours: the right rows, or one line."""
    for source, line in READERS.items():
        result = result_of(source)
        for name, damage, number in damaged(files_in(world / source), times):

            def work(
                folder: Path,
                draw: random.Random,
                source: str = source,
                name: str = name,
                damage: Any = damage,
                line: str = line,
                result: str = result,
            ) -> tuple[str, str]:
                damage(folder / source / name, draw)
                shutil.rmtree(folder / result)
                ran = scir(f"{line} -o {result}", folder)
                return judge(ran, same_as(world, result, folder / result))

            kind = (
                "model of ours as input"
                if source in ("trained", "lora/adapter")
                else ("dataset of ours as input")
            )
            yield Case(kind, f"{source}/{name}: {damage.__name__} {number}", work)


def damaged_outputs(world: Path, times: int) -> Iterator[Case]:
    """The same command on a finished folder that was damaged: what it wrote, or one line."""
    for target in (*DATASETS, *MODELS):
        for name, damage, number in damaged(files_in(world / target), times):

            def work(
                folder: Path,
                draw: random.Random,
                target: str = target,
                name: str = name,
                damage: Any = damage,
            ) -> tuple[str, str]:
                damage(folder / target / name, draw)
                ran = scir(line_of(target), folder)
                return judge(ran, same_as(world, target, folder / target))

            yield Case(
                "same command on a damaged folder",
                f"{target}/{name}: {damage.__name__} {number}",
                work,
            )


def damaged_resumes(world: Path, times: int) -> Iterator[Case]:
    """A dataset that was damaged before it is continued."""

    def work(
        folder: Path, draw: random.Random, target: str, name: str, damage: Any
    ) -> tuple[str, str]:
        interrupt(folder, target, draw)
        file = folder / target / name
        if file.exists():
            damage(file, draw)
        else:
            file.write_bytes(draw.randbytes(100))
        return judge(scir(line_of(target), folder), same_as(world, target, folder / target))

    for target in ("candidates", "judged", "preferences"):
        parts = [name for name in files_in(world / target) if name.endswith(".arrow")]
        hidden = [f".{name}.xxh3" for name in parts]
        for name, damage, number in damaged([*parts[:3], *hidden[:2]], times):
            yield Case(
                "resume of a damaged dataset",
                f"{target}/{name}: {damage.__name__} {number}",
                partial(work, target=target, name=name, damage=damage),
            )


def interrupt(folder: Path, target: str, draw: random.Random) -> None:
    """Makes a finished dataset one whose run was killed after the parts but one."""
    from scir_cli.data import folders

    out = folder / target
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    for name in ("manifest.json", "state.json", "dataset_info.json", "README.md"):
        (out / name).unlink()
    for part in manifest["parts"]:
        folders.record_digest(out / part["file"], part["digest"])
    last = out / manifest["parts"][-1]["file"]
    last.unlink()
    folders.forget_digest(last)


def damaged_checkpoints(world: Path, times: int) -> Iterator[Case]:
    """A training that was killed after two steps, with a damaged file beside it."""

    def work(
        folder: Path, draw: random.Random, target: str, names: list[str], damage: Any
    ) -> tuple[str, str]:
        shutil.rmtree(folder / target)
        scir(line_of(target), folder, partial(stop_after, 2))
        for name in names:
            damage(folder / target / name, draw)
        return judge(scir(line_of(target), folder), same_as(world, target, folder / target))

    newest, before = "checkpoints/step-00000002.pt", "checkpoints/step-00000001.pt"
    digest = "checkpoints/.step-00000002.pt.xxh3"
    for names in ([newest], [newest, before], [digest], ["metrics.jsonl"]):
        for name, damage, number in damaged([names[0]], times):
            for target in MODELS:
                yield Case(
                    "resume of a training",
                    f"{target}/{' '.join(names)}: {damage.__name__} {number}",
                    partial(work, target=target, names=[name, *names[1:]], damage=damage),
                )


def stop_after(step: int) -> None:
    """Makes a training end like a killed one when a checkpoint has been written."""
    from scir_cli.training.trainer import Trainer

    save = Trainer.save_checkpoint

    def save_and_stop(trainer: Any) -> None:
        save(trainer)
        if trainer.step == step:
            os._exit(0)

    Trainer.save_checkpoint = save_and_stop  # type: ignore[method-assign]


def models_of_others(world: Path, times: int) -> Iterator[Case]:
    """A model without digests: damage that its files show by themselves is refused."""

    def work(
        folder: Path, draw: random.Random, name: str, damage: Any, in_shards: bool
    ) -> tuple[str, str]:
        if in_shards:
            split_weights(folder / "policy")
        damage(folder / "policy" / name, draw)
        shutil.rmtree(folder / "candidates")
        ran = scir(line_of("candidates"), folder)
        return judge(ran, same_as(world, "candidates", folder / "candidates"))

    whole = ["config.json", "model.safetensors", "tokenizer.json"]
    shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    for names, in_shards in ((whole, False), (shards, True)):
        for name, damage, number in damaged(names, times):
            is_swap = in_shards and damage in (swap, take_another)
            if DAMAGE[damage] and not is_swap:
                continue
            yield Case(
                "model of others",
                f"{name}: {damage.__name__} {number}",
                partial(work, name=name, damage=damage, in_shards=in_shards),
            )


def split_weights(folder: Path) -> None:
    """Splits the weights of a model into two files with an index."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in chosen}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


# ------------------------------------------------------------------ files of users


def user_files(world: Path, times: int) -> Iterator[Case]:
    """Random damage to prompts and pairs in every format: rows, or one line."""

    def work(
        folder: Path, draw: random.Random, make: Any, name: str, damage: Any, line: str
    ) -> tuple[str, str]:
        file = make(folder, name)
        damage(file, draw)
        ran = scir(line.format(name=name), folder)
        # A file that lost its end, or all, is no input.
        is_lost = damage in (remove, become_a_loop)
        return judge(ran, (lambda: False) if is_lost else None)

    prompts = f"generate -m policy -i {{name}} --n 1 --max-new-tokens 2 -o out {FP32}"
    pairs = f"judge -m policy -i {{name}} --reward-models likelihood -o out {FP32}"
    for make, name in (
        (make_text, "in.jsonl"),
        (make_json, "in.json"),
        (make_csv, "in.csv"),
        (make_parquet, "in.parquet"),
        (make_saved, "saved"),
    ):
        for line in (prompts, pairs):
            for _, damage, number in damaged([name], times):
                yield Case(
                    "file of a user",
                    f"{line.split()[0]} {name}: {damage.__name__} {number}",
                    partial(work, make=make, name=name, damage=damage, line=line),
                )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The pairs of the world, which hold prompts too."""
    text = (folder / "pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def make_text(folder: Path, name: str) -> Path:
    write_rows(folder / name, rows_of(folder))
    return folder / name


def make_json(folder: Path, name: str) -> Path:
    (folder / name).write_text(json.dumps(rows_of(folder)), encoding="utf-8")
    return folder / name


def make_csv(folder: Path, name: str) -> Path:
    import pyarrow.csv

    pyarrow.csv.write_csv(pa.Table.from_pylist(rows_of(folder)), folder / name)
    return folder / name


def make_parquet(folder: Path, name: str) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows_of(folder)), folder / name)
    return folder / name


def make_saved(folder: Path, name: str) -> Path:
    """A folder as `datasets` saves it; returns its file of rows."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows_of(folder)).save_to_disk(folder / name)
    return next((folder / name).glob("*.arrow"))


# ------------------------------------------------------------------ recipes and settings

RECIPE = """output_dir: runs/x
set: {base: policy, rate: 1.0e-6}
all: {seed: 0}
steps:
  - generate: {model: "{base}", input: prompts.jsonl, n: 2, output_dir: "{out}/a"}
  - iterations: 2
    steps:
      - judge: {model: "{base}", input: "{out}/a", output_dir: "{out}/j{i}"}
      - filter: {input: "{out}/j{i}", output_dir: "{out}/p{i}"}
"""
PIECES = [
    "iterations: 1000000000", "iterations: -1", "iterations: 1.5", "iterations: two", "&a [*a]",
    "*a", "!!python/object/apply:os.system [ls]", "? [", "{{{{", "\x1b[2J", "\u202e", "\x00",
    "extends: recipe.yaml", "extends: ..", "null", "nan", "inf", "1e999", "~", "[[[[[[", "<<: *a",
    "{out}/a", "{out", "{nosuch}", "output_dir: prompts.jsonl", "seed: -1", "n: 0", "n: 1e9",
]  # fmt: skip
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def recipes(world: Path, times: int) -> Iterator[Case]:
    """Recipes with changed, repeated and planted lines: a plan or lines with status 2."""

    def work(folder: Path, draw: random.Random, text: str | None) -> tuple[str, str]:
        lines = RECIPE.splitlines(keepends=True)
        for _ in range(0 if text else draw.randrange(1, 4)):
            place = draw.randrange(len(lines))
            change = draw.randrange(4)
            if change == 0:
                del lines[place]
            elif change == 1:
                lines.insert(place, lines[draw.randrange(len(lines))])
            elif change == 2:
                lines.insert(place, draw.choice(PIECES) + "\n")
            else:
                at = draw.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:at] + draw.choice(PIECES) + lines[place][at:]
            lines = lines or ["\n"]
        recipe = text or "".join(lines)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8", errors="replace")
        started = time.monotonic()
        outcome = judge(scir("run recipe.yaml --dry-run", folder), None)
        return ("hang", "over 5 s") if time.monotonic() - started > 5 else outcome

    for number in range(times):
        yield Case("recipe", f"random {number}", partial(work, text=None))
    for number, text in enumerate([*PIECES, BOMB, RECIPE + BOMB]):
        yield Case("recipe", f"planted {number}", partial(work, text=text))


VALUES = [
    "inf", "-inf", "nan", "1e39", "1e400", "-1", "0", "²", "٣", "1_0", "", "null", "none",
    "\x1b[2J",
    "999999999999999999999", "0x10", "1,,2", "[", "🙂", "a=b",
]  # fmt: skip


def settings(world: Path) -> Iterator[Case]:
    """Every number and text of some commands with odd values: never a traceback or a hang."""
    from scir_cli import config, registry

    def work(folder: Path, draw: random.Random, words: list[str]) -> tuple[str, str]:
        return judge(scir(words, folder), None)

    for stage, line in (
        ("train", f"{TRAIN} -o out --max-steps 1"),
        ("generate", f"{COMMANDS['candidates']} -o out"),
        ("filter", f"{COMMANDS['preferences']} -o out"),
    ):
        for index, name in enumerate(config.fields(registry.STAGES[stage].settings)):
            if name in ("output_dir", "workers", "num_processes", "device", "backend", "report"):
                continue
            for offset in range(3):
                value = VALUES[(3 * index + offset) % len(VALUES)]
                yield Case(
                    "setting",
                    f"{stage} {name}={value}",
                    partial(work, words=[*line.split(), f"{name}={value}"]),
                )


# ------------------------------------------------------------------ texts

TEXTS = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\u202e",
    "\r\n",
    "\x9b2J",
    "[red]x[/red]",
    ":boom:",
    "\x7f",
]


def hostile_texts(world: Path) -> Iterator[Case]:
    """Names of others with escapes: no control character reaches the terminal."""

    def run_line(folder: Path, draw: random.Random, words: list[str]) -> tuple[str, str]:
        return judge(scir(words, folder), None)

    def column(folder: Path, draw: random.Random, text: str) -> tuple[str, str]:
        write_rows(folder / "in.jsonl", [{text: "a", f"{text}2": "b"}])
        return judge(scir("generate -m policy -i in.jsonl -o out", folder), None)

    def role(folder: Path, draw: random.Random, text: str) -> tuple[str, str]:
        write_rows(folder / "in.jsonl", [{"messages": [{"role": text, "content": text}]}])
        return judge(scir(f"generate -m policy -i in.jsonl -o out {FP32}", folder), None)

    def subset(folder: Path, draw: random.Random, text: str) -> tuple[str, str]:
        rows = [{**row, "subset": text, "chosen_model": text} for row in rows_of(folder)]
        write_rows(folder / "in.jsonl", rows)
        line = f"eval rewards -m policy -i in.jsonl --reward-models likelihood -o out {FP32}"
        return judge(scir(line, folder), None)

    def template(folder: Path, draw: random.Random, text: str) -> tuple[str, str]:
        source = "{{ raise_exception('" + text.replace("\n", " ") + "') }}"
        (folder / "t.jinja").write_text(source, encoding="utf-8")
        line = f"{COMMANDS['candidates']} --chat-template t.jinja -o out"
        return judge(scir(line, folder), None)

    def kind(folder: Path, draw: random.Random, text: str) -> tuple[str, str]:
        path = folder / "judged" / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        del manifest["checksum"]
        path.write_text(json.dumps({**manifest, "kind": text}), encoding="utf-8")
        return judge(scir("filter -i judged -o out", folder), None)

    for text in TEXTS:
        for name, work in (
            ("column", column),
            ("role", role),
            ("subset", subset),
            ("template", template),
            ("kind of a manifest", kind),
        ):
            yield Case("hostile text", f"{name} {text!r}", partial(work, text=text))
        for words in (
            ["filter", "-i", text, "-o", "out"],
            ["generate", "-m", text, "-i", "prompts.jsonl", "-o", "out"],
            ["filter", "-i", "judged", "-o", "out", f"{text}=1"],
            ["filter", "-i", "judged", "-o", "out", f"rule={text}"],
            [text],
            ["run", text],
        ):
            name = " ".join(words)
            yield Case("hostile text", repr(name), partial(run_line, words=words))


# ------------------------------------------------------------------ failing calls and signals

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)


def fail_at(call: str, n: int, number: int) -> None:
    """Makes the n-th use of a function of `os` fail with an error of the operating system.

    A file that is opened for reading is not counted.
    """
    function = getattr(os, call)
    left = [n]

    def failing(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        return function(*args, **options)

    setattr(os, call, failing)


def failing_calls(world: Path, times: int) -> Iterator[Case]:
    """A system call of a stage fails: one line, and the same command then ends as undisturbed."""

    def work(
        folder: Path, draw: random.Random, target: str, call: str, n: int, number: int
    ) -> tuple[str, str]:
        shutil.rmtree(folder / target)
        first = judge(scir(line_of(target), folder, partial(fail_at, call, n, number)), None)
        if first[0] not in faults.ACCEPTED:
            return first
        return judge(scir(line_of(target), folder), same_as(world, target, folder / target))

    for target in ("candidates", "preferences", "trained"):
        for call in ("fsync", "replace", "mkdir"):
            for n in range(1, times + 1):
                number = ERRORS[n % len(ERRORS)]
                yield Case(
                    "failing system call",
                    f"{target}: {call} {n} {errno.errorcode[number]}",
                    partial(work, target=target, call=call, n=n, number=number),
                )


def signals(world: Path, times: int) -> Iterator[Case]:
    """A signal at a random time: the same command then ends as undisturbed."""

    def work(
        folder: Path, draw: random.Random, target: str, number: signal.Signals, clear: bool
    ) -> tuple[str, str]:
        line = line_of(target)
        if clear:
            line += " --overwrite"
        else:
            shutil.rmtree(folder / target)
        process = faults.start(line.split(), folder, None)
        started = time.monotonic()
        time.sleep(draw.uniform(0, 0.4))
        os.kill(process, number)
        if number == signal.SIGSTOP:
            time.sleep(0.1)
            os.kill(process, signal.SIGCONT)
        ran = faults.finish(process, folder, started)
        ends = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9, signal.SIGSTOP: 0}
        # It may have ended before, or not have installed its handlers yet.
        if ran.status not in (0, ends[number], -number):
            return ran.fault or "words", f"status {ran.status}: {ran.err[-2000:]}"
        return judge(scir(line, folder), same_as(world, target, folder / target))

    for target in ("candidates", "judged", "preferences", "trained"):
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGSTOP):
            for n in range(times):
                yield Case(
                    "signal",
                    f"{target}: {number.name} {n}",
                    partial(work, target=target, number=number, clear=n % 3 == 0),
                )


#: Audit events of Python that change a file system -> the position of the path in their arguments
CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 1, "open": 0}


def watch_changes(out: str, seen: Callable[[str], None]) -> None:
    """Calls `seen` before each change of a folder: a file opened for writing, renamed, removed.

    A hook stays as long as its process.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        position = CHANGES.get(event)
        if position is None or not isinstance(arguments[position], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(arguments[position]))
        if f"{os.sep}{out}" not in path:
            return
        if event == "open":
            _, mode, flags = arguments
            if not (set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)):
                return
        seen(f"{event.removeprefix('os.')} {os.path.basename(path)}")

    sys.addaudithook(hook)


def kill_at(out: str, n: int) -> None:
    """Kills this process before the n-th change of a folder."""
    left = [n]

    def count(change: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_changes(out, count)


def note_changes(out: str, log: Path) -> None:
    """Writes the changes of a folder to a file, one per line."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch_changes(out, lambda change: os.write(descriptor, change.encode() + b"\n") and None)


def kills_at_changes(world: Path) -> Iterator[Case]:
    """SIGKILL before every change of the output folder; the same command then ends as undisturbed.

    Claim, parts, digests, manifest, card, checkpoints, model, and what --overwrite deletes.
    """

    def work(
        folder: Path, draw: random.Random, target: str, n: int, overwrite: bool
    ) -> tuple[str, str]:
        line = line_of(target)
        if overwrite:
            line += " --overwrite"
        else:
            shutil.rmtree(folder / target)
        ran = scir(line, folder, partial(kill_at, target, n))
        if ran.status != -signal.SIGKILL:
            return "unexpected", f"not killed but status {ran.status}: {ran.err[-2000:]}"
        if overwrite:
            # A kill before the first deletion leaves the finished folder, which is right as well.
            again = judge(scir(line_of(target), folder), same_as(world, target, folder / target))
            if again[0] != "right":
                return again
        return judge(scir(line, folder), same_as(world, target, folder / target))

    for target in ("candidates", "judged", "preferences", "trained"):
        for overwrite in (False, True):
            trial = world.parent / f"trial-{target}-{overwrite}"
            shutil.copytree(world, trial, symlinks=True)
            if not overwrite:
                shutil.rmtree(trial / target)
            line = line_of(target) + (" --overwrite" if overwrite else "")
            checked(scir(line, trial, partial(note_changes, target, trial / "changes")))
            changes = (trial / "changes").read_text(encoding="utf-8").splitlines()
            shutil.rmtree(trial)
            for n, change in enumerate(changes, start=1):
                yield Case(
                    "killed before a change of a file",
                    f"{target}{' --overwrite' if overwrite else ''}: {n} {change}",
                    partial(work, target=target, n=n, overwrite=overwrite),
                )


def two_at_once(world: Path, times: int) -> Iterator[Case]:
    """Two processes write one folder: one of them is right, the other as well or refused."""

    def work(folder: Path, draw: random.Random, target: str, overwrite: str) -> tuple[str, str]:
        shutil.rmtree(folder / target)
        lines = [line_of(target).split(), (line_of(target) + overwrite).split()]
        (folder / "logs").mkdir()
        started = time.monotonic()
        first = faults.start(lines[0], folder, None)
        time.sleep(draw.uniform(0, 0.2))
        second = faults.start(lines[1], folder, partial(os.chdir, folder))
        rans = [faults.finish(process, folder, started) for process in (first, second)]
        statuses = sorted(ran.status for ran in rans)
        if statuses not in ([0, 0], [0, 1]):
            return "words", f"statuses {statuses}: {rans[0].err[-1000:]}"
        return judge(scir(line_of(target), folder), same_as(world, target, folder / target))

    for target in ("candidates", "preferences", "trained"):
        for n in range(times):
            overwrite = " --overwrite" if n % 2 else ""
            yield Case(
                "two processes on one folder",
                f"{target} {n}{overwrite}",
                partial(work, target=target, overwrite=overwrite),
            )


# ------------------------------------------------------------------ environments


def environments(world: Path) -> Iterator[Case]:
    """Odd terminals and variables, each in an interpreter of its own."""

    def work(
        folder: Path, draw: random.Random, line: str, shell: str, variables: dict[str, str]
    ) -> tuple[str, str]:
        command = [sys.executable, "-c", "from scir_cli.cli import main; main()", *line.split()]
        quoted = " ".join(f"'{word}'" for word in command)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **variables,
        }
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", shell.format(command=quoted)],
            cwd=folder,
            env=environment,
            capture_output=True,
            check=False,
            timeout=faults.LIMIT_S,
        )
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        ran = Ran(done.returncode, out, err, time.monotonic() - started, 0)
        target = line.split("-o ")[1].split()[0]
        if not (folder / target / "manifest.json").exists() and not ran.status:
            return "silent", "status 0 and nothing written"
        return judge(
            ran, same_as(world, "preferences", folder / target) if not ran.status else None
        )

    line = COMMANDS["preferences"] + PARTS + " -o out"
    for name, shell, variables in (
        ("as usual", "{command}", {}),
        ("stdout closed", "{command} >&-", {}),
        ("stderr closed", "{command} 2>&-", {}),
        ("stdout full", "{command} > /dev/full", {}),
        ("a pipe that nobody reads", "{command} | true; exit ${{PIPESTATUS[0]}}", {}),
        ("stdin closed", "{command} <&-", {}),
        ("stdout in ASCII", "{command}", {"PYTHONIOENCODING": "ascii"}),
        ("a C locale", "{command}", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("COLUMNS=0", "{command}", {"COLUMNS": "0"}),
        ("COLUMNS=-1", "{command}", {"COLUMNS": "-1"}),
        ("COLUMNS=x", "{command}", {"COLUMNS": "x"}),
        ("no TERM", "{command}", {"TERM": ""}),
        ("RANK without WORLD_SIZE", "{command}", {"RANK": "1"}),
        ("HOME is nowhere", "{command}", {"HOME": "/nowhere"}),
        ("TMPDIR is nowhere", "{command}", {"TMPDIR": "/nowhere"}),
        ("an old umask", "umask 077; {command}", {}),
        ("few open files", "ulimit -n 40; {command}", {}),
    ):  # fmt: skip
        yield Case("environment", name, partial(work, line=line, shell=shell, variables=variables))

    def deleted(folder: Path, draw: random.Random) -> tuple[str, str]:
        def delete_and_stay() -> None:
            (folder / "d").mkdir()
            os.chdir(folder / "d")
            (folder / "d").rmdir()

        out = folder / "out"
        words = f"filter -i {folder / 'judged'} -o {out} --keep-unlabeled --keep-cut{PARTS}"
        return judge(scir(words, folder, delete_and_stay), same_as(world, "preferences", out))

    yield Case("environment", "a deleted working folder", deleted)
