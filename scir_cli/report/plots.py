"""Pictures as inline SVG, each with the numbers behind it: arrays and figures in, `Picture` out; pure, and the same bytes every time.

matplotlib draws (the extra `report`; imported when something is drawn). It is given a stand-in for each colour, which becomes a CSS variable of
the page, so that one drawing serves light, dark and paper; text stays text in the page's font. Labels may come from data: nothing in them is
mathematics or markup. Left out on purpose: interaction; the tables are what to look values up in.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = Sequence[Any]  # text, numbers, None

SIZE = (
    4.7,
    3.2,
)  # inches: about 340 px wide, so that text is readable on a phone, and enlarged by a third on a screen
DOTS = 500  # up to this many pairs are drawn as dots, more as density
BINS = 28  # of a density, each way
POINTS = 300  # of a curve; longer ones are means of neighbours
TABLE_ROWS = 60

#: CSS variable -> the colour it has while matplotlib draws
STAND_IN = {
    name: f"#fe00{i:02x}"
    for i, name in enumerate(["ink", "muted", "grid", "paper", *(f"s{n}" for n in range(8))])
}
#: the colour of what is drawn again and again: a reward model looks the same in every picture
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

STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "text.parse_math": False, "font.size": 9.5, "legend.fontsize": 9, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "text.color": STAND_IN["ink"], "axes.labelcolor": STAND_IN["ink"], "xtick.color": STAND_IN["muted"], "ytick.color": STAND_IN["muted"],
    "xtick.labelcolor": STAND_IN["ink"], "ytick.labelcolor": STAND_IN["ink"], "axes.edgecolor": STAND_IN["muted"], "grid.color": STAND_IN["grid"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6, "axes.linewidth": 0.7,
    "lines.linewidth": 1.5, "lines.markersize": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    title: str
    svg: str
    headings: Row
    rows: Sequence[Row]  # the numbers behind it
    caption: str = ""


def colour(name: str, place: int) -> str:
    return STAND_IN[f"s{SERIES.get(name, place % 8)}"]


def draw(
    paint: Callable[[Any], None],
    label: str,
    size: tuple[float, float] = SIZE,
    panels: tuple[int, int] = (1, 1),
) -> str:
    """The SVG element that `paint(axes)` gives; `label` is what a screen reader says.  panels: rows and columns of axes"""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    style: Any = {**STYLE, "svg.hashsalt": label}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a glyph that this machine's fonts lack is the browser's business
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(*panels))
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return _inline(out.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """matplotlib's document as an element: no prologue, no metadata, no ids but those it refers to itself, colours as CSS variables."""
    svg = re.sub(
        r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL
    )
    used = set(re.findall(r"#(\w+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(
        "|".join(STAND_IN.values()), lambda m: f"var(--{list(STAND_IN)[int(m[0][-2:], 16)]})", svg
    )
    svg = re.sub(r"font-family: [^;]*;", "font-family: var(--font);", svg)
    svg = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL
    )  # its rule would hold for the whole page
    svg = re.sub(
        r"(<svg[^>]*?) height=\"[^\"]*\"",
        r"\1",
        re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
    svg = re.sub(
        r"<[^>]+>", lambda tag: _rounded(tag[0]), re.sub(r"\s+", " ", svg)
    )  # text between tags stays as it is
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1).strip()


def _rounded(tag: str) -> str:
    """A hundredth of a pixel is enough."""
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", tag)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


# Agreement


