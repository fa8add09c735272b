"""Recipes: a YAML list of stages, expanded to the same commands a shell would run.

extends: loop.yaml                   another recipe beside this one, whose keys hold where this one has none; `set` and `all` are merged
output_dir: runs/quickstart          {out}
set: {base: some/model}              names for use below, as {base}; {here} is the recipe's own folder
all: {seed: 0}                       settings for every stage that knows them
steps:
  - train: {objective: sft, model: "{base}", output_dir: "{out}/m1", ...}
  - iterations: 2                    repeats its steps with {i} = 1, 2 and {next} = {i} + 1
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


@dataclass(frozen=True)
class Step:
    """One stage of a recipe with its settings, checked; `arguments` is what follows `scir` on a command line."""

    stage: str
    settings: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        words = self.stage.split()
        for name, value in self.settings.items():
            flag = "--" + name.replace("_", "-").replace(".", "-")
            if isinstance(value, bool):
                words.append(flag if value else f"{name}=false")
            elif isinstance(value, list | tuple):
                words += [flag, ",".join(map(str, value))]
            else:
                words += [flag, "null" if value is None else str(value)]
        return words

    def shell_command(self) -> str:
        return shlex.join(["scir", *self.arguments])


def load(
    path: Path, output_dir: Path | None = None, overrides: dict[str, Any] | None = None
) -> list[Step]:
    """The steps of a recipe, in order; every mistake in it is reported at once (ConfigError)."""
    recipe = _read(path)
    if not isinstance(recipe.get("steps"), list):
        raise ConfigError(f"{path}: 'steps' should be a list of stages")
    names = {
        "out": str(output_dir or recipe.get("output_dir") or f"runs/{path.stem}"),
        "here": str(path.parent),
    }
    changes = {
        **recipe.get("set", {}),
        **{k: v for k, v in (overrides or {}).items() if k in recipe.get("set", {})},
    }
    common = {
        **recipe.get("all", {}),
        **{k: v for k, v in (overrides or {}).items() if k not in changes},
    }
    names |= {name: str(value) for name, value in changes.items()}
    steps = [
        _step(path, stage, settings, common)
        for stage, settings in _expand(path, recipe["steps"], names)
    ]
    _check(path, steps, common)
    return steps


def _read(path: Path) -> dict[str, Any]:
    """A recipe's keys, over those of the recipe it extends."""
    recipe = read_yaml(path)
    for key in recipe:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'.{suggest(str(key), KEYS)}")
    if "extends" not in recipe:
        return recipe
    base = _read(path.parent / str(recipe["extends"]))
    return (
        base
        | recipe
        | {name: {**base.get(name, {}), **recipe.get(name, {})} for name in ("set", "all")}
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; raises ConfigError naming the file (and line) that is wrong."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold a mapping of names to values")
    return value


def _expand(
    path: Path, items: list[Any], names: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for item in items:
        if not isinstance(item, dict):
            raise ConfigError(f"{path}: a step should be 'stage: {{settings}}', got {item!r}")
        if "iterations" in item:
            for i in range(1, int(_fill(path, item["iterations"], names)) + 1):
                yield from _expand(
                    path, item.get("steps", []), names | {"i": str(i), "next": str(i + 1)}
                )
            continue
        if len(item) != 1:
            raise ConfigError(
                f"{path}: a step should name one stage, got {', '.join(map(str, item))}"
            )
        ((stage, settings),) = item.items()
        if stage not in STAGES:
            raise ConfigError(f"{path}: unknown stage '{stage}'.{suggest(str(stage), STAGES)}")
        yield stage, _fill(path, settings or {}, names)


def _fill(path: Path, value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(path, inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(path, inner, names) for inner in value]
    if not isinstance(value, str):
        return value

    def one(field: re.Match[str]) -> str:
        if field[1] not in names:
            raise ConfigError(
                f"{path}: unknown name '{{{field[1]}}}' in {value!r}.{suggest(field[1], names)}"
            )
        return names[field[1]]

    return re.sub(r"\{(\w+)\}", one, value)


def _step(path: Path, stage: str, own: dict[str, Any], common: dict[str, Any]) -> Step:
    known = config.fields(STAGES[stage].settings)
    settings = {
        k: v for k, v in config.flatten(common, known).items() if k in known
    } | config.flatten(own, known)
    config.build(STAGES[stage].settings, settings, where=f"{path}: {stage}")
    return Step(stage, settings)


def _check(path: Path, steps: list[Step], common: dict[str, Any]) -> None:
    """Settings for all that no stage knows, and two stages that write the same folder, are mistakes."""
    known = {name for step in steps for name in config.fields(STAGES[step.stage].settings)}
    for name in common:
        key = str(name).replace("-", "_")
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise ConfigError(
                f"{path}: no stage of this recipe has the setting '{name}'.{suggest(key, known)}"
            )
    folders = [str(step.settings["output_dir"]) for step in steps]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"{path}: two steps write {folder}")
