"""train: pairs -> a model folder (safetensors, tokenizer, card), with the dataset's reference log-probabilities and no second model in the loop."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scir_cli import (
    __version__,
    config,
    consistency,
    losses,
    model_sources,
    objectives,
    pages,
    parallel,
    planning,
    reward_models,
    sources,
    store,
    trackers,
    trees,
)
from scir_cli import policy as policies
from scir_cli.config import TrainSettings
from scir_cli.errors import ConfigError, DataError, warn
from scir_cli.objectives import Collapse, Example, Objective
from scir_cli.parallel import Ranks
from scir_cli.places import is_remote, place
from scir_cli.policy import Policy
from scir_cli.recipe import Step
from scir_cli.reward_models import Context, Pair
from scir_cli.stages.common import LazyPolicy, progress, try_encode
from scir_cli.stages.judge import Scorer, with_reference
from scir_cli.stages.live import View, watching
from scir_cli.store import Json
from scir_cli.trainer import Trainer

LABEL = {"first": 1, "second": -1, None: 0}
#: Settings that are fitted, and the value with which
FITTED: dict[str, Any] = {"implicit_scale": "fitted", "penalty_weight": None}
FITTED_ON = 4  # steps whose gradients lambda is fitted on
REFERENCE_ROWS = 256  # pairs between two moves of the progress bar


def run(settings: TrainSettings) -> Json:
    """Trains and writes a model folder, and returns its manifest; counts are in pairs."""
    if settings.num_processes > 1 and "WORLD_SIZE" not in os.environ and not settings.dry_run:
        given = {name: value for name, value in settings.model_dump(exclude_unset=True).items() if name != "num_processes"}
        parallel.launch(Step("train", config.flatten(given, config.fields(TrainSettings))).arguments, settings.num_processes)
        return store.read_json(settings.output_dir / "manifest.json")
    ranks = Ranks(policies.resolve_device(settings.device).startswith("cuda"))
    try:
        manifest = _run(settings, ranks)
        if settings.report and ranks.main and not settings.dry_run:
            pages.write(settings.report, pages.training(settings.output_dir))
        return manifest
    finally:
        ranks.close()


def _run(settings: TrainSettings, ranks: Ranks) -> Json:
    trackers.check(settings.report_to)
    _check_zero(settings, ranks)
    rows, dropped, digests = _rows(settings)
    if settings.objective == "scir" and settings.entropy_weight > 0.5:
        warn(
            f"--entropy-weight {settings.entropy_weight:g} is large: pairs grow sure of what they happen to say. 0.1 is the default"
        )
    scorer = Scorer(settings) if settings.objective == "scir" else None  # refuses a degenerate reward_reference
    start = scorer.model if scorer else LazyPolicy(settings, settings.model)
    reference = scorer.reference if scorer else None
    reward_key = reference.key if reference else None
    if settings.lora.rank:
        start.options["adapt"] = partial(_with_adapters, settings=settings)
    if ranks.shards_weights or (ranks.size > 1 and settings.sharding == "fsdp"):
        for weights in filter(None, (start, reference)):
            weights.options |= {"ranks": ranks, "cpu_offload": settings.cpu_offload}
    kept = kept_fits(start.path, settings, reward_key) if scorer else {}
    plan = {"stage": "train", "settings": settings.plan(), **digests, "model": start.key, "reward_reference": reward_key}
    plan |= {"kept": kept} if kept else {}
    out = Path(settings.output_dir)
    if settings.dry_run:
        examples, drops = _examples(rows, start, settings)
        estimate = planning.estimate(start.policy, examples, settings, objective_for(settings, start, reward_key))
        return {
            "dry_run": True,
            "plan": plan,
            "rows_in": len(rows) + dropped.total(),
            "drops": dict(dropped + drops),
            "estimate": estimate,
        }
    with store.claim(out, plan, settings.overwrite) if ranks.main else nullcontext() as done:
        if (done := ranks.first(done)) is not None:
            return {**done, "reused": True}
        examples, drops = _examples(rows, start, settings)
        anchors, lost = _examples(_labelled_rows(settings.anchors), start, settings, labelled=True)
        examples, drops = [*examples, *anchors], drops + lost
        validation, _ = _examples(_labelled_rows(settings.validation), start, settings, labelled=True)
        needed = [reference] if reference is not None else []
        for weights in [*needed, *([start] if settings.objective != "sft" else [])]:
            _remember([e.pair for e in [*examples, *validation]], weights, settings, ranks)
        if reference is not None:
            reference.__dict__.pop("policy", None)  # its log-probabilities are known: the second model leaves the memory
        settings = settings.model_copy(update=kept)
        if scorer and settings.implicit_scale == "fitted":
            settings = settings.model_copy(update={"implicit_scale": fitted_scale(rows, examples, scorer, settings)})
        return _train(settings, start, reward_key, examples, validation, dropped + drops, plan, ranks)


def _check_zero(settings: TrainSettings, ranks: Ranks) -> None:
    if ranks.zero and (settings.sharding == "fsdp" or settings.compile):
        raise ConfigError("accelerate's DeepSpeed plugin shards by itself and does not compile: leave --sharding and --compile out")
    if ranks.shards_weights and (settings.quantization != "none" or settings.dry_run):
        raise ConfigError("--quantization and --dry-run need the whole model in each process: no ZeRO stage above 2")
    if ranks.zero and settings.objective == "scir" and settings.penalty_weight is None:
        raise ConfigError(
            "--penalty-ratio is not available under DeepSpeed, which does not expose gradients: give --penalty-weight"
        )


def objective_for(settings: TrainSettings, start: LazyPolicy, reward_key: str | None) -> Objective:
    return objectives.TABLE[settings.objective](settings, start.chat, start.key, reward_key)


def _remember(pairs: list[Pair], weights: LazyPolicy, settings: TrainSettings, ranks: Ranks) -> None:
    """Adds the log-probabilities under `weights` that are missing, each rank its part, and keeps them beside the data for the next run."""
    source = place(settings.input)
    beside = source if store.is_dataset(source) and not is_remote(source) else Path(settings.output_dir)
    path = beside / f"reference_logps-{weights.key}.arrow"
    _add(pairs, weights.key, store.read_columns(path) if path.exists() else {})
    missing = [pair for pair in pairs if weights.key not in pair.reference_logps]
    if not ranks.first(len(missing)):
        return
    own = missing[ranks.rank :: ranks.size]
    with progress("reference log-probabilities", len(own)) as advance:
        for low in range(0, max(ranks.gather(len(own))), REFERENCE_ROWS):  # as often on every rank: sharded weights need them all
            with_reference(own[low : low + REFERENCE_ROWS], weights, settings.max_tokens_per_pack)
            advance(len(own[low : low + REFERENCE_ROWS]))
    for part in ranks.gather({p.pair_id: p.reference_logps[weights.key] for p in own}):
        _add(missing, weights.key, part)
    if ranks.main and os.access(beside, os.W_OK):
        known = {p.pair_id: p.reference_logps[weights.key] for p in pairs}
        store.write_columns(path, known)


def _add(pairs: list[Pair], key: str, known: dict[str, tuple[float, float]]) -> None:
    for pair in pairs:
        if pair.pair_id in known:
            pair.reference_logps[key] = known[pair.pair_id]


def kept_fits(model: Path, settings: TrainSettings, reward_key: str | None) -> dict[str, float]:
    """The scale and the lambda that were fitted when `model` was trained with the same settings against the same reward reference; {} where they were not.

    Fitting the scale anew in each iteration lowers it as log-ratios grow, and with it the penalty's hold on the policy (docs/study.md).
    """
    now = settings.plan()
    wanted = [name for name, value in FITTED.items() if now[name] == value]
    plan, manifest = model / "plan.json", model / "manifest.json"
    if not wanted or not (plan.exists() and manifest.exists()):
        return {}
    made, found = store.read_json(plan), store.read_json(manifest).get("fitted", {})
    before = made["settings"]
    same = all(before.get(name) == now[name] for name in config.names_with(TrainSettings, "affects_fit"))
    if not same or made.get("reward_reference") != reward_key:
        return {}
    return {name: found[name] for name in wanted if name in found and before.get(name) == FITTED[name]}


def fitted_scale(rows: list[dict[str, Any]], examples: list[Example], scorer: Scorer, settings: TrainSettings) -> float:
    """--implicit-scale fitted: s such that the implicit log-odds have the median size of the judge's verdicts, those in the data or, where there are none, its own."""
    pairs = [e.pair for e in examples]
    said = [[r["log_odds"] for r in row["rewards"] if r["reward_model"] == "judge"] for row in rows]
    judge = torch.tensor([float("nan") if a is None else a for one in said for a in one])
    if not len(judge):
        asked = [scorer.models["judge"].branches(pair) for pair in pairs[:REFERENCE_ROWS]]
        logps = torch.stack(list(scorer.model.policy.score(asked, settings.max_tokens_per_pack)))
        judge = scorer.models["judge"].odds(logps.T, Context.of(pairs[:REFERENCE_ROWS], None)).log_odds
    own = torch.tensor([p.reference_logps[scorer.model.key] for p in pairs]).T  # (2, pairs)
    unfitted = settings.model_copy(update={"implicit_scale": config.IMPLICIT_SCALE})
    models = reward_models.make(["implicit"], scorer.model.chat, unfitted)
    implicit = models["implicit"].odds(own, Context.of(pairs, scorer.reference_key)).log_odds
    return config.IMPLICIT_SCALE * losses.matching_scale(judge, implicit)


