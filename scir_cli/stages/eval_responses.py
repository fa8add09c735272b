"""eval responses: answers to a prompt set in AlpacaEval's format."""

from __future__ import annotations

from scir_cli.data import dataset, files
from scir_cli.data.files import Json
from scir_cli.rewards import prompts
from scir_cli.settings import EvalResponsesSettings
from scir_cli.stages.sampling import write_candidates


def run(settings: EvalResponsesSettings) -> Json:
    """Answers a prompt set; returns the manifest of the candidates dataset in OUT.

    Also writes OUT/responses.json, which AlpacaEval's tools read.
    """
    path = settings.output_dir / "responses.json"
    manifest = write_candidates(settings)
    if settings.dry_run or path.exists():
        return manifest

    table = dataset.read_dataset(settings.output_dir, "candidates")
    responses = []
    for row in table.to_pylist():
        responses.append(
            {
                "dataset": row["subset"],
                "instruction": prompts.question_text(row["messages"]),
                "output": row["response"],
                "generator": settings.generator,
            }
        )
    files.write_json(path, responses)
    return manifest
