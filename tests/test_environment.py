"""`scir env`: what a report of a bug needs, and no secret."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command

from scir_cli.stages import environment


def test_env_prints_versions_devices_and_variables(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_command(["env"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  torch: {torch.__version__}" in lines
    assert f"  python: {platform.python_version()} (CPython)" in lines
    assert "  OMP_NUM_THREADS: 7" in lines
    assert lines.index("system:") < lines.index("packages:") < lines.index("devices:")


def test_env_prints_of_a_secret_only_that_it_is_set_and_shows_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:key@host/\x1b[2J[bold]x")
    assert run_command(["env"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "HF_TOKEN: ***" in out
    assert "hf_secret" not in out and "key@" not in out and "\x1b" not in out
    assert "[bold]x" in out
    assert run_command(["env", "--json"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["variables"]["HF_TOKEN"] == "***"
    assert "key@" not in out


def test_env_reports_a_torch_that_cannot_be_imported(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from scir_cli.stages import environment; print(environment.describe()['devices'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot be imported: OSError: libcudart.so.12: cannot open" in result.stdout


def test_a_package_that_is_missing_is_reported_as_such(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package", "torch"))
    packages = environment.describe()["packages"]
    assert packages["no-such-package"] == "not installed"
