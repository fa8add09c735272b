"""The recipes that ship.

Each is read whole, and the shell form of the quickstart is what its YAML says.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scir_cli import recipe
from scir_cli.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_loads_and_its_settings_exist(path: Path):
    assert len(recipe.load(path)) >= 5


def test_the_shell_form_of_the_quickstart_is_what_its_yaml_prints():
    command = [sys.executable, "-m", "scir_cli", "run", "recipes/quickstart.yaml", "--dry-run"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "recipes" / "quickstart.sh").read_text(encoding="utf-8")


def test_an_unknown_stage_setting_or_name_is_an_error_with_a_suggestion(tmp_path: Path):
    for text, expected in (
        ("steps: [{generat: {}}]", "Did you mean 'generate'?"),
        (
            "steps: [{generate: {model: m, input: p, output_dir: o, temprature: 1}}]",
            "Did you mean 'temperature'?",
        ),
        (
            "steps: [{generate: {model: '{bsae}', input: p, output_dir: o}}]\nset: {base: m}",
            "Did you mean 'base'?",
        ),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            recipe.load(path)
        assert expected in str(caught.value)


def test_iterations_count_from_one_and_know_the_next(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        (
            "output_dir: o\nsteps:\n- iterations: 2\n  steps: [{generate: {model: '{out}/m{i}', "
            "input: p, output_dir: '{out}/m{next}'}}]\n"
        ),
        encoding="utf-8",
    )
    assert [(s.settings["model"], s.settings["output_dir"]) for s in recipe.load(path)] == [
        ("o/m1", "o/m2"),
        ("o/m2", "o/m3"),
    ]


def test_a_recipe_extends_another_and_wins_over_it(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(
        (
            "output_dir: o\nset: {m: m0, p: p0}\nall: {seed: 1, n: 2}\nsteps: [{generate: {model: "
            "'{m}', input: '{p}', output_dir: '{out}/c'}}]\n"
        ),
        encoding="utf-8",
    )
    (tmp_path / "own.yaml").write_text(
        "extends: base.yaml\noutput_dir: own\nset: {p: p1}\nall: {n: 3}\n", encoding="utf-8"
    )
    (step,) = recipe.load(tmp_path / "own.yaml")
    assert step.settings == {"model": "m0", "input": "p1", "output_dir": "own/c", "seed": 1, "n": 3}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "methods").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_method_trains_twice_on_its_own_answers_and_is_measured_alike(path: Path):
    steps = recipe.load(path)
    assert [s.settings["output_dir"].rpartition("/")[2] for s in steps if s.stage == "train"] == [
        "m1-judge",
        "m1",
        "m2",
        "m3",
    ]
    assert [s.stage for s in steps].count("generate") == 2
