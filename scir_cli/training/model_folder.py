"""A trained model -> a model folder: weights, tokenizer, card and manifest."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from scir_cli import __version__
from scir_cli.data import dataset, file_lists, files, hashing, manifests
from scir_cli.data.files import Json
from scir_cli.engine import checkpoints, model_files
from scir_cli.engine.policy import Policy
from scir_cli.errors import TrainingError
from scir_cli.settings import TrainSettings
from scir_cli.training import adapters, objectives
from scir_cli.training.consensus import Consensus
from scir_cli.training.objectives import Metrics
from scir_cli.training.trainer import Trainer

#: A model or data set of the hub, with or without a revision
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
#: The hidden folder in which a model is written.
DRAFT = ".draft-model"

#: The model card, which users edit: it is not among the files with digests.
CARD = "README.md"


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

    The files are written in a hidden folder and moved when they are on disk.
    The checkpoints are removed last.
    policy: the trained model, unsharded. weights_digest: of the model that training started from.
    metrics: the last figures, for the manifest's "summary".
    account: rows in, rows out and drops of everything that was read.
    Raises StoreError if the folder cannot be written.
    """
    out = Path(settings.output_dir)
    draft = out / DRAFT
    with files.as_store_error(out):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        _write_weights(settings, policy, weights_digest, draft)
        written = [file for file in draft.rglob("*") if file.is_file()]
        moved = _move(written, draft, out)
        entries = file_lists.describe(out, [file for file in moved if file.name != CARD])
        with files.atomic_write(out / CARD) as temporary:
            temporary.write_text(_card(settings, plan, trainer), encoding="utf-8")
    manifest = _manifest(entries, trainer, metrics, account)
    if isinstance(trainer.objective, objectives.Scir):
        manifest["fitted"] = {
            "implicit_scale": settings.implicit_scale,
            "penalty_weight": trainer.objective.penalty_weight,
        }
    elif isinstance(trainer.objective, Consensus):
        manifest["fitted"] = {"penalty_weight": trainer.objective.penalty_weight}
    manifests.write(out, manifest)
    trainer.finish()
    return manifest


def _move(written: list[Path], draft: Path, out: Path) -> list[Path]:
    """Moves files from a draft to the output folder when they are on disk; returns their paths.

    They get the mode of a new file: safetensors makes its files readable by their owner alone.
    """
    probe = draft / "mode"
    probe.touch()
    mode = probe.stat().st_mode
    moved = []
    for file in written:
        file.chmod(mode)
        files.sync(file)
        target = out / file.relative_to(draft)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
        moved.append(target)
    for folder in {file.parent for file in moved}:
        files.sync(folder)
    shutil.rmtree(draft)
    return moved


def _write_weights(settings: TrainSettings, policy: Policy, weights_digest: str, out: Path) -> None:
    """Writes the adapter of a LoRA run, the full weights and the tokenizer."""
    model = policy.model
    if settings.lora.rank:
        adapters.save_adapter(policy, out / "adapter", weights_digest)
        model = adapters.merge_adapter(policy, settings, out / "adapter")
    _check_finite(model)
    model.set_attn_implementation(policy.plain_attention)
    model.save_pretrained(out)
    policy.chat.tokenizer.save_pretrained(out)
    source = model_files.base_model_path(policy.path)
    for name in ("generation_config.json", *checkpoints.PROCESSOR_FILES):
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())


def _check_finite(model: Any) -> None:
    """Raises TrainingError if a weight is not finite, as when an adapter's sum overflows."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise TrainingError(
                f"{name} of the trained model is not finite, so the model is not written; "
                "lower --learning-rate"
            )


def _manifest(entries: list[Json], trainer: Trainer, metrics: Metrics, account: Json) -> Json:
    """The manifest of the written weights, without the fitted values.

    entries: the files of the folder, as `file_lists.describe` returns them.
    """
    digests = []
    for entry in entries:
        name = entry["file"]
        if name.endswith(".safetensors") and "/" not in name:
            digests.append(entry["digest"])
    return {
        "kind": "model",
        "digest": hashing.digest_json(digests),
        **account,
        "nulls": {},
        "files": entries,
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
