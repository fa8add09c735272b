"""Recipes: a YAML list of stages, expanded to the commands that a shell would run.

extends: loop.yaml           another recipe beside this one: the keys of this one replace its keys,
                             and `set` and `all` are merged
output_dir: runs/quickstart  {out}
set: {base: some/model}      names for use below, as {base}; {here} is the folder of the recipe
all: {seed: 0}               settings for every stage that has them
steps:
  - train: {objective: sft, model: "{base}", output_dir: "{out}/m1", ...}
  - iterations: 2            repeats its steps with {i} = 1, 2 and {next} = {i} + 1
    steps:
      - generate: {model: "{out}/m{i}", ...}
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scir_cli import config
from scir_cli.errors import ConfigError, suggest
from scir_cli.registry import STAGES

KEYS = ("extends", "name", "output_dir", "set", "all", "steps")
#: Keys whose mappings are merged with those of the recipe that is extended.
MERGED_KEYS = ("set", "all")


@dataclass(frozen=True)
class Step:
    """One stage of a recipe with its checked settings."""

    stage: str
    settings: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The words after `scir` on a command line."""
        words = self.stage.split()
        for name, value in self.settings.items():
            words += _cli_words(name, value)
        return words

    def shell_command(self) -> str:
        """The step as a line for a shell, quoted as needed."""
        return shlex.join(["scir", *self.arguments])


def _cli_words(name: str, value: Any) -> list[str]:
    """One setting as words of a command line."""
    flag = "--" + name.replace("_", "-").replace(".", "-")
    if isinstance(value, bool):
        return [flag] if value else [f"{name}=false"]
    if isinstance(value, list | tuple):
        return [flag, ",".join(map(str, value))]
    if value is None:
        return [flag, "null"]
    return [flag, str(value)]


def load(
    path: Path, output_dir: Path | None = None, overrides: dict[str, Any] | None = None
) -> list[Step]:
    """The steps of a recipe, in order.

    output_dir: replaces the recipe's output_dir, as {out}.
    overrides: values for names of `set`; the others are settings for all stages, as in `all`.
    Raises ConfigError if the recipe has a mistake.
    """
    recipe = _read(path)
    if not isinstance(recipe.get("steps"), list):
        raise ConfigError(f"{path}: 'steps' should be a list of stages")

    replaced = {**recipe.get("set", {})}
    common = {**recipe.get("all", {})}
    for name, value in (overrides or {}).items():
        target = replaced if name in replaced else common
        target[name] = value

    out = output_dir or recipe.get("output_dir") or f"runs/{path.stem}"
    names = {"out": str(out), "here": str(path.parent)}
    for name, value in replaced.items():
        names[name] = str(value)

    steps = []
    for stage, settings in _expand(path, recipe["steps"], names):
        steps.append(_step(path, stage, settings, common))
    _check(path, steps, common)
    return steps


def _read(path: Path) -> dict[str, Any]:
    """The keys of a recipe, merged over those of the recipe that it extends.

    Raises ConfigError for a key that recipes do not have.
    """
    recipe = read_yaml(path)
    for key in recipe:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'.{suggest(str(key), KEYS)}")
    if "extends" not in recipe:
        return recipe

    base = _read(path.parent / str(recipe["extends"]))
    merged = base | recipe
    for key in MERGED_KEYS:
        merged[key] = {**base.get(key, {}), **recipe.get(key, {})}
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises ConfigError, with the file (and the line), if it cannot be read or holds no mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {reason}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold a mapping of names to values")
    return value


def _expand(
    path: Path, items: list[Any], names: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stages of a list of steps with their settings, iterations written out.

    names: value of each {name} that the settings may contain.
    Raises ConfigError for a step that is not one stage with a known name.
    """
    for item in items:
        if not isinstance(item, dict):
            raise ConfigError(f"{path}: a step should be 'stage: {{settings}}', got {item!r}")

        if "iterations" in item:
            n_iterations = int(_substitute(path, item["iterations"], names))
            for i in range(1, n_iterations + 1):
                counters = {"i": str(i), "next": str(i + 1)}
                yield from _expand(path, item.get("steps", []), names | counters)
            continue

        if len(item) != 1:
            keys = ", ".join(map(str, item))
            raise ConfigError(f"{path}: a step should name one stage, got {keys}")
        ((stage, settings),) = item.items()
        if stage not in STAGES:
            raise ConfigError(f"{path}: unknown stage '{stage}'.{suggest(str(stage), STAGES)}")
        yield stage, _substitute(path, settings or {}, names)


def _substitute(path: Path, value: Any, names: dict[str, str]) -> Any:
    """The value with every {name} in its texts replaced, in nested lists and mappings too.

    Raises ConfigError for a name that is not in `names`.
    """
    if isinstance(value, dict):
        return {key: _substitute(path, inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(path, inner, names) for inner in value]
    if not isinstance(value, str):
        return value

    def replacement(field: re.Match[str]) -> str:
        name = field[1]
        if name not in names:
            hint = suggest(name, names)
            raise ConfigError(f"{path}: unknown name '{{{name}}}' in {value!r}.{hint}")
        return names[name]

    return re.sub(r"\{(\w+)\}", replacement, value)


def _step(path: Path, stage: str, settings: dict[str, Any], common: dict[str, Any]) -> Step:
    """A step with its settings over those for all stages, checked.

    common: settings for all stages; the ones that this stage does not have are left out.
    """
    fields = config.fields(STAGES[stage].settings)
    merged = {}
    for name, value in config.flatten(common, fields).items():
        if name in fields:
            merged[name] = value
    merged |= config.flatten(settings, fields)

    config.build(STAGES[stage].settings, merged, where=f"{path}: {stage}")
    return Step(stage, merged)


def _check(path: Path, steps: list[Step], common: dict[str, Any]) -> None:
    """Raises ConfigError for mistakes that concern several steps.

    They are: a setting for all stages that no stage has, and two stages that write one folder.
    """
    fields: set[str] = set()
    for step in steps:
        fields.update(config.fields(STAGES[step.stage].settings))

    for name in common:
        key = str(name).replace("-", "_")
        is_group = any(field.startswith(key + ".") for field in fields)
        if key not in fields and not is_group:
            raise ConfigError(
                f"{path}: no stage of this recipe has the setting '{name}'.{suggest(key, fields)}"
            )

    folders = [str(step.settings["output_dir"]) for step in steps]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"{path}: two steps write {folder}")
