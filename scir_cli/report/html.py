"""Results as one self-contained HTML page, made from finished folders alone: the same folders give the same bytes, now or a year later.

Nothing is fetched and no script but our own runs (a Content-Security-Policy says so to the browser, beside the escaping); what models wrote is text,
with control characters made visible. Pictures come from plots.py; tables are those of the terminal. A page stays below MAX_BYTES because of what is
taken into it: some pairs, the beginning of long texts, means of long curves; each says so where it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from rich.table import Table

from scir_cli import __version__, registry
from scir_cli.analysis import consistency, statistics
from scir_cli.analysis.verdicts import Array, Verdicts, from_table
from scir_cli.data import dataset, folders, hashing
from scir_cli.data.files import Json, as_store_error, atomic_write, read_json
from scir_cli.data.folders import is_dataset
from scir_cli.data.storage import to_path
from scir_cli.report import plots
from scir_cli.report.plots import Picture
from scir_cli.report.tables import (
    duration,
    grade_table,
    iterations_table,
    number,
    percent,
    verdict_tables,
    winrate_tables,
)
from scir_cli.settings import ReportSettings
from scir_cli.training import metrics
from scir_cli.training.metrics import Metric

MAX_BYTES = 5_000_000
PAIR_BYTES = 3_000_000  # of all pairs of a page, as HTML
PAIRS = 60  # shown of a dataset
MAX_CHARACTERS = 12_000  # of one text
SUBSETS = 40  # drawn; RewardBench has 23
#: C0 and C1 controls, but for tab and line feed, and lone surrogates: shown, because a parser drops or refuses them
CONTROLS = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | dict.fromkeys(
    [*range(0x7F, 0xA0), *range(0xD800, 0xE000)], 0xFFFD
)


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Browser:
    """Pairs to read: what was taken, and why these."""

    title: str
    text: str
    pairs: Sequence[Json]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    browsers: Sequence[Browser] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # how it was made
    notes: Sequence[str] = ()  # what to know before believing it


# ---------------------------------------------------------------------------------------------------------------------- writing


def write(path: Path, page: Page) -> None:
    """Writes the page at `path`, whose folder is made where it is missing; raises StoreError where it cannot be written."""
    with as_store_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(render(page), encoding="utf-8")


def write_for(stage: str, settings: ReportSettings, **more: Any) -> None:
    """Writes the page of a finished stage at settings.report, if it is set.  more: what its page takes beside the output folder"""
    target = registry.STAGES[stage].page
    if settings.report is not None and target is not None:
        write(settings.report, registry.load(target)(settings.output_dir, **more))


def render(page: Page) -> str:
    return _template().render(page=page, version=__version__)


@cache
def _template() -> Any:
    files = {
        name: (resources.files("scir_cli.report") / "template" / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    }
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {"cell": cell, "svg": _placed, "grid": _grid}
    script = files["page.js"].strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "css": Markup(files["page.css"]),
        "script": Markup(script),
        "script_hash": digest,
    }
    return environment.from_string(files["page.html"])


def _visible(value: Any) -> Any:
    """Every expression of the template passes here; translating markup leaves it markup."""
    return type(value)(value.translate(CONTROLS)) if isinstance(value, str) else value


def _placed(svg: str, place: str) -> Markup:
    """The picture with ids that no other picture on the page has."""
    return Markup(re.sub(r'(id="|#)([mp][0-9a-f]{10})(?=["\)])', rf"\1\2-{place}", svg))


def cell(value: Any) -> str:
    """A number or a word as a table shows it; "–" where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−", 1)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _grid(table: Table) -> Json:
    """A terminal's table as headings and rows."""
    cells = [list(column.cells) for column in table.columns]
    headings = [
        str(column.header).replace("-\n", "-").replace("\n", " ") for column in table.columns
    ]
    return {
        "title": table.title or "",
        "headings": headings,
        "rows": list(zip(*cells, strict=True)),
        "caption": table.caption or "",
    }


# ---------------------------------------------------------------------------------------------------------------------- pages


def consistency_page(out: Path, judged: Path, across: Json | None = None) -> Page:
    """The page of a folder that `check-consistency` wrote.

    judged: the verdicts that it was made from.

    across: what stays of the verdicts in other datasets, which the folder does not keep.
    """
    return _checked("How far the internal reward models agree", out, judged, across)