def matrix(names: Sequence[str], between: Sequence[Mapping[str, Any]]) -> Picture:
    """How often each two reward models prefer the same response, and Cohen's kappa below it."""
    n = len(names)
    place = {name: i for i, name in enumerate(names)}

    def paint(ax: Any) -> None:
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
        ax.set_xticklabels(
            [_short(x, 11) for x in names],
            rotation=0 if n < 5 else 40,
            ha="center" if n < 5 else "right",
        )
        ax.set_yticklabels([_short(x, 11) for x in names])
        cells = [(place[b["first"]], place[b["second"]], b) for b in between]
        for i, j, b in [*cells, *((j, i, b) for i, j, b in cells)]:
            rate, kappa = b["agreement"], b["kappa"]
            ax.add_patch(
                _square(
                    j,
                    i,
                    STAND_IN["s0"],
                    0.0 if rate is None else 0.06 + 0.6 * max(0.0, 2 * rate - 1),
                )
            )
            text = (
                "–"
                if rate is None
                else f"{rate:.0%}" + ("" if kappa is None else f"\nκ {kappa:.2f}")
            )
            ax.text(j, i, text, ha="center", va="center", fontsize=10 if n < 5 else 7)
        for i in range(n):
            ax.add_patch(_square(i, i, STAND_IN["muted"], 0.08))

    rows = [
        (
            b["first"],
            b["second"],
            b["pairs"],
            b["agreement"],
            b["agreement_low"],
            b["agreement_high"],
            b["kappa"],
            b["spearman"],
        )
        for b in between
    ]
    headings = (
        "of",
        "and",
        "pairs",
        "agreement",
        "95 % from",
        "to",
        "Cohen's kappa",
        "rank correlation",
    )
    caption = "Share of pairs on which both prefer the same response; κ: Cohen's kappa, 0 is what chance gives."
    return Picture(
        "Agreement of each two",
        draw(paint, "Agreement of each two reward models"),
        headings,
        rows,
        caption,
    )


def _square(x: float, y: float, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0)


def quadrants(first: str, second: str, a: Array, b: Array) -> Picture:
    """Log-odds of two reward models against each other; agreement is the upper right and the lower left.  a, b: (pairs,) NaN: no verdict"""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    reach = [
        max(1e-6, float(np.quantile(np.abs(side), 0.995))) * 1.05 if len(side) else 1.0
        for side in (a, b)
    ]
    shown = [np.clip(side, -r, r) for side, r in zip((a, b), reach, strict=True)]
    counts, x, y = np.histogram2d(shown[0], shown[1], bins=BINS, range=[(-r, r) for r in reach])

    def paint(ax: Any) -> None:
        ax.axhline(0, color=STAND_IN["muted"], linewidth=0.9)
        ax.axvline(0, color=STAND_IN["muted"], linewidth=0.9)
        if len(a) <= DOTS:
            agree = np.sign(shown[0]) == np.sign(shown[1])
            for part, series in ((agree, "s2"), (~agree, "s4")):
                ax.scatter(
                    shown[0][part],
                    shown[1][part],
                    s=13,
                    color=STAND_IN[series],
                    alpha=0.55,
                    linewidths=0,
                )
        else:
            _density(ax, x, y, counts)
        ax.set(
            xlim=(-reach[0], reach[0]), ylim=(-reach[1] * 1.16, reach[1] * 1.16)
        )  # room for the shares
        ax.set(
            xlabel=f"{_short(first)}, log-odds that the first is better",
            ylabel=f"{_short(second)}, log-odds",
        )
        for sx, sy in ((1, 1), (-1, 1), (-1, -1), (1, -1)):
            share = float(((np.sign(a) == sx) & (np.sign(b) == sy)).mean()) if len(a) else 0.0
            place = {"ha": "right" if sx > 0 else "left", "va": "top" if sy > 0 else "bottom"}
            ax.text(
                0.5 + 0.485 * sx,
                0.5 + 0.485 * sy,
                f"{share:.0%}",
                transform=ax.transAxes,
                weight="bold" if sx == sy else "normal",
                **place,
            )

    title = f"{first} against {second}"
    caption = f"{len(a):,} pairs. They agree in the upper right and the lower left; the shares are of each quadrant. The outermost 0.5 % lie on the edge."
    if len(a) <= DOTS:
        return Picture(
            title,
            draw(paint, title),
            (f"{first}, nats", f"{second}, nats"),
            sorted(zip(a.tolist(), b.tolist(), strict=True)),
            caption,
        )
    cells = sorted(zip(*np.nonzero(counts), strict=True), key=lambda c: -counts[c])[
        : 2 * TABLE_ROWS
    ]
    rows = [
        (float(x[i]), float(x[i + 1]), float(y[j]), float(y[j + 1]), int(counts[i, j]))
        for i, j in cells
    ]
    headings = (f"{first} from", "to", f"{second} from", "to", "pairs")
    return Picture(
        title,
        draw(paint, title),
        headings,
        rows,
        f"{caption} The table has the {len(rows)} fullest cells.",
    )


