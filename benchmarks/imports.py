"""The imports between the modules of the package.

A folder of the package (`engine/`) or a module at its top (`config`) has one layer in the table of
docs/architecture.md. An arrow is an import between two of them; it runs up if it does not point to
a lower layer.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "architecture.md"
ENTRY_POINTS = {"__init__", "__main__"}


class Imports:
    """The imports of a package, read from its text.

    paths: module ("engine.trees", "engine.__init__", "config") -> file.
    """

    def __init__(self, package: Path) -> None:
        self.name = package.name
        self.paths = {
            ".".join(path.relative_to(package).with_suffix("").parts): path
            for path in sorted(package.rglob("*.py"))
        }
        self.modules = {name for name in self.paths if name not in ENTRY_POINTS}
        self.imported = {name: self._read(path) for name, path in self.paths.items()}

    def _read(self, path: Path) -> set[str]:
        """Modules of the package that a file imports anywhere, functions included."""
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {self._as_module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                members = {self._as_module(f"{node.module}.{alias.name}") for alias in node.names}
                names |= {name or self._as_module(node.module) for name in members}
        return names & set(self.paths)

    def _as_module(self, name: str) -> str:
        """`engine.trees` for `scir_cli.engine.trees`; "" for a name of another package."""
        inside = name.removeprefix(self.name + ".")
        if inside == name:
            return ""
        return next((m for m in (inside, f"{inside}.__init__") if m in self.paths), "")

    def top_level(self) -> set[str]:
        """The folders and modules at the top of the package, without entry points."""
        return {folder_of(module) for module in self.modules}

    def upward(self, layers: dict[str, int]) -> list[str]:
        """The imports that leave their folder and do not point to a lower layer."""
        found = []
        for module in sorted(self.modules):
            for other in sorted(self.imported[module] - ENTRY_POINTS):
                here, there = folder_of(module), folder_of(other)
                if here != there and layers[there] >= layers[here]:
                    found.append(f"{module} imports {other}")
        return found

    def cycle(self) -> list[str]:
        """The modules that take part in an import cycle or lead to one; [] if there is none.

        Modules that import nothing of the rest are removed until none is left or none is removed.
        """
        left = set(self.modules)
        while leaves := {m for m in left if not (self.imported[m] & left) - {m}}:
            left -= leaves
        return sorted(left)


def folder_of(module: str) -> str:
    """`engine/` for `engine.trees` and `engine.__init__`, `config` for `config`."""
    folder, dot, _ = module.partition(".")
    return folder + "/" if dot else module


def layers(document: Path = DOCUMENT) -> dict[str, int]:
    """Folder or module -> layer, from the table in the document."""
    text = document.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ((?:`[\w/]+` ?)+)\|", text, re.MULTILINE)
    return {name: int(layer) for layer, names in rows for name in re.findall(r"`([\w/]+)`", names)}
