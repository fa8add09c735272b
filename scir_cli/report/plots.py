"""Pictures as inline SVG, each with its numbers; the same arguments give the same bytes.

Functions are pure: arrays and figures in, `Picture` out. matplotlib draws (the extra `report`); it
is imported only when something is drawn. It draws with a stand-in for each color, and every
stand-in becomes a CSS variable of the page, so one drawing serves light, dark and paper. Text
stays text in the page's font. Labels may contain text from data, so nothing in them is read as
mathematics or markup. Pictures are not interactive: the tables show exact values.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = Sequence[Any]  # text, numbers, None
Points = Sequence[Mapping[str, Any]]
#: A rate, and the ends of its 95 % interval; None: unknown
Rate = tuple[float | None, float | None, float | None]
#: A name, then its rate as in `Rate`
NamedRate = tuple[str, float | None, float | None, float | None]
#: Name -> (steps, values) of a curve
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]

#: Inches; about 340 px wide, so text is readable on a phone. A screen enlarges it by a third.
SIZE = (4.7, 3.2)
#: Up to this many pairs are drawn as dots, more as density
DOTS = 500
#: Bins of a density along each axis
BINS = 28
#: Points of a curve; in a longer one each point is a mean of neighbors
POINTS = 300
#: A curve with more points than this is smoothed as well
SMOOTHED_ABOVE = 40
TABLE_ROWS = 60
#: The levels of the five quantiles that `spread` draws
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

#: CSS variable -> the color that stands for it while matplotlib draws
STAND_IN = {
    "ink": "#fe0000",
    "muted": "#fe0001",
    "grid": "#fe0002",
    "paper": "#fe0003",
    "s0": "#fe0004",
    "s1": "#fe0005",
    "s2": "#fe0006",
    "s3": "#fe0007",
    "s4": "#fe0008",
    "s5": "#fe0009",
    "s6": "#fe000a",
    "s7": "#fe000b",
}
VARIABLE_OF = {color: name for name, color in STAND_IN.items()}
#: Name -> number of its color: a reward model has the same color in every picture
SERIES = {
    "judge": 0,
    "judge_forward": 0,
    "judge_swapped": 5,
    "implicit": 1,
    "agreed": 2,
    "rubric": 3,
    "rationale": 4,
    "likelihood": 5,
    "pmi": 6,
    "external": 7,
}
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv"

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,
    "font.size": 9.5,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.color": STAND_IN["ink"],
    "axes.labelcolor": STAND_IN["ink"],
    "xtick.color": STAND_IN["muted"],
    "ytick.color": STAND_IN["muted"],
    "xtick.labelcolor": STAND_IN["ink"],
    "ytick.labelcolor": STAND_IN["ink"],
    "axes.edgecolor": STAND_IN["muted"],
    "grid.color": STAND_IN["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Picture:
    """An SVG element, and the table of the numbers that it shows."""

    title: str
    svg: str
    headings: Row
    rows: Sequence[Row]
    caption: str = ""


def color(name: str, index: int) -> str:
    """The stand-in color of a reward model, or of the series at `index` if it is none."""
    number = SERIES.get(name, index % 8)
    return STAND_IN[f"s{number}"]


def draw(
    paint: Callable[[Any], None],
    label: str,
    size: tuple[float, float] = SIZE,
    panels: tuple[int, int] = (1, 1),
) -> str:
    """The SVG element of what `paint(axes)` draws.

    label: read aloud by a screen reader
    size: width and height, inches
    panels: rows and columns of axes
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": label}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The browser draws the text, so it does not matter if a font here lacks a glyph.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(*panels))
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return _inline(out.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """matplotlib's document as an element of a page.

    It has no prologue, no metadata, only the ids that it refers to, and CSS variables as colors.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = _without_unused_ids(svg)
    svg = _with_css_variables(svg)
    svg = re.sub(r"font-family: [^;]*;", "font-family: var(--font);", svg)
    # The rules of this style element would apply to the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    # The page sets the width; the height follows from viewBox.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s+", " ", svg)
    # Numbers in the text between tags stay as they are.
    svg = re.sub(r"<[^>]+>", lambda tag: _rounded(tag[0]), svg)
    labeled = f'<svg role="img" aria-label="{_attribute(label)}"'
    return svg.replace("<svg", labeled, 1).strip()


def _with_css_variables(svg: str) -> str:
    """The SVG with CSS variables in place of the stand-in colors."""
    stand_in = "|".join(VARIABLE_OF)

    def replace(color: re.Match[str]) -> str:
        return f"var(--{VARIABLE_OF[color[0]]})"

    return re.sub(stand_in, replace, svg)


def _without_unused_ids(svg: str) -> str:
    """The SVG without the ids that nothing in it refers to."""
    used = set(re.findall(r"#(\w+)[\")]", svg))

    def replace(attribute: re.Match[str]) -> str:
        if attribute[1] in used:
            return attribute[0]
        return ""

    return re.sub(r' id="([^"]*)"', replace, svg)


def _rounded(tag: str) -> str:
    """The tag with its numbers rounded to a hundredth of a pixel."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)


def _attribute(text: str) -> str:
    """The text as the value of an attribute in double quotes."""
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


# Parts of pictures


def _short(name: str, most: int = 22) -> str:
    """The name, cut after at most `most` characters."""
    if len(name) <= most:
        return name
    return name[: most - 1] + "…"


def _size(n_rows: int) -> tuple[float, float]:
    """The size of a picture with one line per name, inches."""
    width, _ = SIZE
    height = max(1.7, 0.75 + 0.32 * n_rows)
    return width, height


def _rows(ax: Any, names: Sequence[str]) -> None:
    """One line per name, the first on top."""
    n = len(names)
    labels = [_short(name, 28) for name in names]
    ax.set(yticks=range(n), ylim=(n - 0.5, -0.5))
    ax.set_yticklabels(labels)
    ax.grid(axis="y", visible=False)


def _percent_axis(axis: Any) -> None:
    """Writes the numbers of an axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _zero_line(draw_line: Callable[..., Any], at: float = 0, **style: Any) -> None:
    """A thin line across the axes.

    draw_line: `ax.axhline` or `ax.axvline`
    """
    draw_line(at, color=STAND_IN["muted"], linewidth=0.9, **style)


def _line_style(name: str, index: int) -> dict[str, Any]:
    """Color, marker and dashes of the series at `index`."""
    return {
        "color": color(name, index),
        "marker": MARKERS[index % 5],
        "linestyle": DASHES[index % 4],
    }


def _bar(ax: Any, y: float, low: float, high: float, color: str, **style: Any) -> None:
    """A horizontal bar with round ends."""
    ax.plot(
        [low, high],
        [y, y],
        color=color,
        solid_capstyle="round",
        **style,
    )


def _dot(ax: Any, x: float | None, y: float, color: str, **style: Any) -> None:
    """A round marker at (x, y)."""
    ax.plot([x], [y], "o", color=color, **style)


def _values(points: Points, key: str) -> list[Any]:
    """The figure `key` of each point, in their order."""
    return [point[key] for point in points]


def _point_rows(curves: Mapping[str, Points], keys: Sequence[str]) -> list[Row]:
    """Rows (name, value of each key), one per point of each curve."""
    rows: list[Row] = []
    for name, points in curves.items():
        for point in points:
            values = [point[key] for key in keys]
            rows.append((name, *values))
    return rows


def _rectangle(x: float, y: float, width: float, height: float, **style: Any) -> Any:
    """A rectangle without an edge, in the coordinates of the data."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, linewidth=0, **style)


# Agreement


def matrix(names: Sequence[str], between: Points) -> Picture:
    """How often each two reward models prefer the same response, and Cohen's kappa below it.

    between: one entry per two reward models, as `consistency.summary` returns them
    """

    def paint(ax: Any) -> None:
        _matrix_axes(ax, names)
        _matrix_cells(ax, names, between)

    keys = (
        "first",
        "second",
        "pairs",
        "agreement",
        "agreement_low",
        "agreement_high",
        "kappa",
        "spearman",
    )
    headings = (
        "reward model",
        "and",
        "pairs",
        "agreement",
        "95 % from",
        "to",
        "Cohen's kappa",
        "rank correlation",
    )
    rows = [tuple(figures[key] for key in keys) for figures in between]
    caption = (
        "Share of pairs on which both prefer the same response; κ: Cohen's kappa, 0 at chance."
    )
    svg = draw(paint, "Pairwise agreement of the reward models")
    return Picture("Pairwise agreement", svg, headings, rows, caption)


def _matrix_axes(ax: Any, names: Sequence[str]) -> None:
    """Square axes without a frame; each name labels one row and one column."""
    n = len(names)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set(
        xlim=(-0.5, n - 0.5),
        ylim=(n - 0.5, -0.5),
        xticks=range(n),
        yticks=range(n),
        aspect="equal",
    )
    ax.tick_params(length=0)

    labels = [_short(name, 11) for name in names]
    if n < 5:
        ax.set_xticklabels(labels, rotation=0, ha="center")
    else:
        ax.set_xticklabels(labels, rotation=40, ha="right")
    ax.set_yticklabels(labels)


def _matrix_cells(ax: Any, names: Sequence[str], between: Points) -> None:
    """Both cells of each two reward models, then the diagonal."""
    index = {name: i for i, name in enumerate(names)}
    fontsize = 10 if len(names) < 5 else 7

    for row_key, column_key in (("first", "second"), ("second", "first")):
        for figures in between:
            row = index[figures[row_key]]
            column = index[figures[column_key]]
            _matrix_cell(ax, row, column, figures, fontsize)

    for i in index.values():
        diagonal = _square(i, i, STAND_IN["muted"], 0.08)
        ax.add_patch(diagonal)


def _matrix_cell(
    ax: Any,
    row: int,
    column: int,
    figures: Mapping[str, Any],
    fontsize: int,
) -> None:
    """A square that is the more opaque, the more the rate exceeds a half, and its text.

    figures: of the reward models in this row and this column
    """
    rate = figures["agreement"]
    opacity = 0.0
    if rate is not None:
        opacity = 0.06 + 0.6 * max(0.0, 2 * rate - 1)
    square = _square(column, row, STAND_IN["s0"], opacity)
    ax.add_patch(square)

    text = _matrix_text(rate, figures["kappa"])
    ax.text(column, row, text, ha="center", va="center", fontsize=fontsize)


def _matrix_text(rate: float | None, kappa: float | None) -> str:
    """The rate, and kappa below it if it is known."""
    if rate is None:
        return "–"
    if kappa is None:
        return f"{rate:.0%}"
    return f"{rate:.0%}\nκ {kappa:.2f}"


def _square(x: float, y: float, color: str, alpha: float) -> Any:
    """A square around (x, y), with a small gap to its neighbors."""
    left = x - 0.47
    bottom = y - 0.47
    return _rectangle(left, bottom, 0.94, 0.94, facecolor=color, alpha=alpha)


def quadrants(first: str, second: str, a: Array, b: Array) -> Picture:
    """Log-odds of two reward models against each other.

    The reward models agree in the upper right and the lower left quadrant. Up to DOTS pairs are
    drawn as dots, more as the density of the pairs.
    a, b: (pairs,) nats; NaN: no verdict
    """
    both = ~(np.isnan(a) | np.isnan(b))
    a = a[both]
    b = b[both]
    few = len(a) <= DOTS

    reach_a = _reach(a)
    reach_b = _reach(b)
    shown_a = np.clip(a, -reach_a, reach_a)
    shown_b = np.clip(b, -reach_b, reach_b)
    span = [(-reach_a, reach_a), (-reach_b, reach_b)]
    counts, x, y = np.histogram2d(shown_a, shown_b, bins=BINS, range=span)
    # The shares of the quadrants need space above and below.
    height = reach_b * 1.16

    def paint(ax: Any) -> None:
        """One dot per pair, or a density of many pairs."""
        _zero_line(ax.axhline)
        _zero_line(ax.axvline)
        if few:
            _agreement_dots(ax, shown_a, shown_b)
        else:
            _density(ax, x, y, counts)
        ax.set(
            xlim=(-reach_a, reach_a),
            ylim=(-height, height),
        )
        ax.set(
            xlabel=f"{_short(first)}, log-odds that the first is better",
            ylabel=f"{_short(second)}, log-odds",
        )
        _quadrant_shares(ax, a, b)

    title = f"{first} against {second}"
    caption = (
        f"{len(a):,} pairs. They agree in the upper right and the lower left; "
        "each quadrant shows its share of the pairs. The outermost 0.5 % are drawn at the edge."
    )
    svg = draw(paint, title)
    if few:
        headings: Row = (f"{first}, nats", f"{second}, nats")
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        return Picture(title, svg, headings, sorted(pairs), caption)

    headings = (f"{first} from", "to", f"{second} from", "to", "pairs")
    rows = _density_rows(x, y, counts)
    caption = f"{caption} The table lists the {len(rows)} cells with the most pairs."
    return Picture(title, svg, headings, rows, caption)


def _reach(values: Array) -> float:
    """How far an axis reaches each way: 5 % beyond the 99.5th percentile of the sizes."""
    if not len(values):
        return 1.0
    most = float(np.quantile(np.abs(values), 0.995))
    return max(1e-6, most) * 1.05


def _agreement_dots(ax: Any, x: Array, y: Array) -> None:
    """One dot per pair, in the color of agreement or of disagreement."""
    agree = np.sign(x) == np.sign(y)
    _dots(ax, x[agree], y[agree], STAND_IN["s2"])
    _dots(
        ax,
        x[~agree],
        y[~agree],
        STAND_IN["s4"],
    )


def _dots(ax: Any, x: Array, y: Array, color: str) -> None:
    """Small translucent dots.

    x, y: (dots,)
    """
    ax.scatter(
        x,
        y,
        s=13,
        color=color,
        alpha=0.55,
        linewidths=0,
    )


def _quadrant_shares(ax: Any, a: Array, b: Array) -> None:
    """Writes each quadrant's share of the pairs into its outer corner.

    a, b: (pairs,) log-odds, nats
    """
    for sign_a, sign_b in ((1, 1), (-1, 1), (-1, -1), (1, -1)):
        share = 0.0
        if len(a):
            same_a = np.sign(a) == sign_a
            same_b = np.sign(b) == sign_b
            share = float((same_a & same_b).mean())
        ax.text(
            0.5 + 0.485 * sign_a,
            0.5 + 0.485 * sign_b,
            f"{share:.0%}",
            transform=ax.transAxes,
            weight="bold" if sign_a == sign_b else "normal",
            ha="right" if sign_a > 0 else "left",
            va="top" if sign_b > 0 else "bottom",
        )


def _density(ax: Any, x: Array, y: Array, counts: Array) -> None:
    """Cells of one color whose opacity is the root of the count, so any background will do.

    x, y: (BINS + 1,) edges, nats
    counts: (BINS, BINS) pairs
    """
    most = counts.max()
    for i, j in _filled_cells(counts):
        left, right = x[i], x[i + 1]
        bottom, top = y[j], y[j + 1]
        agree = (left + right) * (bottom + top) > 0
        color = STAND_IN["s2"] if agree else STAND_IN["s4"]
        fullness = float(np.sqrt(counts[i, j] / most))
        cell = _rectangle(
            left,
            bottom,
            right - left,
            top - bottom,
            color=color,
            alpha=0.08 + 0.85 * fullness,
        )
        ax.add_patch(cell)


def _filled_cells(counts: Array) -> list[tuple[int, int]]:
    """The indices (i, j) of the cells with pairs, row by row."""
    rows, columns = np.nonzero(counts)
    return list(zip(rows, columns, strict=True))


def _density_rows(x: Array, y: Array, counts: Array) -> list[Row]:
    """The cells with the most pairs, the fullest first: their edges and counts."""
    fullest = sorted(_filled_cells(counts), key=lambda cell: -counts[cell])
    rows: list[Row] = []
    for i, j in fullest[: 2 * TABLE_ROWS]:
        row = (
            float(x[i]),
            float(x[i + 1]),
            float(y[j]),
            float(y[j + 1]),
            int(counts[i, j]),
        )
        rows.append(row)
    return rows


def distributions(
    title: str,
    groups: Mapping[str, Array],
    caption: str,
    label: str = "log-odds, nats",
) -> Picture:
    """The spread of each group's values.

    groups: name -> (n,) values; NaN: no value
    label: of the horizontal axis
    """
    quantiles = {}
    for name, values in groups.items():
        present = values[~np.isnan(values)]
        if len(present):
            quantiles[name] = np.quantile(present, QUANTILES).tolist()
    return spread(title, quantiles, caption, label)


def spread(
    title: str,
    quantiles: Mapping[str, Sequence[float]],
    caption: str,
    label: str,
) -> Picture:
    """The spread of several groups, one line each.

    A thin bar reaches from the 10th to the 90th percentile, a thick one covers the middle half,
    and a dot marks the median.
    quantiles: name -> (5,) values at QUANTILES
    """

    def paint(ax: Any) -> None:
        for y, (name, values) in enumerate(quantiles.items()):
            low, lower_quartile, median, upper_quartile, high = values
            reward_model = name.rsplit(" ", 1)[-1]
            bar_color = color(reward_model, y)
            _bar(ax, y, low, high, bar_color, linewidth=1.6)
            _bar(ax, y, lower_quartile, upper_quartile, bar_color, linewidth=6.5, alpha=0.55)
            _dot(ax, median, y, bar_color, markersize=5.5)
        _rows(ax, list(quantiles))
        ax.set_xlabel(label)
        _zero_line(ax.axvline)

    rows = [(name, *values) for name, values in quantiles.items()]
    svg = draw(paint, title, _size(len(rows)))
    headings = ("", "10 %", "25 %", "median", "75 %", "90 %")
    caption = f"{caption} Dot: median; thick: middle half; thin: 10 % to 90 %."
    return Picture(title, svg, headings, rows, caption)


# Rates with intervals


def rates(
    title: str,
    rows: Sequence[NamedRate],
    caption: str,
    chance: float | None = None,
    model: str | None = None,
    span: tuple[float, float] | None = None,
) -> Picture:
    """Rates with their intervals, one line each.

    rows: (name, rate, low, high); a row without a rate is only in the table
    chance: a dashed line is drawn at this rate
    model: the reward model that all rows are about, whose color they have
    span: least and largest possible value, if the values are not rates
    """
    drawn = [row for row in rows if row[1] is not None]
    names = [row[0] for row in drawn]

    def paint(ax: Any) -> None:
        for y, (name, rate, low, high) in enumerate(drawn):
            bar_color = color(model or name, 0)
            if low is not None and high is not None:
                _bar(ax, y, low, high, bar_color, linewidth=1.8)
            _dot(ax, rate, y, bar_color, markersize=6)
        if chance is not None:
            _zero_line(ax.axvline, chance, linestyle="--")
        _rows(ax, names)
        if span is None:
            ax.set_xlim(-0.02, 1.02)
            _percent_axis(ax.xaxis)
        else:
            ax.set_xlim(*span)

    svg = draw(paint, title, _size(len(drawn)))
    headings = ("", "mean" if span else "rate", "95 % from", "to")
    return Picture(title, svg, headings, rows, caption)


# Lines


def reliability(curves: Mapping[str, Points]) -> Picture:
    """Accuracy against stated confidence.

    curves: reward model -> bins {confidence, accuracy, accuracy_low, accuracy_high, pairs}
    """

    def paint(ax: Any) -> None:
        """One calibration curve per reward model, beside the diagonal."""
        ax.plot(
            [0.5, 1],
            [0.5, 1],
            color=STAND_IN["muted"],
            linewidth=0.9,
            linestyle="--",
        )
        for index, (name, bins) in enumerate(curves.items()):
            x = _values(bins, "confidence")
            low = _values(bins, "accuracy_low")
            high = _values(bins, "accuracy_high")
            style = _line_style(name, index)
            ax.vlines(
                x,
                low,
                high,
                color=style["color"],
                linewidth=0.9,
                alpha=0.5,
            )
            ax.plot(
                x,
                _values(bins, "accuracy"),
                label=_short(name),
                **style,
            )
        ax.set(
            xlim=(0.49, 1.01),
            ylim=(-0.02, 1.02),
            xlabel="confidence max(p, 1 − p)",
            ylabel="accuracy",
        )
        _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    keys = ("pairs", "confidence", "accuracy", "accuracy_low", "accuracy_high")
    headings = ("", "pairs", "mean confidence", "accuracy", "95 % from", "to")
    caption = (
        "On the dashed line, accuracy equals confidence; "
        "below it, the reward model is overconfident. Bars: 95 %."
    )
    svg = draw(paint, "Reliability")
    return Picture("Reliability", svg, headings, _point_rows(curves, keys), caption)


def risk_coverage(curves: Mapping[str, Points]) -> Picture:
    """Accuracy on the most confident pairs against their share.

    curves: name -> points {coverage, pairs, accuracy, accuracy_low, accuracy_high}
    """

    def paint(ax: Any) -> None:
        """One risk-coverage curve per reward model."""
        for index, (name, points) in enumerate(curves.items()):
            x = _values(points, "coverage")
            low = _values(points, "accuracy_low")
            high = _values(points, "accuracy_high")
            style = _line_style(name, index)
            # A single point would be an invisible line.
            style["marker"] = "o" if len(x) == 1 else None
            ax.fill_between(
                x,
                low,
                high,
                color=style["color"],
                alpha=0.1,
                linewidth=0,
            )
            ax.plot(
                x,
                _values(points, "accuracy"),
                label=_short(name),
                **style,
            )
        ax.set(
            xlim=(0, 1.02),
            ylim=(None, 1.02),
            xlabel="coverage, most confident pairs first",
            ylabel="accuracy",
        )
        _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    keys = ("coverage", "pairs", "accuracy", "accuracy_low", "accuracy_high")
    headings = ("", "coverage", "pairs", "accuracy", "95 % from", "to")
    caption = (
        "Accuracy on the most confident labeled pairs, by their share. "
        "“agreed”: pairs on which all agree, ordered by their smallest margin. Bands: 95 %."
    )
    svg = draw(paint, "Risk and coverage")
    return Picture("Risk and coverage", svg, headings, _point_rows(curves, keys), caption)


def length_bias(odds: Mapping[str, Array], difference: Array) -> Picture:
    """How often each reward model prefers the first response, by how much longer it is.

    odds: name -> (pairs,) nats
    difference: (pairs,) tokens of the first response minus those of the second
    """
    rows = _wins_by_length(odds, difference)

    def paint(ax: Any) -> None:
        """One curve of preference by length difference per reward model."""
        _zero_line(ax.axhline, 0.5, linestyle="--")
        for index, name in enumerate(odds):
            points = [row for row in rows if row[0] == name]
            x = [row[1] for row in points]
            y = [row[3] for row in points]
            ax.plot(
                x,
                y,
                label=_short(name),
                **_line_style(name, index),
            )
        ax.set(
            ylim=(-0.02, 1.02),
            xlabel="length of first minus length of second, tokens",
            ylabel="first preferred",
        )
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    headings = ("", "mean difference", "pairs", "first preferred")
    caption = (
        "A rising line is a preference for longer responses. "
        "Each point has an equal share of the pairs."
    )
    return Picture("Length", draw(paint, "Length bias"), headings, rows, caption)


def _wins_by_length(odds: Mapping[str, Array], difference: Array) -> list[Row]:
    """Rows (reward model, mean difference, pairs, win rate of the first response).

    The pairs are split at quantiles of `difference`, at most 9 bins with about 15 pairs or more.
    odds: name -> (pairs,) nats; difference: (pairs,) tokens
    """
    bins_of_15 = len(difference) // 15
    n_bins = min(9, max(2, bins_of_15))
    levels = np.linspace(0, 1, n_bins + 1)
    edges = np.unique(np.quantile(difference, levels))
    last_bin = max(0, len(edges) - 2)
    edges_below = np.searchsorted(edges, difference, side="right")
    bin_of_pair = np.clip(edges_below - 1, 0, last_bin)

    rows: list[Row] = []
    for name, log_odds in odds.items():
        present = ~np.isnan(log_odds)
        for number in range(last_bin + 1):
            inside = present & (bin_of_pair == number)
            if not inside.any():
                continue
            # A tie counts as half a win.
            wins = 0.5 + 0.5 * np.sign(log_odds[inside])
            row = (
                name,
                float(difference[inside].mean()),
                int(inside.sum()),
                float(wins.mean()),
            )
            rows.append(row)
    return rows


def iterations(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[Rate]],
    caption: str,
) -> Picture:
    """Rates from one dataset to the next.

    names: of the datasets
    series: name -> (rate, low, high) per dataset; None: unknown
    """

    n = len(names)
    slanted = n > 4 or any(len(name) > 12 for name in names)
    labels = [_short(name) for name in names]

    def paint(ax: Any) -> None:
        """One line of rates with intervals per series."""
        for index, (name, values) in enumerate(series.items()):
            # Neighboring series are moved aside so that their intervals do not overlap.
            middle = (len(series) - 1) / 2
            shift = 0.06 * (index - middle)
            style = _line_style(name, index)
            _iteration_line(ax, name, values, shift, style)
        ax.set(
            ylim=(-0.03, 1.03),
            xticks=range(n),
            xlim=(-0.4, n - 0.6),
        )
        if slanted:
            ax.set_xticklabels(labels, rotation=25, ha="right")
        else:
            ax.set_xticklabels(labels, rotation=0, ha="center")
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    rows = []
    for name, values in series.items():
        for dataset, rate in zip(names, values, strict=True):
            rows.append((dataset, name, *rate))
    headings = ("dataset", "", "rate", "95 % from", "to")
    return Picture(title, draw(paint, title), headings, rows, caption)


