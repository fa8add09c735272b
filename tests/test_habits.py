"""Habits that a test can hold.

Tests stand alone, install hints name extras that exist, the version is written once.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import scir_cli
from scir_cli.errors import install_hint

ROOT = Path(__file__).parent.parent
TESTS = sorted((ROOT / "tests").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
#: The public methods of named tuples.
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(module: ast.Module) -> set[str]:
    """First parts of the names of all modules that are imported, anywhere in the file."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_names(module: ast.Module) -> Iterator[str]:
    """`object._name` for each use of a private name of another object.

    By a dot, by an import, by setattr.
    """
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls"):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr")):
            strings = [
                argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)
            ]
            yield from (
                f"{ast.unparse(node.args[0])}.{name}"
                for name in strings
                if isinstance(name, str) and is_private(name)
            )


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_no_test_file_imports_a_test_file_or_reaches_a_private_name(path: Path):
    module = tree(path)
    test_files = {other.stem for other in TESTS if other.stem.startswith("test_")} | {"conftest"}
    assert imported_modules(module) & test_files == set()
    assert set(private_names(module)) == set()


def test_a_test_file_loads_no_class_of_another_test_file_by_name():
    pattern = re.compile(r"""["'](test_\w+):[A-Z]""")
    for path in TESTS:
        assert set(pattern.findall(path.read_text(encoding="utf-8"))) <= {path.stem}


def test_what_reaches_a_private_name_is_seen_in_each_of_its_forms():
    source = """
from scir_cli.store import _a
import scir_cli.store as store
store._b()
monkeypatch.setattr(store, "_c", 1)
self._d, row._replace(x=1), store.__name__, store.e
getattr(store, "_f")
"""
    assert set(private_names(ast.parse(source))) == {
        "scir_cli.store._a",
        "store._b",
        "store._c",
        "store._f",
    }


# Install hints


def texts() -> dict[str, str]:
    """The text of every file that users or developers read or run, by name.

    CHANGELOG and log keep what was.
    """
    folders = ("scir_cli", "benchmarks", "docs", "recipes", "tests", ".ci", ".github")
    suffixes = {".py", ".md", ".yaml", ".yml", ".sh", ".html", ".toml", ".txt", ".cff", ""}
    files = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    ]
    files += [
        path for path in ROOT.iterdir() if path.suffix in suffixes and path.name != "CHANGELOG.md"
    ]
    names = {
        str(path.relative_to(ROOT)): path
        for path in files
        if path.is_file() and path.name not in ("log.md", ".git")
    }
    return {name: path.read_text(encoding="utf-8") for name, path in names.items()}


def hinted_extras(text: str) -> set[str]:
    """Extras in `pip install -e '.[a,b]'`, `scir-cli[a]` and `install_hint("a")`."""
    groups = re.findall(
        r"""['"]\.\[([\w,-]+)\]['"]|scir-cli\\?\[([\w,-]+)\\?\]|install_hint\(["'](\w+)["']\)""",
        text,
    )
    return {extra for group in groups for extra in "".join(group).split(",")}


def test_a_hint_names_the_distribution_and_its_extra():
    assert install_hint("lora") == "pip install 'scir-cli[lora]'"
    hints = "pip install -e '.[dev,ray]', pip install 'scir-cli[lora]', install_hint('eval')"
    assert hinted_extras(hints) == {"dev", "ray", "lora", "eval"}


def test_every_hint_names_an_extra_that_exists_and_none_the_project_called_scir():
    found = {
        name: hinted_extras(text)
        for name, text in texts().items()
        if name != "tests/test_habits.py"
    }
    assert {name: extras - EXTRAS for name, extras in found.items() if extras - EXTRAS} == {}
    assert found["README.md"] and found["docs/scaling.md"] and found["Makefile"]
    code = set().union(*(extras for name, extras in found.items() if name.startswith("scir_cli/")))
    assert code == {
        "deepspeed",
        "eval",
        "lora",
        "qlora",
        "quickstart",
        "ray",
        "remote",
        "report",
        "vllm",
    }
    wrong = re.compile(r"(?<![\w/-])scir\\?\[[a-z]|pip install ['\"]?scir(?![\w-])")
    assert [name for name, text in texts().items() if wrong.search(text)] == []


def test_the_distribution_is_scir_cli_and_its_command_is_scir():
    assert PROJECT["name"] == "scir-cli"
    assert PROJECT["scripts"] == {"scir": "scir_cli.cli:main"}


# The version, and how the code is checked


def test_the_version_is_written_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    numbers = re.findall(
        r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert numbers == [scir_cli.__version__]
    done = subprocess.run(
        [sys.executable, "-m", "scir_cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"scir {scir_cli.__version__}\n"


def test_pre_commit_runs_the_ruff_that_constraints_pin_and_nothing_from_elsewhere():
    import yaml

    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    (pinned,) = re.findall(
        r"^ruff==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert all(hook["additional_dependencies"] == [pinned] for hook in hooks["repos"][0]["hooks"])


def test_make_help_names_every_target_that_a_person_calls():
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", rules, re.MULTILINE)
    assert phony is not None
    documented = set(re.findall(r"^([\w-]+):.*?## ", rules, re.MULTILINE))
    assert documented == set(phony[1].split())
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(
        f"make {target}" in contributing for target in ("check", "test-fast", "test", "test-vllm")
    )
