"""Results as one self-contained HTML page, computed from finished folders alone.

The same folders give the same bytes, now or a year later. The page loads nothing and runs no script
but ours: a Content-Security-Policy in the page tells the browser to refuse any other, and all text
is escaped as well. The output of models is shown as text, with control characters made visible.
`plots` draws the pictures; the tables are those of the terminal. To stay below MAX_BYTES, a page
holds some pairs only, the beginning of long texts, and means of long curves; it reports each cut.
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
from scir_cli.analysis.verdicts import (
    Array,
    Verdicts,
    from_table,
    surest_disagreement,
    surest_mistake,
)
from scir_cli.data import dataset, folders, hashing, manifests
from scir_cli.data.files import Json, as_store_error, atomic_write, read_json
from scir_cli.data.folders import is_dataset
from scir_cli.data.storage import to_path
from scir_cli.errors import StoreError
from scir_cli.report import plots
from scir_cli.report.plots import NamedRate, Picture, Rate
from scir_cli.report.tables import (
    drops_by_reason,
    duration,
    grade_table,
    iterations_table,
    number,
    percent,
    verdict_tables,
    winrate_tables,
)
from scir_cli.settings import ReportSettings, report_problem
from scir_cli.training import metrics
from scir_cli.training.metrics import Metric

#: Upper bound of a page
MAX_BYTES = 5_000_000
#: Upper bound of all pairs of a page, as HTML
PAIR_BYTES = 3_000_000
#: Pairs shown per page
PAIRS = 60
#: Characters shown of one text
MAX_CHARACTERS = 12_000
#: Subsets drawn; RewardBench has 23
SUBSETS = 40
#: Bytes of a pair's HTML beside its texts and verdicts, and of one verdict, estimated from above
MARKUP_BYTES = 1500
VERDICT_BYTES = 600

#: Caption of win rates
DRAW_CAPTION = "The line is a draw; bars: 95 %."

C0_CONTROLS = [code for code in range(32) if chr(code) not in "\t\n"]
C1_CONTROLS = range(0x7F, 0xA0)
SURROGATES = range(0xD800, 0xE000)
#: Code point -> a visible one. Parsers drop or refuse controls and lone surrogates.
CONTROLS = {code: 0x2400 + code for code in C0_CONTROLS}
CONTROLS |= dict.fromkeys([*C1_CONTROLS, *SURROGATES], 0xFFFD)

#: Name -> (steps, values) of a logged figure
Series = dict[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Tile:
    """One figure at the top of a page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Pictures and tables under one heading; without any, the page omits it."""

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Browser:
    """Pairs to read, and how they were chosen."""

    title: str
    text: str
    pairs: Sequence[Json]

    @property
    def subsets(self) -> list[str]:
        """The subsets of the pairs; "" stands for none."""
        return sorted({pair["subset"] or "" for pair in self.pairs} - {""})

    @property
    def models(self) -> list[str]:
        """The reward models with a verdict on a pair, in their order."""
        names = [verdict["model"] for pair in self.pairs for verdict in pair["verdicts"]]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Page:
    """The content of a page.

    facts: settings, counts and versions that the results were computed with
    notes: warnings about the results
    """

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    browsers: Sequence[Browser] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


# Writing


def write(path: Path, page: Page) -> None:
    """Writes the page at `path`; creates its folder if that is missing.

    Raises StoreError if the page cannot be written, or another file is there by now.
    """
    problem = report_problem(path)
    if problem:
        raise StoreError(f"--report {path}: {problem}")
    with as_store_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(render(page), encoding="utf-8")


def write_for(stage: str, settings: ReportSettings, **more: Any) -> None:
    """Writes the page of a finished stage at settings.report, if that is set.

    more: arguments of the stage's page function beside the output folder
    """
    target = registry.STAGES[stage].page
    if settings.report is None or target is None:
        return
    page_of = registry.load(target)
    write(settings.report, page_of(settings.output_dir, **more))


def render(page: Page) -> str:
    """The page as HTML."""
    return _template().render(page=page, version=__version__)


@cache
def _template() -> Any:
    """The Jinja template of a page, with its style, its script and the script's digest."""
    folder = resources.files("scir_cli.report") / "template"
    css = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8").strip()
    page = (folder / "page.html").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["cell"] = cell
    environment.filters["svg"] = _with_unique_ids
    environment.filters["grid"] = _grid
    environment.filters["words"] = verdict_words
    environment.globals["css"] = Markup(css)
    environment.globals["script"] = Markup(script)
    environment.globals["script_hash"] = base64.b64encode(digest).decode()
    return environment.from_string(page)


def _visible(value: Any) -> Any:
    """The value of an expression in the template, with control characters made visible.

    Markup stays markup, and text stays text.
    """
    if not isinstance(value, str):
        return value
    return type(value)(value.translate(CONTROLS))


def _with_unique_ids(svg: str, suffix: str) -> Markup:
    """The picture with this suffix on its ids, so that two pictures never share one."""
    identifier = r'(id="|#)([mp][0-9a-f]{10})(?=["\)])'
    return Markup(re.sub(identifier, rf"\1\2-{suffix}", svg))


