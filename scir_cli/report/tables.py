"""Terminal output: tables of agreement and accuracy, and one line per stage.

All tables fit into 80 columns, and look the same in a pipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from scir_cli import registry
from scir_cli.registry import Stage
from scir_cli.report.console import PlainConsole

Figures = dict[str, Any]

#: If P(A) + P(B) is below this, the judge rates some other answer as likelier.
LITTLE_MASS = 0.5
SHOWN_COVERAGE = (0.1, 0.25, 0.5, 0.75, 1.0)
#: Subset of pairs whose dataset names none
NO_SUBSET = "(none)"


# Cells


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A rate in percent; "–" for None.

    low, high: the ends of its interval, which is shown if both are known
    """
    if value is None:
        return "–"
    rate = f"{value:.1%}"
    if low is None or high is None:
        return rate
    return f"{rate} [{low:.0%}, {high:.0%}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number with this many digits after the point; "–" for None."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """A time in hours and minutes, or in minutes and seconds if it is shorter."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"


def verdicts(m: Figures) -> str:
    """The number of verdicts, and of pairs if some have no verdict."""
    if m["verdicts"] < m["pairs"]:
        return f"{m['verdicts']} of {m['pairs']}"
    return str(m["pairs"])


def rate_and_error(m: Figures) -> str:
    """The win rate, with its standard error if that is known."""
    if m["standard_error"] is None:
        return percent(m["win_rate"])
    return f"{m['win_rate']:.1%} ± {m['standard_error']:.1%}"


def _rate(figures: Figures, key: str, interval: bool = True) -> str:
    """The rate `key`, with its interval from `key`_low and `key`_high if `interval`."""
    if not interval:
        return percent(figures.get(key))
    low = figures.get(f"{key}_low")
    high = figures.get(f"{key}_high")
    return percent(figures.get(key), low, high)


# Tables


def table_of(*headings: str, title: str | None = None) -> Table:
    """A table without a frame, its first column on the left and figures on the right."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    first, *figures = headings
    table.add_column(first, justify="left", overflow="fold")
    for heading in figures:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _frameless(*headings: str, title: str | None = None, **more: Any) -> Table:
    """A table without a frame; `headings` are columns on the left.

    more: further arguments of rich's Table
    """
    return Table(
        *headings,
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        **more,
    )


def _add_figures(table: Table, headings: Iterable[str], **more: Any) -> None:
    """Adds a column of figures, on the right, for each heading.

    more: further arguments of rich's `add_column`
    """
    for heading in headings:
        table.add_column(heading, justify="right", **more)


def consistency_tables(summary: Figures) -> list[Table]:
    """Each reward model alone; if several exist, each two of them and all together."""
    tables = [_models_table(summary)]
    if len(summary["models"]) > 1:
        tables.append(_between_table(summary))
    return tables


def _is_labeled(summary: Figures) -> bool:
    """Whether any pair with a verdict has a gold label."""
    return any(m["labeled"] for m in summary["models"].values())


def _models_table(summary: Figures) -> Table:
    """Verdicts, confidence, order flips and accuracy, one row per reward model."""
    labeled = _is_labeled(summary)
    headings = ["reward model", "verdicts", "median\n|a|", "order\nflips", "mass", "length\nr"]
    if labeled:
        headings.append("accuracy (95 %)")
    table = table_of(*headings, title=f"{summary['pairs']} pairs")

    for name, m in summary["models"].items():
        cells = [
            name,
            str(m["verdicts"]),
            number(m["median_abs_log_odds"]),
            percent(m["flip_rate"]),
            number(m["verdict_mass"]),
            number(m["length_correlation"]),
        ]
        if labeled:
            cells.append(_rate(m, "accuracy"))
        table.add_row(*cells)
    table.caption = "\n".join(_models_remarks(summary)) or None
    return table


def _models_remarks(summary: Figures) -> list[str]:
    """What is unusual about the reward models: little mass, unknown verdicts, empty cells."""
    models = summary["models"]
    remarks = []
    silent = [
        name
        for name, m in models.items()
        if m["verdict_mass"] is not None and m["verdict_mass"] < LITTLE_MASS
    ]
    if silent:
        remarks.append(
            f"{' and '.join(silent)}: little probability on the verdicts (mass); "
            "other answers are more likely"
        )
    for name, count in summary.get("beyond_top_logprobs", {}).items():
        remarks.append(
            f"{name}: {count} verdicts unknown: "
            "their tokens are not among the endpoint's top log-probabilities"
        )
    of_answers = []
    for name, m in models.items():
        if "answer_length_correlation" in m:
            of_answers.append(f"{name} {number(m['answer_length_correlation'])}")
    if of_answers:
        remarks.append(f"length r without reasoning: {', '.join(of_answers)}")
    optional = ("flip_rate", "verdict_mass", "length_correlation")
    if any(m[key] is None for m in models.values() for key in optional):
        remarks.append("–: no order to flip, no verdict tokens, or all lengths or verdicts equal")
    return remarks


