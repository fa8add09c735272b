"""The pictures of docs/study.md as SVG files: numbers that report.py computed in, a document out;
pure, and the same bytes every time.

scir_cli.report.plots draws, with its fonts and colors. A file has no page around it, so it brings
the light paper of the reports and fixed colors: readable on a dark page too. Left out on purpose:
tables of the numbers, which the page has.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import Any

from scir_cli.report import plots
from scir_cli.report.plots import STAND_IN

WIDTH, SHOWN = (
    9.0,
    864,
)  # inches while it is drawn, and pixels on a page: text of 9 points has 12 pixels
# A panel goes as far as this many times the median row; what lies beyond is an arrow with its
# number
REACH = 4
MARKERS = "osD^"  # of the first series, the second …

Mark = tuple[float, float, float]  # mean difference and its interval, infinite where there is none
DIRECTION = {1: "more is better →", -1: "← less is better", 0: ""}


@dataclass(frozen=True)
class Forest:
    """One panel: a figure, whether a rise helps, and its marks, rows x series.

    None: not measured.
    """

    heading: str
    sign: int
    marks: Sequence[Sequence[Mark | None]]


@dataclass(frozen=True)
class Heat:
    heading: str
    sign: int
    values: Sequence[Sequence[float | None]]  # rows x columns; None: not measured


def verdict(mark: Mark, sign: int) -> str:
    """better | worse, where the interval does not hold 0.

    Open where it does; unknown where there is none.
    """
    _, low, high = mark
    if not math.isfinite(low):
        return "unknown"
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (sign > 0) else "worse"


LOOK = {
    "better": ("s2", True),
    "worse": ("s4", True),
    "open": ("muted", False),
    "unknown": ("muted", False),
}  # color, filled
SAID = {
    "better": "better, 95 % interval without 0",
    "worse": "worse, 95 % interval without 0",
    "open": "interval holds 0",
    "unknown": "no interval",
}


def span(panel: Forest) -> tuple[float, float]:
    """What a panel shows: zero, and all that lies within its reach."""
    ends = [[x for x in mark if math.isfinite(x)] for row in panel.marks for mark in row if mark]
    reach = REACH * statistics.median([max(map(abs, own)) for own in ends] or [1.0])
    low, high = (
        max([0.0, *(min(reach, side * x) for own in ends for x in own)]) for side in (-1, 1)
    )
    pad = 0.08 * (low + high) or 1.0
    return -low - pad, high + pad


def ticks(low: float, high: float) -> list[float]:
    """Zero and a round number on both sides, far enough from it for labels, where it is not at the
    panel's very edge.
    """
    wide = high - low
    ten = 10.0 ** math.floor(math.log10(0.24 * wide))
    step = next(k * ten for k in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if k * ten >= 0.24 * wide)
    return [x for x in (-step, 0.0, step) if x == 0 or low + 0.05 * wide <= x <= high - 0.05 * wide]


def signed(x: float, digits: str) -> str:
    return f"{x:+{digits}}".replace("-", "−") if x else "0"


def forest(
    label: str,
    corner: str,
    names: Sequence[str],
    panels: Sequence[Forest],
    strong: Set[str] = frozenset(),
    series: Sequence[str] = ("",),
) -> str:
    """Differences with their intervals.

    A row a name, those of `strong` set off; a panel a figure; a mark a series.  corner: what the
    rows are
    """
    seen = [
        v
        for v in LOOK
        if any(m and verdict(m, p.sign) == v for p in panels for row in p.marks for m in row)
    ]

    def paint(axes: Any) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            _forest(ax, names, panel, strong)
        axes[0].set_yticklabels(names)
        axes[0].text(
            -0.045,
            1.015,
            corner,
            transform=axes[0].transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
            color=STAND_IN["muted"],
        )
        for tick, name in zip(axes[0].get_yticklabels(), names, strict=True):
            tick.set_weight("bold" if name in strong else "normal")
        handles = [_dot(*LOOK[v], label=SAID[v]) for v in seen]
        if len(series) > 1:
            handles += [_dot("ink", False, MARKERS[i], label=name) for i, name in enumerate(series)]
        _legend(axes[0].figure, handles, 0.2)
        axes[0].figure.get_layout_engine().set(wspace=0.07)

    height = 1.1 + 0.2 * len(names) * (1 + 0.5 * (len(series) - 1))
    return document(plots.draw(paint, label, (WIDTH, height), (1, len(panels))), (WIDTH, height))


def _forest(ax: Any, names: Sequence[str], panel: Forest, strong: Set[str]) -> None:
    ends = span(panel)
    ax.set(xlim=ends, ylim=(len(names) - 0.5, -0.5), xticks=ticks(*ends), yticks=range(len(names)))
    ax.set_yticklabels([])
    for text in ax.set_xticklabels([signed(x, ".2g") for x in ticks(*ends)], fontsize=8.5):
        text.set_in_layout(False)  # all panels as wide as each other
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(" ")  # the room of their labels
    ax.set_title(f"{panel.heading}\n", fontsize=9.5, weight="bold")
    ax.text(
        0.5,
        1.015,
        DIRECTION[panel.sign],
        transform=ax.transAxes,
        ha="center",
        va="bottom",
        fontsize=8,
        color=STAND_IN["muted"],
    )
    ax.axvline(0, color=STAND_IN["ink"], linewidth=0.9)
    for y, (name, marks) in enumerate(zip(names, panel.marks, strict=True)):
        if name in strong:
            ax.axhspan(y - 0.5, y + 0.5, color=STAND_IN["s0"], alpha=0.09, linewidth=0)
        for i, mark in enumerate(marks):
            if mark:
                _mark(
                    ax,
                    y + (i - (len(marks) - 1) / 2) * 0.4,
                    mark,
                    verdict(mark, panel.sign),
                    MARKERS[i],
                    ends,
                )
        if not any(marks):
            ax.text(
                sum(ends) / 2,
                y,
                "not measured",
                ha="center",
                va="center",
                fontsize=8,
                color=STAND_IN["muted"],
                bbox={"facecolor": STAND_IN["paper"], "pad": 1, "linewidth": 0},
            )


def _mark(
    ax: Any, y: float, mark: Mark, found: str, marker: str, ends: tuple[float, float]
) -> None:
    """A dot and a bar, with a tip where the bar goes on beyond the panel.

    Of a mean beyond it only a tip and the number.
    """
    mean, low, high = mark
    name, filled = LOOK[found]
    inside = 0.02 * (ends[1] - ends[0])
    left, right = (
        _dot(name, True, tip, at=(x, y), size=3.5)
        for tip, x in (("<", ends[0] + inside), (">", ends[1] - inside))
    )
    if mean < ends[0] or mean > ends[1]:
        tip, edge, shift, align = (
            (left, ends[0], 7, "left") if mean < ends[0] else (right, ends[1], -7, "right")
        )
        ax.add_line(tip)
        ax.annotate(
            signed(mean, ".2f"),
            (edge, y),
            (shift, 0),
            textcoords="offset points",
            ha=align,
            va="center",
            fontsize=8,
            color=STAND_IN[name],
        )
        return
    if found != "unknown":
        ax.plot([low, high], [y, y], color=STAND_IN[name], linewidth=1.6)
        for tip in [left] * (low < ends[0]) + [right] * (high > ends[1]):
            ax.add_line(tip)
    ax.add_line(_dot(name, filled, marker, at=(mean, y)))


def _dot(
    name: str,
    filled: bool,
    marker: str = "o",
    at: tuple[float, float] = (0, 0),
    label: str = "",
    size: float = 5,
) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [at[0]],
        [at[1]],
        marker=marker,
        linestyle="",
        markersize=size,
        clip_on=False,
        markeredgecolor=STAND_IN[name],
        markeredgewidth=1.2,
        markerfacecolor=STAND_IN[name if filled else "paper"],
        label=label,
    )


def _legend(figure: Any, handles: Sequence[Any], gap: float) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        handletextpad=gap,
        columnspacing=1.6,
    )


def heat_map(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    axes_names: tuple[str, str],
    panels: Sequence[Sequence[Heat]],
) -> str:
    """Values in cells, the darker the better among the panels of a column of panels.

    axes_names: of rows, of columns
    """

    def paint(axes: Any) -> None:
        for k, stack in enumerate(zip(*panels, strict=True)):
            goods = [
                panel.sign * value
                for panel in stack
                for row in panel.values
                for value in row
                if value is not None
            ]
            low, width = (
                min(goods, default=0.0),
                (max(goods, default=0.0) - min(goods, default=0.0)) or 1.0,
            )
            for ax, panel in zip(axes[:, k], stack, strict=True):
                _heat(
                    ax,
                    rows,
                    columns,
                    panel,
                    lambda x, sign=panel.sign, low=low, width=width: (
                        0.04 + 0.6 * (sign * x - low) / width
                    ),
                )
        for ax in axes[:, 0]:
            ax.set_ylabel(axes_names[0])
        for ax in axes[-1]:
            ax.set_xlabel(axes_names[1])

    size = (WIDTH, 0.4 + len(panels) * (0.5 + 0.3 * len(rows)))
    return document(plots.draw(paint, label, size, (len(panels), len(panels[0]))), size)


def _heat(
    ax: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    panel: Heat,
    shade: Callable[[float], float],
) -> None:
    from matplotlib.patches import Rectangle

    _cell_axes(ax, rows, columns)
    ax.set_title(panel.heading, fontsize=9.5, weight="bold")
    for i, row in enumerate(panel.values):
        for j, value in ((j, value) for j, value in enumerate(row) if value is not None):
            ax.add_patch(
                Rectangle(
                    (j - 0.49, i - 0.48),
                    0.98,
                    0.96,
                    facecolor=STAND_IN["s0"],
                    alpha=shade(value),
                    linewidth=0,
                )
            )
            ax.text(j, i, f"{value:.2f}", ha="center", va="center")


@dataclass(frozen=True)
class Region:
    """One panel of a map: the best method of each cell, and the cells that a line surrounds."""

    heading: str
    best: Sequence[Sequence[str]]  # rows x columns
    values: Sequence[Sequence[float]]  # of the best method, from 0 to 1
    outlined: Sequence[Sequence[bool]]


def regions(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    axes_names: tuple[str, str],
    methods: Sequence[str],
    panels: Sequence[Region],
    outline: str,
) -> str:
    """Cells in the color of their best method, with its value in percent.

    axes_names: of rows, of columns; outline: what the line surrounds
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def paint(axes: Any) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            _cell_axes(ax, rows, columns)
            ax.set_title(panel.heading, fontsize=9.5, weight="bold")
            ax.set_xlabel(axes_names[1])
            _region(ax, panel, methods)
        axes[0].set_ylabel(axes_names[0])
        handles = [Patch(color=plots.color("", i), alpha=0.45) for i in range(len(methods))]
        axes[0].figure.legend(
            handles=[*handles, Line2D([], [], color=STAND_IN["ink"], linewidth=1.6)],
            labels=[*methods, outline],
            loc="outside lower center",
            ncols=3,
            columnspacing=1.6,
        )

    size = (WIDTH, 1.5 + 0.27 * len(rows))
    return document(plots.draw(paint, label, size, (1, len(panels))), size)


