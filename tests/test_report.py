"""Tables on a terminal.

Whole at 80 columns and in a pipe, whatever reward models and subsets are called.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from scir_cli import registry
from scir_cli.analysis import consistency
from scir_cli.analysis.verdicts import Verdicts
from scir_cli.report import tables


def verdicts(names: list[str], n: int = 200) -> Verdicts:
    """Random verdicts with seats and labels, and subsets with names that look like markup."""
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 3, (len(names), n))
    odds[0] = np.abs(odds[0]) * 5  # always right: the widest figures
    subsets: list[str | None] = [f"[/red] subset-number-{i % 3}" for i in range(n)]
    seats = np.full_like(odds, 0.7)
    return Verdicts(
        names,
        odds,
        odds + seats,
        odds - seats,
        seats,
        np.ones(n),
        rng.normal(0, 9, n),
        np.full(n, np.nan),
        subsets,
        [str(i) for i in range(n)],
    )


@pytest.mark.parametrize(
    "names",
    [
        ["judge", "implicit"],
        ["judge", "implicit", "rubric", "rationale", "likelihood", "pmi", "external"],
    ],
)
def test_tables_are_whole_at_80_columns(names: list[str]):
    v = verdicts(names)
    summary = consistency.summary(v) | {
        "by_subset": consistency.by_subset(v),
        "curves": consistency.curves(v),
    }
    out = io.StringIO()
    console = Console(file=out, width=80, markup=False)
    for table in tables.verdict_tables({"summary": summary}):
        console.print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    (judge,) = [line for line in lines if line.split()[:2] == ["judge", "200"]]
    assert judge.split()[-3:] == ["100.0%", "[98%,", "100%]"]  # an interval stands beside its rate
    assert "[/red]" in out.getvalue()


def test_names_that_look_like_markup_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    v = verdicts(["judge", "[bold]other"])
    summary = consistency.summary(v) | {"by_subset": consistency.by_subset(v)}
    tables.print_results(registry.STAGES["eval rewards"], {"summary": summary})
    printed = capsys.readouterr().out
    assert "[bold]other" in printed
    assert "[/red] subset-number-0" in printed
    assert "\x1b" not in printed