def cell(value: Any) -> str:
    """A number or a text as a table shows it; "–" for None and NaN."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:.4g}".replace("-", "−", 1)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _grid(table: Table) -> Json:
    """A terminal's table as title, headings, rows and caption."""
    headings = []
    columns = []
    for column in table.columns:
        heading = str(column.header)
        headings.append(heading.replace("-\n", "-").replace("\n", " "))
        columns.append(list(column.cells))
    return {
        "title": table.title or "",
        "headings": headings,
        "rows": list(zip(*columns, strict=True)),
        "caption": table.caption or "",
    }


# Pages


def consistency_page(out: Path, judged: Path, across: Json | None = None) -> Page:
    """The page of a folder that `check-consistency` wrote.

    judged: the dataset with the verdicts that the folder's figures are computed from
    across: the comparison with the verdicts of other datasets, which the folder does not contain
    """
    return _checked("Agreement of the internal reward models", out, judged, across)


def rewards_page(out: Path, judged: Path) -> Page:
    """The page of a folder that `eval rewards` wrote.

    judged: the dataset with the verdicts that the folder's figures are computed from
    """
    return _checked("Accuracy of the internal reward models", out, judged)


def _checked(title: str, out: Path, judged: Path, across: Json | None = None) -> Page:
    """The page of the agreement and the accuracy of reward models; arguments as above."""
    plan, manifest = _plan_and_manifest(out)
    summary = manifest["summary"]
    table = _checked_pairs(out, judged)
    verdicts = from_table(table)
    settings = plan.get("settings", {})
    agreement = {
        "agree_on": settings.get("agree_on"),
        "min_confidence": settings.get("min_confidence", statistics.MIN_CONFIDENCE),
    }
    # The headings between the tables of subsets are for the terminal only.
    shown = verdict_tables({**manifest, "across": across})
    tables = [item for item in shown if isinstance(item, Table)]
    sections = [
        _agreement(verdicts, summary),
        _confidence(verdicts, agreement),
        _bias(verdicts, summary),
        _subsets(verdicts, agreement),
        Section("All figures", tables=tables),
    ]
    return Page(
        title,
        str(out),
        _agreement_tiles(summary),
        sections,
        browsers=[browser(table, verdicts)],
        facts=_provenance(plan, manifest),
        notes=summary.get("notes", ()),
    )


def _checked_pairs(out: Path, judged: Path) -> pa.Table:
    """The pairs in `judged` that the figures of the folder `out` are about.

    Under --limit, `check-consistency` reads the first rows only.
    """
    table = dataset.read_dataset(judged, "judged", "preferences")
    manifest = manifests.read(out)
    if manifest["kind"] == "consistency":
        return table.slice(0, manifest["rows_out"])
    return table


def grades_page(out: Path) -> Page:
    """The page of a folder that `eval mt-bench` wrote."""
    plan, manifest = _plan_and_manifest(out)
    summary = manifest["summary"]
    total = summary["all"]
    tiles = [
        Tile("mean grade", number(total["grade"]), "on a scale of 1 to 10"),
        Tile("grades", f"{total['grades']:,}"),
    ]
    pictures = [
        _grades("By turn", summary["turns"]),
        _grades("By category", summary["categories"]),
    ]
    tables = [grade_table(summary)]
    section = Section("Grades", pictures=pictures, tables=tables)
    return Page(
        "Graded answers",
        str(out),
        tiles,
        [section],
        facts=_provenance(plan, manifest),
        notes=summary["notes"],
    )


def _grades(title: str, groups: Json) -> Picture:
    """The mean grade of each group of answers."""
    return plots.rates(
        title,
        _named_rates(groups, "grade"),
        "Mean grade; bars: 95 %.",
        span=(1, 10),
    )


def training_page(out: Path) -> Page:
    """The page of a model folder that `train` wrote."""
    plan, manifest = _plan_and_manifest(out)
    records = logged(out)
    last = manifest["summary"]
    steps = Tile(
        "optimizer steps",
        f"{manifest['steps']:,}",
        f"on {manifest['rows_out']:,} pairs",
    )
    tiles = [steps]
    for key in ("loss", "scir/mask_rate", "rewards/accuracies", "validation/agreement"):
        if key in last:
            tiles.append(_metric_tile(key, last[key]))
    time = duration(manifest["seconds"])
    tiles.append(Tile("time", time, _speed(records)))
    objective = plan["settings"].get("objective", "")
    return Page(
        f"Training, objective {objective}",
        str(out),
        tiles,
        _curves({"": records}),
        facts=_provenance(plan, manifest),
    )


def _metric_tile(key: str, value: float) -> Tile:
    """A figure of the last step."""
    metric = metrics.find(key)
    assert metric is not None
    shown = percent(value) if metric.is_rate else number(value, 3)
    return Tile(metric.label, shown, "last step")


