"""eval responses: answers to a prompt set in AlpacaEval's format."""

from __future__ import annotations

from scir_cli.data import dataset, files
from scir_cli.data.files import Json
from scir_cli.rewards import prompts
from scir_cli.settings import EvalResponsesSettings
from scir_cli.stages.sampling import write_candidates


def run(settings: EvalResponsesSettings) -> Json:
    """Answers a prompt set: a candidates dataset in OUT, and OUT/responses.json as AlpacaEval's tools take it."""
    out = settings.output_dir
    manifest = write_candidates(settings)
    if not settings.dry_run and not (out / "responses.json").exists():
        table = dataset.read_dataset(out, "candidates")
        files.write_json(
            out / "responses.json",
            [
                {
                    "dataset": row["subset"], "instruction": prompts.question_text(row["messages"]), "output": row["response"],
                    "generator": settings.generator,
                }
                for row in table.to_pylist()
            ],
        )  # fmt: skip
    return manifest
