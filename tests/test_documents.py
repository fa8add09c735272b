"""The tutorial's commands run, the FAQ's messages exist, and the generated pages are up to date."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toy import make_model

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_generated_page_is_what_the_code_says(name: str):
    message = "run python benchmarks/pages.py"
    assert (DOCS / name).read_text(encoding="utf-8") == pages.PAGES[name](), message


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run_in_its_order(scir_command: list[str], tmp_path: Path):
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    script = "set -e\n" + "".join(blocks)
    assert script.count(MODEL) == 1
    make_model(tmp_path / "m0", seed=1)
    command = tmp_path / "bin" / "scir"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.join(scir_command)} "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", script.replace(MODEL, str(tmp_path / "m0"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in ("m1", "m2", "accuracy", "consistency-m2"):
        assert (tmp_path / "out" / folder / "manifest.json").is_file()


def test_every_message_of_the_faq_is_one_of_the_code():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\*\*`(.+)`\*\*$", text, re.MULTILINE)
    assert len(messages) >= 10
    # Texts are joined as Python joins adjacent strings, and names stand for what is filled in.
    code = ""
    for path in sorted((ROOT / "scir_cli").rglob("*.py")):
        code += re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    for message in messages:
        fixed = message.replace("--FLAG", "{flag}")
        assert fixed in code, message


def test_links_between_documents_lead_to_files():
    for name in ("tutorial.md", "faq.md", "glossary.md", "settings.md", "data.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (DOCS / target).exists(), (name, target)
