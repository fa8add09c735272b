"""The check that --overwrite deletes no input.

An output folder must not be, or contain, a file or folder that the stage reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scir_cli import config, registry
from scir_cli.data.storage import real_path, to_path
from scir_cli.engine import model_files
from scir_cli.errors import ConfigError
from scir_cli.recipe import Step
from scir_cli.settings import StageSettings


def check(settings: StageSettings, where: str) -> None:
    """Raises ConfigError if the output folder is or holds an input of the stage.

    The base model of an adapter counts as an input. where: prefix of the error message.
    """
    problem = _problem(settings)
    if problem:
        raise ConfigError(f"{where}: {problem}")


def check_steps(steps: list[Step], where: str) -> None:
    """Raises ConfigError with one line per step of a recipe that fails `check`.

    where: prefix of each line.
    """
    problems = []
    for step in steps:
        settings_class = registry.STAGES[step.stage].settings
        settings = config.build(settings_class, step.settings, where=where)
        problem = _problem(settings)
        if problem:
            problems.append(f"{where}: {step.stage}: {problem}")
    if problems:
        raise ConfigError(*problems)


def _problem(settings: StageSettings) -> str | None:
    """Returns the error message for the first input in the output folder, or None."""
    out = real_path(settings.output_dir)
    for name, spec in _inputs(settings):
        if _is_or_holds(out, spec):
            return _message(settings, name, spec)
        for base in _base_models(spec):
            if _is_or_holds(out, base):
                return _message(settings, f"the base model of {name} {spec},", base)
    return None


def _base_models(spec: str) -> list[str]:
    """The model behind an adapter, and if that is an adapter too, the one behind it, and so on."""
    bases: list[str] = []
    base = model_files.base_model_name(to_path(spec))
    while base and base not in bases:
        bases.append(base)
        base = model_files.base_model_name(to_path(base))
    return bases


def _is_or_holds(out: Path, spec: str) -> bool:
    """Whether `spec` names an existing file or folder that is `out` or lies below it."""
    path = real_path(to_path(spec))
    if not path.exists():
        place, found, _ = spec.rpartition("?")
        return bool(found) and _is_or_holds(out, place)
    return path == out or out in path.parents


def _message(settings: StageSettings, description: str, path: str) -> str:
    return (
        f"output_dir {settings.output_dir} is or holds {description} {path}; choose another folder"
    )


def _inputs(settings: StageSettings) -> Iterator[tuple[str, str]]:
    """Yields (setting, path or model) for every input of the stage.

    A setting of the form 'A | B' yields both alternatives.
    """
    for name in config.names_with(type(settings), "path"):
        value: Any = getattr(settings, name) or ""
        specs = value if isinstance(value, list) else str(value).split("|")
        for spec in specs:
            stripped = spec.strip()
            if stripped:
                yield name, stripped