def _between_table(summary: Figures) -> Table:
    """Agreement, one row per two reward models and one for all of them."""
    table = table_of("agreement of", "pairs", "rate (95 %)", "kappa", "rank r")
    for b in summary["between"]:
        table.add_row(
            f"{b['first']} / {b['second']}",
            str(b["pairs"]),
            _rate(b, "agreement"),
            number(b["kappa"]),
            number(b["spearman"]),
        )
    agreed = summary["agreed"]
    if _is_labeled(summary):
        accuracy = _rate(agreed, "accuracy")
        labeled = agreed["labeled"]
        table.caption = f"accuracy on agreed pairs: {accuracy} of {labeled} labeled pairs"
    table.add_row(
        "all",
        str(agreed["pairs"]),
        _rate(agreed, "rate"),
        "",
        "",
    )
    return table


def accuracy_tables(summary: Figures) -> list[Table]:
    """Accuracy at several coverages, and the sections of a benchmark; [] without labels."""
    curves = summary.get("curves", {})
    covered = {}
    for name, points in curves.get("risk_coverage", {}).items():
        if points:
            covered[name] = points
    tables = []
    if covered:
        tables.append(_coverage_table(covered, summary["models"]))
    tables += benchmark_tables(summary.get("benchmark"))
    return tables


def _coverage_table(curves: Figures, models: Figures) -> Table:
    """Accuracy on the most confident pairs at SHOWN_COVERAGE, and the calibration error.

    curves: name -> points {coverage, accuracy, ...}, by ascending coverage
    """
    headings = [f"{share:.0%}" for share in SHOWN_COVERAGE]
    title = "accuracy by coverage, most confident pairs first"
    table = table_of("accuracy of", *headings, "ECE", title=title)
    for name, points in curves.items():
        cells = [_accuracy_at(points, share) for share in SHOWN_COVERAGE]
        figures = models.get(name, {})
        error = figures.get("calibration_error")
        table.add_row(name, *cells, number(error))
    if "agreed" in curves:
        most = curves["agreed"][-1]["coverage"]
        table.caption = f"agreed covers at most {most:.0%} of the pairs; –: not reached"
    return table


def _accuracy_at(points: Sequence[Figures], share: float) -> str:
    """The accuracy at the first point that covers this share; "–" if none does."""
    for point in points:
        # Coverages are quotients, so they can miss a share by a rounding error.
        if point["coverage"] >= share - 1e-6:
            return percent(point["accuracy"])
    return "–"


def bias_tables(biases: Figures | None) -> list[Table]:
    """How often verdicts go to seat A, the longer response, a format or the judge's own.

    biases: reward model or "gold" -> feature -> {pairs, rate, rate_low, rate_high}
    """
    if not biases:
        return []
    table = _frameless("verdicts for", title="preferences of the verdicts")
    _add_figures(table, ("pairs", *biases), no_wrap=True)
    named = {
        "position": "seat A",
        "longer": "longer",
        "longer answer": "longer answer",
        "own": "judge's own",
    }
    # Four columns with intervals are wider than 80 columns.
    intervals = len(biases) < 4
    features: dict[str, None] = {}
    for by_feature in biases.values():
        features |= dict.fromkeys(by_feature)
    for feature in features:
        columns = [by_feature.get(feature, {}) for by_feature in biases.values()]
        pairs = max(figures.get("pairs", 0) for figures in columns)
        if pairs:
            name = named.get(feature, f"with {feature}")
            rates = [_rate(figures, "rate", intervals) for figures in columns]
            table.add_row(name, str(pairs), *rates)
    return [table]


def across_tables(across: Figures | None) -> list[Table]:
    """The stability of verdicts and ranks over the datasets that were compared.

    [] if no dataset was compared.
    """
    if not across:
        return []
    tables = [_stability_table(other) for other in across["against"]]
    if across["unanimous"]:
        tables.append(_unanimous_table(across))
    return tables


