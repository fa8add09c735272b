"""The bounds on the package's shape, and the counting behind them on a few lines counted by
hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import scir_cli
from scir_cli import registry

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import style

# Today's values. The aim is 5 nodes per line, no line over 100 columns, no function of 15 lines
# without a docstring.
NODES_PER_LINE = 7.61
WIDE_LINES = 1619
LONGEST_FUNCTION = 74
UNDOCUMENTED_LONG_FUNCTIONS = 64


@pytest.fixture(scope="module")
def package() -> style.Style:
    return style.count(Path(scir_cli.__file__).parent)


def test_the_package_is_no_denser_than_its_bound(package: style.Style):
    assert package.nodes_per_line <= NODES_PER_LINE


def test_the_package_has_no_more_lines_over_a_hundred_columns_than_its_bound(package: style.Style):
    assert len(package.wide_lines) <= WIDE_LINES, package.wide_lines


def test_no_function_of_the_package_is_longer_than_the_bound(package: style.Style):
    assert package.longest[0] <= LONGEST_FUNCTION, package.longest[1]


def test_functions_of_fifteen_lines_or_more_have_a_docstring_but_for_the_bound(
    package: style.Style,
):
    assert len(package.undocumented) <= UNDOCUMENTED_LONG_FUNCTIONS, package.undocumented


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
    assert (counted.raising, counted.raising_documented) == (
        2,
        1,
    )  # refuse and inner; _private only defines inner


def test_a_long_function_without_a_docstring_is_listed(tmp_path: Path):
    body = "\n".join(f"    x = {i}" for i in range(14))
    (tmp_path / "a.py").write_text(
        f"def long():\n{body}\n\n\ndef short():\n{body[: body.rindex(chr(10))]}\n", encoding="utf-8"
    )
    assert style.count(tmp_path).undocumented == ["a.py:1 long"]  # 15 lines; the other has 14


def test_every_command_has_a_count_of_settings():

    assert style.settings_per_command().keys() == registry.STAGES.keys()
