"""docs/study.md and docs/study_appendix.md from the raw results: tables, pictures, and the
differences that intervals establish.

    python benchmarks/study/report.py
        reads benchmarks/study/results/*.json,
        writes both pages and docs/study/*.svg (with the extra `report`)

No figure in the pages is typed by hand. This module has the appendix; `summary.py` has the page.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from study import summary
from study.experiments import EXPERIMENTS
from study.figures import Forest, Heat, Mark, courses, forest, heat_map
from study.tables import (
    CLAIMED,
    COST,
    FIGURES,
    WHY,
    Json,
    by_seed,
    differences,
    interval,
    last_iteration,
    means,
    paired,
    present,
    rank_correlation,
    said,
    spread,
    table,
)

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "study.md"
APPENDIX = PAGE.with_name("study_appendix.md")
IMAGES = PAGE.with_suffix("")


def sweep(
    records: Sequence[Json], methods: Sequence[Json], iteration: int, figure: str
) -> dict[str, dict[float, dict[float, list[float]]]]:
    """Values of a figure over seeds by orders, scale and lambda."""
    found: dict[str, dict[float, dict[float, list[float]]]] = {}
    for m in sorted(
        methods, key=lambda m: (m["settings"]["implicit_scale"], m["settings"]["penalty_weight"])
    ):
        asked = m["settings"]
        orders = (
            asked.get("judge_orders") or asked["orders"]
        )  # its name in the results up to LAST_WITH_ALL_ARMS
        scale, weight = asked["implicit_scale"], asked["penalty_weight"]
        values = list(by_seed(records, m["name"], iteration, figure).values())
        found.setdefault(orders, {}).setdefault(scale, {})[weight] = values
    return found


def heat(records: Sequence[Json], methods: Sequence[Json], iteration: int, figure: str) -> str:
    """Mean of a figure by scale (rows) and lambda (columns), one table for each setting of
    `orders`.
    """
    parts = []
    for orders, scales in sweep(records, methods, iteration, figure).items():
        weights = list(next(iter(scales.values())))
        rows = [
            [f"s = {scale:g}", *(spread(row[w]) for w in weights)] for scale, row in scales.items()
        ]
        parts.append(
            f"judge orders {orders}:\n\n"
            + table([FIGURES[figure][0], *(f"lambda {w:g}" for w in weights)], rows)
        )
    return "\n\n".join(parts)


# ------------------------------ the page


OURS, RIVAL = "scir", "srlm"  # of the page's first table
SAME_WORLD = ("ablation", "sweep")  # as main


def gaps(results: dict[str, Json]) -> str:
    """How the gap between OURS and RIVAL moves.

    A row an experiment and iteration, where M_1 stands and the paired differences.
    """
    rows = []
    for name, result in results.items():
        if name in SAME_WORLD:
            continue
        records = result["records"]
        claimed = present(records, CLAIMED[:6])
        for iteration in range(1, max((r["iteration"] for r in records), default=0) + 1):
            pairs = {figure: paired(records, OURS, RIVAL, iteration, figure) for figure in claimed}
            if not claimed or not (n := len(pairs[claimed[0]])):
                continue
            m1 = [
                m
                for seed, m in result["m1"].items()
                if int(seed) in by_seed(records, OURS, iteration, claimed[0])
            ]
            cells = [
                spread([m[figure] for m in m1])
                for figure in ("judge_accuracy", "implicit_accuracy", "agreement", "flip_rate")
            ]
            for figure in CLAIMED[:6]:
                mean, low, high = interval(pairs[figure]) if pairs.get(figure) else (math.nan, 0, 0)
                mark = "**" if low > 0 or high < 0 else ""
                cells.append("–" if math.isnan(mean) else f"{mark}{mean:+.3f}{mark}")
            rows.append([ABOUT.get(name, (name, ""))[0], str(iteration), str(n), *cells])
    start = ["judge accuracy", "implicit accuracy", "agreement", "flips"]
    return table(
        [
            "experiment",
            "iteration",
            "seeds",
            *(f"M_1: {s}" for s in start),
            *(FIGURES[f][0] for f in CLAIMED[:6]),
        ],
        rows,
    )


#: The main world's seeds: those that settings and defaults were chosen on, and those that came
#: after every choice.
SEED_SETS = {"0-9, chosen on": range(10), "from 10 on, fresh": range(10, 20)}


def again(records: Sequence[Json], methods: Sequence[str], iteration: int) -> str:
    """Another seed set.

    The claims about OURS on each set by itself, and how alike the two order all methods.
    """
    sets = {name: [r for r in records if r["seed"] in seeds] for name, seeds in SEED_SETS.items()}
    if not all(by_seed(part, OURS, iteration, "agreement") for part in sets.values()):
        return ""
    own = [m for m in methods if m in (OURS, "scir-likelihood")]
    tables = [
        "\n\n".join([f"Seeds {name}:", differences(part, own, RIVAL, iteration)])
        for name, part in sets.items()
    ]
    figures = [figure for figure in CLAIMED if figure in present(records, CLAIMED)]
    both = [
        m
        for m in methods
        if all(by_seed(part, m, iteration, "agreement") for part in sets.values())
    ]
    columns = [
        [
            [statistics.fmean(by_seed(part, m, iteration, figure).values()) for m in both]
            for part in sets.values()
        ]
        for figure in figures
    ]
    alike = table(
        ["rank correlation of the sets", *(FIGURES[f][0] for f in figures)],
        [[f"{len(both)} methods", *(f"{rank_correlation(*column):+.2f}" for column in columns)]],
    )
    return "\n\n".join(
        [
            "Settings and defaults were chosen on seeds 0 to 9. Each seed set by itself:",
            *tables,
            alike,
        ]
    )


def why(results: dict[str, Json], iteration: int) -> str:
    """Where SCIR does not win in the main world, and what the other figures say about it."""
    main, real = results["main"], results.get("real")
    methods = [m["name"] for m in main["methods"]]
    had = [set(by_seed(main["records"], m, iteration, "agreement")) for m in methods]
    seeds = set.intersection(*filter(None, had))
    records = [r for r in main["records"] if r["seed"] in seeds]

    def mean(
        method: str, figure: str, of: Sequence[Json] = records, after: int = iteration
    ) -> float:
        return statistics.fmean(by_seed(of, method, after, figure).values())

    start = statistics.fmean(
        m["judge_accuracy"] for seed, m in main["m1"].items() if int(seed) in seeds
    )
    there = [m for m in methods if by_seed(records, m, iteration, "judge_accuracy")]
    changes = [
        statistics.fmean(
            r["judge_accuracy"] - main["m1"][str(r["seed"])]["judge_accuracy"]
            for r in records
            if r["method"] == m and r["iteration"] == iteration
        )
        for m in there
    ]
    points = [
        (
            f"**The judge's accuracy does not move**, under any method: {start:.3f} at M_1, and "
            f"from {min(changes):+.3f} to {max(changes):+.3f} after iteration {iteration}."
        )
        + (
            " Gold labels do not change it either: after the verdict's loss on gold labels of "
            "the same pairs for as many steps (`verdict oracle`) it is "
            f"{mean('verdict oracle', 'judge_accuracy'):.3f}. So this world cannot "
            "show whether SCIR improves the judge."
            if by_seed(records, "verdict oracle", iteration, "judge_accuracy")
            else ""
        ),
        f"**Sampled quality is equal.** Of its own pairs in iteration {iteration} SCIR's mask "
        f"keeps {mean(OURS, 'mask_rate'):.0%}, and the agreed labels are correct on "
        f"{mean(OURS, 'own_agreed_accuracy'):.1%} (the judge, who labels all pairs for "
        f"`{RIVAL}`, on {mean(RIVAL, 'own_judge_accuracy'):.1%}). But the penalty also "
        "limits how far the policy moves: "
        "mean |log-odds| of the implicit reward (s = 1) end at "
        f"{mean(OURS, 'implicit_abs'):.3f}, under `{RIVAL}` at "
        f"{mean(RIVAL, 'implicit_abs'):.3f}. The smaller move "
        "cancels the gain of better labels in sampled answers; greedy answers, which a large "
        "move makes worse, keep it. Half of the "
        f"penalty (`scir-r1`) has {mean('scir-r1', 'sampled_quality'):.3f} sampled and "
        f"{mean('scir-r1', 'greedy_quality'):.3f} greedy, the full penalty "
        f"{mean(OURS, 'sampled_quality'):.3f} and {mean(OURS, 'greedy_quality'):.3f}.",
        "**The first defaults lose** (`scir-s5-l1`): with s lambda = 5 the penalty is too "
        "weak to keep the implicit reward accurate: its accuracy falls to "
        f"{mean('scir-s5-l1', 'own_implicit_accuracy'):.1%} "
        "on own pairs, and so do the agreed labels, which are correct on "
        f"{mean('scir-s5-l1', 'own_agreed_accuracy'):.1%}. Without any penalty "
        f"(`filter-only`) it is {mean('filter-only', 'own_agreed_accuracy'):.1%}.",
    ]
    if by_seed(records, "penalty-only", iteration, "greedy_quality"):
        chosen = [
            interval(paired(records, OURS, "penalty-only", iteration, figure))
            for figure in CLAIMED[:4]
        ]
        points.append(
            "**Selecting by agreement adds little.** `{}` minus the same without the mask "
            "(`penalty-only`: every pair, the judge's label): sampled {:+.3f} [{:+.3f}, "
            "{:+.3f}], greedy {:+.3f} [{:+.3f}, {:+.3f}], "
            "judge {:+.3f} [{:+.3f}, {:+.3f}], implicit {:+.3f} [{:+.3f}, {:+.3f}].".format(
                OURS, *(x for one in chosen for x in one)
            )
        )
    if real and by_seed(of := real["records"], OURS, 1, "unseen_implicit_accuracy"):
        losses = [
            statistics.fmean(paired(of, m, RIVAL, 1, "unseen_implicit_accuracy"))
            for m in ("scir-l0.1", OURS, "scir-l3")
        ]
        held = [mean(m, "implicit_abs", of, 1) for m in (RIVAL, "scir-l0.1", OURS, "scir-l3")]
        points.append(
            "**On a real model the implicit reward is less accurate, and more so with a larger "
            "penalty.** Means on unseen kinds of damage, minus `srlm`: {:+.3f} with lambda 0.1, "
            "{:+.3f} by default, {:+.3f} with lambda 3. There "
            "DPO still improves the implicit reward, and the penalty shortens "
            "its move: the implicit reward's mean |log-odds| (s = 1) end at {:.3f} under "
            "`srlm`, and at {:.3f}, {:.3f} and {:.3f}.".format(*losses, *held)
        )
    return "\n\n".join(
        [
            f"Means over the {len(seeds)} seeds that all methods have.",
            "\n".join(f"- {point}" for point in points),
        ]
    )


def in_short(results: dict[str, Json]) -> str:
    main = results["main"]
    last = last_iteration(main["records"])
    own = [m["name"] for m in main["methods"] if m["name"].startswith("scir")]
    lines = [
        line
        for other in ("srlm", "filter-only", "ipo", "sppo")
        for line in said(main["records"], own, other, last)
    ]
    return "\n\n".join(
        [
            "## In short",
            (
                f"All methods less `{RIVAL}` in the main world, after iteration {last}; an arrow "
                "marks a value outside of its panel, and section [main](#main) has the numbers:"
            ),
            image("methods"),
            "Differences that 95 % intervals establish there, for SCIR's settings:",
            "\n".join(lines),
            *filter(None, [again(main["records"], [m["name"] for m in main["methods"]], last)]),
            f"`{OURS}` less `{RIVAL}` in every world:",
            image("worlds"),
            "The same as numbers (bold: the interval excludes 0), beside M_1:",
            gaps(results),
            "## Where it does not win, and why",
            why(results, last),
            "Later experiments are in the ablation, in the sweep, and in [log.md](log.md).",
        ]
    )


# ------------------------------ pictures


#: File -> what it shows, for who cannot see it
ALT = {
    "methods": (
        "Every method less {rival} in the main world after its last iteration: paired means "
        "with 95 % intervals, one panel per figure"
    ),
    "worlds": (
        "{ours} less {rival} in every world, after each iteration: paired means with 95 % "
        "intervals, one panel per figure"
    ),
    "courses": (
        "The main world's figures from M_1 to the last model, one line per method: means over the "
        "seeds that all have"
    ),
    "sweep": (
        "Means by scale and lambda as heat maps, a row for each setting of orders, a column a "
        "figure"
    ),
}
COURSES = (OURS, RIVAL, "filter-only", "oracle")


def alt(name: str) -> str:
    return ALT[name].format(ours=OURS, rival=RIVAL)


def image(name: str) -> str:
    return f"![{alt(name)}]({IMAGES.name}/{name}.svg)"


def mark(records: Sequence[Json], method: str, iteration: int, figure: str) -> Mark | None:
    values = paired(records, method, RIVAL, iteration, figure)
    return interval(values) if values else None


def methods_picture(result: Json) -> str:
    records, last = result["records"], last_iteration(result["records"])
    claimed = present(records, CLAIMED[:6])
    found = {
        m["name"]: [mark(records, m["name"], last, figure) for figure in claimed]
        for m in result["methods"]
        if m["name"] != RIVAL
    }
    found = {name: marks for name, marks in found.items() if any(marks)}
    names = [f"{name} ({len(paired(records, name, RIVAL, last, claimed[0]))})" for name in found]
    panels = [
        Forest(*FIGURES[figure], [[marks[i]] for marks in found.values()])
        for i, figure in enumerate(claimed)
    ]
    return forest(
        alt("methods"),
        f"less {RIVAL} (seeds)",
        names,
        panels,
        strong={name for name in names if name.startswith(OURS)},
    )


def worlds_picture(results: dict[str, Json]) -> str:
    worlds = {
        name: results[name]["records"]
        for name in results
        if name not in SAME_WORLD and last_pairs(results[name]["records"])
    }
    iterations = range(1, max(map(last_iteration, worlds.values())) + 1)
    names = [
        f"{ABOUT.get(name, (name, ''))[0]} ({last_pairs(records)})"
        for name, records in worlds.items()
    ]
    panels = [
        Forest(
            *FIGURES[figure],
            [[mark(records, OURS, i, figure) for i in iterations] for records in worlds.values()],
        )
        for figure in CLAIMED[:6]
    ]
    return forest(
        alt("worlds"),
        f"{OURS} less {RIVAL} (seeds)",
        names,
        panels,
        series=[f"iteration {i}" for i in iterations],
    )


def last_pairs(records: Sequence[Json]) -> int:
    """Seeds that OURS and RIVAL both have at the end."""
    return len(paired(records, OURS, RIVAL, last_iteration(records), "agreement"))


def courses_picture(result: Json) -> str:
    records, last = result["records"], last_iteration(result["records"])
    names = [name for name in COURSES if by_seed(records, name, last, "agreement")]
    seeds = set.intersection(*(set(by_seed(records, name, last, "agreement")) for name in names))

    def course(method: str, figure: str) -> list[float]:
        start = [result["m1"][str(seed)][figure] for seed in seeds]
        columns = [by_seed(records, method, i, figure) for i in range(1, last + 1)]
        return [
            statistics.fmean(start),
            *(statistics.fmean(column[seed] for seed in seeds) for column in columns),
        ]

    panels = {
        FIGURES[figure][0]: {name: course(name, figure) for name in names}
        for figure in ("sampled_quality", "greedy_quality", "implicit_accuracy", "agreement")
    }
    return courses(alt("courses"), [f"M_{i}" for i in range(1, last + 2)], panels)


def sweep_picture(result: Json) -> str:
    records, last = result["records"], last_iteration(result["records"])
    shown = present(records, ("greedy_quality", "implicit_accuracy", "agreement"))
    tables = {figure: sweep(records, result["methods"], last, figure) for figure in shown}
    orders = next(iter(tables.values()))
    panels = [
        [
            Heat(
                f"{FIGURES[figure][0]}, orders {order}",
                FIGURES[figure][1],
                averages(tables[figure][order]),
            )
            for figure in shown
        ]
        for order in orders
    ]
    scales = next(iter(orders.values()))
    weights = next(iter(scales.values()))
    return heat_map(
        alt("sweep"),
        [f"{s:g}" for s in scales],
        [f"{w:g}" for w in weights],
        ("scale s", "lambda"),
        panels,
    )


def averages(scales: dict[float, dict[float, list[float]]]) -> list[list[float | None]]:
    return [
        [statistics.fmean(values) if values else None for values in row.values()]
        for row in scales.values()
    ]


def pictures(results: dict[str, Json]) -> dict[str, str]:
    """File -> SVG: those that the page refers to."""
    ordered = {name: results[name] for name in EXPERIMENTS if name in results}
    drawn = {"sweep": sweep_picture(ordered["sweep"])} if "sweep" in ordered else {}
    if "main" in ordered:
        main = ordered["main"]
        drawn |= {
            "methods": methods_picture(main),
            "worlds": worlds_picture(ordered),
            "courses": courses_picture(main),
        }
    return drawn


# ------------------------------ the page


def appendix(results: dict[str, Json]) -> str:
    ordered = {name: results[name] for name in EXPERIMENTS if name in results}
    parts = [
        INTRODUCTION,
        *([in_short(ordered)] if "main" in ordered else []),
        *(section(name, results[name]) for name in EXPERIMENTS if name in results),
    ]
    missing = [name for name in EXPERIMENTS if name not in results]
    if missing:
        parts.append(
            "## Not run yet\n\n"
            + "\n".join(
                f"- `python benchmarks/study/run.py --experiment {name}`" for name in missing
            )
        )
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# The study's appendix: every experiment

[study.md](study.md) is the page to read first.
`python benchmarks/study/report.py` writes both from `benchmarks/study/results/`.
It computes every figure from those records; failed attempts are in [log.md](log.md).

**The world** (`benchmarks/study/world.py`).
Small Llamas answer three kinds of task whose quality, from 0 to 1, a program computes:
sort digits, drop a letter from a word, spell syllables by a small grammar.
An answer may begin with a phrase without meaning, so length is almost independent of quality.
M_0 is trained on answers with errors, and on which of two answers is better.
M_1 is M_0 after a few steps of DPO on 600 labeled pairs.
After that no method uses a label, except the oracles (DPO on gold labels; the verdict's loss on
gold labels) and `external` (gold labels and noise).
All methods start from the same M_1 of their seed, sample the same number of answers to the same
prompts in each of two iterations, and take the same number of steps of the same number of pairs.
So data and steps are equal.
SCIR's steps also compute the judge's branches, so they process more tokens (last table of each
section).

**How to read it.**
"Quality" is the mean quality of answers to prompts that no training uses, sampled at temperature 1
or greedy.
Accuracy, agreement and flips are measured on 600 held-out labeled pairs.
Tables give mean ± standard deviation over seeds.
Differences are paired by seed, with a 95 % interval (Student's t).
Bold means that the interval excludes 0; with fewer than three seeds there is no interval.
With this many intervals, one in twenty would exclude 0 by chance."""


