"""A trained model -> a model folder: weights, tokenizer, card and manifest."""

from __future__ import annotations

import time
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
    account: Json,
) -> Json:
    """Writes the model to settings.output_dir and returns its manifest.

    The checkpoints are removed last.
    policy: the trained model, unsharded. weights_digest: of the model that training started from.
    metrics: the last figures, for the manifest's "summary".
    account: rows in, rows out and drops of everything that was read.
    Raises StoreError if the folder cannot be written.
    """
    out = Path(settings.output_dir)
    with files.as_store_error(out):
        _write_weights(settings, policy, weights_digest, out)
        card = _card(settings, plan, trainer)
        (out / "README.md").write_text(card, encoding="utf-8")
    manifest = _manifest(out, trainer, metrics, account)
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


def _write_weights(settings: TrainSettings, policy: Policy, weights_digest: str, out: Path) -> None:
    """Writes the adapter of a LoRA run, the full weights and the tokenizer."""
    model = policy.model
    if settings.lora.rank:
        adapters.save_adapter(policy, out / "adapter", weights_digest)
        model = adapters.merge_adapter(policy, settings, out / "adapter")
    model.set_attn_implementation(policy.plain_attention)
    model.save_pretrained(out)
    policy.chat.tokenizer.save_pretrained(out)
    generation = model_files.base_model_path(policy.path) / "generation_config.json"
    if generation.is_file():
        (out / generation.name).write_bytes(generation.read_bytes())


def _manifest(out: Path, trainer: Trainer, metrics: Metrics, account: Json) -> Json:
    """The manifest of the written weights, without the fitted values."""
    digests = [hashing.digest_file(path) for path in sorted(out.glob("*.safetensors"))]
    return {
        "kind": "model",
        "digest": hashing.digest_json(digests),
        **account,
        "nulls": {},
        "steps": trainer.n_steps,
        "seconds": round(time.monotonic() - trainer.started, 3),
        "versions": dataset.versions(),
        "summary": {name: round(float(value), 6) for name, value in metrics.items()},
    }


def _card(settings: TrainSettings, plan: Json, trainer: Trainer) -> str:
    """The model card: the source of the weights and the data, and every setting."""
    rows = [f"| `{name}` | {value} |" for name, value in plan["settings"].items()]
    reference = settings.reward_reference
    lines = [
        "---",
        "library_name: transformers",
        "tags: [scir, preference-optimization]",
        "---",
        "",
        f"# A policy trained by scir {__version__}",
        "",
        f"Objective `{settings.objective}`,"
        f" {trainer.n_steps} steps on {len(trainer.examples)} pairs.",
        "",
        f"- parent: `{settings.model}` (weights key `{plan['model']}`)",
        f"- data: `{settings.input}` (digest `{plan['input']}`)",
        f"- reward reference: `{reference}` (weights key `{plan['reward_reference']}`)",
        "",
        "| setting | value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
