"""The check that --overwrite deletes no input: an output folder must not be, or hold, what a stage reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scir_cli import config, registry
from scir_cli.data.storage import to_path
from scir_cli.engine import model_files
from scir_cli.errors import ConfigError
from scir_cli.recipe import Step
from scir_cli.settings import StageSettings


def check(settings: StageSettings, where: str) -> None:
    """Raises ConfigError if the output folder is or holds an input, or the base model of an adapter."""
    if problem := _problem(settings):
        raise ConfigError(f"{where}: {problem}")


def check_steps(steps: list[Step], where: str) -> None:
    """As `check`, for all steps of a recipe at once."""
    problems = []
    for step in steps:
        settings = config.build(registry.STAGES[step.stage].settings, step.settings, where=where)
        if problem := _problem(settings):
            problems.append(f"{where}: {step.stage}: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))


def _problem(settings: StageSettings) -> str | None:
    out = settings.output_dir.resolve()
    for name, spec in _inputs(settings):
        base = model_files.base_model_name(to_path(spec))
        for what, read in ((name, spec), (f"the base model of {name} {spec},", base)):
            path = to_path(read or "").resolve()
            if read and path.exists() and (path == out or out in path.parents):
                return f"output_dir {settings.output_dir} is or holds {what} {read}; choose another folder"
    return None


def _inputs(settings: StageSettings) -> Iterator[tuple[str, str]]:
    """(setting, path or model spec) of everything the stage reads; of 'A | B', both."""
    for name in config.names_with(type(settings), "path"):
        value: Any = getattr(settings, name) or ""
        specs = value if isinstance(value, list) else str(value).split("|")
        yield from ((name, spec.strip()) for spec in specs if spec.strip())
