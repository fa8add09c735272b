"""A progress bar on a terminal.

It is not part of `tables`: stages that score nothing need no torch, which this module imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from scir_cli.engine.throughput import Meter
from scir_cli.errors import shown
from scir_cli.report.console import PlainConsole


class Speed(ProgressColumn):
    """Tokens read (in) and sampled (out) per second.

    It also shows the share of the tokens read that a prefix cache held.
    """

    def __init__(self, meter: Meter) -> None:
        super().__init__(Column(no_wrap=True))
        self.meter = meter

    def render(self, task: Task) -> Text:
        """The meter's line."""
        return Text(self.meter.line(), style="progress.data.speed")


@contextmanager
def progress(
    description: str, total: int, meter: Meter | None = None
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`, which moves a bar on stderr if that is a terminal.

    With a meter the bar also shows the speed. Without a terminal nothing is printed.
    """
    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        yield lambda n: None
        return

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    if meter is not None:
        columns.insert(3, Speed(meter))
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(shown(description), total=total)
        yield lambda n: bar.advance(task, n)