def fitted_weight(trainer: Trainer, ratio: float) -> float:
    """--penalty-ratio: lambda such that the penalty's gradient is `ratio` times the preference loss's at the start, over the first steps' pairs."""
    norms = trainer.term_norms(("preference", "penalty"), FITTED_ON)
    if not all(norms.values()):
        warn(f"--penalty-ratio: the gradient norms of the first {FITTED_ON} steps are {norms}; lambda is {ratio:g}")
        return ratio
    return ratio * norms["preference"] / norms["penalty"]


def _rows(settings: TrainSettings) -> tuple[list[dict[str, Any]], Counter[str], Json]:
    """The training rows, each with a `label`; which columns count as labels depends on the kind of dataset, never on the objective."""
    path = place(settings.input)
    if store.is_dataset(path):
        table, dropped = store.read_dataset(path, "preferences", "consistency", "judged").slice(0, settings.limit), Counter[str]()
    else:
        table, dropped = sources.load_pairs(settings.input, settings.limit)
    if not table.num_rows:
        raise DataError(f"{settings.input} holds no pair to train on ({dict(dropped) or 'it has no rows'})")
    rows = table.to_pylist()
    for row in rows:
        row["label"] = row["label"] if "label" in row else row["gold"]
    others = {
        name: spec and sources.digest(spec) for name, spec in (("validation", settings.validation), ("anchors", settings.anchors))
    }
    digests = {"input": sources.digest(settings.input), **others}
    return rows, dropped, digests