def _region(ax: Any, panel: Region, methods: Sequence[str]) -> None:
    """The cells of one panel, and the line around those that are outlined."""
    from matplotlib.patches import Rectangle

    n_rows, n_columns = len(panel.best), len(panel.best[0])
    for i, j in product(range(n_rows), range(n_columns)):
        color = plots.color("", methods.index(panel.best[i][j]))
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=color, alpha=0.45, linewidth=0))
        ax.text(j, i, f"{100 * panel.values[i][j]:.0f}", ha="center", va="center", fontsize=8)

    def is_inside(i: int, j: int) -> bool:
        return 0 <= i < n_rows and 0 <= j < n_columns and panel.outlined[i][j]

    line = {"color": STAND_IN["ink"], "linewidth": 1.6}
    for i, j in product(range(n_rows), range(n_columns)):
        if j + 1 < n_columns and is_inside(i, j) != is_inside(i, j + 1):
            ax.plot([j + 0.5] * 2, [i - 0.5, i + 0.5], **line)
        if i + 1 < n_rows and is_inside(i, j) != is_inside(i + 1, j):
            ax.plot([j - 0.5, j + 0.5], [i + 0.5] * 2, **line)


def _cell_axes(ax: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
    ax.set(
        xlim=(-0.5, len(columns) - 0.5),
        ylim=(len(rows) - 0.5, -0.5),
        xticks=range(len(columns)),
        yticks=range(len(rows)),
    )
    ax.set_xticklabels(columns)
    ax.set_yticklabels(rows)


def courses(
    label: str, models: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """Figures from model to model.

    panels: heading -> method -> a value a model, the first method drawn strongest
    """

    def paint(axes: Any) -> None:
        for ax, (heading, lines) in zip(axes, panels.items(), strict=True):
            for place, (name, values) in enumerate(lines.items()):
                ax.plot(
                    range(len(values)),
                    values,
                    color=plots.color("", place),
                    label=name,
                    linewidth=1.4 if place else 2.4,
                    marker=MARKERS[place % 4],
                    linestyle=plots.DASHES[place % 4],
                    zorder=3 - 0.1 * place,
                )
            ax.set(xticks=range(len(models)), xlim=(-0.15, len(models) - 0.85))
            ax.set_xticklabels(models)
            ax.set_title(heading, fontsize=9.5, weight="bold")
            ax.margins(y=0.08)
        handles, _ = axes[0].get_legend_handles_labels()
        _legend(axes[0].figure, handles, 0.6)

    size = (WIDTH, 2.7)
    return document(plots.draw(paint, label, size, (1, len(panels))), size)


def document(svg: str, size: tuple[float, float]) -> str:
    """An element of a page as a file of its own.

    Sizes, paper, and the colors and font that the page's light style sheet gives.
    """
    css = (
        (files("scir_cli.report") / "template" / "page.css")
        .read_text(encoding="utf-8")
        .split("@media")[0]
    )
    palette = dict(re.findall(r"--(\w+): ([^;]+);", css))
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"|font-family: [^;"]*; ?', "", svg)
    svg = re.sub(r"var\(--(\w+)\)", lambda m: palette[m[1]], svg)
    start = svg.index(">") + 1
    height, font = round(SHOWN * size[1] / size[0]), palette["font"].replace('"', "'")
    head = svg[:start].replace(
        "<svg", f'<svg width="{SHOWN}" height="{height}" font-family="{font}"', 1
    )
    return f'{head}<rect width="100%" height="100%" fill="{palette["paper"]}"/>{svg[start:]}\n'
