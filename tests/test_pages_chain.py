"""A recipe with --report.

The story of a real run on tiny models, made again from its folders alone, and opened in a browser.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import PROGRAM, Chromium
from toy import make_model

RECIPE = """
set: {base: BASE, policy: POLICY}
all: {dtype: fp32, device: cpu}
steps:
  - eval rewards: {model: "{policy}", reward_reference: "{base}", input: "{here}/gold.jsonl",
                  output_dir: "{out}/m1-heldout"}
  - train: {objective: scir, model: "{policy}", reward_reference: "{base}",
            input: "{out}/m1-heldout/judged", batch_size: 2, learning_rate: 1.0e-3,
            validation: "{here}/gold.jsonl", validation_every: 1,
            output_dir: "{out}/m2", report: "{out}/m2.html"}
  - eval rewards: {model: "{out}/m2", reward_reference: "{base}", input: "{here}/gold.jsonl",
                  output_dir: "{out}/m2-heldout"}
"""


@pytest.mark.slow
def test_a_recipe_writes_the_story_of_its_iterations(tmp_path: Path):
    make_model(tmp_path / "base", seed=1)
    make_model(tmp_path / "policy", seed=2)
    rows = [
        {"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "<b>No.</b>"}
        for w in ("cat", "dog", "sun", "sea")
    ]
    (tmp_path / "gold.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    text = RECIPE.replace("BASE", str(tmp_path / "base")).replace(
        "POLICY", str(tmp_path / "policy")
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    story, again = tmp_path / "story.html", tmp_path / "again.html"
    for page in (story, again):
        command = [
            sys.executable,
            "-m",
            "scir_cli",
            "run",
            str(tmp_path / "recipe.yaml"),
            "-o",
            str(tmp_path / "out"),
            "--report",
            str(page),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    assert story.read_bytes() == again.read_bytes()
    page = story.read_text(encoding="utf-8")
    for said in (
        "m1-heldout",
        "m2-heldout",
        "Confidence",
        "Training, objective scir",
        "&lt;b&gt;No.&lt;/b&gt;",
        "Stages",
    ):
        assert said in page
    assert "Mean |log-odds|" in (tmp_path / "out" / "m2.html").read_text(encoding="utf-8")
    if PROGRAM is not None:
        browser = Chromium(tmp_path / "profile")
        try:
            for made in (story, tmp_path / "out" / "m2.html"):
                browser.look(made, 400)
                assert (browser.complaints, browser.requests) == ([], [])
        finally:
            browser.close()
