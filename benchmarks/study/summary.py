"""docs/study.md: the study on one page, from the raw results.

Question, worlds, answer, tables and pictures; `report.py` has the appendix with every experiment.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from study import regimes
from study.figures import Forest, Mark, Region, forest, regions
from study.tables import (
    FIGURES,
    Json,
    by_seed,
    differences,
    interval,
    last_iteration,
    means,
    paired,
    present,
    said,
)

#: The experiment with fresh seeds, the method it is about, and what that has to beat.
FRESH, OURS, RIVAL, PAPER, GOLD = "consensus", "consensus", "srlm-soft", "scir", "oracle"
SHOWN = ("sampled_quality", "greedy_quality", "implicit_accuracy", "judge_accuracy")
SHOWN += ("agreement", "flip_rate")
COLUMNS = {name: FIGURES[name][0] for name in SHOWN}
COLUMNS |= {"label_accuracy": "correct labels", "tokens": "tokens computed"}

#: The experiment on a real model, and its figures.
REAL = "powered-real"
ON_REAL = ("implicit_accuracy", "unseen_implicit_accuracy", "forced_choice")
ON_REAL += ("unseen_forced_choice", "judge_accuracy", "unseen_judge_accuracy")

#: Experiment -> its name in the picture of all worlds.
WORLDS = {
    "consensus": "the main world",
    "consensus-hostile": "hostile: a systematic error is likely",
    "consensus-length-bias": "labels that favor length",
    "consensus-smaller": "a smaller model",
}

#: File -> what it shows.
ALT = {
    "consensus": (
        f"Every method less {RIVAL} on the fresh seeds of the main world: paired means with 95 % "
        "intervals, one panel per figure"
    ),
    "consensus-real": (
        f"Every method less {RIVAL} on the real model: paired means with 95 % intervals, one panel "
        "per figure"
    ),
    "consensus-worlds": (
        f"{OURS} less {RIVAL} in every world: paired means with 95 % intervals, one panel per "
        "figure"
    ),
    "regimes": (
        "The best labels in a simulation, by the accuracy of the judge and of a second voter: one "
        "panel per arrangement of their errors, the accuracy of the trained student in each cell"
    ),
}

#: The methods of the map of regimes; SRLM with hard labels is best nowhere.
MAPPED = ("srlm-soft", "agreement", "consensus", "consensus, calibrated weights")

INTRODUCTION = """# Does it help? A study with gold labels

`python benchmarks/study/report.py` computes every figure of this page from
`benchmarks/study/results/`.
Methods and primary figures were written down in [log.md](log.md) before the fresh seeds ran, and
what failed is there too.
Every other experiment (ablations, rivals, more reward models) is in the
[appendix](study_appendix.md).

## The question

