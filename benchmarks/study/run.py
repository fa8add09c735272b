"""The study: methods x seeds on one world, through scir's own stages, every method on the same M_1,
prompts, steps and pairs a step.

    python benchmarks/study/run.py --experiment main --out runs/study
        the main table; what is done is not done again
    python benchmarks/study/report.py
        docs/study.md from benchmarks/study/results/*.json

A cell is a method on a seed. It runs the steps of the method's recipe (recipes/methods/) in this
process and is measured after each iteration; its figures go to OUT/cells/, and all of an
experiment's to results/EXPERIMENT.json. Steps with the same settings and inputs (the first
iteration's answers and verdicts) are made once a seed and copied. The gold scorer answers for
evaluation, for the oracle and for the external reward model only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent.parent))

from scir_cli import config, recipe, registry, stages
from scir_cli.analysis import consistency
from scir_cli.analysis.verdicts import from_table
from scir_cli.data import dataset, files, hashing, manifests
from study import real
from study.experiments import EXPERIMENTS, RATIONALES, WORLDS, Method, Setup
from study.world import JUDGE_PROMPT, Gold, plant_position_bias, quality_of_rows

Json = dict[str, Any]
HERE = Path(__file__).parent
RECIPES = HERE.parent.parent / "recipes" / "methods"
MEASURED = {"dtype": "fp32", "device": "cpu"}  # where nothing else is said


# ------------------------------ stages in this process


def run(stage: str, **values: Any) -> Json:
    """Runs a stage with these settings and returns its manifest."""
    settings = registry.STAGES[stage].settings
    known = {k: v for k, v in MEASURED.items() if k in settings.model_fields}
    return stages.load(stage)(config.build(settings, known, values, where=stage))


def run_once(step: recipe.Step, made: dict[str, Path]) -> Json:
    """Runs a step, or copies what the same stage made of the same inputs for another method of this
    seed.
    """
    settings = {k: str(v) for k, v in step.settings.items() if k != "output_dir"}
    digests = {
        k: hashing.digest_path(Path(v)) if Path(v).exists() else v for k, v in settings.items()
    }
    key, out = hashing.digest_json([step.stage, digests]), Path(step.settings["output_dir"])
    if key in made and not (out / "manifest.json").exists():
        shutil.copytree(made[key], out, dirs_exist_ok=True)
    manifest = run(step.stage, **step.settings)
    if (
        step.stage in ("generate", "judge") and settings.get("score_column") is None
    ):  # with scores from outside, equal digests are not equal data
        made.setdefault(key, out)
    return manifest


# ------------------------------ measuring


def measure(
    model: Path, world: Path, out: Path, setup: Setup, gold: Gold, answers: bool = True
) -> Json:
    """Figures of a model on what no method trains on.

    Its reward models on held-out pairs, and what its answers are like, unless `answers` is false.
    """
    kind = WORLDS[setup.world]
    if (world / "measured.jsonl").exists():
        figures = measure_together(model, world, out, setup)
    else:
        figures = measure_heldout(model, world, "heldout", out, setup)
        if (world / "unseen.jsonl").exists():
            figures |= {
                f"unseen_{name}": value
                for name, value in measure_heldout(model, world, "unseen", out, setup).items()
            }
    if not answers:
        return figures
    for name, options in kind.ANSWERS.items():
        run(
            "generate",
            model=str(model),
            input=str(world / "test.jsonl"),
            max_new_tokens=setup.max_new_tokens,
            batch_size=256,
            dtype=setup.dtype,
            device=setup.device,
            output_dir=out / name,
            **options,
        )
        rows = dataset.read_dataset(out / name, "candidates").to_pylist()
        figures |= {
            f"{name}_{figure}": value for figure, value in kind.of_answers(rows, gold).items()
        }
    return figures


def measure_heldout(model: Path, world: Path, name: str, out: Path, setup: Setup) -> Json:
    """How right, how sure and how much of one mind a model's reward models are on the labeled
    pairs of NAME.jsonl.
    """
    asked = {
        "model": str(model),
        "input": str(world / f"{name}.jsonl"),
        "dtype": setup.dtype,
        "device": setup.device,
        **prompts_of(world),
    }
    run(
        "eval rewards",
        **asked,
        reward_reference=str(world / "m0"),
        implicit_scale=1.0,
        output_dir=out / name,
    )
    summary = files.read_json(out / name / "manifest.json")["summary"]
    others = {}
    if judges := list(getattr(setup.size, "judges", ())):
        run(
            "eval rewards",
            **asked,
            reward_models=judges,
            output_dir=out / f"{name}-others",
            **RATIONALES,
        )
        others = files.read_json(out / f"{name}-others" / "manifest.json")["summary"]["models"]
    return figures_of(summary, summary["by_subset"], others)


def measure_together(model: Path, world: Path, out: Path, setup: Setup) -> Json:
    """`measure_heldout` of the pairs of seen and unseen damage, scored at once.

    And the policy's forced choice: how often it gives the real answer more probability per token.
    M_0's log-probabilities are computed once a world.
    """
    shared = {
        "dtype": setup.dtype,
        "device": setup.device,
        "rows_per_part": 1000,
        **prompts_of(world),
    }
    pairs, first = world / "measured-pairs", world / WORLDS[setup.world].CHAIN[0]
    if not (pairs / "manifest.json").exists():
        run(
            "judge",
            model=str(first),
            input=str(world / "measured.jsonl"),
            reward_models=["likelihood"],
            output_dir=pairs,
            **shared,
        )
    run(
        "eval rewards",
        model=str(model),
        input=str(pairs),
        reward_models=["judge", "implicit", "likelihood"],
        reward_reference=str(first),
        implicit_scale=1.0,
        output_dir=out / "measured",
        **shared,
    )
    verdicts = from_table(dataset.read_dataset(out / "measured" / "judged", "judged"))
    figures: Json = {}
    for prefix, kinds in (("", real.SEEN), ("unseen_", real.UNSEEN)):
        rows = [i for i, kind in enumerate(verdicts.subset) if kind in kinds]
        of = verdicts.take(np.array(rows))
        summary = consistency.summary(of, ["judge", "implicit"])
        found = figures_of(summary, consistency.by_subset(of), {})
        found["forced_choice"] = summary["models"]["likelihood"]["accuracy"]
        figures |= {f"{prefix}{name}": value for name, value in found.items()}
    return figures


def figures_of(summary: Json, by_subset: Json, others: Json) -> Json:
    """The figures of judge and implicit reward that a record has.

    summary, by_subset: of `eval rewards`. others: further reward models of another run.
    """
    judge, implicit = summary["models"]["judge"], summary["models"]["implicit"]
    return {
        "judge_accuracy": judge["accuracy"],
        "implicit_accuracy": implicit["accuracy"],
        "agreed_accuracy": summary["agreed"]["accuracy"],
        "agreement": summary["between"][0]["agreement"],
        "flip_rate": judge["flip_rate"],
        "judge_abs": judge["mean_abs_log_odds"],
        "implicit_abs": implicit["mean_abs_log_odds"],
        "judge_calibration_error": judge["calibration_error"],
        "judge_length_correlation": judge["length_correlation"],
        "implicit_length_correlation": implicit["length_correlation"],
        **{f"{other}_accuracy": figures["accuracy"] for other, figures in others.items()},
        **{
            f"{model} on {kind}": of["models"][model]["accuracy"]
            for kind, of in by_subset.items()
            for model in ("judge", "implicit")
        },
    }


def measure_pairs(judged: Path, gold: Gold) -> Json:
    """How right the reward models are about the pairs that are trained on.

    By gold labels, which training does not see.
    """
    table = dataset.read_dataset(judged, "judged")
    with gold.purpose("evaluation"):
        better = [
            gold(row["messages"][-1]["content"], row["first"]["text"])
            - gold(row["messages"][-1]["content"], row["second"]["text"])
            for row in table.select(["messages", "first", "second"]).to_pylist()
        ]
    labels = pa.array(
        [None if d == 0 else "first" if d > 0 else "second" for d in better], pa.string()
    )
    table = table.set_column(table.schema.get_field_index("gold_label"), "gold_label", labels)
    verdicts = from_table(table)
    summary = consistency.summary(verdicts)
    figures = {f"own_{name}_accuracy": of["accuracy"] for name, of in summary["models"].items()}
    if {"judge", "implicit"} <= set(verdicts.names):
        agreed = consistency.summary(verdicts, ["judge", "implicit"])["agreed"]
        figures |= {
            "own_agreement": agreed["rate"],
            "own_agreed_accuracy": agreed["accuracy"],
        }
    return figures


def measure_labels(preferences: Path, gold: Gold) -> Json:
    """Accuracy and certainty of the labels that a method trains on.

    By gold labels, which training does not see.
    """
    table = dataset.read_dataset(preferences, "preferences")
    right: list[float] = []
    certainty: list[float] = []
    with gold.purpose("evaluation"):
        for row in table.select(
            ["messages", "first", "second", "label", "label_probability"]
        ).to_pylist():
            prompt = row["messages"][-1]["content"]
            better = gold(prompt, row["first"]["text"]) - gold(prompt, row["second"]["text"])
            if better == 0 or row["label"] is None:
                continue
            right.append(float((better > 0) == (row["label"] == "first")))
            certainty.append(1.0 if row["label_probability"] is None else row["label_probability"])
    if not right:
        return {}
    return {
        "label_accuracy": statistics.fmean(right),
        "label_certainty": statistics.fmean(certainty),
    }


def trained(folder: Path) -> Json:
    """What training cost and what it saw: means over its steps."""
    records = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [r for r in records if r["kind"] == "train"]
    names = {
        "scir/mask_rate": "mask_rate",
        "scir/scale": "scale",
        "scir/penalty_weight": "penalty_weight",
        "grad_norm": "grad_norm",
    }
    means = {
        short: statistics.fmean(r[name] for r in steps)
        for name, short in names.items()
        if name in steps[0]
    }
    gradients = {
        k.replace("branch_grad_norm/", "gradient_"): v
        for r in records
        if r["kind"] == "validation"
        for k, v in r.items()
        if "branch" in k
    }
    totals = {
        "steps": len(steps),
        "tokens": sum(r["tokens"] for r in steps),
        "train_seconds": sum(r["step_seconds"] for r in steps),
    }
    return means | gradients | totals


# ------------------------------ one world, one cell


def prompts_of(world: Path) -> dict[str, str]:
    """The setting that names each prompt file of a world."""
    return {
        f"{name}_prompt": str(path)
        for name in ("judge", "rationale", "rubric")
        if (path := world / f"{name}.txt").exists()
    }


def place_of(worlds: Path, setup: Setup, seed: int) -> Path:
    """Where the world of a seed is kept: one for all experiments that make it alike."""
    made_by = [dataclasses.asdict(setup.size), setup.base, setup.tune]
    for name, default in MEASURED.items():
        if (value := getattr(setup, name)) != default:
            made_by.append(value)
    return worlds / f"world-{hashing.digest_json(made_by)[:8]}-{seed}"


def prepare(world: Path, setup: Setup, seed: int, gold: Gold) -> Path:
    """The world of a seed with M_0, M_0 taught to judge (one model where M_0 is made) and M_1
    (tuned on the few seed labels), and M_1's figures.

    Worlds that differ in their seed labels alone share the model that is taught to judge.
    """
    kind = WORLDS[setup.world]
    if not (world / "m1.json").exists():
        if not (world / "judge.txt").exists():
            kind.write(world, setup.size, seed)
        first, taught, lesson = kind.CHAIN
        shared = {
            **prompts_of(world),
            "seed": seed,
            "num_epochs": 1000,
            "dtype": setup.dtype,
            "device": setup.device,
        }
        same = [
            hashing.digest_path(world / first),
            hashing.digest_path(world / f"{lesson}.jsonl"),
            setup.base,
            setup.dtype,
            seed,
        ]
        made = world.parent / f"{taught}-{hashing.digest_json(same)[:8]}"
        if not (made / "manifest.json").exists():
            run(
                "train",
                objective="sft",
                reward_models=["judge"],
                model=str(world / first),
                input=str(world / f"{lesson}.jsonl"),
                output_dir=made,
                **shared,
                **setup.base,
            )
        shutil.rmtree(world / taught, ignore_errors=True)
        shutil.copytree(made, world / taught)
        if bias := getattr(setup.size, "position_bias", 0.0):
            pairs = [
                json.loads(line)
                for line in (world / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            asked = [
                JUDGE_PROMPT.format(question=p["prompt"], a=p["chosen"], b=p["rejected"])
                for p in pairs
            ]
            plant_position_bias(world / taught, asked, bias)
        run(
            "train",
            objective="dpo",
            model=str(world / taught),
            input=str(world / "seed.jsonl"),
            output_dir=world / "m1",
            **shared,
            **setup.tune,
        )
        files.write_json(
            world / "m1.json", measure(world / "m1", world, world / "measured", setup, gold)
        )
    return world


def run_cell(
    folder: Path,
    world: Path,
    method: Method,
    setup: Setup,
    seed: int,
    gold: Gold,
    made: dict[str, Path],
) -> list[Json]:
    """One record an iteration."""
    out = folder / f"{method.name}-{seed}"
    if not (out / "m1").exists():
        shutil.copytree(world / "m1", out / "m1")
    records: list[Json] = []
    figures: Json = {}
    for step in steps_of(world, out, method, setup, seed, gold):
        started, place = time.monotonic(), Path(step.settings["output_dir"])
        if step.stage == "generate":
            step.settings["backend"] = WORLDS[setup.world].BACKEND
        manifest = run_once(step, made)
        figures["seconds"] = figures.get("seconds", 0) + time.monotonic() - started
        if step.stage == "generate" and method.scores:
            add_scores(place, method.scores, gold, seed)
        if place.name.endswith("-judged"):
            figures |= measure_pairs(place, gold)
        if step.stage == "filter":
            figures["kept"] = manifest["summary"]["labeled"] / manifest["rows_in"]
            figures |= measure_labels(place, gold)
            if soft := manifest["summary"].get("soft_labels"):
                figures["label_temperature"] = soft["temperature"]
        if step.stage == "train":
            record = {
                "method": method.name,
                "seed": seed,
                "iteration": len(records) + 1,
                **figures,
                **trained(place),
            }
            last = len(records) + 1 == setup.iterations
            answers = last or setup.answers == "every"
            record |= measure(place, world, out / f"{place.name}-measured", setup, gold, answers)
            records.append(record)
            figures = {}
            if last:
                break
    return records


def steps_of(
    world: Path, out: Path, method: Method, setup: Setup, seed: int, gold: Gold
) -> list[recipe.Step]:
    """The steps of a method's recipe, without those that make M_1, because the world has it."""
    names = {
        "base": str(world / "m0"),
        "prompts": str(world / "prompts.jsonl"),
        "seed_pairs": str(world / "seed.jsonl"),
    }
    shared = {
        "seed": seed,
        "dtype": setup.dtype,
        "device": setup.device,
        **prompts_of(world),
    }
    overrides = names | shared | setup.loop | method.settings
    overrides = {k: v.format(**names) if isinstance(v, str) else v for k, v in overrides.items()}
    steps = [
        s
        for s in recipe.load(RECIPES / f"{method.recipe}.yaml", out, overrides)
        if not s.settings["output_dir"].endswith(("/m1", "/m1-judge"))
    ]
    if (world / "pairs.jsonl").exists():
        return with_given_pairs(steps, world, out, method, gold)
    return steps


