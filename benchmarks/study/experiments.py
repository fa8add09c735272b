"""What the study compares.

A setup (world, sizes, steps) and methods, each a recipe of recipes/methods/ with a few settings
changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from study import real, world
from study.world import Size

#: Where a setup's world comes from: its data sets, models, gold scorer, and what is measured of
#: answers.
WORLDS: dict[str, Any] = {"tasks": world, "text": real}


@dataclass(frozen=True)
class Method:
    """A recipe and what is changed in it.

    Scores: the purpose for which gold scores become a column of its candidates (oracle, external).
    """

    name: str
    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    scores: str = ""


@dataclass(frozen=True)
class Setup:
    """A world's size and the settings of each kind of training; `loop` holds for every method
    alike.

    Learning rate, steps and beta of the loop were chosen on the oracle alone, on a world that is
    not in any table (docs/log.md).
    """

    size: Size | real.Size = field(default_factory=Size)
    base: dict[str, Any] = field(
        default_factory=lambda: {
            "learning_rate": 3e-3,
            "batch_size": 48,
            "max_steps": 1200,
            "schedule": "linear",
        }
    )
    tune: dict[str, Any] = field(
        default_factory=lambda: {
            "learning_rate": 1e-4,
            "batch_size": 32,
            "max_steps": 20,
            "schedule": "linear",
        }
    )
    loop: dict[str, Any] = field(
        default_factory=lambda: {
            "learning_rate": 1e-4,
            "beta": 1.0,
            "batch_size": 32,
            "max_steps": 60,
            "num_epochs": 1000,
            "schedule": "linear",
            "n": 4,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 24,
            "keep_cut": True,
            "rows_per_part": 1000,
        }
    )
    max_new_tokens: int = 24
    world: str = "tasks"  # of WORLDS
    iterations: int = 2
    dtype: str = "fp32"
    device: str = "cpu"
    # whether answers are sampled to measure every model, or none before the last iteration's
    answers: Literal["every", "last"] = "every"


RIVALS = [
    Method("srlm", "srlm"),
    Method("filter-only", "filter-only"),
    Method("penalty-only", "penalty-only"),
    Method("dice", "dice"),
    Method("cream", "cream"),
    Method("random-filter", "random-filter"),
    Method("external", "external", scores="external"),
    Method("ipo", "ipo"),
    Method("simpo", "simpo", {"beta": 2.0}),
    Method("sppo", "sppo"),
    Method("oracle", "external", scores="oracle"),
]

#: How far labels can take the judge: the verdict's loss, and nothing else, on gold labels of the
#: same pairs.
VERDICTS = Method(
    "verdict oracle",
    "external",
    {"objective": "sft", "sft_weight": 0.0, "reward_models": ["judge", "external"]},
    scores="oracle",
)

LIKELIHOOD = {"reward_models": ["judge", "implicit", "likelihood"]}
SCIR = Method(
    "scir", "scir"
)  # the defaults: s and lambda matched to M_1's log-odds and gradients, and kept
R1 = Method("scir-r1", "scir", {"penalty_ratio": 1.0})
L3 = Method(
    "scir-l3", "scir", {"penalty_weight": 3.0}
)  # the defaults before: one lambda for every model
BEFORE = Method(
    "scir-s5-l1", "scir", {"implicit_scale": 5.0, "penalty_weight": 1.0}
)  # and those before them

MAIN = [
    SCIR,
    R1,
    Method("scir-likelihood", "scir-likelihood"),
    L3,
    Method(
        "scir-likelihood-l3", "scir", LIKELIHOOD | L3.settings
    ),  # the ablation's best, on two of the seeds
    BEFORE,
    Method("scir-l1", "scir", {"penalty_weight": 1.0}),
    # the sizes at M_1, found on the tuning world (docs/log.md)
    Method("scir-s25-l1", "scir", {"implicit_scale": 25.0, "penalty_weight": 1.0}),
    Method("scir-s25-l3", "scir", {"implicit_scale": 25.0, "penalty_weight": 3.0}),
    *RIVALS,
    VERDICTS,
    Method("srlm half step", "srlm", {"learning_rate": 5e-5}),
]

#: SCIR's open settings, one at a time, and the baseline again, so that pairs are within the
#: experiment. The committed results
#: have more: arms of settings that lost or did nothing and are gone (LAST_WITH_ALL_ARMS in
#: report.py).
ABLATION = [
    Method("srlm", "srlm"),
    L3,
    *[
        Method(name, "scir", L3.settings | settings)
        for name, settings in {
            "orders averaged": {"judge_orders": "averaged"},
            "no mask": {"target": "judge"},
            "no entropy": {"entropy_weight": 0.0},
            "judge not trained": {"stop_gradient": "judge"},
            "threshold 0.6": {"min_confidence": 0.6},
            "anchored": {"anchors": "{seed_pairs}"},
            "with likelihood": LIKELIHOOD,
            "ipo": {"preference_loss": "ipo"},
            "sppo": {"preference_loss": "sppo"},
        }.items()
    ],
]

SWEEP = [
    Method(
        f"{orders} s={scale:g} lambda={weight:g}",
        "scir",
        {"judge_orders": orders, "implicit_scale": scale, "penalty_weight": weight},
    )
    for orders in ("separate", "averaged")
    for scale in (1.0, 5.0, 25.0, 100.0)
    for weight in (0.1, 1.0, 5.0)
]

RATIONALES = {"rationale_max_tokens": 24, "rationale_batch_size": 256}
JUDGES = Setup(
    size=Size(judges=("rubric", "rationale"), n_base=24000),
    base={**Setup().base, "max_steps": 1800},
    loop=Setup().loop | RATIONALES,
)
WITH_JUDGES = [
    Method("srlm", "srlm"),
    Method(
        "srlm by rubric",
        "srlm",
        {"rule": "rubric", "reward_models": ["judge", "implicit", "rubric"]},
    ),
    Method(
        "srlm by rationale",
        "srlm",
        {"rule": "rationale", "reward_models": ["judge", "implicit", "rationale"]},
    ),
    L3,
    *[
        Method(
            f"scir-l3, {' and '.join(more)}",
            "scir",
            {"reward_models": ["judge", "implicit", *more], **L3.settings},
        )
        for more in (["rubric"], ["rationale"], ["rubric", "rationale"])
    ],
    Method("oracle", "external", scores="oracle"),
]

FEW = [Method("srlm", "srlm"), Method("filter-only", "filter-only"), SCIR, L3, BEFORE]


#: SmolLM2-135M-Instruct on real text; learning rates, batch and steps of the judge's lesson are the
#: quickstart's. 48 steps are what the oracle
#: needs to show its labels; in 12 it did not (docs/log.md).
REAL = Setup(
    world="text",
    size=real.Size(),
    dtype="bf16",
    iterations=1,
    max_new_tokens=48,
    base={
        "learning_rate": 1e-4,
        "batch_size": 4,
        "max_steps": 36,
        "schedule": "linear",
        "sft_weight": 0,
    },
    tune={"learning_rate": 5e-5, "batch_size": 8, "max_steps": 14, "schedule": "linear"},
    loop={
        "learning_rate": 3e-5,
        "beta": 0.1,
        "batch_size": 4,
        "max_steps": 48,
        "num_epochs": 1000,
        "schedule": "linear",
        "n": 2,
        "max_new_tokens": 128,
        "keep_cut": True,
        "rows_per_part": 1000,
    },
)

ON_REAL = [
    Method("srlm", "srlm"),
    Method("filter-only", "filter-only"),
    SCIR,
    R1,
    L3,
    Method("scir-l0.1", "scir", {"penalty_weight": 0.1}),
    Method("oracle", "external", scores="oracle"),
]


def softly(name: str, recipe: str, scores: str = "", **settings: Any) -> Method:
    """A method of the consensus experiment, by the settings that it changes in its recipe."""
    return Method(name, recipe, settings, scores)


#: Verdicts of the oracle in the loss of consensus-judge: gold labels, all of them sure.
GOLD_TARGET = {"objective": "scir", "target": "consensus", "reward_models": ["judge", "external"]}

#: Consensus labels, their rivals, controls, and gold labels under the same losses. docs/method.md,
#: section 8.
CONSENSUS = [
    Method("srlm", "srlm"),
    Method("srlm-soft", "srlm-soft"),
    SCIR,
    Method("scir-likelihood", "scir-likelihood"),
    Method("consensus", "consensus"),
    softly("consensus, sppo", "consensus", preference_loss="sppo", beta=0.5),
    softly("consensus, hard labels", "consensus", label_temperature=1e-9),
    softly("consensus, uncalibrated", "consensus", label_temperature=1.0),
    # a temperature without gold labels
    Method("consensus-damaged", "consensus-damaged"),
    softly("consensus without the judge", "consensus", voters=["likelihood", "pmi"]),
    Method("consensus-judge", "consensus-judge"),
    softly("consensus-judge, half weight", "consensus-judge", penalty_ratio=0.5),
    softly("consensus-judge, double weight", "consensus-judge", penalty_ratio=2.0),
    softly("consensus-judge, sppo", "consensus-judge", preference_loss="sppo", beta=0.5),
    # the control of the judge's term: the judge learns its own soft labels
    softly(
        "own verdicts as target",
        "srlm-soft",
        objective="scir",
        target="consensus",
        penalty_ratio=1.0,
    ),
    Method("ipo", "ipo"),
    Method("random-filter", "random-filter"),
    Method("oracle", "external", scores="oracle"),
    softly("oracle, sppo", "external", "oracle", preference_loss="sppo", beta=0.5),
    softly("oracle-judge", "external", "oracle", **GOLD_TARGET, penalty_ratio=1.0),
]

#: The same on real text, where an experiment has few methods.
CONSENSUS_REAL = [
    m
    for m in CONSENSUS
    if m.name
    in (
        "srlm",
        "srlm-soft",
        "scir",
        "consensus",
        "consensus-judge",
        "own verdicts as target",
        "oracle",
        "oracle-judge",
    )
]


#: The real model with hundreds of own pairs, each of them once an iteration, and 500 held-out ones;
#: for a GPU. The loop is the first of POWER_GRID until pilot seeds have chosen (powered.py).
POWERED = replace(
    REAL,
    size=real.Size(
        words=(12, 90), prompt_words=80, n_seed=56, n_pairs=200, n_kinds=3, n_heldout=100
    ),
    iterations=2,
    max_new_tokens=96,
    device="auto",
    answers="last",
    base=REAL.base | {"save_every": 1000},
    tune=REAL.tune | {"save_every": 1000},
    loop=REAL.loop
    | {
        "batch_size": 12,
        "max_steps": 50,
        "max_tokens_per_pack": 4096,
        "save_every": 1000,
    },
)
POWER_GRID: list[dict[str, Any]] = [
    {"learning_rate": rate, "beta": beta} for rate in (3e-5, 1e-4) for beta in (0.1, 0.5)
]


#: The same in worlds where a voter misleads, or the judge is weaker.
CONSENSUS_ELSEWHERE = [
    m
    for m in CONSENSUS
    if m.name
    in (
        "srlm",
        "srlm-soft",
        "scir",
        "consensus",
        "consensus-judge",
        "consensus without the judge",
        "oracle",
    )
]


def with_size(**changes: Any) -> Setup:
    return Setup(size=replace(Size(), **changes))


EXPERIMENTS: dict[str, tuple[Setup, list[Method]]] = {
    "main": (Setup(), MAIN),
    "ablation": (Setup(), ABLATION),
    "sweep": (Setup(), SWEEP),
    "seed-labels-150": (with_size(n_labels=150), FEW),
    "label-noise": (with_size(label_noise=0.2), FEW),
    "length-bias": (with_size(length_bias=0.5), FEW),
    "position-bias": (with_size(position_bias=2.0), FEW),
    "smaller": (with_size(hidden=64, layers=2), FEW),
    "larger": (with_size(hidden=192, layers=4), FEW),
    "judges": (JUDGES, WITH_JUDGES),
    "real": (REAL, ON_REAL),
    "consensus": (Setup(), CONSENSUS),
    "consensus-hostile": (with_size(systematic_error=0.75), CONSENSUS_ELSEWHERE),
    "consensus-length-bias": (with_size(length_bias=0.5), CONSENSUS_ELSEWHERE),
    "consensus-smaller": (with_size(hidden=64, layers=2), CONSENSUS_ELSEWHERE),
    "consensus-real": (REAL, CONSENSUS_REAL),
    "powered-real": (POWERED, CONSENSUS_REAL),
}