def _labelled_rows(spec: str | None) -> list[dict[str, Any]]:
    rows = sources.load_pairs(spec)[0].to_pylist() if spec else []
    return [{**row, "label": row["gold"]} for row in rows if row["gold"]]


def _examples(
    rows: list[dict[str, Any]], start: LazyPolicy, settings: TrainSettings, labelled: bool | None = None
) -> tuple[list[Example], Counter[str]]:
    """The rows as examples, with their labels; SCIR's own pairs are taken without, where nothing else is said."""
    labelled = settings.objective != "scir" if labelled is None else labelled
    drops: Counter[str] = Counter()
    objective = objective_for(settings, start, None)
    examples = []
    for row in rows:
        pair = try_encode(row, start.chat)
        label = LABEL[row["label"]] if labelled else 0
        branches = objective.branches(Example(pair, label)) if pair else []
        if pair is None:
            drops["prompt_boundary"] += 1
        elif labelled and label == 0:
            drops["unlabelled"] += 1
        elif max(len(b.ids) for b in branches) > start.context_length:
            drops["too_long"] += 1
        else:
            certainty = row.get("certainty")
            examples.append(Example(pair, label, 1.0 if certainty is None else certainty, trees.size(branches)))
    if rows and not examples:
        raise DataError(f"{settings.input} leaves no pair to train on: {dict(drops)}")
    return examples, drops