def _speed(series: Series) -> str:
    """The median number of tokens per second; empty if none was logged."""
    _, values = series.get("tokens_per_second", ([], []))
    if not values:
        return ""
    return f"{np.median(values):,.0f} tokens/s"


def _plan_and_manifest(out: Path) -> tuple[Json, Json]:
    """The plan and the manifest of a finished folder.

    Raises DataError if the folder has another schema version.
    """
    plan = read_json(out / "plan.json")
    manifest = manifests.read(out)
    if manifest["kind"] != "model":
        folders.check_version(out, folders.version_of(manifest))
    return plan, manifest


def _provenance(plan: Json, manifest: Json) -> Json:
    """Counts, versions, digests of inputs and settings of a finished folder."""
    facts: Json = {}
    for name in ("rows_in", "rows_out", "drops", "nulls", "seconds", "versions", "digest"):
        if name in manifest:
            facts[name] = manifest[name]
    for name, value in plan.items():
        if name not in ("stage", "settings"):
            facts[name] = value
    return {**facts, **plan.get("settings", {})}


# Win rates


def win_rate_page(out: Path) -> Page:
    """The page of a folder that `eval winrate` wrote, from verdicts or from annotations."""
    plan, manifest = _plan_and_manifest(out)
    summary = manifest["summary"]
    judged = out / "judged"
    wins = Section(
        "Wins",
        pictures=_wins(summary),
        tables=winrate_tables(summary),
    )
    sections = [wins]
    browsers = []
    if is_dataset(judged):
        table = dataset.read_dataset(judged, "judged")
        verdicts = from_table(table)
        sections.append(_bias(verdicts, consistency.summary(verdicts)))
        browsers.append(browser(table, verdicts))
    return Page(
        "Win rate",
        str(out),
        _match_tiles(summary["matches"][0]),
        sections,
        browsers=browsers,
        facts=_provenance(plan, manifest),
        notes=summary["notes"],
    )


def _match_tiles(match: Json) -> list[Tile]:
    """The win rates, pairs and lengths of one match."""
    return [
        Tile(
            "win rate",
            percent(match["win_rate"]),
            f"{match['model']} against {match['other']}",
        ),
        Tile(
            "length-controlled",
            percent(match["length_controlled_win_rate"]),
            match.get("length_controlled_reason") or "",
        ),
        Tile(
            "pairs",
            f"{match['pairs']:,}",
            f"{match['verdicts']:,} with a verdict",
        ),
        Tile(
            "mean length",
            f"{match['mean_characters']:,.0f}",
            f"characters; the other's {match['mean_characters_other']:,.0f}",
        ),
    ]


def win_rate_sections(name: str, manifest: Json) -> list[Section]:
    """The sections about one `eval winrate` on the page of a whole run."""
    summary = manifest["summary"]
    section = Section(
        f"Win rate: {name}",
        pictures=_wins(summary),
        tables=winrate_tables(summary),
    )
    return [section]


def win_rates(summary: Json) -> dict[str, list[NamedRate]]:
    """Each kind of win rate -> the known ones of all matches, with 95 % intervals.

    A win rate without an interval gets 1.96 standard errors each way.
    """
    rates: dict[str, list[NamedRate]] = {}
    others = {match["other"] for match in summary["matches"]}
    for match in summary["matches"]:
        name = match["model"]
        if len(others) > 1:
            name = f"{name} / {match['other']}"

        if match["win_rate"] is not None:
            rows = rates.setdefault("Win rate", [])
            rows.append((name, *_with_error(match["win_rate"], match["standard_error"])))

        if match["length_controlled_win_rate"] is not None:
            row = (
                name,
                match["length_controlled_win_rate"],
                match["length_controlled_low"],
                match["length_controlled_high"],
            )
            rows = rates.setdefault("Length-controlled win rate", [])
            rows.append(row)
    return rates


def _with_error(rate: float, error: float | None) -> Rate:
    """The rate with an interval of 1.96 standard errors each way, within 0 and 1."""
    if error is None:
        return rate, None, None
    reach = 1.96 * error
    low = max(0.0, rate - reach)
    high = min(1.0, rate + reach)
    return rate, low, high


def _wins(summary: Json) -> list[Picture]:
    """The win rates of all matches, those by subset of a single match, and Bradley-Terry."""
    matches = summary["matches"]
    other = matches[0]["other"]
    caption = DRAW_CAPTION
    if all(match["other"] == other for match in matches):
        caption = f"Against {other}. {caption}"
    pictures = []
    for kind, rows in win_rates(summary).items():
        picture = plots.rates(
            kind,
            rows,
            caption,
            chance=0.5,
        )
        pictures.append(picture)

    if len(matches) == 1:
        pictures += _wins_by_subset(matches[0]["by_subset"])

    scale = summary.get("bradley_terry")
    if scale and len(scale["models"]) > 2:
        last = matches[-1]["other"]
        pictures += _bradley_terry(scale["models"], last)
    return pictures


