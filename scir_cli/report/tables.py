"""What a person sees on the terminal: tables of agreement and accuracy, and one line a stage. All are whole at 80 columns, and in a pipe."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scir_cli import registry
from scir_cli.registry import Stage

Figures = dict[str, Any]
LITTLE_MASS = 0.5  # P(A) + P(B) below this: something else is the likelier answer


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if low is None or high is None else f"{value:.1%} [{low:.0%}, {high:.0%}]"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def table_of(*headings: str, title: str | None = None) -> Table:
    """A table without a frame, its first column on the left and figures on the right."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    return table


def consistency_tables(summary: Figures) -> list[Table]:
    """How each reward model does, how each two agree, and how far all agree."""
    labelled = any(m["labelled"] for m in summary["models"].values())
    headings = (
        "reward model",
        "verdicts",
        "median\n|a|",
        "order\nflips",
        "mass",
        "length\nr",
        *(["accuracy (95 %)"] if labelled else []),
    )
    models = table_of(*headings, title=f"{summary['pairs']} pairs")
    for name, m in summary["models"].items():
        cells = [
            str(m["verdicts"]),
            number(m["median_abs_log_odds"]),
            percent(m["flip_rate"]),
            number(m["verdict_mass"]),
            number(m["length_correlation"]),
        ]
        models.add_row(
            name,
            *cells,
            *([percent(m["accuracy"], m["accuracy_low"], m["accuracy_high"])] if labelled else []),
        )
    silent = [
        name
        for name, m in summary["models"].items()
        if m["verdict_mass"] is not None and m["verdict_mass"] < LITTLE_MASS
    ]
    said = (
        [
            f"{' and '.join(silent)}: little probability on the verdicts (mass); it hardly answers the question"
        ]
        if silent
        else []
    )
    for name, count in summary.get("beyond_top_logprobs", {}).items():
        said.append(
            f"{name}: {count} verdicts unknown, their tokens are not among the endpoint's likeliest"
        )
    if any(
        m[key] is None
        for m in summary["models"].values()
        for key in ("flip_rate", "verdict_mass", "length_correlation")
    ):
        said.append(
            "–: no order to flip, no verdict tokens, or lengths or verdicts that are all equal"
        )
    models.caption = "\n".join(said) or None
    between = table_of("agreement of", "pairs", "rate (95 %)", "kappa", "rank r")
    for b in summary["between"]:
        rate = percent(b["agreement"], b["agreement_low"], b["agreement_high"])
        between.add_row(
            f"{b['first']} / {b['second']}",
            str(b["pairs"]),
            rate,
            number(b["kappa"]),
            number(b["spearman"]),
        )
    a = summary["agreed"]
    cells = [str(a["pairs"]), percent(a["rate"], a["rate_low"], a["rate_high"])]
    if labelled:
        between.caption = f"accuracy where all agree: {percent(a['accuracy'], a['accuracy_low'], a['accuracy_high'])} of {a['labelled']} labelled pairs"
    between.add_row("all", *cells, "", "")
    return [models, between] if len(summary["models"]) > 1 else [models]


SHOWN_COVERAGE = (0.1, 0.25, 0.5, 0.75, 1.0)


def accuracy_tables(summary: Figures) -> list[Table]:
    """Of labelled pairs: what selecting the surest buys, and the benchmark's sections where the data is one."""
    tables = []
    covered = {
        name: points
        for name, points in summary.get("curves", {}).get("risk_coverage", {}).items()
        if points
    }
    if covered:
        headings = [f"{share:.0%}" for share in SHOWN_COVERAGE]
        table = table_of(
            "accuracy of", *headings, "ECE", title="accuracy on the surest pairs, by their share"
        )
        for name, points in covered.items():
            at = [
                next((p for p in points if p["coverage"] >= share - 1e-6), None)
                for share in SHOWN_COVERAGE
            ]
            error = summary["models"].get(name, {}).get("calibration_error")
            table.add_row(name, *(percent(p and p["accuracy"]) for p in at), number(error))
        if "agreed" in covered:
            table.caption = f"agreed: at most {covered['agreed'][-1]['coverage']:.0%} of the pairs; –: not so many are covered"
        tables.append(table)
    return tables + benchmark_tables(summary.get("benchmark"))