def _train(
    settings: TrainSettings, start: LazyPolicy, reward_key: str | None, examples: list[Example], validation: list[Example],
    drops: Counter[str], plan: Json, ranks: Ranks,
) -> Json:  # fmt: skip
    policy = start.policy
    if start.sharded and not policy.takes_trees:
        raise ConfigError(f"--sharding fsdp needs a model that takes token trees; {settings.model} does not: use ddp")
    watch = Watch(settings, policy, [e.pair for e in validation], [e.label for e in validation], reward_key)
    objective = objective_for(settings, start, reward_key)
    trainer = Trainer(policy, objective, examples, settings, Path(settings.output_dir), watch if validation else None, ranks)
    if isinstance(objective, objectives.Scir) and settings.penalty_weight is None:
        objective.penalty_weight = ranks.first(fitted_weight(trainer, settings.penalty_ratio))
    with watching(View(f"train {settings.objective}", trainer.n_steps)) if ranks.main else nullcontext(lambda *_: None) as see:
        final = trainer.train(see)
    if start.sharded:
        state = {name: parallel.whole(value, ranks.main) for name, value in policy.model.state_dict(keep_vars=True).items()}
        if ranks.main:
            policy = policies.load(settings, str(start.path), "cpu", adapt=start.options.get("adapt"))
            policy.model.load_state_dict(state)
    manifest = _write_model(settings, policy, trainer, plan, Path(settings.output_dir), final, drops) if ranks.main else None
    return ranks.first(manifest)