def _iteration_line(
    ax: Any,
    name: str,
    values: Sequence[Rate],
    shift: float,
    style: Mapping[str, Any],
) -> None:
    """A line through the known rates of one series, with their intervals.

    values: (rate, low, high) per dataset; None: unknown
    """
    x = []
    y = []
    for i, (rate, _, _) in enumerate(values):
        if rate is not None:
            x.append(i + shift)
            y.append(rate)
    ax.plot(x, y, label=name, **style)

    color = style["color"]
    for i, (rate, low, high) in enumerate(values):
        if rate is not None and low is not None:
            position = i + shift
            ax.plot(
                [position, position],
                [low, high],
                color=color,
                linewidth=1,
                alpha=0.6,
            )


def steps(
    title: str,
    series: Curves,
    unit: str = "",
    rate: bool = False,
    caption: str = "",
) -> Picture:
    """Figures over optimizer steps.

    A long curve is drawn as means of neighbors; one with more than SMOOTHED_ABOVE points is
    smoothed as well.
    series: name -> (steps, values)
    rate: the values are rates, so the axis reaches from 0 to 100 %
    """
    curves = {}
    for name, (x, y) in series.items():
        curves[name] = _thin(np.asarray(x, float), np.asarray(y, float))
    longest = max((len(x) for x, _ in series.values()), default=0)
    title_names_all = all(name.replace("_", " ") in title.lower() for name in curves)

    def paint(ax: Any) -> None:
        """One line per curve over optimizer steps."""
        from matplotlib.ticker import MaxNLocator

        for index, (name, (x, y)) in enumerate(curves.items()):
            _step_line(ax, name, index, x, y)
        ax.set(
            xlabel="optimizer step",
            ylabel=unit,
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if longest == 1:
            # matplotlib would show a range of a tenth of a step.
            left, right = ax.get_xlim()
            ax.set_xlim(left - 1, right + 1)
        if rate:
            ax.set_ylim(-0.03, 1.03)
            _percent_axis(ax.yaxis)
        if len(curves) > 1 or not title_names_all:
            ax.legend(loc="best")

    svg = draw(paint, title)
    headings = ("step", *curves)
    return Picture(title, svg, headings, _step_rows(series), _step_caption(caption, longest))


def _step_caption(caption: str, longest: int) -> str:
    """The caption of a picture of curves, with how they were thinned and smoothed.

    longest: points of the longest curve
    """
    notes = [caption] if caption else []
    if longest > POINTS:
        steps_per_point = math.ceil(longest / POINTS)
        notes.append(f"Each point is a mean over about {steps_per_point} steps.")
    if longest > SMOOTHED_ABOVE:
        notes.append("Faint: raw values; strong: smoothed.")
    return " ".join(notes)


def _step_line(ax: Any, name: str, index: int, x: Array, y: Array) -> None:
    """One curve; if it has more than SMOOTHED_ABOVE points, faint, below a smoothed one.

    x, y: (points,) steps and values
    """
    n = len(y)
    style = _line_style(name, index)
    style["marker"] = "o" if n < 12 else None
    if n > SMOOTHED_ABOVE:
        ax.plot(x, y, color=style["color"], alpha=0.3, linewidth=0.8)
        y = _smooth(y)
    ax.plot(x, y, label=_short(name), **style)


def _step_rows(series: Curves) -> list[Row]:
    """Rows (step, value of each series): at most TABLE_ROWS, evenly spread over the steps."""
    by_step: dict[float, dict[str, float]] = {}
    for name, (x, y) in series.items():
        for step, value in zip(x, y, strict=True):
            at_step = by_step.setdefault(step, {})
            at_step[name] = value

    rows: list[Row] = []
    for step in _spread_evenly(sorted(by_step)):
        at_step = by_step[step]
        values = [at_step.get(name) for name in series]
        rows.append((int(step), *values))
    return rows


def _spread_evenly(steps: list[float]) -> list[float]:
    """At most TABLE_ROWS of the steps, with the first and the last."""
    if len(steps) <= TABLE_ROWS:
        return steps
    last = len(steps) - 1
    spaced = np.linspace(0, last, TABLE_ROWS).astype(int)
    return [steps[i] for i in np.unique(spaced)]


def _thin(x: Array, y: Array) -> tuple[Array, Array]:
    """At most POINTS points: means of neighbors.

    x, y: (n,) -> (min(n, POINTS),) each
    """
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    mean_x = [x[part].mean() for part in parts]
    mean_y = [y[part].mean() for part in parts]
    return np.array(mean_x), np.array(mean_y)


def _smooth(y: Array) -> Array:
    """A centered mean over a tenth of the curve, narrower at its ends.

    y: (n,) -> (n,)
    """
    n = len(y)
    half = max(1, n // 20)
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(n)
    first = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, n)
    sums = total[end] - total[first]
    return sums / (end - first)