def _density(ax: Any, x: Array, y: Array, counts: Array) -> None:
    """Cells of one colour whose opacity is the count, on a root scale: it works on any paper."""
    from matplotlib.patches import Rectangle

    most = counts.max()
    for i, j in zip(*np.nonzero(counts), strict=True):
        agree = (x[i] + x[i + 1]) * (y[j] + y[j + 1]) > 0
        alpha = 0.08 + 0.85 * float(np.sqrt(counts[i, j] / most))
        ax.add_patch(
            Rectangle(
                (x[i], y[j]),
                x[i + 1] - x[i],
                y[j + 1] - y[j],
                color=STAND_IN["s2" if agree else "s4"],
                alpha=alpha,
                linewidth=0,
            )
        )


QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def distributions(
    title: str, groups: Mapping[str, Array], caption: str, label: str = "log-odds, nats"
) -> Picture:
    """The spread of each group's values; NaN: no value."""
    known = {name: values[~np.isnan(values)] for name, values in groups.items()}
    return spread(
        title,
        {n: [float(q) for q in np.quantile(x, QUANTILES)] for n, x in known.items() if len(x)},
        caption,
        label,
    )


def spread(
    title: str, quantiles: Mapping[str, Sequence[float]], caption: str, label: str
) -> Picture:
    """A thin bar from the 10th to the 90th percentile, a thick one for the middle half, a dot for the median.  quantiles: name -> at QUANTILES"""

    def paint(ax: Any) -> None:
        for row, (name, (low, q1, median, q3, high)) in enumerate(quantiles.items()):
            c = colour(name.rsplit(" ", 1)[-1], row)
            ax.plot([low, high], [row, row], color=c, linewidth=1.6, solid_capstyle="round")
            ax.plot(
                [q1, q3], [row, row], color=c, linewidth=6.5, alpha=0.55, solid_capstyle="round"
            )
            ax.plot([median], [row], "o", color=c, markersize=5.5)
        _rows(ax, list(quantiles))
        ax.set_xlabel(label)
        ax.axvline(0, color=STAND_IN["muted"], linewidth=0.9)

    rows = [(name, *values) for name, values in quantiles.items()]
    caption = f"{caption} Dot: median; thick: middle half; thin: 10 % to 90 %."
    return Picture(
        title,
        draw(paint, title, _size(len(rows))),
        ("", "10 %", "25 %", "median", "75 %", "90 %"),
        rows,
        caption,
    )


def _rows(ax: Any, names: Sequence[str]) -> None:
    """One line a name, the first on top."""
    ax.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    ax.set_yticklabels([_short(name, 28) for name in names])
    ax.grid(axis="y", visible=False)


def _size(n_rows: int) -> tuple[float, float]:
    return SIZE[0], max(1.7, 0.75 + 0.32 * n_rows)


# Rates with intervals


def rates(
    title: str,
    rows: Sequence[tuple[str, float | None, float | None, float | None]],
    caption: str,
    chance: float | None = None,
    of: str | None = None,
    span: tuple[float, float] | None = None,
) -> Picture:
    """Rates with their intervals, one line each.  rows: (name, rate, low, high), None: unknown; of: the reward model they all are of

    span: least and most, of what is no rate.
    """
    drawn = [row for row in rows if row[1] is not None]

    def paint(ax: Any) -> None:
        for y, (name, rate, low, high) in enumerate(drawn):
            c = colour(of or name, 0)
            if low is not None and high is not None:
                ax.plot([low, high], [y, y], color=c, linewidth=1.8, solid_capstyle="round")
            ax.plot([rate], [y], "o", color=c, markersize=6)
        if chance is not None:
            ax.axvline(chance, color=STAND_IN["muted"], linewidth=0.9, linestyle="--")
        _rows(ax, [row[0] for row in drawn])
        ax.set_xlim(*(span or (-0.02, 1.02)))
        if span is None:
            _percent_axis(ax.xaxis)

    return Picture(
        title,
        draw(paint, title, _size(len(drawn))),
        ("", "mean" if span else "rate", "95 % from", "to"),
        rows,
        caption,
    )


# Lines

Points = Sequence[Mapping[str, Any]]


