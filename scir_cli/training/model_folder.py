"""A trained model -> a model folder: weights, tokenizer, card and manifest."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from scir_cli import __version__
from scir_cli.data import dataset, files, hashing
from scir_cli.data.files import Json
from scir_cli.engine import model_files
from scir_cli.engine.policy import Policy
from scir_cli.settings import TrainSettings
from scir_cli.training import adapters, objectives
from scir_cli.training.consensus import Consensus
from scir_cli.training.objectives import Metrics
from scir_cli.training.trainer import Trainer


def write_model_folder(
    settings: TrainSettings,
    policy: Policy,
    weights_digest: str,
    trainer: Trainer,
    plan: Json,
    metrics: Metrics,
    drops: Counter[str],
) -> Json:
    """Writes the model to settings.output_dir and returns its manifest; removes the checkpoints last.

    policy: the trained model, whole. weights_digest: of the model that training started from.
    metrics: the last figures, for the manifest's "summary". drops: input pairs that were not trained on, by reason.
    """
    out = Path(settings.output_dir)
    model = policy.model
    with files.as_store_error(out):
        if settings.lora.rank:
            adapters.save_adapter(policy, out / "adapter", weights_digest)
            model = adapters.merge_adapter(policy, settings, out / "adapter")
        model.set_attn_implementation(policy.plain_attention)
        model.save_pretrained(out)
        policy.chat.tokenizer.save_pretrained(out)
        generation = model_files.base_model_path(policy.path) / "generation_config.json"
        if generation.is_file():
            (out / generation.name).write_bytes(generation.read_bytes())
        (out / "README.md").write_text(_card(settings, plan, trainer), encoding="utf-8")
    manifest = {
        "kind": "model",
        "digest": hashing.digest_json(
            [hashing.digest_file(f) for f in sorted(out.glob("*.safetensors"))]
        ),
        "rows_in": len(trainer.examples) + drops.total(),
        "rows_out": len(trainer.examples),
        "drops": dict(drops),
        "nulls": {},
        "steps": trainer.n_steps,
        "seconds": round(time.monotonic() - trainer.started, 3),
        "versions": dataset.versions(),
        "summary": {name: round(float(value), 6) for name, value in metrics.items()},
    }
    if isinstance(trainer.objective, objectives.Scir):
        manifest["fitted"] = {
            "implicit_scale": settings.implicit_scale,
            "penalty_weight": trainer.objective.penalty_weight,
        }
    elif isinstance(trainer.objective, Consensus):
        manifest["fitted"] = {"penalty_weight": trainer.objective.penalty_weight}
    files.write_json(out / "manifest.json", manifest)
    trainer.finish()
    return manifest


def _card(settings: TrainSettings, plan: Json, trainer: Trainer) -> str:
    """The model card: where the weights came from, and every setting."""
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