def bias_tables(biases: Figures | None) -> list[Table]:
    """How often verdicts go to seat A, to the longer response, to the one with a format of its own, to the judge's own."""
    if not biases:
        return []
    table = Table(
        "verdicts for",
        title="what verdicts lean to",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("pairs", *biases):
        table.add_column(heading, justify="right", no_wrap=True)
    named = {"position": "seat A", "longer": "the longer", "own": "the judge's own"}
    rows = dict.fromkeys(name for figures in biases.values() for name in figures)
    for name in rows:
        cells = [figures.get(name, {}) for figures in biases.values()]
        pairs = max(cell.get("pairs", 0) for cell in cells)
        wide = len(biases) < 4  # columns with intervals that 80 have room for
        ends = [
            (cell.get("rate_low"), cell.get("rate_high")) if wide else (None, None)
            for cell in cells
        ]
        if pairs:
            rates = (percent(cell.get("rate"), *end) for cell, end in zip(cells, ends, strict=True))
            table.add_row(named.get(name, f"with {name}"), str(pairs), *rates)
    return [table]


def across_tables(across: Figures | None) -> list[Table]:
    """What stays of the verdicts in each dataset that was compared."""
    if not across:
        return []
    tables = []
    for other in across["against"]:
        left = ", ".join(
            f"{n} {why.replace('_', ' ')}" for why, n in other["left_out"].items() if n
        )
        title = f"against {other['dataset']}: {other['pairs']} pairs in both{f' ({left})' if left else ''}"
        table = Table(
            "reward model", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for heading in (
            "same verdict (95 %)",
            "kappa",
            "rank r",
            "CREAM's tau",
            "same best\nand worst",
        ):
            table.add_column(heading, justify="right")
        for name, m in other["models"].items():
            same = percent(m["agreement"], m["agreement_low"], m["agreement_high"])
            table.add_row(
                name,
                same,
                number(m["kappa"]),
                number(m["spearman"]),
                number(m["kendall"]),
                percent(m["top_order"]),
            )
        prompts = max((m["ranked_prompts"] for m in other["models"].values()), default=0)
        table.caption = (
            f"ranks: {prompts} prompts with 3 or more responses, every pair judged"
            if prompts
            else "no prompt with 3 responses to rank"
        )
        tables.append(table)
    if across["unanimous"]:
        table = Table(
            "same verdict in all",
            f"of {across['unanimous_pairs']} pairs (95 %)",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for name, m in across["unanimous"].items():
            table.add_row(name, percent(m["unanimous"], m["unanimous_low"], m["unanimous_high"]))
        tables.append(table)
    return tables


def subset_table(by_subset: Figures, models: list[str]) -> Table:
    """Accuracy of each model on each subset, with its interval where a terminal of 80 columns has room for it."""
    table = table_of("accuracy on", "pairs", *models)
    for subset, figures in by_subset.items():
        rates = [figures["models"].get(name, {}) for name in models]
        ends = [
            (m.get("accuracy_low"), m.get("accuracy_high")) if len(models) < 3 else (None, None)
            for m in rates
        ]
        cells = [percent(m.get("accuracy"), *end) for m, end in zip(rates, ends, strict=True)]
        table.add_row(subset, str(figures["pairs"]), *cells)
    return table


def benchmark_tables(benchmark: Figures | None) -> list[Table]:
    if not benchmark:
        return []
    models = benchmark["models"]
    table = table_of(benchmark["name"], *models)
    for section in dict.fromkeys(s for figures in models.values() for s in figures["sections"]):
        table.add_row(
            section, *(percent(figures["sections"].get(section)) for figures in models.values())
        )
    for name, key in (("score", "score"), ("with prior sets", "score_with_prior_sets")):
        if any(figures.get(key) is not None for figures in models.values()) or key == "score":
            table.add_row(name, *(percent(figures[key]) for figures in models.values()))
    missing = next(iter(models.values()))["missing"]
    if missing:
        table.caption = (
            f"no score: nothing of {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        )
    incomplete = sum(figures.get("incomplete", 0) for figures in models.values())
    if incomplete:
        table.caption = (
            f"{table.caption or ''} {incomplete} examples without all verdicts are left out".strip()
        )
    return [table]


def iterations_table(rows: list[tuple[str, Figures]]) -> Table:
    """One row per dataset that was checked, in the order of the run: agreement, order flips, and accuracy."""
    caption = (
        "order flips: share of the judge's verdicts that change when the two answers change places; "
        "accuracy against gold labels: of the judge, of the implicit reward, and where all agree"
    )
    title = "how far the internal reward models agree"
    # Whole at 80 columns, because padding collapses.
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("dataset", no_wrap=True)
    for heading in (
        "pairs",
        "agree",
        "kappa",
        "order\nflips",
        "judge\naccuracy",
        "implicit\naccuracy",
        "agreed\naccuracy",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in rows:
        judge, implicit = s["models"].get("judge", {}), s["models"].get("implicit", {})
        kappa = s["between"][0]["kappa"] if s["between"] else None
        accuracy = [percent(m.get("accuracy")) for m in (judge, implicit, s["agreed"])]
        table.add_row(
            name,
            str(s["pairs"]),
            percent(s["agreed"]["rate"]),
            number(kappa),
            percent(judge.get("flip_rate")),
            *accuracy,
        )
    return table


def winrate_tables(summary: Figures) -> list[Table]:
    """Each two models that were compared, one match by subset, and several on one scale; whole at 80 columns."""
    others = {m["other"] for m in summary["matches"]}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(
        f"against {others.copy().pop()}" if len(others) == 1 else "model / against", overflow="fold"
    )
    for heading in ("verdicts", "win rate ± s.e.", "length-\ncontrolled (95 %)", "characters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in summary["matches"]:
        name = m["model"] if len(others) == 1 else f"{m['model']} / {m['other']}"
        lc = [m.get(f"length_controlled_{key}") for key in ("win_rate", "low", "high")]
        characters = f"{m['mean_characters']:.0f} / {m['mean_characters_other']:.0f}"
        table.add_row(name, verdicts(m), rate_and_error(m), percent(*lc), characters)
    tables = [table]
    if len(summary["matches"]) == 1 and summary["matches"][0]["by_subset"]:
        parts = Table("subset", "verdicts", "win rate ± s.e.", box=box.SIMPLE_HEAD, pad_edge=False)
        for subset, part in summary["matches"][0]["by_subset"].items():
            parts.add_row(subset, verdicts(part), rate_and_error(part))
        tables.append(parts)
    scale = summary["bradley_terry"]
    if scale and len(scale["models"]) > 2:
        last = summary["matches"][-1]["other"]
        board = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        board.add_column("Bradley-Terry", overflow="fold")
        for heading in (f"beats {last}\n(95 %)", "length and style\ntaken out (95 %)"):
            board.add_column(heading, justify="right")
        for row in scale["models"]:
            rates = [
                percent(
                    *(row.get(f"{p}{key}") for key in ("win_rate", "win_rate_low", "win_rate_high"))
                )
                for p in ("", "style_controlled_")
            ]
            board.add_row(row["model"], *rates)
        tables.append(board)
    return tables


def grade_table(summary: Figures) -> Table:
    table = table_of("answers to", "grades", "mean grade (95 %)")
    rows = {
        "all": summary["all"],
        **summary["turns"],
        **{name: f for name, f in summary["categories"].items() if name != "None"},
    }
    for name, m in rows.items():
        ends = (
            f" [{number(m['grade_low'], 1)}, {number(m['grade_high'], 1)}]"
            if m["grade_low"] is not None
            else ""
        )
        table.add_row(name, str(m["grades"]), number(m["grade"]) + ends)
    if summary["mean_mass"] is not None and summary["mean_mass"] < LITTLE_MASS:
        table.caption = f"the judge gives a grade with probability {summary['mean_mass']:.2f}: it hardly answers the question"
    return table


def verdicts(m: Figures) -> str:
    return f"{m['verdicts']} of {m['pairs']}" if m["verdicts"] < m["pairs"] else str(m["pairs"])


def rate_and_error(m: Figures) -> str:
    return (
        percent(m["win_rate"])
        if m["standard_error"] is None
        else f"{m['win_rate']:.1%} ± {m['standard_error']:.1%}"
    )


def plan_tables(estimate: Figures) -> list[Table]:
    """What a training run will take, and how long its pairs are."""
    run = Table(
        title="what this run will take, on one process", title_justify="left", show_header=False
    )
    shared = 1 - estimate["tokens"] / estimate["tokens_without_sharing"]
    rows = [
        ("optimiser steps", f"{estimate['steps']:,} of {estimate['pairs']:,} pairs"),
        (
            "tokens",
            f"{estimate['tokens']:,}; {estimate['tokens_without_sharing']:,} without sharing ({shared:.0%} saved)",
        ),
        ("packs", f"{estimate['packs']:,}, {estimate['packing_efficiency']:.0%} full"),
        (
            "peak memory",
            f"about {estimate['peak_bytes'] / 2**30:.1f} GiB (weights {estimate['weights_bytes'] / 2**30:.1f})",
        ),
        ("time", f"about {estimate['seconds'] / 60:.1f} min, from one pack on this device"),
    ]
    for name, value in rows:
        run.add_row(name, value)
    lengths = Table(
        "tokens of a pair, up to",
        "pairs",
        "",
        title="all branches, shared tokens once",
        title_justify="left",
    )
    most = max(count for _, count in estimate["tokens_a_pair"])
    for tokens, count in estimate["tokens_a_pair"]:
        lengths.add_row(f"{tokens:,}", f"{count:,}", "█" * round(20 * count / most))
    return [run, lengths]


def print_results(stage: Stage, manifest: Figures) -> None:
    """Prints a stage's results on stdout, where it has any beside its dataset."""
    console = Console(markup=False)  # names of models and subsets are whatever they are
    summary = manifest.get("summary") or {}
    tables: list[Any] = []
    if "estimate" in manifest:
        tables = plan_tables(manifest["estimate"])
    elif summary and stage.tables is not None:
        tables = registry.load(stage.tables)(manifest)
    for table in tables:
        console.print(table)
    for note in summary.get("notes", ()):
        console.print(f"note: {note}", markup=False)


def match_tables(manifest: Figures) -> list[Table]:
    """All of `eval winrate`."""
    return winrate_tables(manifest["summary"])


def grade_tables(manifest: Figures) -> list[Table]:
    """All of `eval mt-bench`."""
    return [grade_table(manifest["summary"])]


def verdict_tables(manifest: Figures) -> list[Any]:
    """All of `check-consistency` or `eval rewards`, the whole first and then each subset."""
    summary = manifest["summary"]
    tables: list[Any] = (
        consistency_tables(summary) + accuracy_tables(summary) + bias_tables(summary.get("biases"))
    )
    tables += across_tables(manifest.get("across"))
    if set(summary.get("by_subset", ())) - {"(none)"}:
        tables.append(subset_table(summary["by_subset"], list(summary["models"])))
    for subset, figures in manifest.get("by_subset", {}).items():
        if subset != "(none)":
            tables += [f"subset {subset}", *consistency_tables(figures)]
    return tables


def summary_line(stage: str, out: str, manifest: Figures) -> str:
    """One line: rows in, rows out, every drop by reason, every null, seconds."""
    if manifest.get("dry_run"):
        return f"{stage}: dry run, nothing written; {manifest.get('rows_in', 'all')} rows would go to {out}"
    drops = (
        ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["drops"].items()))
        or "0 dropped"
    )
    nulls = "".join(
        f", {count} without a verdict of {name.removeprefix('rewards.')}"
        for name, count in manifest["nulls"].items()
        if name.startswith("rewards.")
    )
    again = (
        " (already done)" if manifest.get("reused") else f" in {manifest.get('seconds', 0):.1f} s"
    )
    return f"{stage}: {manifest['rows_in']} in = {manifest['rows_out']} out + {drops}{nulls} → {out}{again}"
