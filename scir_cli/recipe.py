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

import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scir_cli import config
from scir_cli.data.storage import real_path
from scir_cli.errors import ConfigError, is_visible, redact, suggest
from scir_cli.registry import STAGES

KEYS = ("extends", "name", "output_dir", "set", "all", "steps")

# Bounds on a recipe, far above those that ship (3 kB, 16 steps).
MOST_BYTES = 256 * 1024
MOST_VALUES = 20_000
MOST_STEPS = 1000
MOST_EXTENDED = 10
MOST_LEVELS = 50


@dataclass(frozen=True)
class Step:
    """One stage of a recipe with its checked settings."""

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
                words += [flag, config.list_as_text(value)]
            elif value is not None:
                # None is the default of every setting that accepts it.
                words += [flag, str(value)]
        return words

    def shell_command(self) -> str:
        """The step as a shell runs it, with `***` in place of passwords, keys and tokens."""
        words = [_shell_word(redact(word)) for word in self.arguments]
        return " ".join(["scir", *words])


def _shell_word(word: str) -> str:
    """A word quoted for sh; printf makes the characters that cannot be seen."""
    core = word.rstrip("\n")
    if all(character in "\n\t" or is_visible(character) for character in core):
        return shlex.quote(word)

    # A shell removes line breaks at the end of $(…), so they follow it.
    breaks = word[len(core) :]
    codes = ""
    for character in core:
        if character == "\\":
            codes += "\\\\"
        elif is_visible(character):
            codes += character
        else:
            octets = character.encode("utf-8", "surrogateescape")
            codes += "".join(f"\\0{octet:03o}" for octet in octets)
    return f'"$(printf %b {shlex.quote(codes)})"' + (shlex.quote(breaks) if breaks else "")


def load(
    path: Path, output_dir: Path | None = None, overrides: dict[str, Any] | None = None
) -> list[Step]:
    """The steps of a recipe, in order.

    A recipe is text of others: its size, its steps and what its names expand to are bounded.
    Raises ConfigError for the first mistake in it.
    """
    recipe = _read(path, ())
    names = {
        "out": str(output_dir or recipe.get("output_dir") or f"runs/{path.stem}"),
        "here": str(path.parent),
    }
    changes = {
        **recipe["set"],
        **{k: v for k, v in (overrides or {}).items() if k in recipe["set"]},
    }
    common = {
        **recipe["all"],
        **{k: v for k, v in (overrides or {}).items() if k not in changes},
    }
    names |= {name: str(value) for name, value in changes.items()}
    expanded = []
    for item in _expand(path, recipe.get("steps"), names):
        expanded.append(item)
        if len(expanded) > MOST_STEPS:
            raise ConfigError(f"{path}: more than {MOST_STEPS} steps; split the recipe")
    steps = [
        _step(path, stage, _fill(path, settings, names), common)
        for stage, settings, names in expanded
    ]
    _check(path, steps, common)
    return steps


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's keys, over those of the recipe it extends; `set` and `all` are mappings.

    above: the recipes that extend this one
    """
    recipe = read_yaml(path)
    for key in recipe:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key '{key}'.{suggest(key, KEYS)}")
    for name in ("set", "all"):
        recipe[name] = _mapping(recipe.get(name), f"{path}: '{name}'")
    for name in ("name", "output_dir", "extends"):
        if not isinstance(recipe.get(name, ""), str):
            raise ConfigError(f"{path}: '{name}' is {recipe[name]!r}; expected text")
    if "extends" not in recipe:
        return recipe

    chain = (*above, real_path(path))
    base_path = path.parent / recipe["extends"]
    if real_path(base_path) in chain:
        raise ConfigError(f"{path}: 'extends' leads back to {base_path}")
    if len(chain) > MOST_EXTENDED:
        raise ConfigError(f"{path}: more than {MOST_EXTENDED} recipes extend one another")
    base = _read(base_path, chain)
    merged = {name: {**base[name], **recipe[name]} for name in ("set", "all")}
    return base | recipe | merged


def _mapping(value: Any, what: str) -> dict[str, Any]:
    """The value, or {} for none; raises ConfigError unless it maps names to values."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is a {_kind(value)}; expected a mapping of names to values")
    return value


def _kind(value: Any) -> str:
    """The YAML word for the type of a value."""
    names = {list: "list", dict: "mapping", str: "text", bool: "truth value"}
    return names.get(type(value), "number" if isinstance(value, int | float) else "value")


class _Loader(yaml.SafeLoader):
    """A YAML loader that stops at content nested deeper than MOST_LEVELS."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in PyYAML; raises RecursionError below MOST_LEVELS."""
        self.level += 1
        if self.level > MOST_LEVELS:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of names to plain values: text, numbers, truth values, lists, mappings.

    Raises ConfigError, which names the file (and line), for anything else: other types, a name
    twice, and aliases that repeat so much that the content exceeds MOST_VALUES.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES} bytes; is it a recipe?")
        loader = _Loader(content.decode("utf-8-sig"))
        root = loader.get_single_node()
        if root is not None:
            _check_node(path, root, {})
        value = None if root is None else loader.construct_document(root)
        _check_plain(path, value)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: bytes that are not UTF-8, a date that does not exist, a number too long.
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should hold a mapping of names to values")
    return value