def with_given_pairs(
    steps: Sequence[recipe.Step], world: Path, out: Path, method: Method, gold: Gold
) -> list[recipe.Step]:
    """The steps without `generate`: what is judged are the pairs of the world's file.

    A method with gold labels reads a copy in its own folder that has them as a column.
    """
    given = world / "pairs.jsonl"
    if method.scores:
        lines = [json.loads(line) for line in given.read_text(encoding="utf-8").splitlines()]
        with gold.purpose(method.scores):
            for row in lines:
                quality = [gold(row["prompt"], row[side]) for side in ("chosen", "rejected")]
                row["score"] = quality[0] - quality[1]
        given = out / "pairs.jsonl"
        with files.atomic_write(given) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    kept = [step for step in steps if step.stage != "generate"]
    for step in kept:
        if step.stage == "judge" and str(step.settings["input"]).endswith("-candidates"):
            step.settings["input"] = str(given)
    return kept


def add_scores(candidates: Path, purpose: str, gold: Gold, seed: int) -> None:
    """A column `score` of the candidates, and the digests of the manifest that go with it.

    Gold for the oracle, gold and noise for the external reward model.
    """
    from study.world import Draw

    manifest = manifests.read(candidates)
    if manifest.get("scores") == purpose:
        return
    for part in manifest["parts"]:
        path = candidates / part["file"]
        with pa.ipc.open_stream(path) as stream:
            table = stream.read_all()
        if "score" in table.column_names:  # of a run that was stopped before the manifest
            table = table.drop_columns(["score"])
        with gold.purpose(purpose):
            scores = quality_of_rows(gold, table.to_pylist())
        if purpose == "external":
            scores = [
                s + Draw(f"{seed} {i}").gauss(0, 0.3)
                for s, i in zip(scores, table["candidate_id"].to_pylist(), strict=True)
            ]
        table = table.append_column("score", pa.array(scores)).replace_schema_metadata(
            table.schema.metadata
        )
        with (
            files.atomic_write(path) as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        part["digest"] = hashing.digest_part(path)
    digest = hashing.digest_json([part["digest"] for part in manifest["parts"]])
    manifests.write(candidates, {**manifest, "digest": digest, "scores": purpose})


# ------------------------------ an experiment


def run_experiment(
    name: str,
    out: Path,
    seeds: Sequence[int],
    methods: Sequence[Method],
    setup: Setup,
    gold: Gold,
    results: Path,
) -> None:
    """All cells, seed by seed, so that a run that is stopped has whole seeds.

    The results so far are written after each cell.
    """
    cells = out / "cells"
    worlds = out.parent
    cells.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        started = time.monotonic()
        world = prepare(place_of(worlds, setup, seed), setup, seed, gold)
        made: dict[str, Path] = {}
        print(f"seed {seed}: M_1 ready after {time.monotonic() - started:.0f} s", flush=True)
        for method in methods:
            path = cells / f"{method.name}-{seed}.json"
            if not path.exists():
                started = time.monotonic()
                files.write_json(
                    path, {"records": run_cell(out, world, method, setup, seed, gold, made)}
                )
                print(f"  {method.name}: {time.monotonic() - started:.0f} s", flush=True)
            collect(name, out, seeds, methods, setup, results)
        for folder in {
            *made.values(),
            *(out / f"{method.name}-{seed}" for method in methods),
        }:  # weights and answers; the figures are kept
            shutil.rmtree(folder if folder.parent == out else folder.parent, ignore_errors=True)


def collect(
    name: str,
    out: Path,
    seeds: Sequence[int],
    methods: Sequence[Method],
    setup: Setup,
    results: Path,
) -> None:
    """results/NAME.json: what was asked for, where everybody starts, and all records there are."""
    start = {
        str(s): files.read_json(path)
        for s in seeds
        if (path := place_of(out.parent, setup, s) / "m1.json").exists()
    }
    records = [
        record
        for seed in seeds
        for method in methods
        if (path := out / "cells" / f"{method.name}-{seed}.json").exists()
        for record in files.read_json(path)["records"]
    ]
    asked = {
        "setup": dataclasses.asdict(setup),
        "methods": [dataclasses.asdict(m) for m in methods],
    }
    results.mkdir(parents=True, exist_ok=True)
    files.write_json(
        results / f"{name}.json",
        {
            "experiment": name,
            **asked,
            "versions": dataset.versions(),
            "m1": start,
            "records": records,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="main")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", help="only these of the experiment's methods")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    setup, methods = EXPERIMENTS[given.experiment]
    methods = [m for m in methods if not given.methods or m.name in given.methods]
    gold = Gold(("evaluation", "oracle", "external"), WORLDS[setup.world].scorer(setup.size))
    run_experiment(
        given.experiment,
        given.out / given.experiment,
        given.seeds,
        methods,
        setup,
        gold,
        given.results,
    )


if __name__ == "__main__":
    main()