def rewards_page(out: Path, judged: Path) -> Page:
    """The page of a folder that `eval rewards` wrote.  judged: the dataset with the verdicts that it is made from"""
    return _checked("Accuracy of the internal reward models", out, judged)


def _checked(title: str, out: Path, judged: Path, across: Json | None = None) -> Page:
    plan, manifest = _plan_and_manifest(out)
    table = _checked_pairs(out, judged)
    verdicts, settings = from_table(table), plan.get("settings", {})
    agreement = {
        "agree_on": settings.get("agree_on"),
        "min_confidence": settings.get("min_confidence", statistics.MIN_CONFIDENCE),
    }
    summary = manifest["summary"]
    shown = [t for t in verdict_tables({**manifest, "across": across}) if isinstance(t, Table)]
    tables = Section("All figures", tables=shown)
    sections = [
        _agreement(verdicts, summary),
        _confidence(verdicts, agreement),
        _bias(verdicts, summary),
        _subsets(verdicts, agreement),
        tables,
    ]
    return Page(
        title,
        str(out),
        _agreement_tiles(summary),
        sections,
        [browser(table, verdicts)],
        _provenance(plan, manifest),
        summary.get("notes", ()),
    )


def _checked_pairs(out: Path, judged: Path) -> pa.Table:
    """The pairs in `judged` that the folder `out` has figures of.

    Under --limit, `check-consistency` reads the first rows only.
    """
    table = dataset.read_dataset(judged, "judged", "preferences")
    manifest = read_json(out / "manifest.json")
    return table.slice(0, manifest["rows_out"]) if manifest["kind"] == "consistency" else table


def win_rate_page(out: Path) -> Page:
    """The page of a folder that `eval winrate` wrote, from verdicts or from annotations."""
    plan, manifest = _plan_and_manifest(out)
    summary, judged = manifest["summary"], out / "judged"
    first = summary["matches"][0]
    tiles = [
        Tile("win rate", percent(first["win_rate"]), f"{first['model']} against {first['other']}"),
        Tile(
            "length-controlled",
            percent(first["length_controlled_win_rate"]),
            first.get("length_controlled_reason") or "",
        ),
        Tile("pairs", f"{first['pairs']:,}", f"{first['verdicts']:,} with a verdict"),
        Tile(
            "mean length",
            f"{first['mean_characters']:,.0f}",
            f"characters; the other's {first['mean_characters_other']:,.0f}",
        ),
    ]
    sections = [Section("Wins", "", _wins(summary), winrate_tables(summary))]
    browsers = []
    if is_dataset(judged):
        table = dataset.read_dataset(judged, "judged")
        verdicts = from_table(table)
        sections.append(_bias(verdicts, consistency.summary(verdicts)))
        browsers.append(browser(table, verdicts))
    return Page(
        "Win rate",
        str(out),
        tiles,
        sections,
        browsers,
        _provenance(plan, manifest),
        summary["notes"],
    )


def grades_page(out: Path) -> Page:
    """The page of a folder that `eval mt-bench` wrote."""
    plan, manifest = _plan_and_manifest(out)
    summary = manifest["summary"]
    tiles = [
        Tile("mean grade", number(summary["all"]["grade"]), "of 1 to 10"),
        Tile("grades", f"{summary['all']['grades']:,}"),
    ]
    pictures = [
        plots.rates(
            title,
            [(name, *_ends(f, "grade")) for name, f in summary[key].items()],
            "Mean grade; bars: 95 %.",
            span=(1, 10),
        )
        for key, title in (("turns", "By turn"), ("categories", "By category"))
    ]
    return Page(
        "Graded answers",
        str(out),
        tiles,
        [Section("Grades", "", pictures, [grade_table(summary)])],
        [],
        _provenance(plan, manifest),
        summary["notes"],
    )


def win_rate_sections(name: str, manifest: Json) -> list[Section]:
    """What the page of a whole run shows of one `eval winrate`."""
    summary = manifest["summary"]
    return [Section(f"Win rate: {name}", pictures=_wins(summary), tables=winrate_tables(summary))]


Interval = tuple[str, float | None, float | None, float | None]  # name, rate, and its 95 % interval