def reliability(curves: Mapping[str, Points]) -> Picture:
    """Accuracy against stated confidence.  curves: reward model -> bins {confidence, accuracy, accuracy_low, accuracy_high, pairs}"""

    def paint(ax: Any) -> None:
        ax.plot([0.5, 1], [0.5, 1], color=STAND_IN["muted"], linewidth=0.9, linestyle="--")
        for place, (name, bins) in enumerate(curves.items()):
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            c = colour(name, place)
            ax.vlines(
                x,
                [b["accuracy_low"] for b in bins],
                [b["accuracy_high"] for b in bins],
                color=c,
                linewidth=0.9,
                alpha=0.5,
            )
            ax.plot(
                x,
                y,
                color=c,
                marker="os^Dv"[place % 5],
                linestyle=DASHES[place % 4],
                label=_short(name),
            )
        ax.set(
            xlim=(0.49, 1.01), ylim=(-0.02, 1.02), xlabel="confidence max(p, 1 − p)", ylabel="right"
        )
        _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    rows = [
        (name, b["pairs"], b["confidence"], b["accuracy"], b["accuracy_low"], b["accuracy_high"])
        for name, bins in curves.items()
        for b in bins
    ]
    caption = "On the dashed line a reward model is right as often as it claims; below it, it is too sure of itself. Bars: 95 %."
    return Picture(
        "Reliability",
        draw(paint, "Reliability"),
        ("", "pairs", "mean confidence", "right", "95 % from", "to"),
        rows,
        caption,
    )


def risk_coverage(curves: Mapping[str, Points]) -> Picture:
    """Accuracy on the surest pairs against how many they are.  curves: name -> points {coverage, pairs, accuracy, accuracy_low, accuracy_high}"""

    def paint(ax: Any) -> None:
        for place, (name, points) in enumerate(curves.items()):
            x, c = [p["coverage"] for p in points], colour(name, place)
            ax.fill_between(
                x,
                [p["accuracy_low"] for p in points],
                [p["accuracy_high"] for p in points],
                color=c,
                alpha=0.1,
                linewidth=0,
            )
            ax.plot(
                x,
                [p["accuracy"] for p in points],
                color=c,
                linestyle=DASHES[place % 4],
                label=_short(name),
                marker="o" if len(x) == 1 else None,
            )
        ax.set(
            xlim=(0, 1.02),
            ylim=(None, 1.02),
            xlabel="labelled pairs kept, surest first",
            ylabel="right",
        )
        _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    rows = [
        (name, p["coverage"], p["pairs"], p["accuracy"], p["accuracy_low"], p["accuracy_high"])
        for name, points in curves.items()
        for p in points
    ]
    caption = "What selecting buys: accuracy when only the surest pairs are kept. “agreed”: pairs on which all agree, by their smallest margin. Bands: 95 %."
    return Picture(
        "Risk and coverage",
        draw(paint, "Risk and coverage"),
        ("", "coverage", "pairs", "right", "95 % from", "to"),
        rows,
        caption,
    )


def length_bias(odds: Mapping[str, Array], difference: Array) -> Picture:
    """How often each reward model prefers the first response, by how much longer it is.  odds: name -> (pairs,); difference: (pairs,) tokens"""
    bins = min(9, max(2, len(difference) // 15))
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, bins + 1)))
    where = np.clip(np.searchsorted(edges, difference, side="right") - 1, 0, max(0, len(edges) - 2))
    rows: list[Row] = []
    for name, a in odds.items():
        for b in range(max(1, len(edges) - 1)):
            inside = (where == b) & ~np.isnan(a)
            if inside.any():
                wins = float((0.5 + 0.5 * np.sign(a[inside])).mean())
                rows.append((name, float(difference[inside].mean()), int(inside.sum()), wins))

    def paint(ax: Any) -> None:
        ax.axhline(0.5, color=STAND_IN["muted"], linewidth=0.9, linestyle="--")
        for place, name in enumerate(odds):
            own = [row for row in rows if row[0] == name]
            ax.plot(
                [r[1] for r in own],
                [r[3] for r in own],
                color=colour(name, place),
                marker="os^Dv"[place % 5],
                linestyle=DASHES[place % 4],
                label=_short(name),
            )
        ax.set(
            ylim=(-0.02, 1.02),
            xlabel="length of first minus length of second, tokens",
            ylabel="first preferred",
        )
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    caption = (
        "A rising line prefers the longer response. Each point is an equal share of the pairs."
    )
    headings = ("", "mean difference", "pairs", "first preferred")
    return Picture("Length", draw(paint, "Length bias"), headings, rows, caption)