def _check_node(path: Path, node: Any, sizes: dict[int, int]) -> int:
    """The number of values below a node, those behind an alias once per use.

    sizes: of nodes that were counted; 0 marks one that is being counted
    Raises ConfigError for a name that occurs twice, a circle, or more than MOST_VALUES.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ConfigError(f"{_place(path, node)}: an alias is inside of its own value")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size = 1
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            if isinstance(key, yaml.ScalarNode) and name in seen:
                raise ConfigError(f"{_place(path, key)}: the name '{name}' occurs twice")
            seen.add(name)
            children += [key, value]
    for child in children:
        size += _check_node(path, child, sizes)
        if size > MOST_VALUES:
            raise ConfigError(f"{path} holds more than {MOST_VALUES} values, aliases expanded")
    sizes[id(node)] = size
    return size


def _place(path: Path, node: Any) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _check_plain(path: Path, value: Any) -> None:
    """Raises ConfigError for a name that is no text, and for values of types that JSON lacks."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{path}: the name {name!r} is not text; write it in quotes")
            _check_plain(path, name)
            _check_plain(path, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(path, inner)
    elif isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"{path}: {value!r} contains a null character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"{path}: {value!r} contains half of a surrogate pair")
    elif value is not None and not isinstance(value, bool | int | float):
        kind = type(value).__name__
        raise ConfigError(f"{path}: {value} is read as a {kind}; write it in quotes")


def _expand(
    path: Path, items: Any, names: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Yields (stage, its settings, values of the names in them) of each step."""
    if not isinstance(items, list) or not items:
        raise ConfigError(f"{path}: 'steps' should be a list of stages")
    for item in items:
        if not isinstance(item, dict):
            raise ConfigError(f"{path}: a step should be 'stage: {{settings}}', got {item!r}")
        if "iterations" in item:
            others = set(item) - {"iterations", "steps"}
            if others:
                raise ConfigError(
                    f"{path}: unknown key '{min(others)}' beside 'iterations'; expected 'steps'"
                )
            for i in range(1, _iterations(path, item["iterations"], names) + 1):
                inner = names | {"i": str(i), "next": str(i + 1)}
                yield from _expand(path, item.get("steps"), inner)
            continue
        if len(item) != 1:
            raise ConfigError(f"{path}: a step should name one stage, got {', '.join(item)}")
        ((stage, settings),) = item.items()
        if stage not in STAGES:
            raise ConfigError(f"{path}: unknown stage '{stage}'.{suggest(stage, STAGES)}")
        yield stage, _mapping(settings, f"{path}: '{stage}'"), names


def _iterations(path: Path, value: Any, names: dict[str, str]) -> int:
    """The number of iterations, from 1 to MOST_STEPS; raises ConfigError for other values."""
    filled = _fill(path, value, names)
    if isinstance(filled, str) and re.fullmatch("[0-9]{1,9}", filled):
        filled = int(filled)
    if type(filled) is not int or not 1 <= filled <= MOST_STEPS:
        raise ConfigError(
            f"{path}: 'iterations' is {filled!r}; expected a whole number from 1 to {MOST_STEPS}"
        )
    return filled


def _fill(path: Path, value: Any, names: dict[str, str]) -> Any:
    """The value with the values of `names` in place of {name}, in mappings and lists too."""
    if isinstance(value, dict):
        return {key: _fill(path, inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(path, inner, names) for inner in value]
    if not isinstance(value, str):
        return value

    length = 0

    def filled(field: re.Match[str]) -> str:
        nonlocal length
        name = field[1]
        if name not in names:
            raise ConfigError(
                f"{path}: unknown name '{{{name}}}' in {value!r}.{suggest(name, names)}"
            )
        length += len(names[name])
        if length > MOST_BYTES:
            raise ConfigError(f"{path}: '{{{name}}}' repeats to more than {MOST_BYTES} characters")
        return names[name]

    return re.sub(r"\{(\w+)\}", filled, value)


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
    _check_folders(path, [str(step.settings["output_dir"]) for step in steps])


def _check_folders(path: Path, folders: list[str]) -> None:
    """Raises ConfigError if two steps write the same folder, or one inside of the other's."""
    by_place: dict[str, str] = {}
    for folder in folders:
        place = _normal(folder)
        if place in by_place:
            raise ConfigError(f"{path}: two steps write {_both(by_place[place], folder)}")
        by_place[place] = folder
    for place, folder in by_place.items():
        for parent in Path(place).parents:
            outer = by_place.get(str(parent))
            if outer is not None:
                raise ConfigError(f"{path}: a step writes {folder} inside of {outer}")


def _both(first: str, second: str) -> str:
    return first if first == second else f"{first}, also as {second}"


def _normal(folder: str) -> str:
    """One spelling of a folder: absolute, without links, `..` and doubled slashes."""
    scheme, mark, rest = folder.partition("://")
    if mark:
        return f"/{scheme}:/{posixpath.normpath(rest)}"
    return os.path.realpath(folder)
