"""What a person sees while a model trains: on a terminal every figure with its recent course; in a pipe or a file one line every half minute."""

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

from scir_cli.report import tables
from scir_cli.training import metrics
from scir_cli.training.objectives import Metrics

RECENT = 24  # steps whose mean and course are shown
LINE_SECONDS = 30.0
BARS = "▁▂▃▄▅▆▇█"


class View:
    """The figures so far; rich draws it, `line` says it in one line."""

    def __init__(
        self, title: str, n_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.n_steps, self.clock = title, n_steps, clock
        self.recent: dict[str, deque[float]] = {}
        self.step = self.first_step = 0
        self.started = clock()

    def see(self, step: int, figures: Metrics) -> None:
        """The figures of a step; without any, the step from which a resumed run goes on."""
        if not figures:
            self.first_step, self.started = step, self.clock()
        self.step = step
        for name, value in figures.items():
            self.recent.setdefault(name, deque(maxlen=RECENT)).append(value)

    def rows(self) -> Iterator[tuple[str, str, bool]]:
        """(metric, name shown, is it a rate) of every figure there is."""
        for key, metric in metrics.present(self.recent):
            if metric.in_view:
                indent = "  " if metric.is_loss_term else ""
                yield key, indent + metric.full_label(key), metric.is_rate

    def machine(self) -> str:
        """Tokens a second, memory, and time left."""
        parts = (
            [f"{self.mean('tokens_per_second'):,.0f} tokens/s"]
            if "tokens_per_second" in self.recent
            else []
        )
        parts.append(f"{peak_memory() / 2**30:.1f} GiB at most")
        done = self.step - self.first_step
        if done:
            left = (self.clock() - self.started) / done * (self.n_steps - self.step)
            parts.append(f"{tables.duration(left)} left")
        return ", ".join(parts)

    def mean(self, name: str) -> float:
        return sum(self.recent[name]) / len(self.recent[name])

    def line(self) -> str:
        shown = [(key, metric) for key, metric in metrics.present(self.recent) if metric.in_line]
        figures = [
            f"{metric.full_label(key)} {_value(self.mean(key), metric.is_rate)}"
            for key, metric in shown
        ]
        return f"{self.title}: step {self.step}/{self.n_steps}, {', '.join([*figures, self.machine()])}"

    def __rich__(self) -> Group:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            self.title,
            ProgressBar(self.n_steps, self.step, width=24),
            f"{self.step}/{self.n_steps}",
            style="bold",
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("", no_wrap=True, max_width=30)
        for heading in ("now", f"mean of {RECENT}"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("course", no_wrap=True, overflow="crop")
        for name, shown, rate in self.rows():
            values = self.recent[name]
            table.add_row(
                shown, _value(values[-1], rate), _value(self.mean(name), rate), sparkline(values)
            )
        return Group(
            head, table, Text(self.machine(), style="dim", no_wrap=True, overflow="ellipsis")
        )


def _value(value: float, rate: bool) -> str:
    return tables.percent(value) if rate else f"{value:.4g}"


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """One bar a value, from the smallest to the largest of them; equal values lie in the middle."""
    low, high = min(values), max(values)
    if not high > low:
        return BARS[3] * len(values)
    return "".join(BARS[min(7, int(8 * (v - low) / (high - low)))] for v in values)


def peak_memory() -> float:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1.0 if sys.platform == "darwin" else 1024.0
    )


@contextmanager
def watching(
    view: View, console: Console | None = None
) -> Iterator[Callable[[int, Metrics], None]]:
    """Gives `see(step, figures)`, which shows the view on stderr: drawn in place on a terminal, elsewhere a line every LINE_SECONDS."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        with Live(view, console=console, refresh_per_second=2, transient=True):
            yield view.see
        return
    said = view.clock()

    def see(step: int, figures: Metrics) -> None:
        nonlocal said
        view.see(step, figures)
        if view.clock() - said >= LINE_SECONDS:
            said = view.clock()
            print(view.line(), file=console.file, flush=True)

    yield see