def _wins_by_subset(by_subset: Json) -> list[Picture]:
    """One picture if there are several subsets, otherwise none."""
    rows: list[NamedRate] = []
    for name, part in list(by_subset.items())[:SUBSETS]:
        row = (
            name,
            part["discrete_win_rate"],
            part["discrete_low"],
            part["discrete_high"],
        )
        rows.append(row)
    if len(rows) < 2:
        return []
    title = "Discrete win rate, by subset"
    return [plots.rates(title, rows, DRAW_CAPTION, chance=0.5)]


def _bradley_terry(models: Sequence[Json], last: str) -> list[Picture]:
    """Expected win rates over the model `last`, as fitted and with style controlled."""
    kinds = {
        "win_rate": "Bradley-Terry",
        "style_controlled_win_rate": "Bradley-Terry, length and style controlled",
    }
    caption = f"Expected win rate over {last}. The line is a draw; bars: 95 %."
    pictures = []
    for key, title in kinds.items():
        rows = [(row["model"], *_rate(row, key)) for row in models]
        if _any_known(rows):
            picture = plots.rates(title, rows, caption, chance=0.5)
            pictures.append(picture)
    return pictures


# The page of a whole run


@dataclass(frozen=True)
class _StageResult:
    """A finished folder of a run."""

    stage: str
    out: Path
    #: Name on the page
    name: str
    plan: Json
    manifest: Json

    @property
    def entry(self) -> registry.Stage:
        """The stage as the registry describes it."""
        return registry.STAGES[self.stage]

    @property
    def summary(self) -> Json:
        """The figures of a stage that measures something."""
        return self.manifest["summary"]

    @property
    def objective(self) -> str:
        """The objective of a training."""
        return self.plan["settings"].get("objective", "")


def run_page(folders: Sequence[tuple[str, Path]]) -> Page:
    """The page of a whole run: the changes from one iteration to the next.

    folders: (stage, folder) in the order of the run
    """
    results = _stage_results(folders)
    checks = [result for result in results if result.entry.shows_agreement]
    groups = _groups(checks)

    sections = []
    if checks:
        rows = [(result.name, result.summary) for result in checks]
        sections.append(Section("Agreement", tables=[iterations_table(rows)]))
    for group, members in groups.items():
        sections.append(_iterations(group, members))
    sections += _training_sections(results)
    for result in results:
        target = result.entry.story
        if target:
            sections_of = registry.load(target)
            sections += sections_of(result.name, result.manifest)
    stages = Section(
        "Stages",
        "Rows in = rows out + drops.",
        tables=[_stages(results)],
    )
    sections.append(stages)

    parents = {str(out.parent) for _, out in folders}
    return Page(
        "Summary of a run",
        ", ".join(sorted(parents)),
        _run_tiles(groups, results),
        sections,
        browsers=_run_browsers(groups),
        facts={"versions": results[-1].manifest.get("versions", {})},
    )