def win_rates(summary: Json) -> dict[str, list[Interval]]:
    """Each kind of win rate of each match, where it is known: with the interval it has, or 1.96 standard errors each way."""
    found: dict[str, list[Interval]] = {}
    others = {m["other"] for m in summary["matches"]}
    for m in summary["matches"]:
        name = m["model"] if len(others) == 1 else f"{m['model']} / {m['other']}"
        rate, error = m["win_rate"], m["standard_error"]
        if rate is not None:
            ends = (
                (None, None)
                if error is None
                else (max(0.0, rate - 1.96 * error), min(1.0, rate + 1.96 * error))
            )
            found.setdefault("Win rate", []).append((name, rate, *ends))
        if m["length_controlled_win_rate"] is not None:
            values = (m[f"length_controlled_{key}"] for key in ("win_rate", "low", "high"))
            found.setdefault("Length-controlled win rate", []).append((name, *values))  # type: ignore[arg-type]
    return found


def _wins(summary: Json) -> list[Picture]:
    other = summary["matches"][0]["other"]
    against = f"Against {other}. " if all(m["other"] == other for m in summary["matches"]) else ""
    pictures = [
        plots.rates(name, rows, f"{against}The line is a draw; bars: 95 %.", 0.5)
        for name, rows in win_rates(summary).items()
    ]
    if len(summary["matches"]) == 1:
        parts = [
            (name, part["discrete_win_rate"], part["discrete_low"], part["discrete_high"])
            for name, part in list(summary["matches"][0]["by_subset"].items())[:SUBSETS]
        ]
        pictures += (
            [plots.rates("Wins counted, by subset", parts, "The line is a draw; bars: 95 %.", 0.5)]
            if len(parts) > 1
            else []
        )
    scale = summary.get("bradley_terry")
    if scale and len(scale["models"]) > 2:
        last = summary["matches"][-1]["other"]
        for prefix, title in (
            ("", "Bradley-Terry"),
            ("style_controlled_", "Bradley-Terry, length and style taken out"),
        ):
            rows = [
                (r["model"], *(r.get(f"{prefix}win_rate{end}") for end in ("", "_low", "_high")))
                for r in scale["models"]
            ]
            if any(row[1] is not None for row in rows):
                pictures.append(
                    plots.rates(
                        title,
                        rows,
                        f"Expected wins over {last}; the line is a draw. Bars: 95 %.",
                        0.5,
                    )
                )
    return pictures


def training_page(out: Path) -> Page:
    """The page of a model folder that `train` wrote."""
    plan, manifest = _plan_and_manifest(out)
    records, last = logged(out), manifest["summary"]
    shown = [
        key
        for key in ("loss", "scir/mask_rate", "rewards/accuracies", "validation/agreement")
        if key in last
    ]
    tiles = [
        Tile("optimiser steps", f"{manifest['steps']:,}", f"on {manifest['rows_out']:,} pairs"),
        *(_metric_tile(key, last[key]) for key in shown),
        Tile("time", duration(manifest["seconds"]), _speed(records)),
    ]
    objective = plan["settings"].get("objective", "")
    return Page(
        f"Training, objective {objective}",
        str(out),
        tiles,
        _curves({"": records}),
        [],
        _provenance(plan, manifest),
    )


def _metric_tile(key: str, value: float) -> Tile:
    """A figure of the last step."""
    metric = metrics.find(key)
    assert metric is not None
    return Tile(metric.label, percent(value) if metric.is_rate else number(value, 3), "last step")


