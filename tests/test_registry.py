"""Each stage is one record.

Its help, settings, function, tables and page; one more record is one more command and step.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from scir_cli import cli, errors, recipe, registry
from scir_cli.registry import STAGES, Stage
from scir_cli.settings import CheckConsistencySettings, ReportSettings, StageSettings

FAKE = Stage(
    "eval fake",
    "Measure nothing at all.",
    CheckConsistencySettings,
    run="test_registry:run_fake",
    tables="test_registry:fake_tables",
)


def run_fake(settings: CheckConsistencySettings) -> dict[str, Any]:
    summary = {"confidence": settings.min_confidence}
    return {"rows_in": 3, "rows_out": 2, "drops": {"dull": 1}, "nulls": {}, "summary": summary}


def fake_tables(manifest: dict[str, Any]) -> list[Table]:
    table = Table("confidence")
    table.add_row(str(manifest["summary"]["confidence"]))
    return [table]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_stage_has_settings_a_line_of_help_and_functions_that_exist(stage: Stage):
    assert issubclass(stage.settings, StageSettings)
    assert "\n" not in stage.about
    assert stage.about.endswith(".")
    assert 10 < len(stage.about) <= 100
    targets = [
        target
        for target in (stage.run, stage.tables, stage.page, stage.story)
        if target is not None
    ]
    assert all(callable(registry.load(target)) for target in targets)
    assert issubclass(stage.settings, ReportSettings) == (stage.page is not None)


def test_the_commands_of_the_cli_are_the_stages_run_inspect_and_env():
    app = typer.main.get_command(cli.app)
    evaluations = app.commands["eval"].commands  # type: ignore[attr-defined]
    names = {*app.commands, *(f"eval {name}" for name in evaluations)} - {"eval"}  # type: ignore[attr-defined]
    assert names == {*STAGES, "run", "inspect", "env"}
    assert evaluations["rewards"].help == STAGES["eval rewards"].about


def test_the_stages_are_listed_without_torch():
    code = "import sys, scir_cli.registry, scir_cli.recipe; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_record_is_a_command_with_its_settings_its_line_and_its_tables(tmp_path: Path):
    app = typer.Typer()
    app.command("other")(lambda: None)  # one command alone would have no name
    cli.add_stages(app, [FAKE])
    shown = CliRunner().invoke(app, ["eval", "--help"])
    assert "Measure nothing at all." in shown.stdout
    done = CliRunner().invoke(
        app, ["eval", "fake", "-i", "x", "-o", str(tmp_path / "o"), "--min-confidence", "0.75"]
    )
    assert done.exit_code == 0
    assert "0.75" in done.stdout
    assert done.stderr.startswith("eval fake: 3 in = 2 out + 1 dull")
    wrong = CliRunner().invoke(
        app, ["eval", "fake", "-i", "x", "-o", str(tmp_path / "o"), "min_confidense=0.75"]
    )
    assert wrong.exit_code == 2
    assert "Did you mean 'min_confidence'?" in wrong.stderr


def test_one_record_is_a_step_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: [{eval fake: {input: x, output_dir: o}}]", encoding="utf-8")
    with pytest.raises(errors.ConfigError, match="unknown stage 'eval fake'"):
        recipe.load(path)
    monkeypatch.setitem(STAGES, "eval fake", FAKE)
    (step,) = recipe.load(path)
    assert step.shell_command() == "scir eval fake --input x --output-dir o"
