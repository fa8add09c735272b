"""The bounds on the package's shape, and the counting behind them, checked by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import scir_cli
from scir_cli import config, registry

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import style

NODES_PER_LINE = 5
MOST_SETTINGS_OF_TRAIN = 60
MOST_SETTINGS_OF_ITS_FIRST_THREE_GROUPS = 20


@pytest.fixture(scope="module")
def package() -> style.Style:
    return style.count(Path(scir_cli.__file__).parent)


def test_the_package_is_no_denser_than_its_bound(package: style.Style):
    assert package.nodes_per_line <= NODES_PER_LINE


def test_no_line_of_the_package_is_over_a_hundred_columns(package: style.Style):
    assert package.wide_lines == []


def test_no_function_of_the_package_has_more_than_sixty_lines(package: style.Style):
    assert package.longest[0] <= style.LONG, package.longest[1]


def test_functions_of_fifteen_lines_or_more_have_a_docstring(package: style.Style):
    assert package.undocumented == []


SOURCE = '''def double(x: Tensor) -> Tensor:
    """Twice x.  (pairs,) -> (pairs,)"""

    return x + x


def refuse(x):
    """Raises ValueError."""
    raise ValueError


class A:
    def _private(self):
        def inner():
            raise KeyError
        return inner
'''


def test_nodes_lines_and_documentation_are_those_counted_by_hand(tmp_path: Path):
    (tmp_path / "a.py").write_text(SOURCE + "#" * 101 + "\n" + "#" * 100 + "\n", encoding="utf-8")
    counted = style.count(tmp_path)
    # double: def, arguments, arg, Tensor, Expr, Constant, Return, BinOp, x, Add, x, Tensor = 12
    # refuse: def, arguments, arg, Expr, Constant, Raise, ValueError = 7
    # A: class, def, arguments, arg, def, arguments, Raise, KeyError, Return, inner = 10; and the
    # module
    assert counted.nodes == 12 + 7 + 10 + 1
    assert counted.lines == 3 + 3 + 5 + 2
    assert counted.wide_lines == ["a.py:17"]
    assert sorted(counted.functions) == [
        (2, "a.py:14 inner"),
        (3, "a.py:7 refuse"),
        (4, "a.py:1 double"),
        (4, "a.py:13 _private"),
    ]
    assert (counted.public, counted.public_documented) == (3, 2)
    assert (counted.array_functions, counted.array_functions_with_shapes) == (1, 1)
    # refuse and inner; _private only defines inner
    assert (counted.raising, counted.raising_documented) == (
        2,
        1,
    )


def test_a_long_function_without_a_docstring_is_listed(tmp_path: Path):
    body = "\n".join(f"    x = {i}" for i in range(14))
    (tmp_path / "a.py").write_text(
        f"def long():\n{body}\n\n\ndef short():\n{body[: body.rindex(chr(10))]}\n", encoding="utf-8"
    )
    assert style.count(tmp_path).undocumented == ["a.py:1 long"]  # 15 lines; the other has 14


def test_train_has_sixty_settings_at_most_and_twenty_in_its_first_three_groups():
    groups = style.settings_per_group()["train"]
    assert sum(groups.values()) <= MOST_SETTINGS_OF_TRAIN
    assert sum(list(groups.values())[:3]) <= MOST_SETTINGS_OF_ITS_FIRST_THREE_GROUPS


def test_every_setting_of_every_command_is_counted_in_one_group():
    assert {name: sum(groups.values()) for name, groups in style.settings_per_group().items()} == {
        name: len(config.fields(stage.settings)) for name, stage in registry.STAGES.items()
    }