def _stability_table(other: Figures) -> Table:
    """Agreement of each reward model with itself in one other dataset."""
    reasons = []
    for reason, count in other["left_out"].items():
        if count:
            words = reason.replace("_", " ")
            reasons.append(f"{count} {words}")
    title = f"against {other['dataset']}: {other['pairs']} pairs in both"
    if reasons:
        left_out = ", ".join(reasons)
        title = f"{title} ({left_out})"
    headings = (
        "same verdict (95 %)",
        "kappa",
        "rank r",
        "CREAM's tau",
        "same best\nand worst",
    )
    table = _frameless("reward model", title=title)
    _add_figures(table, headings)

    models = other["models"]
    for name, m in models.items():
        table.add_row(
            name,
            _rate(m, "agreement"),
            number(m["kappa"]),
            number(m["spearman"]),
            number(m["kendall"]),
            percent(m["top_order"]),
        )
    prompts = max((m["ranked_prompts"] for m in models.values()), default=0)
    if prompts:
        table.caption = f"ranks: {prompts} prompts with 3 or more responses, every pair judged"
    else:
        table.caption = "no ranks: no prompt with 3 or more responses"
    return table


def _unanimous_table(across: Figures) -> Table:
    """How often each reward model has the same verdict in all datasets."""
    table = Table(
        "same verdict in all",
        f"of {across['unanimous_pairs']} pairs (95 %)",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, m in across["unanimous"].items():
        table.add_row(name, _rate(m, "unanimous"))
    return table


def subset_table(by_subset: Figures, models: list[str]) -> Table:
    """Accuracy of each model on each subset; with intervals for at most two models.

    More intervals do not fit into 80 columns.
    """
    table = table_of("accuracy on", "pairs", *models)
    intervals = len(models) < 3
    for subset, figures in by_subset.items():
        columns = [figures["models"].get(name, {}) for name in models]
        cells = [_rate(m, "accuracy", intervals) for m in columns]
        table.add_row(subset, str(figures["pairs"]), *cells)
    return table


def benchmark_tables(benchmark: Figures | None) -> list[Table]:
    """Accuracy per section of a benchmark and its scores; [] without a benchmark."""
    if not benchmark:
        return []
    models = benchmark["models"]
    columns = list(models.values())
    table = table_of(benchmark["name"], *models)

    sections: dict[str, None] = {}
    for figures in columns:
        sections |= dict.fromkeys(figures["sections"])
    for section in sections:
        rates = [figures["sections"].get(section) for figures in columns]
        _add_rates(table, section, rates)

    scores = [figures["score"] for figures in columns]
    _add_rates(table, "score", scores)
    prior = [figures.get("score_with_prior_sets") for figures in columns]
    if any(score is not None for score in prior):
        _add_rates(table, "with prior sets", prior)
    table.caption = _benchmark_caption(columns)
    return [table]


def _add_rates(table: Table, name: str, rates: Sequence[float | None]) -> None:
    """Adds a row with a name and one rate per column; None: unknown."""
    cells = [percent(rate) for rate in rates]
    table.add_row(name, *cells)


def _benchmark_caption(columns: Sequence[Figures]) -> str | None:
    """Why there is no score, and how many examples are left out; None if neither holds.

    columns: the figures of each reward model
    """
    remarks = []
    missing = columns[0]["missing"]
    if missing:
        names = ", ".join(missing[:4])
        more = " …" if len(missing) > 4 else ""
        remarks.append(f"no score: no examples of {names}{more}")
    incomplete = sum(figures.get("incomplete", 0) for figures in columns)
    if incomplete:
        remarks.append(f"{incomplete} examples with missing verdicts are left out")
    return " ".join(remarks) or None


def iterations_table(rows: list[tuple[str, Figures]]) -> Table:
    """One row per checked dataset, in the order of the run.

    rows: (name, summary) of each dataset
    """
    table = _frameless(
        title="agreement of the internal reward models",
        caption=(
            "order flips: share of the judge's verdicts that change when the two responses swap "
            "seats; accuracy against gold labels: of the judge, of the implicit reward, and on "
            "agreed pairs"
        ),
        caption_justify="left",
        # Otherwise the table is wider than 80 columns.
        collapse_padding=True,
    )
    table.add_column("dataset", no_wrap=True)
    headings = (
        "pairs",
        "agree",
        "kappa",
        "order\nflips",
        "judge\naccuracy",
        "implicit\naccuracy",
        "agreed\naccuracy",
    )
    _add_figures(table, headings, no_wrap=True)

    for name, summary in rows:
        judge = summary["models"].get("judge", {})
        implicit = summary["models"].get("implicit", {})
        agreed = summary["agreed"]
        between = summary["between"]
        table.add_row(
            name,
            str(summary["pairs"]),
            percent(agreed["rate"]),
            number(between[0]["kappa"] if between else None),
            percent(judge.get("flip_rate")),
            percent(judge.get("accuracy")),
            percent(implicit.get("accuracy")),
            percent(agreed.get("accuracy")),
        )
    return table


def winrate_tables(summary: Figures) -> list[Table]:
    """The win rates of all matches, those by subset of a single match, and Bradley-Terry."""
    matches = summary["matches"]
    tables = [_matches_table(matches)]
    if len(matches) == 1:
        by_subset = matches[0]["by_subset"]
        if by_subset:
            tables.append(_match_by_subset_table(by_subset))
    scale = summary["bradley_terry"]
    if scale and len(scale["models"]) > 2:
        last = matches[-1]["other"]
        tables.append(_bradley_terry_table(scale["models"], last))
    return tables


def _matches_table(matches: Sequence[Figures]) -> Table:
    """One row per match of two models."""
    others = {m["other"] for m in matches}
    same_other = len(others) == 1
    heading = f"against {matches[0]['other']}" if same_other else "model / against"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(heading, overflow="fold")
    headings = (
        "verdicts",
        "win rate ± s.e.",
        "length-\ncontrolled (95 %)",
        "characters",
    )
    _add_figures(table, headings, no_wrap=True)

    for m in matches:
        name = m["model"] if same_other else f"{m['model']} / {m['other']}"
        length_controlled = percent(
            m.get("length_controlled_win_rate"),
            m.get("length_controlled_low"),
            m.get("length_controlled_high"),
        )
        characters = f"{m['mean_characters']:.0f} / {m['mean_characters_other']:.0f}"
        table.add_row(
            name,
            verdicts(m),
            rate_and_error(m),
            length_controlled,
            characters,
        )
    return table


def _match_by_subset_table(by_subset: Figures) -> Table:
    """One row per subset of a single match."""
    table = Table(
        "subset",
        "verdicts",
        "win rate ± s.e.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for subset, part in by_subset.items():
        table.add_row(subset, verdicts(part), rate_and_error(part))
    return table


def _bradley_terry_table(models: Sequence[Figures], last: str) -> Table:
    """Expected win rates over the model `last`, one row per model."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Bradley-Terry", overflow="fold")
    _add_figures(table, (f"beats {last}\n(95 %)", "length and style\ncontrolled (95 %)"))
    for row in models:
        table.add_row(
            row["model"],
            _rate(row, "win_rate"),
            _rate(row, "style_controlled_win_rate"),
        )
    return table


def grade_table(summary: Figures) -> Table:
    """Mean grades over all answers, per turn and per category."""
    rows = {"all": summary["all"]}
    rows |= summary["turns"]
    for name, m in summary["categories"].items():
        # This group holds the questions without a category.
        if name != "None":
            rows[name] = m

    table = table_of("answers to", "grades", "mean grade (95 %)")
    for name, m in rows.items():
        table.add_row(name, str(m["grades"]), _mean_grade(m))
    mass = summary["mean_mass"]
    if mass is not None and mass < LITTLE_MASS:
        table.caption = f"probability of any grade: {mass:.2f}; other answers are more likely"
    return table


def _mean_grade(m: Figures) -> str:
    """The mean grade, with its interval if that is known."""
    grade = number(m["grade"])
    if m["grade_low"] is None:
        return grade
    low = number(m["grade_low"], 1)
    high = number(m["grade_high"], 1)
    return f"{grade} [{low}, {high}]"


def plan_tables(estimate: Figures) -> list[Table]:
    """The memory and time that a training run will need, and the lengths of its pairs."""
    return [_cost_table(estimate), _lengths_table(estimate["tokens_a_pair"])]


def _cost_table(estimate: Figures) -> Table:
    """Steps, tokens, packs, memory and time, one row each."""
    table = Table(
        title="estimate of this run, on one process",
        title_justify="left",
        show_header=False,
    )
    steps = estimate["steps"]
    pairs = estimate["pairs"]
    packs = estimate["packs"]
    full = estimate["packing_efficiency"]
    tokens = estimate["tokens"]
    unshared = estimate["tokens_without_sharing"]
    saved = 1 - tokens / unshared
    peak = estimate["peak_bytes"] / 2**30
    weights = estimate["weights_bytes"] / 2**30
    minutes = estimate["seconds"] / 60

    rows = {
        "optimizer steps": f"{steps:,} on {pairs:,} pairs",
        "tokens": f"{tokens:,}; {unshared:,} without sharing ({saved:.0%} saved)",
        "packs": f"{packs:,}, {full:.0%} full",
        "peak memory": f"about {peak:.1f} GiB (weights {weights:.1f})",
        "time": f"about {minutes:.1f} min, from one pack on this device",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _lengths_table(counts: Sequence[tuple[int, int]]) -> Table:
    """A histogram of the tokens per pair.

    counts: (largest number of tokens, number of pairs) per bin
    """
    table = Table(
        "tokens per pair, up to",
        "pairs",
        "",
        title="all branches, shared tokens once",
        title_justify="left",
    )
    most = max(count for _, count in counts)
    for tokens, count in counts:
        bar = "█" * round(20 * count / most)
        table.add_row(f"{tokens:,}", f"{count:,}", bar)
    return table


# What a stage prints


def print_results(stage: Stage, manifest: Figures) -> None:
    """Prints the tables and notes of a finished stage on stdout, if it has any.

    A dry run has an estimate instead of results.
    """
    console = PlainConsole()
    summary = manifest.get("summary") or {}
    tables: list[Any] = []
    if "estimate" in manifest:
        tables = plan_tables(manifest["estimate"])
    elif summary and stage.tables is not None:
        tables = registry.load(stage.tables)(manifest)
    for table in tables:
        console.print(table)
    for note in summary.get("notes", ()):
        console.print(f"note: {note}")


def match_tables(manifest: Figures) -> list[Table]:
    """All tables of `eval winrate`."""
    return winrate_tables(manifest["summary"])


def grade_tables(manifest: Figures) -> list[Table]:
    """All tables of `eval mt-bench`."""
    return [grade_table(manifest["summary"])]


def verdict_tables(manifest: Figures) -> list[Any]:
    """All tables of `check-consistency` or `eval rewards`.

    Those about all pairs are first; a line of text precedes the tables of each subset.
    """
    summary = manifest["summary"]
    tables: list[Any] = []
    tables += consistency_tables(summary)
    tables += accuracy_tables(summary)
    tables += bias_tables(summary.get("biases"))
    tables += across_tables(manifest.get("across"))

    by_subset = summary.get("by_subset", {})
    if set(by_subset) - {NO_SUBSET}:
        models = list(summary["models"])
        tables.append(subset_table(by_subset, models))

    for subset, figures in manifest.get("by_subset", {}).items():
        if subset == NO_SUBSET:
            continue
        tables.append(f"subset {subset}")
        tables += consistency_tables(figures)
    return tables


def summary_line(stage: str, out: str, manifest: Figures) -> str:
    """The result of a stage in one line.

    It has rows in, rows out, drops by reason, missing verdicts, responses that the length limit
    cut, the folder and seconds.
    """
    if manifest.get("dry_run"):
        rows = manifest.get("rows_in", "all")
        return f"{stage}: dry run, nothing written; {rows} rows would be written to {out}"

    rows_in = manifest["rows_in"]
    rows_out = manifest["rows_out"]
    dropped = drops_by_reason(manifest) or "0 dropped"
    missing = _missing_verdicts(manifest["nulls"])
    unfinished = _unfinished(manifest.get("summary") or {})
    counts = f"{rows_in} in = {rows_out} out + {dropped}{missing}{unfinished}"

    if manifest.get("reused"):
        time = "(already done)"
    else:
        seconds = manifest.get("seconds", 0)
        time = f"in {seconds:.1f} s"
    return f"{stage}: {counts} → {out} {time}"


def drops_by_reason(manifest: Figures) -> str:
    """Each reason with its number of dropped rows; empty if none was dropped."""
    parts = []
    for reason, count in sorted(manifest["drops"].items()):
        parts.append(f"{count} {reason}")
    return ", ".join(parts)


def _unfinished(summary: Figures) -> str:
    """The number of sampled responses that were cut, and of those without an answer, if any."""
    text = ""
    if summary.get("cut"):
        text += f", {summary['cut']} cut at the length limit"
    if summary.get("without_answer"):
        text += f", {summary['without_answer']} without an answer after their reasoning"
    return text


def _missing_verdicts(nulls: Figures) -> str:
    """The number of pairs without a verdict, per reward model that has any.

    nulls: column -> number of rows in which it is null
    """
    text = ""
    for column, count in nulls.items():
        if column.startswith("rewards."):
            reward_model = column.removeprefix("rewards.")
            text += f", {count} without a verdict of {reward_model}"
    return text
