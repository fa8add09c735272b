"""Work that is finished costs nothing: it is recognized without torch, and never by mistake."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: Runs `scir` with its arguments, then prints the heavy libraries that it imported on stderr.
WATCHED = """
import sys
from scir_cli import cli
sys.argv[0] = "scir"
try:
    cli.main()
finally:
    heavy = sorted({"torch", "transformers", "datasets", "pandas"} & set(sys.modules))
    print(f"imported: {heavy}", file=sys.stderr)
"""

LIGHT = "imported: []"
DONE = "(already done)"


#: What runs `scir` where nobody watches its imports.
PROGRAM: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def preloaded_program(scir_command: list[str]) -> None:
    PROGRAM[:] = scir_command


def scir(*words: object, watched: bool = False) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", WATCHED] if watched else PROGRAM
    return subprocess.run([*program, *map(str, words)], capture_output=True, text=True)


def generate(world: Path, out: Path) -> list[object]:
    model = ["-m", world / "policy", "--dtype", "fp32", "--device", "cpu"]
    return [
        "generate",
        *model,
        "-i",
        world / "prompts.jsonl",
        "--n",
        2,
        "--max-new-tokens",
        4,
        "-o",
        out,
    ]


def test_stages_without_a_model_import_no_heavy_library(world: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    checked = ["check-consistency", "-i", world / "judged", "-o", tmp_path / "c"]
    filtered = ["filter", "-i", world / "judged", "--rule", "judge", "-o", tmp_path / "f"]
    for command in (
        ["--help"],
        ["train", "--help"],
        checked,
        [*checked, "--report", page, "--by-subset"],
        filtered,
        [*filtered, "--dry-run"],
    ):
        done = scir(*command, watched=True)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, LIGHT), command
    assert page.stat().st_size > 10_000


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candidates of the world's policy, with copies of the model and the prompts."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(world / "policy", root / "policy")
    shutil.copy(world / "prompts.jsonl", root / "prompts.jsonl")
    done = scir(*generate(root, root / "candidates"))
    assert done.returncode == 0 and DONE not in done.stderr
    return root


def test_a_finished_stage_imports_no_heavy_library_and_prints_the_same_manifest(made: Path):
    manifest = json.loads((made / "candidates" / "manifest.json").read_text())
    # It is of the file, and no part of what a stage returns.
    del manifest["checksum"]
    done = scir(*generate(made, made / "candidates"), "--json", watched=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, LIGHT)
    assert DONE in done.stderr
    assert json.loads(done.stdout) == {**manifest, "reused": True}


def test_a_finished_stage_whose_records_are_unreadable_is_still_finished(made: Path):
    (made / "candidates" / ".finished.json").write_text("{")
    slow = scir(*generate(made, made / "candidates"), watched=True)
    assert slow.returncode == 0 and DONE in slow.stderr
    assert slow.stderr.splitlines()[-1] != LIGHT
    # The stage has recorded the files anew.
    fast = scir(*generate(made, made / "candidates"), watched=True)
    assert fast.stderr.splitlines()[-1] == LIGHT


@pytest.mark.parametrize("what", ["input", "weights", "setting", "template"])
def test_a_change_of_what_a_stage_reads_is_refused_as_before(made: Path, what: str, tmp_path: Path):
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    words = generate(root, root / "candidates")
    assert scir(*words).returncode == 0
    if what == "input":
        (root / "prompts.jsonl").write_text('{"prompt": "Another one."}\n', encoding="utf-8")
    elif what == "weights":
        path = root / "policy" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif what == "setting":
        words += ["--temperature", 0.5]
    else:
        template = tmp_path / "template.jinja"
        template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}", encoding="utf-8")
        words += ["--chat-template", template]
    done = scir(*words)
    assert done.returncode == 1
    assert "was started with other settings" in done.stderr


def test_damage_of_a_finished_part_is_repaired_and_overwrite_computes_again(made: Path):
    words = generate(made, made / "candidates")
    assert scir(*words).returncode == 0
    part = made / "candidates" / "data-00000.arrow"
    whole = part.read_bytes()
    part.write_bytes(whole[:-40] + bytes(40))
    repaired = scir(*words)
    assert repaired.returncode == 0 and "is damaged or missing" in repaired.stderr
    assert part.read_bytes() == whole
    assert DONE in scir(*words, watched=True).stderr
    assert DONE not in scir(*words, "--overwrite").stderr


def test_a_finished_check_still_fails_under_its_bound(world: Path, tmp_path: Path):
    words = ["check-consistency", "-i", world / "judged", "-o", tmp_path / "c"]
    assert scir(*words, "--fail-under", 0).returncode == 0
    for _ in range(2):
        done = scir(*words, "--fail-under", 1, watched=True)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, LIGHT)


RECIPE = """\
set: {{world: '{world}'}}
all: {{dtype: fp32, device: cpu}}
steps:
- generate: {{model: '{{world}}/policy', input: '{{world}}/prompts.jsonl', n: 2,
             max_new_tokens: 4, output_dir: '{{out}}/c'}}
- judge: {{model: '{{world}}/policy', reward_reference: '{{world}}/base', input: '{{out}}/c',
          output_dir: '{{out}}/j'}}
- check-consistency: {{input: '{{out}}/j', output_dir: '{{out}}/k', fail_under: {bound}}}
- filter: {{input: '{{out}}/j', output_dir: '{{out}}/f', rule: judge}}
"""


def test_a_finished_recipe_imports_no_heavy_library_and_prints_the_same(
    world: Path, tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(world=world, bound=0), encoding="utf-8")
    words = ["run", recipe, "-o", tmp_path / "out"]
    first = scir(*words, watched=True)
    # The driver itself imports nothing heavy either.
    assert (first.returncode, first.stderr.splitlines()[-1]) == (0, LIGHT)
    page = tmp_path / "page.html"
    again = scir(*words, "--report", page, watched=True)
    assert (again.returncode, again.stderr.splitlines()[-1]) == (0, LIGHT)
    assert again.stdout == first.stdout
    assert again.stderr.count(DONE) == 4
    assert "<title>" in page.read_text(encoding="utf-8")
    quiet = scir(*words, "--json")
    assert json.loads(quiet.stdout)["steps"] == 4


def test_a_stage_that_fails_ends_the_recipe_with_its_status(world: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(world=world, bound=1), encoding="utf-8")
    done = scir("run", recipe, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "check-consistency ended with status 1" in done.stderr
    assert not (tmp_path / "out" / "f").exists()
    # Nothing holds the lock of a finished or failed folder.
    with (tmp_path / "out" / "k" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_stage_of_a_recipe_that_a_signal_kills_is_named(world: Path, tmp_path: Path):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from scir_cli.backends import Backend\n"
        "class Deadly(Backend):\n"
        "    def __init__(self, *values):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    def generate(self, requests): ...\n"
        "    def score(self, branches): ...\n",
        encoding="utf-8",
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(world=world, bound=0).replace("n: 2", "n: 2, backend: 'deadly:Deadly'"),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "scir_cli", "run", str(recipe), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 1
    assert "generate was killed by signal 9" in done.stderr


def test_importing_the_stages_asks_nothing_of_cuda():
    """A process that has asked cannot use a GPU after a fork, as the stages of a recipe do."""
    code = """
import importlib
import torch
asked = []
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, lambda *values, name=name: asked.append(name))
from scir_cli import registry
for stage in registry.STAGES.values():
    importlib.import_module(stage.run.partition(":")[0])
print(asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