#: The last commit that has the settings of all committed arms.
LAST_WITH_ALL_ARMS = "95e2cbc"


def removed_arms(name: str, methods: Sequence[str]) -> list[str]:
    """One paragraph that names the arms of an experiment's results that can no longer be run; [] if
    all can.
    """
    removed = [m for m in methods if m not in {method.name for method in EXPERIMENTS[name][1]}]
    if not removed:
        return []
    arms = ", ".join(f"`{m}`" for m in removed)
    return [
        (
            f"The last commit that can run all of these arms is {LAST_WITH_ALL_ARMS}. Since then "
            f"the settings of {arms} are removed."
        )
    ]


#: Experiment -> its heading and what has to be said of it first; the others have their name.
ABOUT = {
    "main": (
        "main",
        """\
`scir` is SCIR at its defaults: the implicit reward's scale s fitted to the judge's sizes at M_1,
lambda such that the penalty's gradient starts at twice the preference loss's. `-r1` has the ratio
1, `-l1` and `-l3` lambda 1 and 3 for every seed, `-s5` and `-s25` that s; `scir-likelihood` has the
policy's likelihood as a third model, at ratio 1. `filter-only` has the mask alone, `penalty-only`
the penalty alone.""",
    ),
    "ablation": (
        "Ablations",
        """\
SCIR as it was by default (`scir-l3`: sizes of its reward models matched at M_1, lambda 3), and one
setting changed at a time.""",
    ),
    "sweep": (
        "Scale and lambda",
        """\
Two seeds, so no intervals. Their product matters most: it sets how much the penalty
limits the policy.""",
    ),
    "seed-labels-150": (
        "A quarter of the labels",
        "150 labeled pairs instead of 600 for M_1. M_0 is that of main.",
    ),
    "label-noise": ("Wrong labels", "A fifth of the labels are wrong. M_0 is main's."),
    "length-bias": (
        "Labels that favor length",
        "Half of the labels go to the longer answer, whatever its quality. M_0 is main's.",
    ),
    "position-bias": (
        "A judge with position bias",
        """\
M_0's judge is given 2 nats for seat A, by moving that row of its head along the mean hidden state
at the verdict. Otherwise main's world.""",
    ),
    "judges": (
        "More ways to judge",
        """\
M_0 is taught, with as many of its pairs each as a kind of task has, to give one answer a score of 0
to 5 (rubric: its quality in fifths) and to write both scores before its verdict (rationale). Each
is SRLM's judge and SCIR's third reward model, or both are with four.""",
    ),
    "smaller": ("A smaller model", "Width 64 and two layers, in place of 96 and three."),
    "larger": ("A larger model", "Width 192 and four layers."),
    "real": (
        "A real model",
        """\
SmolLM2-135M-Instruct on real text (`benchmarks/study/real.py`): instructions and the answers that
came with them, cut to a few sentences, each beside the same answer damaged.
Three kinds of damage are in the pairs that teach the judge and in the unlabeled ones:
another prompt's answer of similar length (foreign), the sentences in another order (shuffled), an
answer that stops in the middle (truncated).
Two are only measured (unseen): a sentence denied, or repeated, in place of another one.
M_1 is the model after {base[max_steps]} steps of {base[batch_size]} pairs of the verdict's loss and
{tune[max_steps]} of {tune[batch_size]} of DPO, on {size[n_seed_pairs]} labeled pairs.
Then each method takes {loop[max_steps]} steps of {loop[batch_size]} pairs on the same
{size[n_pairs]} unlabeled pairs, which are fixed and not sampled, because no program can grade a
sampled answer of this model.
So the quality of the policy is not measured; of its sampled answers the page gives the length, the
share that was cut off at {max_new_tokens} tokens, and the share of three words in a row that
occurred before.
Held out: {size[n_heldout]} prompts per seed, each with every kind of damage.""",
    ),
    "consensus-hostile": (
        "Consensus labels in a hostile world",
        """\
In three quarters of all answers, M_0's lessons included, the last letter is written three times,
which costs quality: the policy finds an error likely, and likelihood misleads where it decides.""",
    ),
    "powered-real": (
        "A real model, with power",
        """\
As above, with {size[n_pairs]} prompts of own pairs (each with {size[n_kinds]} kinds of damage, each
pair once an iteration), {size[n_heldout]} held-out prompts, answers of up to {size[words][1]}
words, and two iterations; one H100, bf16.
Forced choice: the share of held-out pairs whose real answer has more log-probability per token
under the policy than the damaged one.
Learning rate and beta were chosen on pilot seeds by the distance from `srlm` to `oracle` alone
(`benchmarks/study/powered.py`).""",
    ),
}


