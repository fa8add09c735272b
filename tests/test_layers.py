"""The house is laid out as docs/architecture.md says: a module imports from its own or lower layers, and importing one does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import scir_cli

PACKAGE = Path(scir_cli.__file__).parent
DOC = Path(__file__).parent.parent / "docs" / "architecture.md"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py"))
TOP = {"__init__", "__main__"}


def layers() -> dict[str, int]:
    """Module, or folder with a slash, -> layer, from the table in the document."""
    rows = re.findall(r"^\| (\d) \| ((?:`[\w/]+` ?)+)\|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`([\w/]+)`", names)}


def room(module: str) -> str:
    return module.split(".")[0] + "/" if "." in module else module


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scir_cli":
            inside = [*(node.module or "").split(".")[1:]]
            found |= {".".join([*inside, alias.name]) for alias in node.names} | {".".join(inside)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("scir_cli.") for alias in node.names if alias.name.startswith("scir_cli.")}
    folders = {m.removesuffix(".__init__") for m in MODULES if m.endswith(".__init__")}
    return {m for m in found if m in MODULES or m in folders}


def test_every_module_has_a_layer_and_imports_from_its_own_or_lower_ones():
    known = layers()
    assert {room(m) for m in MODULES} - TOP == set(known), "the table of layers and the package differ"
    assert len(known) > 20
    wrong = [
        f"{module} (layer {known[room(module)]}) imports {other} (layer {known[target]})"
        for module in MODULES
        if module not in TOP
        for other in imported(module)
        if (target := room(other) if room(other) in known else other + "/") and known[target] > known[room(module)]
    ]
    assert wrong == []


def test_every_module_is_imported_with_the_core_dependencies_alone_and_says_nothing():
    names = ["scir_cli." + m.removesuffix(".__init__") for m in MODULES if m not in TOP]
    extras = [
        "peft",
        "gguf",
        "sklearn",
        "scipy",
        "vllm",
        "ray",
        "upath",
        "trl",
        "hypothesis",
        "tensorboard",
        "wandb",
        "trackio",
        "mlflow",
        "matplotlib",
    ]
    code = (
        f"import sys, importlib\nfor name in {extras}: sys.modules[name] = None\nfor name in {names}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