def _with_adapters(model: Any, settings: TrainSettings) -> Any:
    """The model with LoRA adapters, which change nothing until they are trained; with them off it is its own frozen start."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("--lora-rank needs the package peft: pip install 'scir[lora]'") from error
    torch.manual_seed(settings.seed)  # every rank the same adapters
    targets = settings.lora.target_modules
    config = LoraConfig(
        r=settings.lora.rank, lora_alpha=settings.lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )  # peft's, of transformers 5.23
        return get_peft_model(model, config)


class Watch:
    """Figures of each reward model on labelled pairs while training goes on: which side wins is free, so it is watched (METHOD 4.5)."""

    def __init__(
        self, settings: TrainSettings, policy: Policy, pairs: Sequence[Pair], labels: Sequence[int], reward_key: str | None
    ) -> None:
        self.settings, self.policy, self.pairs, self.gold, self.reward_key = (
            settings,
            policy,
            pairs,
            np.array(labels, dtype=float),
            reward_key,
        )
        names = [m for m in settings.reward_models if m == "judge" or (m == "implicit" and reward_key)]
        self.models = reward_models.make(names, policy.chat, settings)
        self.guard = Collapse(1)

    def __call__(self) -> dict[str, float]:
        asked = [reward_models.ask(self.models, pair) for pair in self.pairs]
        logps = torch.stack(list(self.policy.score(asked, self.settings.max_tokens_per_pack)))
        answers = reward_models.answer(self.models, logps, Context.of(self.pairs, self.reward_key))
        odds = np.stack([answer.log_odds.numpy().astype(float) for answer in answers.values()])
        figures: dict[str, float] = {}
        for name, values in zip(answers, odds, strict=True):
            figures[f"validation/accuracy/{name}"] = float(np.mean(np.where(values == 0, 0.5, values * self.gold > 0)))
            figures[f"validation/abs_log_odds/{name}"] = float(np.abs(values).mean())
        if "judge" in answers and (seats := answers["judge"].seats) is not None:
            figures["validation/flip_rate"] = float((seats[0].sign() == seats[1].sign()).float().mean())
            self.guard(figures["validation/abs_log_odds/judge"], figures["validation/flip_rate"])
        if len(odds) > 1:
            figures["validation/agreement"] = float(np.nanmean(consistency.agreement(odds).agree))
        return figures


def _merged(policy: Policy, settings: TrainSettings, adapter: Path) -> Any:
    """The model with its adapters in its weights; those of a model held in 4 bits go into the weights it came with."""
    if settings.quantization == "none":
        return policy.model.merge_and_unload()
    from peft import PeftModel

    base = policies.load(settings.model_copy(update={"quantization": "none"}), str(policy.path), "cpu")
    return PeftModel.from_pretrained(base.model, adapter).merge_and_unload()


def _write_model(
    settings: TrainSettings, policy: Policy, trainer: Trainer, plan: Json, out: Path, final: Json, drops: Counter[str]
) -> Json:
    model = policy.model
    with store.disk_errors(out):
        if settings.lora.rank:
            with warnings.catch_warnings():  # peft looks for a config in what it was trained on, and an adapter's folder has none
                warnings.filterwarnings("ignore", message="Could not find a config file")
                model.save_pretrained(out / "adapter")
            store.write_json(out / "adapter" / model_sources.FOR, {"digest": model_sources.digest(policy.path)})
            model = _merged(policy, settings, out / "adapter")
        model.set_attn_implementation(policy.plain_attention)
        model.save_pretrained(out)
        policy.chat.tokenizer.save_pretrained(out)
        generation = model_sources.base(policy.path) / "generation_config.json"
        if generation.is_file():
            (out / generation.name).write_bytes(generation.read_bytes())
        (out / "README.md").write_text(_card(settings, plan, trainer), encoding="utf-8")
    manifest = {
        "kind": "model",
        "digest": store.digest_json([store.digest_file(f) for f in sorted(out.glob("*.safetensors"))]),
        "rows_in": len(trainer.examples) + drops.total(),
        "rows_out": len(trainer.examples),
        "drops": dict(drops),
        "nulls": {},
        "steps": trainer.n_steps,
        "seconds": round(time.monotonic() - trainer.started, 3),
        "versions": store.versions(),
        "summary": {name: round(float(value), 6) for name, value in final.items()},
    }
    if isinstance(trainer.objective, objectives.Scir):
        manifest["fitted"] = {"implicit_scale": settings.implicit_scale, "penalty_weight": trainer.objective.penalty_weight}
    store.write_json(out / "manifest.json", manifest)
    trainer.finish()
    return manifest


def _card(settings: TrainSettings, plan: Json, trainer: Trainer) -> str:
    lines = [f"| `{name}` | {value} |" for name, value in plan["settings"].items()]
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [scir, preference-optimisation]", "---", "",
            f"# A policy trained by scir {__version__}", "",
            f"Objective `{settings.objective}`, {trainer.n_steps} steps on {len(trainer.examples)} pairs.", "",
            f"- parent: `{settings.model}` (weights key `{plan['model']}`)",
            f"- data: `{settings.input}` (digest `{plan['input']}`)",
            f"- reward reference: `{settings.reward_reference}` (weights key `{plan['reward_reference']}`)", "",
            "| setting | value |", "|---|---|", *lines, "",
        ]
    )  # fmt: skip