def section(name: str, result: Json) -> str:
    records, methods = result["records"], [m["name"] for m in result["methods"]]
    last = last_iteration(records)
    shown = range(1, last + 1) if name in ("main", "real") else [last]
    others = [
        m
        for m in (["scir-l3"] if name == "ablation" else ["srlm", "filter-only", "scir-s5-l1"])
        if m in methods
    ]
    seeds = sorted({r["seed"] for r in records})
    heading, about = ABOUT.get(name, (name, ""))
    parts = [
        f"## {heading}",
        *([about.format(**result["setup"])] if about else []),
        f"`python benchmarks/study/run.py --experiment {name} --seeds {' '.join(map(str, seeds))}`",
        *removed_arms(name, methods),
    ]
    start = [
        {"method": "M_1", "iteration": 1, "seed": int(seed), **m}
        for seed, m in result["m1"].items()
        if int(seed) in seeds
    ]
    columns = {figure: heading for figure, (heading, _) in FIGURES.items()}
    if name == "sweep":
        return "\n\n".join(
            [
                *parts,
                "Darker is better:",
                image("sweep"),
                *(heat(records, result["methods"], last, f) for f in present(records, CLAIMED)),
            ]
        )
    if name == "main":
        parts += ["Means over the seeds that all of these methods have:", image("courses")]
    parts += ["M_1:", means(start, ["M_1"], 1, columns)]
    for iteration in shown:
        parts += [
            f"After iteration {iteration} (M_{iteration + 1}):",
            means(records, methods, iteration, columns),
        ]
    for other in others if name in ("main", "ablation", "real") else others[:1]:
        parts += [
            f"Less `{other}`, after iteration {last}:",
            differences(records, methods, other, last),
        ]
    mine = [m for m in methods if m.startswith("scir")] if name == "main" else methods
    lines = [line for other in others for line in said(records, mine, other, last)]
    subsets = {key: key.removeprefix("unseen_") for r in records for key in r if " on " in key}
    if subsets:
        parts += [
            f"Accuracy on each kind, M_1 and after iteration {last}:",
            means(start, ["M_1"], 1, subsets),
            means(records, methods, last, subsets),
        ]
    parts += [
        "Differences that the intervals establish:",
        "\n".join(lines) or "- None: fewer than three seeds are done.",
    ]
    for iteration in shown:
        parts += [
            f"Diagnostics of iteration {iteration} (own pairs: those of training):",
            means(records, methods, iteration, WHY),
        ]
    return "\n\n".join([*parts, f"Cost of iteration {last}:", means(records, methods, last, COST)])


def main() -> None:
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((HERE / "results").glob("*.json"))
    }
    PAGE.write_text(summary.page(results), encoding="utf-8")
    APPENDIX.write_text(appendix(results), encoding="utf-8")
    print(PAGE, APPENDIX, sep="\n")
    if find_spec("matplotlib") is None:
        sys.exit(
            "the pages are written, but not their pictures: they need the package matplotlib, pip "
            "install 'scir-cli[report]'"
        )
    IMAGES.mkdir(exist_ok=True)
    for name, svg in (pictures(results) | summary.pictures(results)).items():
        (IMAGES / f"{name}.svg").write_text(svg, encoding="utf-8")
    print(IMAGES)


if __name__ == "__main__":
    main()
