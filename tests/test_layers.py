"""The package is laid out as docs/architecture.md says: imports point down the folders.

A room is a top-level module (`config`) or a folder (`engine/`) of the package. Each room has a
layer of its own in the table of the document, and a module imports only from its own room or from
rooms on lower layers. Importing a module does nothing.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scir_cli

PACKAGE = Path(scir_cli.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ENTRY_POINTS = {"__init__", "__main__"}
MOST_ROOMS = 17


def layers() -> dict[str, int]:
    """Room -> layer, from the table in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:`[\w/]+` ?)+)\|", text, re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`([\w/]+)`", names)}


def room_of(module: str) -> str:
    """`engine/` for `engine.trees` and `engine.__init__`, `config` for `config`."""
    folder, dot, _ = module.partition(".")
    return folder + "/" if dot else module


def imported_modules(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text, functions included."""
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {as_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            members = {as_module(f"{node.module}.{alias.name}") for alias in node.names}
            names |= {name or as_module(node.module) for name in members}
    return names & set(PATHS)


def as_module(name: str) -> str:
    """`engine.trees` for `scir_cli.engine.trees`.

    "" for a name that is no module of the package.
    """
    inside = name.removeprefix("scir_cli.")
    if inside == name:
        return ""
    return next((path for path in (inside, f"{inside}.__init__") if path in PATHS), "")


def imports_between_rooms() -> set[tuple[str, str]]:
    """(module, imported module) for each import that leaves its room."""
    return {
        (module, other)
        for module in PATHS
        if module not in ENTRY_POINTS
        for other in imported_modules(module) - ENTRY_POINTS
        if room_of(module) != room_of(other)
    }


def cycle_among(modules: set[str]) -> list[str]:
    """The modules of an import cycle; [] if there is none.

    Modules that import nothing of the rest are removed until only cycles are left.
    """
    left = set(modules)
    while leaves := {m for m in left if not (imported_modules(m) & left) - {m}}:
        left -= leaves
    return sorted(left)


def test_the_table_of_layers_lists_each_room_once_on_a_layer_of_its_own():
    known = layers()
    assert {room_of(module) for module in PATHS} - ENTRY_POINTS == set(known)
    assert len(set(known.values())) == len(known)
    assert len(known) <= MOST_ROOMS


def test_every_import_points_to_a_lower_layer():
    known = layers()
    upward = [
        f"{module} imports {other}"
        for module, other in sorted(imports_between_rooms())
        if known[room_of(other)] >= known[room_of(module)]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle_among(set(PATHS) - ENTRY_POINTS) == []


def test_the_tree_in_the_document_names_every_module():
    tree = re.search(
        r"```text\nscir_cli/\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    assert tree is not None
    words = set(re.findall(r"[\w/]+\.py", tree[1]))
    files = {path.name for path in PATHS.values()} - {"__init__.py", "__main__.py"}
    assert files - words == set()
    assert words - files == set()


@pytest.mark.slow
def test_every_module_imports_with_the_core_dependencies_alone_and_prints_nothing():
    modules = [f"scir_cli.{m.removesuffix('.__init__')}" for m in PATHS if m not in ENTRY_POINTS]
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
