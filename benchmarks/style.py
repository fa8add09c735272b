"""The shape of the code in figures: density, length, documentation, settings and imports.

    make counts
    python benchmarks/style.py scir_cli tests benchmarks --json style.json

Nodes per line are nodes of the syntax tree without expression contexts, per line that is not blank.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imports

WIDTH = 100  # columns
LONG = 60  # lines of a function
DOCUMENTED_FROM = 15  # lines of a function that needs a docstring
ARRAYS = re.compile(r"\b(Tensor|Array|ndarray|NDArray)\b")
SHAPE = re.compile(r"\((\w+|\.\.\.|any number of \w+)(, ?[\w ]+)*,?\)")  # as "(models, pairs)"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Style:
    """Counts over the files of one folder."""

    nodes: int = 0
    lines: int = 0
    wide_lines: list[str] = field(default_factory=list)
    functions: list[tuple[int, str]] = field(default_factory=list)  # (lines, "file:line name")
    public: int = 0
    public_documented: int = 0
    # functions of DOCUMENTED_FROM lines or more
    undocumented: list[str] = field(default_factory=list)
    array_functions: int = 0
    array_functions_with_shapes: int = 0
    raising: int = 0
    raising_documented: int = 0

    @property
    def nodes_per_line(self) -> float:
        return self.nodes / max(self.lines, 1)

    @property
    def longest(self) -> tuple[int, str]:
        return max(self.functions, default=(0, "-"))


def count(folder: Path) -> Style:
    """Counts of all Python files below `folder`."""
    style = Style()
    for path in sorted(folder.rglob("*.py")):
        count_file(path, path.relative_to(folder), style)
    return style


def count_file(path: Path, name: Path, style: Style) -> None:
    """Adds the counts of one file to `style`."""
    source = path.read_text(encoding="utf-8")
    module = ast.parse(source)
    style.nodes += sum(not isinstance(node, ast.expr_context) for node in ast.walk(module))
    for number, line in enumerate(source.splitlines(), start=1):
        style.lines += bool(line.strip())
        if len(line) > WIDTH:
            style.wide_lines.append(f"{name}:{number}")
    for node in ast.walk(module):
        if isinstance(node, Function):
            count_function(node, f"{name}:{node.lineno} {node.name}", style)


def count_function(function: Function, place: str, style: Style) -> None:
    """Adds the counts of one function to `style`."""
    length = (function.end_lineno or function.lineno) - function.lineno + 1
    docstring = ast.get_docstring(function) or ""
    style.functions.append((length, place))
    if length >= DOCUMENTED_FROM and not docstring:
        style.undocumented.append(place)
    if function.name.startswith("_"):
        return
    style.public += 1
    style.public_documented += bool(docstring)
    if takes_or_returns_arrays(function):
        style.array_functions += 1
        style.array_functions_with_shapes += bool(SHAPE.search(docstring))
    if any(raised_errors(function)):
        style.raising += 1
        style.raising_documented += "raise" in docstring.lower()


def takes_or_returns_arrays(function: Function) -> bool:
    """Whether an argument or the result is annotated as a tensor or an array."""
    arguments = function.args
    annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [argument.annotation for argument in annotated] + [function.returns]
    return any(ARRAYS.search(ast.unparse(annotation)) for annotation in annotations if annotation)


def raised_errors(function: Function) -> Iterator[ast.Raise]:
    """The function's own `raise` statements with an error; a bare `raise` passes one on."""
    inner = [
        node
        for node in ast.walk(function)
        if isinstance(node, Function | ast.Lambda) and node is not function
    ]
    elsewhere = {id(node) for function_inside in inner for node in ast.walk(function_inside)}
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None and id(node) not in elsewhere:
            yield node


def settings_per_group() -> dict[str, dict[str, int]]:
    """Command -> group of its help, in the order shown -> number of settings.

    Nested settings are counted one by one; --config, --json and --traceback are not counted.
    """
    from scir_cli import config, registry

    counts: dict[str, dict[str, int]] = {}
    for name, stage in registry.STAGES.items():
        fields = config.fields(stage.settings)
        groups = Counter(config.group_of(stage.settings, *item) for item in fields.items())
        counts[name] = {group: groups[group] for group in config.GROUPS if groups[group]}
    return counts


def package_counts() -> dict[str, int]:
    """Import cycles, imports that run up, and what lies at the top of the package."""
    package = imports.Imports(imports.ROOT / "scir_cli")
    return {
        "modules in import cycles": len(package.cycle()),
        "imports that run up": len(package.upward(imports.layers())),
        "folders and modules at the top": len(package.top_level()),
    }


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def row(folder: Path, style: Style) -> dict[str, Any]:
    """A line of the table."""
    longest, place = style.longest
    return {
        "folder": str(folder),
        "lines": style.lines,
        "nodes per line": round(style.nodes_per_line, 2),
        f"lines over {WIDTH} columns": len(style.wide_lines),
        f"functions over {LONG} lines": sum(length > LONG for length, _ in style.functions),
        "longest function": f"{longest} ({place})",
        "public functions with docstring": share(style.public_documented, style.public),
        f"functions of {DOCUMENTED_FROM} lines without": len(style.undocumented),
        "array functions with shape": share(
            style.array_functions_with_shapes, style.array_functions
        ),
        "raising functions that state it": share(style.raising_documented, style.raising),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one shape as a Markdown table."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(value) for value in row.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("scir_cli")])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [row(folder, count(folder)) for folder in given.folders]
    settings = settings_per_group()
    package = package_counts()
    commands = [
        {
            "command": name,
            "settings": sum(groups.values()),
            "per group": ", ".join(f"{group} {n}" for group, n in groups.items()),
        }
        for name, groups in settings.items()
    ]
    print(markdown(rows), markdown(commands), markdown([package]), sep="\n\n")
    if given.json:
        found = {"folders": rows, "settings": settings, "package": package}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
