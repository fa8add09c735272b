"""Training progress: a live table on a terminal, elsewhere one line per half minute."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scir_cli.errors import shown
from scir_cli.report import tables
from scir_cli.report.console import PlainConsole
from scir_cli.training import metrics
from scir_cli.training.objectives import Metrics

#: Steps whose mean and course are shown
RECENT = 24
LINE_SECONDS = 30.0
BARS = "▁▂▃▄▅▆▇█"


class View:
    """The figures so far: rich draws it as a table, and `line` returns them in one line.

    title: shown before the step
    n_steps: of the whole training
    clock: returns the time in seconds
    """

    def __init__(
        self,
        title: str,
        n_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.n_steps = n_steps
        self.clock = clock
        self.recent: dict[str, deque[float]] = {}
        self.step = 0
        self.first_step = 0
        self.started = clock()

    def see(self, step: int, figures: Metrics) -> None:
        """Records the figures of a step.

        Without figures, `step` is the one after which a resumed run continues.
        """
        if not figures:
            self.first_step = step
            self.started = self.clock()
        self.step = step
        for name, value in figures.items():
            values = self.recent.setdefault(name, deque(maxlen=RECENT))
            values.append(value)

    def rows(self) -> Iterator[tuple[str, str, bool]]:
        """Yields (metric, label, whether it is a rate) of every figure so far."""
        for key, metric in metrics.present(self.recent):
            if not metric.in_view:
                continue
            label = metric.full_label(key)
            if metric.is_loss_term:
                label = f"  {label}"
            yield key, label, metric.is_rate

    def machine(self) -> str:
        """Tokens per second, peak memory, and the time left."""
        parts = []
        if "tokens_per_second" in self.recent:
            speed = self.mean("tokens_per_second")
            parts.append(f"{speed:,.0f} tokens/s")
        memory = peak_memory() / 2**30
        parts.append(f"{memory:.1f} GiB peak")

        n_done = self.step - self.first_step
        if n_done:
            elapsed = self.clock() - self.started
            n_left = self.n_steps - self.step
            left = tables.duration(elapsed / n_done * n_left)
            parts.append(f"{left} left")
        return ", ".join(parts)

    def mean(self, name: str) -> float:
        """The mean of a figure over the last RECENT steps."""
        values = self.recent[name]
        return sum(values) / len(values)

    def line(self) -> str:
        """The step, the means of the main figures, and the machine's figures."""
        parts = []
        for key, metric in metrics.present(self.recent):
            if metric.in_line:
                label = metric.full_label(key)
                mean = _value(self.mean(key), metric.is_rate)
                parts.append(f"{label} {mean}")
        parts.append(self.machine())
        figures = ", ".join(parts)
        return f"{self.title}: step {self._position()}, {figures}"

    def _position(self) -> str:
        """The step, and the number of all steps."""
        return f"{self.step}/{self.n_steps}"

    def __rich__(self) -> Group:
        """A bar, a table of every figure, and the machine's figures."""
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(self.n_steps, self.step, width=24)
        head.add_row(Text(shown(self.title)), bar, self._position(), style="bold")
        table = self._table()
        foot = Text(
            self.machine(),
            style="dim",
            no_wrap=True,
            overflow="ellipsis",
        )
        return Group(head, table, foot)

    def _table(self) -> Table:
        """The last value, the mean and the course of every figure, one row each."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("", no_wrap=True, max_width=30)
        table.add_column("now", justify="right", no_wrap=True)
        table.add_column(f"mean of {RECENT}", justify="right", no_wrap=True)
        table.add_column("course", no_wrap=True, overflow="crop")
        for name, label, is_rate in self.rows():
            values = self.recent[name]
            last = _value(values[-1], is_rate)
            mean = _value(self.mean(name), is_rate)
            table.add_row(Text(shown(label)), last, mean, sparkline(values))
        return table


def _value(value: float, is_rate: bool) -> str:
    """A rate in percent, or a number with four digits."""
    if is_rate:
        return tables.percent(value)
    return f"{value:.4g}"


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """One bar per value, the lowest for the smallest and the highest for the largest.

    Equal values get bars of medium height.
    """
    low = min(values)
    high = max(values)
    # Written so that NaN gives equal bars, too.
    if not high > low:
        return BARS[3] * len(values)
    line = ""
    for value in values:
        height = int(8 * (value - low) / (high - low))
        line += BARS[min(7, height)]
    return line


def peak_memory() -> float:
    """Peak memory in bytes: of the GPU if one is in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes, Linux reports KiB.
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return peak * unit


@contextmanager
def watching(
    view: View, console: Console | None = None
) -> Iterator[Callable[[int, Metrics], None]]:
    """Yields `see(step, figures)`, which shows the view on stderr.

    A terminal shows it in place; elsewhere a line is printed every LINE_SECONDS.
    """
    console = console or PlainConsole(stderr=True)
    if console.is_terminal:
        with Live(view, console=console, refresh_per_second=2, transient=True):
            yield view.see
        return

    last_line = view.clock()

    def see(step: int, figures: Metrics) -> None:
        nonlocal last_line
        view.see(step, figures)
        if view.clock() - last_line >= LINE_SECONDS:
            last_line = view.clock()
            print(shown(view.line()), file=console.file, flush=True)

    yield see
