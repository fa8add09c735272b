"""What somebody gets who has no checkout.

The wheel does its work from anywhere, and the README's commands run as they are written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy import make_model

ROOT = Path(__file__).parent.parent
PROMPTS = "".join(
    json.dumps({"prompt": f"Tell me of the {w}."}) + "\n" for w in ("cat", "dog", "sun")
)


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path):
    # Only what a package is made of: an old build/ of the checkout could hide a missing file.
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "scir_cli", source / "scir_cli", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    run(build, tmp_path)
    (wheel,) = tmp_path.glob("scir_cli-*.whl")
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            "installed",
            str(wheel),
        ],
        tmp_path,
    )
    make_model(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text(PROMPTS, encoding="utf-8")
    here = {"PYTHONPATH": str(tmp_path / "installed")}
    where = run(
        [sys.executable, "-c", "import scir_cli; print(scir_cli.__file__)"], tmp_path, **here
    )
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert run([sys.executable, "-m", "scir_cli", "--version"], tmp_path, **here).startswith(
        "scir "
    )
    render = (
        "from scir_cli.report import html; print(html.render(html.Page('t', 's', [], []))[:15])"
    )
    assert (
        run([sys.executable, "-c", render], tmp_path, **here).strip() == "<!doctype html>"
    )  # its template travels
    generate = [
        "generate",
        "-m",
        "policy",
        "-i",
        "prompts.jsonl",
        "--n",
        "1",
        "--max-new-tokens",
        "4",
        "-o",
        "out",
        "--json",
    ]
    assert (
        json.loads(run([sys.executable, "-m", "scir_cli", *generate], tmp_path, **here))["rows_out"]
        == 3
    )
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    assert run(
        [sys.executable, "-m", "scir_cli", "run", recipe, "--dry-run"], tmp_path, **here
    ).startswith("#!/bin/sh")


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_they_are_written(
    scir_command: list[str], tmp_path: Path
):
    (use,) = re.findall(
        r"## Use\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    block = "".join(re.findall(r"```sh\n(.*?)```", use, re.DOTALL))
    make_model(tmp_path / "m0", seed=1, max_position_embeddings=2048)
    make_model(tmp_path / "m1", seed=2, max_position_embeddings=2048)
    (tmp_path / "prompts.jsonl").write_text(PROMPTS, encoding="utf-8")
    pairs = [
        {"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "No."}
        for w in ("cat", "dog", "sun")
    ]
    (tmp_path / "labeled.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8"
    )
    models = {"M0": "m0", "M1": "m1"}
    script = re.sub(r"^(M[01])=.*$", lambda m: f"{m[1]}={models[m[1]]}", block, flags=re.MULTILINE)
    script = script.replace("--fail-under 0.6", "--fail-under 0.0")  # random models agree by chance
    assert script.count("scir ") >= 10
    # They seldom end an answer either.
    for stage in ("generate", "eval responses"):
        script = script.replace(f"scir {stage} ", f"scir {stage} --max-new-tokens 32 ")
    script = script.replace("scir filter ", "scir filter --keep-cut ")
    (tmp_path / "scir").write_text(
        f'#!/bin/sh\nexec {shlex.join(scir_command)} "$@"\n', encoding="utf-8"
    )
    (tmp_path / "scir").chmod(0o755)
    run(
        ["sh", "-e", "-c", script],
        tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHONPATH=str(ROOT),
    )
    for name in (
        "candidates",
        "judged",
        "consistency",
        "preferences",
        "m2",
        "accuracy",
        "winrate",
        "consistency-m2",
    ):
        assert (tmp_path / "out" / name / "manifest.json").exists()
