"""Progress on a terminal, in a module of its own: stages that score nothing need no torch, and its import takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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


class Speed(ProgressColumn):
    """Tokens read (in) and sampled (out) a second, and the share of those read that a prefix cache held."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(Column(no_wrap=True))
        self.meter = meter

    def render(self, task: Task) -> Text:
        return Text(self.meter.line(), style="progress.data.speed")


@contextmanager
def progress(
    description: str, total: int, meter: Meter | None = None
) -> Iterator[Callable[[int], None]]:
    """Gives `advance(n)`: a bar on stderr where that is a terminal, nothing at all elsewhere. With a meter it also says how fast tokens go by."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda n: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), *([Speed(meter)] if meter else []),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)