A model labels pairs of its own answers and is trained on them.
Who should label: the judge alone (SRLM), the pairs on which judge and implicit reward agree (SCIR,
the paper's form), or a consensus of several internal reward models
([method.md](method.md), section 8)?

## The worlds

**Main world** (`benchmarks/study/world.py`).
Small Llamas answer tasks whose quality, from 0 to 1, a program computes.
M_1 is a model after a few steps of DPO on 600 labeled pairs; after that only the oracles (DPO on
gold labels) see a label.
Every method starts from the same M_1 of its seed and has the same prompts, answers per prompt,
steps and pairs per step, in each of two iterations.
**Other worlds** change one property of it.
**Real model** (`benchmarks/study/real.py`): SmolLM2-135M-Instruct on real text, where the worse
answer of a pair is the better one damaged.

Differences are paired by seed, with 95 % intervals of Student's t; bold means that the interval
excludes 0."""

LIMITS = """## What it does not show

- **A better judge in the main world.** There the judge's accuracy does not move, under gold
  labels either; on the real model it does.
- **Ten seeds on the real model.** Three or four seeds have wide intervals.
- **A large model on open text.** The main world's models have less than a million parameters and
  its tasks are graded by a program; the real model has 135 million parameters.
- **Agreement as a virtue.** Under the consensus, judge and implicit reward agree less than under
  the judge's own labels, and so they do under gold labels: a policy that learns what its judge does
  not know must disagree with it. Read agreement beside accuracy.
- **Many more iterations.** Two iterations were run."""


def page(results: dict[str, Json]) -> str:
    """The page as Markdown; without the fresh seeds' results it has no tables."""
    parts = [INTRODUCTION]
    if FRESH in results:
        parts += answer(results[FRESH])
    if REAL in results:
        parts += real_model(results[REAL])
    worlds = worlds_of(results)
    if len(worlds) > 1:
        parts += ["## Other worlds", *_image("consensus-worlds"), *_worlds(worlds)]
    return "\n\n".join([*parts, *map_of_regimes(), LIMITS]) + "\n"


def answer(result: Json) -> list[str]:
    """The sections about the fresh seeds of the main world."""
    records, methods = result["records"], [m["name"] for m in result["methods"]]
    last = last_iteration(records)
    seeds = sorted({r["seed"] for r in records})
    ours = [m for m in methods if m.startswith(OURS)]
    claims = [line for other in (RIVAL, PAPER, "srlm") for line in said(records, ours, other, last)]
    return [
        "## The answer in the main world",
        f"Seeds {seeds[0]} to {seeds[-1]}, which no choice had used. "
        + distance_to_gold(records, last),
        "\n".join(claims),
        *_image("consensus"),
        f"After iteration {last} (mean ± standard deviation over seeds):",
        means(records, methods, last, COLUMNS),
        f"`{RIVAL}` is SRLM with soft labels, calibrated as the consensus is: the honest rival.",
        differences(records, methods, RIVAL, last),
    ]


def real_model(result: Json) -> list[str]:
    """The section about the real model."""
    records, methods = result["records"], [m["name"] for m in result["methods"]]
    last = last_iteration(records)
    ours = [m for m in methods if m.startswith(OURS)]
    claims = [line for other in (RIVAL, PAPER, "srlm") for line in said(records, ours, other, last)]
    columns = {figure: FIGURES[figure][0] for figure in (*ON_REAL, "flip_rate")}
    return [
        "## The answer on a real model",
        "SmolLM2-135M-Instruct on one H100, as many seeds as its time allowed; ten were wanted. "
        "Seen kinds of damage are in the pairs that train, unseen ones are not. Forced choice: how "
        "often the policy gives the real answer more log-probability per token than the damaged "
        "one. Gold labels show the room there is:",
        "\n".join([*said(records, [GOLD, "oracle-judge"], "srlm", last), *claims]),
        *_image("consensus-real"),
        means(records, methods, last, columns | {"label_accuracy": "correct labels"}),
    ]


def map_of_regimes() -> list[str]:
    """The section about the simulation of regimes.py."""
    cells = regimes.read()
    sentences = [regime(cells, name) for name in regimes.ARRANGEMENTS]
    return [
        "## Who should label? A map of regimes",
        "A simulation with a linear reward (`benchmarks/study/regimes.py`): a judge, a second "
        f"voter, {regimes.N_PAIRS} pairs, {regimes.N_CALIBRATION} labeled pairs for temperatures, "
        f"{regimes.N_SEEDS} seeds per cell. It is no evidence about language models; it shows "
        "which labels are best when voters are as in a cell. The line is the formula of "
        "[method.md](method.md), section 8.",
        *_image("regimes"),
        "\n".join(sentences),
    ]


def regime(cells: Sequence[Json], name: str) -> str:
    """One line of the list: where which labels are best, and how often the formula is right."""
    own = [cell for cell in cells if cell["arrangement"] == name]
    best = [regimes.best(cell, MAPPED) for cell in own]
    counts = ", ".join(f"`{m}` in {best.count(m)}" for m in MAPPED if m in best)
    clear = [c for c in own if abs(c["agreement_less_srlm"][0]) > 2 * c["agreement_less_srlm"][1]]
    right = sum((c["agreement_less_srlm"][0] > 0) == regimes.formula(c) for c in clear)
    return (
        f"- **{name.capitalize()}**: best of {len(own)} cells: {counts}. In {right} of the "
        f"{len(clear)} cells in which agreement and SRLM differ by more than two standard errors "
        "the formula names the better one."
    )


def regimes_picture() -> str:
    cells = {(c["arrangement"], c["other"], c["judge"]): c for c in regimes.read()}

    def panel(name: str) -> Region:
        rows = [[cells[name, other, judge] for judge in regimes.JUDGE] for other in regimes.OTHER]
        best = [[regimes.best(cell, MAPPED) for cell in row] for row in rows]
        return Region(
            name,
            best,
            [[max(cell["mean"][m] for m in MAPPED) for cell in row] for row in rows],
            [[regimes.formula(cell) for cell in row] for row in rows],
        )

    return regions(
        ALT["regimes"],
        [f"{other:.2f}" for other in regimes.OTHER],
        [f"{judge:.2f}" for judge in regimes.JUDGE],
        ("accuracy of the second voter", "accuracy of the judge"),
        MAPPED,
        [panel(name) for name in regimes.ARRANGEMENTS],
        "agreement pays by the formula",
    )


def distance_to_gold(records: Sequence[Json], iteration: int) -> str:
    """A sentence: the share of the distance from SRLM to gold labels that is closed."""
    figure = "sampled_quality"
    gold, ours = (
        interval(paired(records, method, "srlm", iteration, figure)) for method in (GOLD, OURS)
    )
    correct = {
        method: statistics.fmean(by_seed(records, method, iteration, "label_accuracy").values())
        for method in (OURS, "srlm", PAPER)
    }
    return (
        f"In sampled quality, gold labels gain {gold[0]:+.3f} [{gold[1]:+.3f}, {gold[2]:+.3f}] "
        f"over SRLM and consensus labels {ours[0]:+.3f} [{ours[1]:+.3f}, {ours[2]:+.3f}], "
        f"{ours[0] / gold[0]:.0%} of that distance. Of the labels {correct[OURS]:.0%} are correct "
        f"under `{OURS}`, {correct['srlm']:.0%} under `srlm` and {correct[PAPER]:.0%} of those "
        f"that `{PAPER}` keeps."
    )


def worlds_of(results: dict[str, Json]) -> dict[str, Json]:
    """The experiments of WORLDS in which both methods were run."""
    return {
        name: results[name]
        for name in WORLDS
        if name in results and _n_seeds(results[name]["records"])
    }


def _n_seeds(records: Sequence[Json]) -> int:
    return len(paired(records, OURS, RIVAL, last_iteration(records), "agreement"))


def _worlds(worlds: dict[str, Json]) -> list[str]:
    parts = []
    for name, result in worlds.items():
        if name == FRESH:
            continue
        records, methods = result["records"], [m["name"] for m in result["methods"]]
        last = last_iteration(records)
        parts += [
            f"**{WORLDS[name].capitalize()}**, {_n_seeds(records)} seeds:",
            means(records, methods, last, COLUMNS),
            "\n".join(said(records, [OURS], RIVAL, last) + said(records, [OURS], "srlm", last)),
        ]
    return [part for part in parts if part]


def _image(name: str) -> list[str]:
    return [f"![{ALT[name]}](study/{name}.svg)"]


def _mark(records: Sequence[Json], method: str, figure: str) -> Mark | None:
    values = paired(records, method, RIVAL, last_iteration(records), figure)
    return interval(values) if values else None


def pictures(results: dict[str, Json]) -> dict[str, str]:
    """File -> SVG: those that the page refers to."""
    drawn = {"regimes": regimes_picture()}
    if FRESH in results:
        drawn["consensus"] = methods_picture(results[FRESH], "consensus", SHOWN)
    if REAL in results:
        drawn["consensus-real"] = methods_picture(results[REAL], "consensus-real", ON_REAL)
    worlds = worlds_of(results)
    if len(worlds) > 1:
        drawn["consensus-worlds"] = worlds_picture(worlds)
    return drawn


def methods_picture(result: Json, name: str, figures: Sequence[str]) -> str:
    records = result["records"]
    methods = [m["name"] for m in result["methods"] if m["name"] != RIVAL]
    found = {m: [_mark(records, m, figure) for figure in figures] for m in methods}
    found = {m: marks for m, marks in found.items() if any(marks)}
    panels = [
        Forest(*FIGURES[figure], [[marks[i]] for marks in found.values()])
        for i, figure in enumerate(figures)
    ]
    strong = {m for m in found if m.startswith(OURS)}
    return forest(ALT[name], f"less {RIVAL}", list(found), panels, strong=strong)


def worlds_picture(worlds: dict[str, Json]) -> str:
    figures = present([r for w in worlds.values() for r in w["records"]], SHOWN)
    panels = [
        Forest(*FIGURES[figure], [[_mark(w["records"], OURS, figure)] for w in worlds.values()])
        for figure in figures
    ]
    names = [f"{WORLDS[name]} ({_n_seeds(w['records'])})" for name, w in worlds.items()]
    return forest(ALT["consensus-worlds"], f"{OURS} less {RIVAL} (seeds)", names, panels)