def iterations(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float | None, float | None, float | None]]],
    caption: str,
) -> Picture:
    """Rates from one dataset to the next.  series: name -> (rate, low, high) of each dataset; None: not known there"""

    def paint(ax: Any) -> None:
        for place, (name, values) in enumerate(series.items()):
            at = [i for i, v in enumerate(values) if v[0] is not None]
            c, shift = colour(name, place), 0.06 * (place - (len(series) - 1) / 2)
            ax.plot(
                [i + shift for i in at],
                [values[i][0] for i in at],
                color=c,
                marker="os^Dv"[place % 5],
                linestyle=DASHES[place % 4],
                label=name,
            )
            whiskers = [
                (i + shift, values[i][1], values[i][2]) for i in at if values[i][1] is not None
            ]
            for x, low, high in whiskers:
                ax.plot([x, x], [low, high], color=c, linewidth=1, alpha=0.6)
        long = len(names) > 4 or any(len(n) > 12 for n in names)
        ax.set(ylim=(-0.03, 1.03), xticks=range(len(names)), xlim=(-0.4, len(names) - 0.6))
        ax.set_xticklabels(
            [_short(n) for n in names], rotation=25 if long else 0, ha="right" if long else "center"
        )
        _percent_axis(ax.yaxis)
        ax.legend(loc="best")

    rows = [
        (dataset, name, *values[i])
        for name, values in series.items()
        for i, dataset in enumerate(names)
    ]
    return Picture(
        title, draw(paint, title), ("dataset", "", "rate", "95 % from", "to"), rows, caption
    )


def steps(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    unit: str = "",
    rate: bool = False,
    caption: str = "",
) -> Picture:
    """Figures over optimiser steps.  series: name -> (steps, values); long ones are drawn as means of neighbours, and a noisy one smoothed."""
    curves = {
        name: _thin(np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in series.items()
    }
    longest = max((len(x) for x, _ in series.values()), default=0)

    def paint(ax: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for place, (name, (x, y)) in enumerate(curves.items()):
            c = colour(name, place)
            noisy = len(y) > 40
            if noisy:
                ax.plot(x, y, color=c, alpha=0.3, linewidth=0.8)
            marker = "o" if len(y) < 12 else None
            ax.plot(
                x,
                _smooth(y) if noisy else y,
                color=c,
                linestyle=DASHES[place % 4],
                marker=marker,
                label=_short(name),
            )
        ax.set(xlabel="optimiser step", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if longest == 1:
            ax.set_xlim(*(ax.get_xlim()[0] - 1, ax.get_xlim()[1] + 1))
        if rate:
            ax.set_ylim(-0.03, 1.03)
            _percent_axis(ax.yaxis)
        if len(curves) > 1 or not all(name.replace("_", " ") in title.lower() for name in curves):
            ax.legend(loc="best")

    said = [caption] if caption else []
    said += (
        [f"Each point is a mean over about {-(-longest // POINTS)} steps."]
        if longest > POINTS
        else []
    )
    said += ["Faint: as measured; strong: smoothed."] if longest > 40 else []
    return Picture(title, draw(paint, title), ("step", *curves), _step_rows(series), " ".join(said))


def _step_rows(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[Row]:
    at: dict[float, dict[str, float]] = {}
    for name, (x, y) in series.items():
        for step, value in zip(x, y, strict=True):
            at.setdefault(step, {})[name] = value
    chosen = sorted(at)
    if len(chosen) > TABLE_ROWS:  # first, last, and evenly between
        chosen = [
            chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, TABLE_ROWS).astype(int))
        ]
    return [(int(step), *(at[step].get(name) for name in series)) for step in chosen]


def _thin(x: Array, y: Array) -> tuple[Array, Array]:
    """At most POINTS points: means of neighbours."""
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _smooth(y: Array) -> Array:
    """A centred mean over a tenth of the curve, narrower at its ends."""
    half = max(1, len(y) // 20)
    total = np.concatenate([[0.0], np.cumsum(y)])
    low, high = (
        np.maximum(np.arange(len(y)) - half, 0),
        np.minimum(np.arange(len(y)) + half + 1, len(y)),
    )
    return (total[high] - total[low]) / (high - low)
