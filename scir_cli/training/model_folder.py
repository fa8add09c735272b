"""A trained model -> a model folder: weights, tokenizer, card and manifest."""

from __future__ import annotations

import re
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

#: A model or data set of the hub, with or without a revision
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def write_model_folder(
    settings: TrainSettings,
    policy: Policy,
    weights_digest: str,
    trainer: Trainer,
    plan: Json,
    metrics: Metrics,
    drops: Counter[str],
) -> Json:
    """Writes the model to settings.output_dir and returns its manifest.

    The checkpoints are removed last.
    policy: the trained model, unsharded. weights_digest: of the model that training started from.
    metrics: the last figures, for the manifest's "summary".
    drops: number of input pairs that were not trained on, by reason.
    Raises StoreError if the folder cannot be written.
    """
    out = Path(settings.output_dir)
    with files.as_store_error(out):
        _write_weights(settings, policy, weights_digest, out)
        card = _card(settings, plan, trainer)
        (out / "README.md").write_text(card, encoding="utf-8")
    manifest = _manifest(out, trainer, metrics, drops)
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


def _manifest(out: Path, trainer: Trainer, metrics: Metrics, drops: Counter[str]) -> Json:
    """The manifest of the written weights, without the fitted values."""
    digests = [hashing.digest_file(path) for path in sorted(out.glob("*.safetensors"))]
    n_examples = len(trainer.examples)
    return {
        "kind": "model",
        "digest": hashing.digest_json(digests),
        "rows_in": n_examples + drops.total(),
        "rows_out": n_examples,
        "drops": dict(drops),
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
        *front_matter(settings.model, [settings.input]),
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


def front_matter(model: str, inputs: list[str]) -> list[str]:
    """The YAML block at the top of a model card, which the hub reads.

    A model that was trained from a folder has the base model and the license of that folder's card.
    model, inputs: as the user named them; those of the hub are named in the card
    """
    inherited = {}
    card = Path(model) / "README.md"
    if card.is_file():
        inherited = dict(re.findall(r"^(base_model|license): (.+)$", card.read_text("utf-8"), re.M))
    first = model.split("|")[0].strip()
    if not Path(first).exists() and HUB_ID.fullmatch(first):
        inherited["base_model"] = first.partition("@")[0]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"{name}: {value}" for name, value in sorted(inherited.items())]
    names = [spec.split("?")[0].split("@")[0].split(":")[0] for spec in inputs]
    names = [name for name in names if HUB_ID.fullmatch(name) and not Path(name).exists()]
    if names:
        lines.append(f"datasets: [{', '.join(names)}]")
    return [*lines, "tags: [scir, preference-optimization]", "---"]
