"""The package is laid out as docs/architecture.md says: imports point down the folders.

Each folder and each module at the top of the package has a layer of its own in the table of the
document, and a module imports only from its own folder or from lower layers. Importing a module
does nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import scir_cli

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import imports

MOST_AT_THE_TOP = 17


@pytest.fixture(scope="module")
def package() -> imports.Imports:
    return imports.Imports(Path(scir_cli.__file__).parent)


def test_the_table_of_layers_lists_each_folder_once_on_a_layer_of_its_own(
    package: imports.Imports,
):
    layers = imports.layers()
    assert package.top_level() == set(layers)
    assert len(set(layers.values())) == len(layers)
    assert len(layers) <= MOST_AT_THE_TOP


def test_every_import_points_to_a_lower_layer(package: imports.Imports):
    assert package.upward(imports.layers()) == []


def test_no_modules_import_each_other_in_a_circle(package: imports.Imports):
    assert package.cycle() == []


def test_an_import_that_runs_up_and_a_cycle_are_found(tmp_path: Path):
    package = tmp_path / "house"
    (package / "attic").mkdir(parents=True)
    (package / "base.py").write_text("import os\n", encoding="utf-8")
    (package / "attic" / "roof.py").write_text("from house import base\n", encoding="utf-8")
    layers = {"base": 0, "attic/": 1}
    sound = imports.Imports(package)
    assert sound.imported == {"base": set(), "attic.roof": {"base"}}
    assert (sound.upward(layers), sound.cycle()) == ([], [])
    # An import inside a function counts as well.
    (package / "base.py").write_text(
        "def late():\n    from house.attic.roof import tile\n", encoding="utf-8"
    )
    broken = imports.Imports(package)
    assert broken.upward(layers) == ["base imports attic.roof"]
    assert broken.cycle() == ["attic.roof", "base"]


def test_the_tree_in_the_document_names_every_module(package: imports.Imports):
    text = imports.DOCUMENT.read_text(encoding="utf-8")
    tree = re.search(r"```text\nscir_cli/\n(.*?)```", text, re.DOTALL)
    assert tree is not None
    words = set(re.findall(r"[\w/]+\.py", tree[1]))
    files = {path.name for path in package.paths.values()} - {"__init__.py", "__main__.py"}
    assert files - words == set()
    assert words - files == set()


@pytest.mark.slow
def test_every_module_imports_with_the_core_dependencies_alone_and_prints_nothing(
    package: imports.Imports,
):
    modules = [f"scir_cli.{m.removesuffix('.__init__')}" for m in sorted(package.modules)]
    extras = ["peft", "gguf", "sklearn", "scipy", "vllm", "ray", "upath", "trl", "hypothesis"]
    extras += ["tensorboard", "wandb", "trackio", "mlflow", "matplotlib", "bitsandbytes"]
    code = "\n".join(
        [
            "import importlib, sys",
            f"sys.modules.update(dict.fromkeys({extras}))",
            f"for name in {modules}: importlib.import_module(name)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
