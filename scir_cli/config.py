"""Every setting, its default, help text and roles, once. The command line, recipes and plans are made from these classes.

Precedence: defaults < recipe or --config file < flags and `name=value` arguments. An unknown name is an error with a suggestion.
Defaults marked [ours] in docs/method.md are our reconstruction and not the paper's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from scir_cli.errors import ConfigError, suggest

# The groups of a command's help.
INPUT_OUTPUT = "Input and output"
MODEL = "Model"
SAMPLING = "Sampling"
LABELS = "Labels"
SELECTION = "Selection"
AGREEMENT = "Agreement"
REWARDS = "Reward models"
OPTIMIZER = "Optimizer"
PREFERENCE_LOSS = "Preference loss"
CONSISTENCY = "Consistency"
MEMORY = "Memory and processes"
LOGGING = "Logging"
WORKERS = "Backend and workers"
RARE = "Rarely needed"

#: The order in which help shows them.
GROUPS = (
    INPUT_OUTPUT, MODEL, SAMPLING, LABELS, SELECTION, AGREEMENT, REWARDS,
    OPTIMIZER, PREFERENCE_LOSS, CONSISTENCY, MEMORY, LOGGING, WORKERS, RARE,
)  # fmt: skip


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    path: bool = False,
    affects_output: bool = True,
    affects_fit: bool = False,
    **limits: Any,
) -> Any:
    """A setting with the roles that other code reads.

    group           heading in the command's help, one of GROUPS
    path            names a file, folder, dataset or model that --overwrite must not delete
    affects_output  part of the plan; False if it cannot change a row: a stopped run may resume with another value
    affects_fit     a scale or lambda that was fitted under another value of it is not kept
    """
    roles: Any = {
        "group": group,
        "path": path,
        "affects_output": affects_output,
        "affects_fit": affects_fit,
    }
    return Field(default, description=help, json_schema_extra=roles, **limits)


def role(info: Any, name: str) -> Any:
    """The role of a setting (`path`, say), as it was declared."""
    return info.json_schema_extra[name]


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; `Annotated` is looked through."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(m for member in get_args(annotation) for m in _members(member))
    return (annotation,)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    #: Where this command's help shows a setting, or all of a group, if not in the group of its declaration.
    regrouped: ClassVar[dict[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _words(cls, value: Any, info: Any) -> Any:
        """Text from a command line: "null" is no value, and a list is written with commas."""
        if not isinstance(value, str):
            return value
        if value.lower() in ("null", "none") and cls.model_fields[info.field_name].default is None:
            return None
        listed = any(
            get_origin(kind) in (list, tuple)
            for kind in _members(cls.model_fields[info.field_name].annotation)
        )
        return [word.strip() for word in value.split(",") if word.strip()] if listed else value

    def plan(self) -> dict[str, Any]:
        """The settings that determine the rows, JSON-ready; for a file, a digest of its content. Inputs and models have their own."""
        free = {
            name
            for name, info in type(self).model_fields.items()
            if not role(info, "affects_output")
        }
        plan = self.model_dump(mode="json", exclude=free)
        files = {
            name: value
            for name, value in self
            if name in plan and isinstance(value, Path) and value.is_file()
        }
        return plan | {
            name: f"a file of digest {hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}"
            for name, path in files.items()
        }


def fields(settings: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name (`lora.rank`), with its pydantic field."""
    found: dict[str, Any] = {}
    for name, info in settings.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        found |= fields(info.annotation, f"{prefix}{name}.") if nested else {prefix + name: info}  # type: ignore[arg-type]
    return found


def group_of(settings: type[Settings], name: str, info: Any) -> str:
    """The group in which this command's help shows a setting.  name: dotted, as `fields` has it"""
    group = role(info, "group")
    return settings.regrouped.get(name) or settings.regrouped.get(group, group)


def names_with(settings: type[Settings], wanted: str) -> list[str]:
    """The settings (not the nested ones) that have a role: names_with(TrainSettings, "path")."""
    return [name for name, info in settings.model_fields.items() if role(info, wanted)]


def build(settings: type[Settings], *layers: dict[str, Any], where: str) -> Any:
    """Settings from layers of values, later ones winning; names may be dotted, nested, kebab- or snake-case.

    Raises ConfigError with every mistake in one report, each named with its value.
    """
    known = fields(settings)
    merged: dict[str, Any] = {}
    problems = []
    for layer in layers:
        for name, value in flatten(layer, known).items():
            if name in known:
                merged[name] = value
            else:
                problems.append(f"{where}: unknown setting '{name}'.{suggest(name, known)}")
    nested: dict[str, Any] = {}
    for name, value in merged.items():
        at = nested
        *path, last = name.split(".")
        for step in path:
            at = at.setdefault(step, {})
        at[last] = value
    try:
        result = settings.model_validate(nested)
    except ValidationError as error:
        problems += [f"{where}: {_explain(item)}" for item in error.errors()]
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def flatten(layer: dict[str, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        name = prefix + str(key).replace("-", "_")
        inner = isinstance(value, dict) and any(k.startswith(name + ".") for k in known)
        flat |= flatten(value, known, name + ".") if inner else {name: value}
    return flat


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"'{name}' is missing; give --{name.replace('_', '-').replace('.', '-')}"
    message = item["msg"].removeprefix("Value error, ")
    return f"'{name}' is {item['input']!r}: {message}" if name else message


WIDEST_METAVAR = 14  # characters; a longer list of choices goes into the help text


def choices(info: Any) -> tuple[str, ...]:
    """The words that a setting accepts as a whole, or () if it accepts anything else as well."""
    members = [m for m in _members(info.annotation) if m is not NoneType]
    return get_args(members[0]) if len(members) == 1 and get_origin(members[0]) is Literal else ()


def metavar(info: Any) -> str:
    """What a setting accepts, for help texts: `a|b` for few choices, INTEGER, NUMBER, PATH, LIST, CHOICE or TEXT."""
    members = [m for m in _members(info.annotation) if m is not NoneType]
    if any(get_origin(m) in (list, tuple) for m in members):
        return "A,B,…"
    if role(info, "path"):
        return "PATH"
    kinds = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    literals = [word for m in members if get_origin(m) is Literal for word in get_args(m)]
    others = [kinds.get(m, "TEXT") for m in members if get_origin(m) is not Literal]
    joined = "|".join([*literals, *others])
    return joined if len(joined) <= WIDEST_METAVAR else "CHOICE"


def help_text(info: Any) -> str:
    """The help text of a setting; choices that are too many for its metavar stand at the end."""
    words = choices(info)
    hidden = words and metavar(info) == "CHOICE"
    return f"{info.description} One of: {', '.join(words)}." if hidden else str(info.description)