def _stage_results(folders: Sequence[tuple[str, Path]]) -> list[_StageResult]:
    """The stages of a run with their plans and manifests.

    folders: (stage, folder) in the order of the run
    """
    names = _short_names([out for _, out in folders])
    results = []
    for stage, out in folders:
        plan, manifest = _plan_and_manifest(out)
        results.append(_StageResult(stage, out, names[out], plan, manifest))
    return results


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Folder -> its name, or its whole path if the folders lie in different places."""
    parents = {folder.parent for folder in folders}
    names = {}
    for folder in folders:
        names[folder] = folder.name if len(parents) == 1 else str(folder)
    return names


def _groups(checks: Iterable[_StageResult]) -> dict[str, list[_StageResult]]:
    """The checks whose names differ only in numbers: m1-heldout and m2-heldout are one group."""
    groups: dict[str, list[_StageResult]] = {}
    for check in checks:
        group = re.sub(r"\d+", "…", check.name)
        groups.setdefault(group, []).append(check)
    return groups


def _training_sections(results: Sequence[_StageResult]) -> list[Section]:
    """One section per objective: the curves that matter for a run, with a line per training."""
    by_objective: dict[str, dict[str, Series]] = {}
    for result in results:
        if result.manifest.get("kind") == "model":
            runs = by_objective.setdefault(result.objective, {})
            runs[result.name] = logged(result.out)

    sections = []
    for objective, runs in by_objective.items():
        pictures: list[Picture] = []
        for section in _curves(runs):
            if section.title in metrics.RUN_SECTIONS:
                pictures += section.pictures
        title = f"Training, objective {objective}"
        sections.append(Section(title, pictures=pictures))
    return sections


def _run_browsers(groups: Mapping[str, Sequence[_StageResult]]) -> list[Browser]:
    """Pairs of the newest check of each group whose verdicts still exist."""
    browsers = []
    for members in groups.values():
        newest = members[-1]
        judged = _verdicts_of(newest.out)
        if judged is None:
            continue
        table = _checked_pairs(newest.out, judged)
        shown = browser(
            table,
            from_table(table),
            title=f"Read some pairs: {newest.name}",
            most=PAIRS // len(groups),
        )
        browsers.append(shown)
    return browsers


def _verdicts_of(out: Path) -> Path | None:
    """The judged dataset that the figures of a checked folder are computed from.

    None if it was moved or changed since, or if `eval rewards` only read it.
    """
    judged = out / "judged"
    if is_dataset(judged):
        return judged
    plan, manifest = _plan_and_manifest(out)
    if manifest["kind"] != "consistency":
        return None
    judged = to_path(manifest["inputs"]["input"])
    if not (judged / "manifest.json").is_file():
        return None
    if hashing.digest_path(judged) != plan["input"]:
        return None
    return judged


def _iterations(group: str, checks: Sequence[_StageResult]) -> Section:
    """Agreement, accuracy and confidence of each group, from one dataset to the next."""
    names = [check.name for check in checks]
    agreed = [check.summary["agreed"] for check in checks]
    models = [check.summary["models"] for check in checks]

    agreement = {
        "agreed": [_rate(figures, "rate") for figures in agreed],
        "order-flip rate": _rates_of("judge", "flip_rate", models),
    }
    all_names: dict[str, None] = {}
    for by_model in models:
        all_names |= dict.fromkeys(by_model)
    accuracy = {name: _rates_of(name, "accuracy", models) for name in all_names}
    accuracy["agreed"] = [_rate(figures, "accuracy") for figures in agreed]

    pictures = [
        plots.iterations(
            "Agreement and order flips",
            names,
            _known_rates(agreement),
            "“agreed”: share of pairs on which all reward models agree. Bars: 95 %.",
        )
    ]
    accuracy = _known_rates(accuracy)
    if accuracy:
        picture = plots.iterations(
            "Accuracy",
            names,
            accuracy,
            "Against gold labels; “agreed”: pairs on which all agree. Bars: 95 %.",
        )
        pictures.append(picture)
    pictures.append(_spread_by_dataset(names, models))
    return Section(group, f"{', '.join(names)}, in this order", pictures)


def _rates_of(model: str, key: str, summaries: Sequence[Json]) -> list[Rate]:
    """The rate `key` of one reward model in each dataset; None for a missing one.

    summaries: reward model -> figures, one per dataset
    """
    rates = []
    for by_model in summaries:
        figures = by_model.get(model, {})
        rates.append(_rate(figures, key))
    return rates


def _known_rates(series: Mapping[str, list[Rate]]) -> dict[str, list[Rate]]:
    """The series with at least one known rate."""
    nonempty = {}
    for name, rates in series.items():
        if any(rate is not None for rate, _, _ in rates):
            nonempty[name] = rates
    return nonempty


def _spread_by_dataset(names: Sequence[str], models: Sequence[Json]) -> Picture:
    """The sizes of the log-odds of each reward model in each dataset."""
    spread = {}
    for name, by_model in zip(names, models, strict=True):
        for model, figures in by_model.items():
            if figures["verdicts"]:
                quantiles = figures["abs_log_odds_quantiles"]
                spread[f"{name} {model}"] = list(quantiles.values())
    return plots.spread(
        "Confidence",
        spread,
        "Absolute log-odds.",
        "|log-odds|, nats",
    )


def _stages(results: Iterable[_StageResult]) -> Table:
    """Rows, drops and seconds of each stage."""
    table = Table(
        "stage",
        "folder",
        "in",
        "out",
        "dropped",
        "seconds",
    )
    for result in results:
        manifest = result.manifest
        table.add_row(
            result.stage,
            result.name,
            f"{manifest['rows_in']:,}",
            f"{manifest['rows_out']:,}",
            drops_by_reason(manifest) or "0",
            f"{manifest['seconds']:,.1f}",
        )
    return table


def _run_tiles(
    groups: Mapping[str, Sequence[_StageResult]], results: Sequence[_StageResult]
) -> list[Tile]:
    """Agreement and accuracy at the end of each group, and the time of all stages."""
    tiles = []
    for group, members in groups.items():
        tiles += _group_tiles(group, members)
    seconds = sum(result.manifest.get("seconds", 0) for result in results)
    tiles.append(Tile("time", duration(seconds), f"{len(results)} stages"))
    return tiles


def _group_tiles(group: str, members: Sequence[_StageResult]) -> list[Tile]:
    """Agreement of the last check of a group, and its accuracy if it has labels."""
    first = members[0].summary["agreed"]
    last = members[-1].summary["agreed"]
    n_checks = len(members)
    note = group
    if n_checks > 1:
        start = percent(first["rate"])
        note = f"{group}: from {start} in {n_checks} checks"
    tiles = [Tile("all agree", percent(last["rate"]), note)]
    if last.get("labeled"):
        name = note.split(":")[0]
        tile = Tile(
            "accuracy on agreed pairs",
            percent(last["accuracy"]),
            f"{name}, at the end",
        )
        tiles.append(tile)
    return tiles


# Sections about verdicts


def _rate(figures: Json, key: str) -> Rate:
    """The rate `key` and the ends of its interval; None if unknown."""
    low = figures.get(f"{key}_low")
    high = figures.get(f"{key}_high")
    return figures.get(key), low, high


def _named_rates(groups: Json, key: str) -> list[NamedRate]:
    """Rows (name, rate, low, high) of the rate `key` of each group."""
    return [(name, *_rate(figures, key)) for name, figures in groups.items()]


def _any_known(rows: Iterable[NamedRate]) -> bool:
    """Whether at least one of the rows has a rate."""
    return any(rate is not None for _, rate, _, _ in rows)


def _by_name(v: Verdicts) -> dict[str, Array]:
    """Reward model -> its log-odds, (pairs,) nats."""
    return dict(zip(v.names, v.log_odds, strict=True))


def _agreement_tiles(summary: Json) -> list[Tile]:
    """Pairs, agreement, kappa, order flips and accuracy, as far as they are known."""
    agreed = summary["agreed"]
    pairs = summary["pairs"]
    rate = percent(agreed["rate"])
    tiles = [
        Tile("pairs", f"{pairs:,}"),
        Tile("all agree", rate, _interval(agreed, "rate")),
    ]
    for between in summary["between"][:1]:
        kappa = between.get("kappa")
        if kappa is not None:
            names = f"{between['first']} and {between['second']}"
            tiles.append(Tile("Cohen's kappa", number(kappa), names))

    judge = summary["models"].get("judge", {})
    flip_rate = judge.get("flip_rate")
    if flip_rate is not None:
        note = "verdicts of the judge that change with the order"
        tiles.append(Tile("order-flip rate", percent(flip_rate), note))

    if agreed.get("labeled"):
        accuracy = percent(agreed["accuracy"])
        interval = _interval(agreed, "accuracy")
        tiles.append(Tile("accuracy on agreed pairs", accuracy, interval))
    return tiles


def _interval(figures: Json, key: str) -> str:
    """The 95 % interval of the rate `key`; empty if it is unknown."""
    _, low, high = _rate(figures, key)
    if low is None or high is None:
        return ""
    return f"95 %: {low:.0%} to {high:.0%}"


def _agreement(v: Verdicts, summary: Json) -> Section:
    """How often reward models agree, and their log-odds against those of the first."""
    pictures = []
    if summary["between"]:
        pictures.append(plots.matrix(v.names, summary["between"]))
    for k, other in enumerate(v.names[1:4], 1):
        pictures.append(
            plots.quadrants(
                v.names[0],
                other,
                v.log_odds[0],
                v.log_odds[k],
            )
        )
    caption = "Log-odds of each reward model."
    pictures.append(plots.distributions("Distribution of verdicts", _by_name(v), caption))
    text = "Log-odds are in nats, positive if the first response is better."
    return Section("Agreement", text, pictures)


def _confidence(v: Verdicts, agreement: Json) -> Section:
    """Reliability, and risk against coverage; no pictures without labels."""
    curves = consistency.curves(v, **agreement)
    pictures = []
    plot_of = {
        "reliability": plots.reliability,
        "risk_coverage": plots.risk_coverage,
    }
    for kind, plot in plot_of.items():
        nonempty = {name: points for name, points in curves[kind].items() if points}
        if nonempty:
            pictures.append(plot(nonempty))
    return Section("Calibration and coverage", "Against the gold labels.", pictures)


def _bias(v: Verdicts, summary: Json) -> Section:
    """Order flips, preferences for a seat, length or format, and wins by length."""
    models = summary["models"]
    flips = [row for row in _named_rates(models, "flip_rate") if row[1] is not None]
    pictures = []
    if flips:
        caption = "Share of verdicts that change when the two responses change seats. Bars: 95 %."
        pictures.append(plots.rates("Order-flip rate", flips, caption))

    biases = summary.get("biases") or {}
    for model, figures in list(biases.items())[:5]:
        pictures += _preferences(model, figures)

    if np.ptp(v.length_difference):
        picture = plots.length_bias(_by_name(v), v.length_difference)
        pictures.append(picture)
    text = (
        "A verdict should not depend on the seat, or on length or format as such. "
        "If the gold labels have the same preference, that part is not a bias."
    )
    return Section("Position, length, format", text, pictures)


def _preferences(model: str, biases: Json) -> list[Picture]:
    """How often one reward model, or the gold labels, prefer each feature; [] without pairs.

    biases: feature -> {pairs, rate, rate_low, rate_high}
    """
    named = {
        "position": "seat A",
        "longer": "longer response",
        "longer answer": "longer answer",
        "own": "own response",
    }
    rows: list[NamedRate] = []
    for feature, figures in biases.items():
        if figures["pairs"]:
            name = named.get(feature, f"with {feature}")
            rows.append((name, *_rate(figures, "rate")))
    if not rows:
        return []
    title = f"Preferences of {model}"
    if model == "gold":
        title = "Preferences of the gold labels"
    caption = (
        "Share of verdicts for a feature, over pairs in which only one response has it. "
        "The line is no preference; bars: 95 %."
    )
    return [plots.rates(title, rows, caption, 0.5, model)]


def _subsets(v: Verdicts, agreement: Json) -> Section:
    """Agreement and accuracy by subset; empty if there is only one subset."""
    n_subsets = len(set(v.subset))
    if n_subsets < 2:
        return Section("")
    figures = consistency.by_subset(v, **agreement)
    by_subset = dict(list(figures.items())[:SUBSETS])
    more = n_subsets - SUBSETS
    left_out = ""
    if more > 0:
        left_out = f" {more} more subsets are left out."

    pictures = [_agreement_by_subset(by_subset, left_out)]
    for model in v.names[:4]:
        pictures += _accuracy_by_subset(model, by_subset, left_out)
    return Section("Subsets", pictures=pictures)


def _agreement_by_subset(by_subset: Json, left_out: str) -> Picture:
    """The share of pairs on which all reward models agree, one row per subset.

    left_out: end of the caption
    """
    agreed = {name: figures["agreed"] for name, figures in by_subset.items()}
    return plots.rates(
        "All agree, by subset",
        _named_rates(agreed, "rate"),
        f"Bars: 95 %.{left_out}",
        model="agreed",
    )


def _accuracy_by_subset(model: str, by_subset: Json, left_out: str) -> list[Picture]:
    """The accuracy of one reward model, one row per subset; [] without labels.

    left_out: end of the caption
    """
    of_model = {name: figures["models"][model] for name, figures in by_subset.items()}
    rows = _named_rates(of_model, "accuracy")
    if not _any_known(rows):
        return []
    picture = plots.rates(
        f"Accuracy of {model}, by subset",
        rows,
        f"Bars: 95 %; the line is chance.{left_out}",
        chance=0.5,
        model=model,
    )
    return [picture]


# Training curves


def logged(out: Path) -> Series:
    """The figures of metrics.jsonl: name -> (steps, values); empty without that file."""
    path = out / "metrics.jsonl"
    series = Series()
    if not path.exists():
        return series
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name in ("step", "kind"):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def _curves(runs: Mapping[str, Series]) -> list[Section]:
    """Every figure that has a picture, by section.

    Figures without an entry in metrics.py are drawn last, under their keys.
    runs: name of a training -> its figures
    """
    groups: dict[tuple[str, str], dict[str, Metric]] = {}
    for key, metric in _entries(runs).items():
        if metric.picture is not None:
            place = (metric.section, metric.picture)
            group = groups.setdefault(place, {})
            group[key] = metric

    pictures_of: dict[str, list[Picture]] = {}
    for (section, title), group in groups.items():
        pictures = pictures_of.setdefault(section, [])
        pictures.extend(_curve_pictures(title, group, runs))

    sections = []
    for title, pictures in pictures_of.items():
        sections.append(Section(title, pictures=pictures))
    return sections


def _entries(runs: Mapping[str, Series]) -> dict[str, Metric]:
    """The entry of every figure: those of metrics.py in its order, then the others."""
    keys: dict[str, None] = {}
    for series in runs.values():
        keys |= dict.fromkeys(series)
    entries = dict(metrics.present(keys))
    for key in keys:
        if key not in entries:
            entries[key] = Metric(key, key, "More", key)
    return entries


def _curve_pictures(
    title: str,
    group: Mapping[str, Metric],
    runs: Mapping[str, Series],
) -> Iterator[Picture]:
    """The figures of one group: one picture for a single run, else one per figure.

    A picture per figure has one line per run.
    """
    if len(runs) == 1:
        (series,) = runs.values()
        curves = {}
        for key, metric in group.items():
            curves[metric.short_label(key)] = series[key]
        first = next(iter(group.values()))
        yield plots.steps(title, curves, first.unit, first.is_rate)
        return

    for key, metric in group.items():
        curves = {}
        for run, series in runs.items():
            if key in series:
                curves[run] = series[key]
        label = title
        if len(group) > 1:
            label = f"{title}: {metric.short_label(key)}"
        yield plots.steps(label, curves, metric.unit, metric.is_rate)


# Pairs to read


def browser(
    table: pa.Table,
    v: Verdicts,
    title: str = "Read some pairs",
    most: int = PAIRS,
) -> Browser:
    """Some pairs with every verdict.

    These are the pairs with the most confident disagreement, those with the most confident
    mistakes, and some at random. They end early if their texts are long.
    table: the pairs of `v`, in the same order
    """
    disagreement = surest_disagreement(v.log_odds)
    mistake = surest_mistake(v)
    chosen = pairs_to_read(disagreement, mistake, most)
    columns = ["pair_id", "messages", "subset", "first", "second", "gold_label"]
    indices = pa.array(chosen, pa.int64())
    rows = table.select(columns).take(indices).to_pylist()

    pairs = []
    n_bytes = 0
    for i, row in zip(chosen, rows, strict=True):
        pair = _pair(v, i, row)
        pair["disagreement"] = float(disagreement[i])
        pair["mistake"] = float(mistake[i])
        n_bytes += _size(pair)
        if n_bytes > PAIR_BYTES * most // PAIRS:
            break
        pairs.append(pair)
    text = (
        f"{len(pairs)} of {len(v.pair_ids):,} pairs: those with the most confident disagreement, "
        "the most confident mistakes if labels exist, and others at random."
    )
    return Browser(title, text, pairs)


def pairs_to_read(disagreement: Array, mistake: Array, most: int) -> list[int]:
    """Indices of at most `most` pairs, the same in every call.

    Two fifths have the largest disagreement, two fifths the largest mistake, the rest is random.
    disagreement, mistake: (pairs,) nats; pairs at 0 count for neither
    """
    chosen: dict[int, None] = {}
    two_fifths = 2 * most // 5
    for size in (disagreement, mistake):
        order = np.argsort(-size, kind="stable")
        for i in order[:two_fifths]:
            if size[i] > 0:
                chosen[int(i)] = None

    generator = np.random.default_rng(0)
    shuffled = generator.permutation(len(disagreement))
    for i in shuffled:
        if len(chosen) >= most:
            break
        chosen.setdefault(int(i))
    return list(chosen)


def _pair(v: Verdicts, i: int, row: Json) -> Json:
    """The texts, verdicts and tags of one pair, as the template shows them.

    i: index of the pair in `v`
    """
    verdicts = []
    for k in range(len(v.names)):
        if not np.isnan(v.log_odds[k, i]):
            verdicts.append(_verdict(v, k, i))

    messages = []
    last_prompt = ""
    for message in row["messages"]:
        role = message["role"]
        content = message["content"]
        messages.append({"role": role, "text": _cut(content)})
        if role == "user":
            last_prompt = content
    return {
        "id": row["pair_id"],
        "subset": row["subset"],
        "line": last_prompt[:160],
        "messages": messages,
        "sides": [_side(row, "first"), _side(row, "second")],
        "verdicts": verdicts,
        "tags": _tags(verdicts),
    }


def _side(row: Json, name: str) -> Json:
    """The text and the tokens of one response.

    name: "first" or "second"
    """
    return {
        "name": name,
        "text": _cut(row[name]["text"]),
        "tokens": len(row[name]["token_ids"] or ()),
        "gold": row["gold_label"] == name,
    }


def _tags(verdicts: Sequence[Json]) -> list[str]:
    """What the filter of the page can select a pair by."""
    signs = {np.sign(verdict["log_odds"]) for verdict in verdicts}
    mistake = any(verdict["right"] is False for verdict in verdicts)
    flips = any(verdict["flips"] for verdict in verdicts)

    tags = []
    if len(signs) > 1:
        tags.append("disagree")
    elif len(verdicts) > 1:
        tags.append("agree")
    if mistake:
        tags.append("mistake")
    if flips:
        tags.append("flips")
    return tags


def _verdict(v: Verdicts, k: int, i: int) -> Json:
    """The verdict of reward model `k` on pair `i`."""
    log_odds = float(v.log_odds[k, i])
    # exp overflows above 709.
    bounded = max(-500.0, min(500.0, log_odds))
    forward = v.forward[k, i]
    swapped = v.swapped[k, i]
    return {
        "model": v.names[k],
        "log_odds": log_odds,
        "p": 1 / (1 + math.exp(-bounded)),
        "right": _is_right(log_odds, float(v.gold[i])),
        "flips": bool(forward * swapped < 0),
        "forward": float(forward),
        "swapped": float(swapped),
        "mass": float(v.verdict_mass[k, i]),
    }


def verdict_words(verdicts: Sequence[Json]) -> list[list[str]]:
    """Each verdict as the page's filters match it: reward model, preferred side, correctness."""
    words = []
    for verdict in verdicts:
        size = verdict["log_odds"]
        side = "first" if size > 0 else "second" if size < 0 else "tie"
        correct = {None: [], True: ["correct"], False: ["wrong"]}[verdict["right"]]
        words.append([verdict["model"], side, *correct])
    return words


def _is_right(log_odds: float, gold: float) -> bool | None:
    """Whether a verdict has the sign of the gold label.

    None if the pair has no label or the verdict is a tie.
    gold: 1 if the first response is better, -1 if the second; NaN: no label
    """
    if log_odds == 0 or math.isnan(gold):
        return None
    return log_odds * gold > 0


def _cut(text: str) -> str:
    """The text, or its first MAX_CHARACTERS and how many more it has."""
    if len(text) <= MAX_CHARACTERS:
        return text
    more = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]}\n… {more:,} more characters, left out of this page"


def _size(pair: Json) -> int:
    """Bytes of the pair's HTML, estimated from above."""
    n_bytes = MARKUP_BYTES
    n_bytes += VERDICT_BYTES * len(pair["verdicts"])
    for part in pair["messages"] + pair["sides"]:
        visible = part["text"].translate(CONTROLS)
        n_bytes += len(escape(visible).encode("utf-8"))
    return n_bytes