def run_page(folders: Sequence[tuple[str, Path]]) -> Page:
    """The page of a whole run: what changes from one iteration to the next.  folders: (stage, folder) in the order of the run"""
    made = [(stage, out, *_plan_and_manifest(out)) for stage, out in folders]
    checks = [
        (out, m["summary"]) for stage, out, _, m in made if registry.STAGES[stage].shows_agreement
    ]
    short = _short_names([out for _, out in folders])
    trained = [(out, p) for _, out, p, m in made if m.get("kind") == "model"]
    sections = (
        [Section("Agreement", tables=[iterations_table([(short[out], s) for out, s in checks])])]
        if checks
        else []
    )
    groups: dict[str, list[tuple[Path, Json]]] = {}
    for out, summary in checks:
        groups.setdefault(re.sub(r"\d+", "…", short[out]), []).append((out, summary))
    sections += [
        _iterations(group, [(short[out], s) for out, s in members])
        for group, members in groups.items()
    ]
    for objective in dict.fromkeys(p["settings"].get("objective", "") for _, p in trained):
        runs = {
            short[out]: logged(out)
            for out, p in trained
            if p["settings"].get("objective") == objective
        }
        pictures = [
            picture
            for section in _curves(runs)
            if section.title in metrics.RUN_SECTIONS
            for picture in section.pictures
        ]
        sections += [Section(f"Training, objective {objective}", pictures=pictures)]
    for stage, out, _, m in made:
        if target := registry.STAGES[stage].story:
            sections += registry.load(target)(short[out], m)
    sections.append(
        Section(
            "Stages",
            "Rows in = rows out + drops.",
            tables=[_stages([(stage, short[out], m) for stage, out, _, m in made])],
        )
    )
    newest = [members[-1][0] for members in groups.values()]
    readable = [(out, judged) for out in newest if (judged := _verdicts_of(out))]
    browsers = [
        _read_browser(out, judged, short[out], PAIRS // len(newest)) for out, judged in readable
    ]
    return Page(
        "The story of a run",
        ", ".join(sorted({str(out.parent) for _, out in folders})),
        _story_tiles(groups, made),
        sections,
        browsers,
        {"versions": made[-1][3].get("versions", {})},
    )


def _plan_and_manifest(out: Path) -> tuple[Json, Json]:
    """Plan and manifest of a finished folder; raises DataError for another schema version."""
    plan, manifest = read_json(out / "plan.json"), read_json(out / "manifest.json")
    if manifest["kind"] != "model":
        folders.check_version(out, folders.version_of(manifest))
    return plan, manifest


def _provenance(plan: Json, manifest: Json) -> Json:
    counts = {
        name: manifest[name]
        for name in ("rows_in", "rows_out", "drops", "nulls", "seconds", "versions", "digest")
        if name in manifest
    }
    return {
        **counts,
        **{k: v for k, v in plan.items() if k not in ("stage", "settings")},
        **plan.get("settings", {}),
    }


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    parents = {f.parent for f in folders}
    return {f: f.name if len(parents) == 1 else str(f) for f in folders}


# ---------------------------------------------------------------------------------------------------------------------- sections


def _agreement_tiles(summary: Json) -> list[Tile]:
    a, judge = summary["agreed"], summary["models"].get("judge", {})
    first = summary["between"][0] if summary["between"] else {}
    tiles = [
        Tile("pairs", f"{summary['pairs']:,}"),
        Tile("all agree", percent(a["rate"]), _interval(a, "rate")),
    ]
    if first.get("kappa") is not None:
        tiles.append(
            Tile("Cohen's kappa", number(first["kappa"]), f"{first['first']} and {first['second']}")
        )
    if judge.get("flip_rate") is not None:
        tiles.append(
            Tile(
                "order-flip rate",
                percent(judge["flip_rate"]),
                "verdicts of the judge that change with the order",
            )
        )
    if a.get("labelled"):
        tiles.append(
            Tile("accuracy where all agree", percent(a["accuracy"]), _interval(a, "accuracy"))
        )
    return tiles


def _interval(figures: Json, name: str) -> str:
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    return "" if low is None or high is None else f"95 %: {low:.0%} to {high:.0%}"


def _agreement(v: Verdicts, summary: Json) -> Section:
    pictures = [plots.matrix(v.names, summary["between"])] if summary["between"] else []
    pictures += [
        plots.quadrants(v.names[0], other, v.log_odds[0], v.log_odds[k])
        for k, other in enumerate(v.names[1:4], 1)
    ]
    return Section(
        "Agreement",
        "Log-odds are in nats, positive where the first response is the better one.",
        [*pictures, _spread_of(v)],
    )


def _spread_of(v: Verdicts) -> Picture:
    return plots.distributions(
        "Distribution of verdicts",
        dict(zip(v.names, v.log_odds, strict=True)),
        "Log-odds of each reward model.",
    )


def _confidence(v: Verdicts, agreement: Json) -> Section:
    """Reliability, and risk against coverage; nothing without labels."""
    found = {
        kind: {name: points for name, points in of.items() if points}
        for kind, of in consistency.curves(v, **agreement).items()
    }
    pictures = [
        draw(found[kind])
        for kind, draw in (
            ("reliability", plots.reliability),
            ("risk_coverage", plots.risk_coverage),
        )
        if found[kind]
    ]
    return Section("Are they right when they are sure?", "Against the gold labels.", pictures)


def _bias(v: Verdicts, summary: Json) -> Section:
    flips = [
        (name, *_ends(m, "flip_rate"))
        for name, m in summary["models"].items()
        if m["flip_rate"] is not None
    ]
    caption = "Share of verdicts that change when the two responses change seats. Bars: 95 %."
    pictures = [plots.rates("Order-flip rate", flips, caption)] if flips else []
    leanings = summary.get("biases") or {}
    named = {"position": "seat A", "longer": "the longer", "own": "its own"}
    for model, found in list(leanings.items())[:5]:
        rows = [
            (named.get(name, f"with {name}"), *_ends(f, "rate"))
            for name, f in found.items()
            if f["pairs"]
        ]
        title = "How the gold labels lean" if model == "gold" else f"What {model} leans to"
        text = "Of pairs where one response has it and the other has not. The line is no leaning; bars: 95 %."
        pictures += [plots.rates(title, rows, text, 0.5, model)] if rows else []
    if np.ptp(v.length_difference):
        pictures.append(
            plots.length_bias(dict(zip(v.names, v.log_odds, strict=True)), v.length_difference)
        )
    text = "A verdict should not depend on the seat, nor on length or format for its own sake; where labels lean too, that part is no bias."
    return Section("Position, length, format", text, pictures)


Rate = tuple[float | None, float | None, float | None]


def _ends(figures: Json, key: str) -> Rate:
    return figures.get(key), figures.get(f"{key}_low"), figures.get(f"{key}_high")


def _subsets(v: Verdicts, agreement: Json) -> Section:
    names = list(dict.fromkeys(v.subset))
    if len(names) < 2:
        return Section("")
    figures = list(consistency.by_subset(v, **agreement).items())[:SUBSETS]
    left_out = f" {len(names) - SUBSETS} more subsets are left out." if len(names) > SUBSETS else ""
    agree = [(name, *_ends(f["agreed"], "rate")) for name, f in figures]
    pictures = [plots.rates("All agree, by subset", agree, f"Bars: 95 %.{left_out}", model="agreed")]
    for model in v.names[:4]:
        right = [(name, *_ends(f["models"][model], "accuracy")) for name, f in figures]
        if any(row[1] is not None for row in right):
            pictures.append(
                plots.rates(
                    f"Accuracy of {model}, by subset",
                    right,
                    f"Bars: 95 %; the line is chance.{left_out}",
                    0.5,
                    model,
                )
            )
    return Section("Subsets", pictures=pictures)


def _iterations(group: str, checks: Sequence[tuple[str, Json]]) -> Section:
    names, summaries = [name for name, _ in checks], [summary for _, summary in checks]

    agreement: dict[str, list[Rate]] = {"agreed": [_ends(s["agreed"], "rate") for s in summaries]}
    agreement["order-flip rate"] = [
        _ends(s["models"].get("judge", {}), "flip_rate") for s in summaries
    ]
    right = {
        m: [_ends(s["models"].get(m, {}), "accuracy") for s in summaries]
        for m in dict.fromkeys(m for s in summaries for m in s["models"])
    }
    right["agreed"] = [_ends(s["agreed"], "accuracy") for s in summaries]
    pictures = [
        plots.iterations(
            "Agreement and order flips",
            names,
            _known_rates(agreement),
            "“agreed”: share of pairs on which all reward models agree. Bars: 95 %.",
        )
    ]
    if known := _known_rates(right):
        pictures.append(
            plots.iterations(
                "Accuracy",
                names,
                known,
                "Against gold labels; “agreed”: the label where all agree. Bars: 95 %.",
            )
        )
    spread = {
        f"{name} {model}": list(m["abs_log_odds_quantiles"].values())
        for name, s in checks
        for model, m in s["models"].items()
        if m["verdicts"]
    }
    pictures.append(
        plots.spread("How sure they are", spread, "Size of the log-odds.", "|log-odds|, nats")
    )
    return Section(group, f"{', '.join(names)}: one after the other", pictures)


def _known_rates(series: Mapping[str, list[Rate]]) -> dict[str, list[Rate]]:
    return {
        name: values for name, values in series.items() if any(v[0] is not None for v in values)
    }


def _stages(made: Iterable[tuple[str, str, Json]]) -> Table:
    table = Table("stage", "folder", "in", "out", "dropped", "seconds")
    for stage, name, manifest in made:
        drops = ", ".join(f"{n} {reason}" for reason, n in sorted(manifest["drops"].items())) or "0"
        table.add_row(
            stage,
            name,
            f"{manifest['rows_in']:,}",
            f"{manifest['rows_out']:,}",
            drops,
            f"{manifest['seconds']:,.1f}",
        )
    return table


def _story_tiles(
    groups: Mapping[str, Sequence[tuple[Path, Json]]], made: Sequence[tuple[Any, ...]]
) -> list[Tile]:
    tiles = []
    for group, members in groups.items():
        first, last = members[0][1]["agreed"], members[-1][1]["agreed"]
        note = (
            f"{group}: from {percent(first['rate'])} in {len(members)} checks"
            if len(members) > 1
            else group
        )
        tiles.append(Tile("all agree", percent(last["rate"]), note))
        if last.get("labelled"):
            tiles.append(
                Tile(
                    "accuracy where all agree",
                    percent(last["accuracy"]),
                    note.split(":")[0] + ", at the end",
                )
            )
    return [
        *tiles,
        Tile("time", duration(sum(m.get("seconds", 0) for *_, m in made)), f"{len(made)} stages"),
    ]


# ---------------------------------------------------------------------------------------------------------------------- training curves

Series = dict[str, tuple[list[float], list[float]]]


def logged(out: Path) -> Series:
    """The figures of metrics.jsonl: name -> (steps, values)."""
    path, series = out / "metrics.jsonl", Series()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        record = json.loads(line)
        for name, value in record.items():
            if (
                name not in ("step", "kind")
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def _curves(runs: Mapping[str, Series]) -> list[Section]:
    """Every figure that has a picture; of several runs, one picture per figure with a line per run.

    Figures without an entry in metrics.py are drawn last, under their keys.
    """
    keys = list(dict.fromkeys(key for series in runs.values() for key in series))
    entries = dict(metrics.present(keys))
    entries |= {key: Metric(key, key, "More", key) for key in keys if key not in entries}
    groups: dict[tuple[str, str], dict[str, Metric]] = {}
    for key, metric in entries.items():
        if metric.picture is not None:
            groups.setdefault((metric.section, metric.picture), {})[key] = metric
    sections: dict[str, list[Picture]] = {}
    for (section, title), group in groups.items():
        sections.setdefault(section, []).extend(_curve_pictures(title, group, runs))
    return [Section(title, pictures=pictures) for title, pictures in sections.items()]


def _curve_pictures(
    title: str, group: Mapping[str, Metric], runs: Mapping[str, Series]
) -> Iterator[Picture]:
    """The figures of one picture: all in one for a single run, else one picture per figure with a line per run."""
    if len(runs) == 1:
        (series,) = runs.values()
        first = next(iter(group.values()))
        yield plots.steps(
            title,
            {metric.short_label(key): series[key] for key, metric in group.items()},
            first.unit,
            first.is_rate,
        )
        return
    for key, metric in group.items():
        lines = {run: series[key] for run, series in runs.items() if key in series}
        label = f"{title}: {metric.short_label(key)}" if len(group) > 1 else title
        yield plots.steps(label, lines, metric.unit, metric.is_rate)


def _speed(series: Series) -> str:
    steps, values = series.get("tokens_per_second", ([], []))
    return f"{np.median(values):,.0f} tokens/s" if steps else ""


# ---------------------------------------------------------------------------------------------------------------------- pairs to read


def browser(
    table: pa.Table, v: Verdicts, title: str = "Read some pairs", most: int = PAIRS
) -> Browser:
    """Some pairs with every verdict: those most disagreed about, the most confident mistakes, and some at random.  The table's rows are those of `v`."""
    disagreement, mistake = surest_disagreement(v.log_odds), _mistake(v)
    chosen = pairs_to_read(disagreement, mistake, most)
    rows = (
        table.select(["pair_id", "messages", "subset", "first", "second", "gold_label"])
        .take(pa.array(chosen, pa.int64()))
        .to_pylist()
    )
    pairs, used = [], 0
    for i, row in zip(chosen, rows, strict=True):
        pair = _pair(v, i, row) | {
            "disagreement": float(disagreement[i]),
            "mistake": float(mistake[i]),
        }
        used += _size(pair)
        if used > PAIR_BYTES * most // PAIRS:
            break
        pairs.append(pair)
    text = f"{len(pairs)} of {len(v.pair_ids):,} pairs: those the reward models disagree about most surely, the most confident mistakes where labels exist, and others at random."
    return Browser(title, text, pairs)


def _verdicts_of(out: Path) -> Path | None:
    """The judged dataset that a checked folder was made from.

    None if it has moved or changed since, or if `eval rewards` only read it.
    """
    if is_dataset(out / "judged"):
        return out / "judged"
    plan, manifest = _plan_and_manifest(out)
    if manifest["kind"] != "consistency":
        return None
    judged = to_path(manifest["inputs"]["input"])
    unchanged = (judged / "manifest.json").is_file() and hashing.digest_path(judged) == plan[
        "input"
    ]
    return judged if unchanged else None


def _read_browser(out: Path, judged: Path, name: str, most: int) -> Browser:
    table = _checked_pairs(out, judged)
    return browser(table, from_table(table), f"Read some pairs: {name}", most)


def surest_disagreement(log_odds: Array) -> Array:
    """How sure the surest are on both sides: min(max a, max -a), nats; above 0 where two reward models disagree.  (models, pairs) -> (pairs,)"""
    known = np.where(np.isnan(log_odds), 0.0, log_odds)
    return np.minimum(known.max(0), (-known).max(0))


def _mistake(v: Verdicts) -> Array:
    """How sure the surest reward model that is wrong is, nats; 0 where none is or no label exists.  (pairs,)"""
    return np.nan_to_num(-v.gold * v.log_odds).max(0).clip(min=0)


def pairs_to_read(disagreement: Array, mistake: Array, most: int) -> list[int]:
    """Rows: two fifths each of the largest disagreement and mistake, the rest at random, always the same."""
    n = len(disagreement)
    chosen: dict[int, None] = {}
    for size in (disagreement, mistake):
        chosen |= dict.fromkeys(
            int(i) for i in np.argsort(-size, kind="stable")[: 2 * most // 5] if size[i] > 0
        )
    others = (int(i) for i in np.random.default_rng(0).permutation(n) if int(i) not in chosen)
    for i in others:
        if len(chosen) >= most:
            break
        chosen[i] = None
    return list(chosen)


def _pair(v: Verdicts, i: int, row: Json) -> Json:
    verdicts = [_verdict(v, k, i) for k in range(len(v.names)) if not np.isnan(v.log_odds[k, i])]
    signs = {np.sign(verdict["log_odds"]) for verdict in verdicts}
    tags = [("disagree" if len(signs) > 1 else "agree") if len(verdicts) > 1 else ""]
    tags += [
        "mistake" if any(verdict["right"] is False for verdict in verdicts) else "",
        "flips" if any(verdict["flips"] for verdict in verdicts) else "",
    ]
    texts = [{"role": m["role"], "text": _cut(m["content"])} for m in row["messages"]]
    sides = [
        {
            "name": name,
            "text": _cut(row[name]["text"]),
            "tokens": len(row[name]["token_ids"] or ()),
            "gold": row["gold_label"] == name,
        }
        for name in ("first", "second")
    ]
    last = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "user"), "")
    return {
        "id": row["pair_id"],
        "subset": row["subset"],
        "line": last[:160],
        "messages": texts,
        "sides": sides,
        "verdicts": verdicts,
        "tags": [t for t in tags if t],
    }


def _verdict(v: Verdicts, k: int, i: int) -> Json:
    a, gold = float(v.log_odds[k, i]), v.gold[i]
    orders = v.forward[k, i] * v.swapped[k, i]
    return {
        "model": v.names[k], "log_odds": a, "p": 1 / (1 + math.exp(-max(-500.0, min(500.0, a)))), "right": None if np.isnan(gold) or a == 0 else bool(a * gold > 0),
        "flips": bool(orders < 0), "forward": float(v.forward[k, i]), "swapped": float(v.swapped[k, i]), "mass": float(v.verdict_mass[k, i]),
    }  # fmt: skip


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= MAX_CHARACTERS
        else f"{text[:MAX_CHARACTERS]}\n… {len(text) - MAX_CHARACTERS:,} more characters, left out of this page"
    )


def _size(pair: Json) -> int:
    """Bytes that the pair will take, with what its verdicts need."""
    texts = [m["text"] for m in pair["messages"]] + [s["text"] for s in pair["sides"]]
    return (
        sum(len(escape(t.translate(CONTROLS)).encode("utf-8")) for t in texts)
        + 1500
        + 600 * len(pair["verdicts"])
    )
