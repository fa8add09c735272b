"""How a setting is declared, read from layers of values, checked and shown.

settings.py declares each setting once, with its default, help text and roles. The command line,
recipes and plans are generated from these declarations.

Precedence: defaults < recipe or --config file < flags and NAME=VALUE arguments. An unknown name is
an error with a suggestion. Defaults marked [ours] in docs/method.md are our reconstruction and not
the paper's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
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

from scir_cli.errors import ConfigError, redact, suggest

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

#: Their order in the help.
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
    """A field of a settings class, with the roles that other code reads.

    help            its text in the command's help
    group           its heading in the command's help, one of GROUPS
    path            it names a file, folder, dataset or model that --overwrite must not delete
    affects_output  it is part of the plan; False if it cannot change a row, so that an interrupted
                    run may resume with another value
    affects_fit     a scale or lambda that was fitted under another value is fitted again
    limits          pydantic's bounds: gt, ge, lt, le, of which a number needs a lower and an upper
                    one; allow_inf_nan=True accepts numbers that are not finite
    """
    roles: Any = {
        "group": group,
        "path": path,
        "affects_output": affects_output,
        "affects_fit": affects_fit,
    }
    return Field(default, description=help, json_schema_extra=roles, **limits)


def role(info: Any, name: str) -> Any:
    """The declared value of a role of a setting.  name: "group", "path", …"""
    return info.json_schema_extra[name]


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; the type inside of `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin not in (Union, UnionType):
        return (annotation,)

    members: list[Any] = []
    for member in get_args(annotation):
        members += _members(member)
    return tuple(members)


#: A number as text. int() and float() also accept 1_000, digits of other scripts, inf and nan.
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)

#: Characters of a number
LONGEST_NUMBER = 40


def _check_number(text: str, words: Iterable[str] = ()) -> None:
    """Raises ValueError unless the text is a finite number in the digits 0 to 9.

    words: the texts that the setting also accepts, for the message.
    """
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        others = "".join(f", or {word}" for word in sorted(words))
        raise ValueError(f"expected a finite number, written with the digits 0 to 9{others}")


def _list_from_text(text: str) -> list[str]:
    """The items of a list: a JSON list of texts, or words between commas."""
    if text.startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            items = None
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    words = [word.strip() for word in text.split(",")]
    return [word for word in words if word]


def list_as_text(values: Sequence[Any]) -> str:
    """A list as the command line accepts it: with commas, or as JSON if that is ambiguous."""
    items = [str(value) for value in values]
    text = ",".join(items)
    return text if _list_from_text(text) == items else json.dumps(items, ensure_ascii=False)


class Settings(BaseModel):
    """Settings of a stage, or a group of them that is nested in another class.

    They are frozen, and an unknown name is an error.
    """

    # A command builds the validator of its own settings only.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,
    )

    #: Setting or group -> the group in which this command's help shows it instead.
    regrouped: ClassVar[dict[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: Any) -> Any:
        """A value from the text of a command line; other values unchanged.

        "null" and "none" are None if the default is None, except for texts. A list is split at its
        commas, or written as JSON. A number has only the digits 0 to 9, and no underscores.
        """
        if not isinstance(value, str):
            return value

        field = cls.model_fields[info.field_name]
        if "\0" in value:
            raise ValueError("it contains a null character")
        if _is_list(field):
            return _list_from_text(value)
        if str in _members(field.annotation):
            return value
        if value.lower() in ("null", "none") and field.default is None:
            return None
        words = _literals(field)
        if _is_number(field) and value not in words:
            _check_number(value, words)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _has_no_repeats(cls, value: Any) -> Any:
        """Raises ValueError if a list names something twice."""
        if isinstance(value, list | tuple):
            for index, word in enumerate(value):
                if word in value[:index]:
                    raise ValueError(f"it names {word!r} twice")
        return value

    def plan(self) -> dict[str, Any]:
        """The settings that determine the rows, JSON-ready; a digest of its content for a file.

        Inputs and models are not part of it: a plan has digests of them beside the settings.
        """
        excluded = set()
        for name, info in type(self).model_fields.items():
            if not role(info, "affects_output"):
                excluded.add(name)

        plan: dict[str, Any] = without_secrets(self.model_dump(mode="json", exclude=excluded))
        for name, value in self:
            if name in plan and isinstance(value, Path) and value.is_file():
                digest = hashlib.blake2b(value.read_bytes(), digest_size=8).hexdigest()
                plan[name] = f"a file of digest {digest}"
        return plan


def without_secrets(value: Any) -> Any:
    """The value with a digest after each text that `redact` has changed, so that texts differ."""
    if isinstance(value, dict):
        return {name: without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str) or redact(value) == value:
        return value
    digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{redact(value)} (digest {digest})"


def fields(settings: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name (`lora.rank`), with its pydantic field."""
    by_name: dict[str, Any] = {}
    for name, info in settings.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            by_name |= fields(kind, f"{prefix}{name}.")
        else:
            by_name[prefix + name] = info
    return by_name


def group_of(settings: type[Settings], name: str, info: Any) -> str:
    """The group in which this command's help shows a setting.  name: dotted, as from `fields`"""
    group = role(info, "group")
    return settings.regrouped.get(name) or settings.regrouped.get(group, group)


def names_with(settings: type[Settings], role_name: str) -> list[str]:
    """The settings (not the nested ones) that have a role: names_with(TrainSettings, "path")."""
    return [name for name, info in settings.model_fields.items() if role(info, role_name)]


def build(settings: type[Settings], *layers: dict[str, Any], where: str) -> Any:
    """An object of a settings class, from layers of values; later layers take precedence.

    layers: names may be dotted or nested, in kebab case or snake case
    where: the source of the values, which begins each message: "scir judge"
    Raises ConfigError with every mistake in one report, each with its name and value.
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
    try:
        result = settings.model_validate(_nested(merged))
    except ValidationError as error:
        problems += [f"{where}: {_explain(item)}" for item in error.errors()]
    if problems:
        raise ConfigError(*problems)
    return result


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings from dotted names: {"lora.rank": 8} -> {"lora": {"rank": 8}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        mapping = nested
        for group in groups:
            mapping = mapping.setdefault(group, {})
        mapping[last] = value
    return nested


def flatten(layer: dict[str, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names in snake case from nested mappings: {"lora": {"rank": 8}} -> {"lora.rank": 8}.

    known: dotted names of settings. A mapping is flattened only if it is a group of them.
    """
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        name = prefix + str(key).replace("-", "_")
        is_group = any(setting.startswith(name + ".") for setting in known)
        if is_group and isinstance(value, dict):
            flat |= flatten(value, known, name + ".")
        else:
            flat[name] = value
    return flat


def _explain(item: Any) -> str:
    """The message for one of pydantic's errors."""
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        flag = "--" + name.replace("_", "-").replace(".", "-")
        return f"'{name}' is missing; pass {flag}"

    message: str = item["msg"].removeprefix("Value error, ")
    if not name:
        return message
    value = item["input"]
    return f"'{name}' is {value!r}: {message}"


# ------------------------------------------------------------------------ help

#: Characters. A longer list of choices is shown at the end of the help text.
WIDEST_METAVAR = 14


def _is_number(info: Any) -> bool:
    """True if a setting accepts a number."""
    return not {int, float}.isdisjoint(_members(info.annotation))


def _literals(info: Any) -> set[str]:
    """The words that a setting accepts beside other values."""
    words: set[str] = set()
    for member in _members(info.annotation):
        if get_origin(member) is Literal:
            words |= set(get_args(member))
    return words


def _is_list(info: Any) -> bool:
    """True if a setting accepts a list, which the command line writes with commas."""
    origins = {get_origin(kind) for kind in _members(info.annotation)}
    return not origins.isdisjoint((list, tuple))


def choices(info: Any) -> tuple[str, ...]:
    """The words that a setting accepts; () if it also accepts other values."""
    members = list(_members(info.annotation))
    if NoneType in members:
        members.remove(NoneType)

    if len(members) == 1 and get_origin(members[0]) is Literal:
        return get_args(members[0])
    return ()


def metavar(info: Any) -> str:
    """The form of a setting's value in the help.

    A few choices as `a|b`, else INTEGER, NUMBER, PATH, CHOICE or TEXT; "A,B,…" for a list.
    """
    if _is_list(info):
        return "A,B,…"
    if role(info, "path"):
        return "PATH"

    kinds = {int: "INTEGER", float: "NUMBER", Path: "PATH"}
    words: list[str] = []
    others: list[str] = []
    for member in _members(info.annotation):
        if get_origin(member) is Literal:
            words += get_args(member)
        elif member is not NoneType:
            others.append(kinds.get(member, "TEXT"))
    joined = "|".join([*words, *others])
    return joined if len(joined) <= WIDEST_METAVAR else "CHOICE"


def help_text(info: Any) -> str:
    """The help text of a setting, with its choices if they are too long for its metavar."""
    text = str(info.description)
    words = choices(info)
    if words and metavar(info) == "CHOICE":
        return f"{text} One of: {', '.join(words)}."
    return text


# ------------------------------------------------------------------------ flags of others

#: Flags of transformers and TRL that mean the same as a flag of ours: accepted, not in the help
ALIASES = {
    "model-name-or-path": "model",
    "dataset-name": "input",
    "train-file": "input",
    "num-train-epochs": "num-epochs",
    "lr": "learning-rate",
    "lr-scheduler-type": "schedule",
    "lora-r": "lora-rank",
    "loss-type": "preference-loss",
    "rpo-alpha": "sft-weight",
    "max-completion-length": "max-new-tokens",
    "num-return-sequences": "n",
    "num-generations": "n",
    "save-steps": "save-every",
    "eval-steps": "validation-every",
    "eval-dataset": "validation",
    "overwrite-output-dir": "overwrite",
    "ref-model": "reward-reference",
    "torch-dtype": "dtype",
}

#: Flags of others that mean something else here, or nothing: what to write
OTHER_FLAGS = {
    "per-device-train-batch-size": "--batch-size is the number of pairs per optimizer step, "
    "over all devices and packs",
    "gradient-accumulation-steps": "--batch-size is the number of pairs per optimizer step; "
    "--max-tokens-per-pack bounds memory",
    "per-device-eval-batch-size": "--max-tokens-per-pack bounds memory",
    "max-length": "nothing is truncated; scir filter --max-response-tokens drops long responses",
    "max-prompt-length": "nothing is truncated; a prompt that does not fit is dropped and counted",
    "use-peft": "--lora-rank 16 trains LoRA adapters",
    "lora-dropout": "LoRA has no dropout here; --lora-rank, --lora-alpha, --lora-target-modules",
    "load-in-4bit": "--quantization 4bit",
    "load-in-8bit": "only --quantization 4bit",
    "bf16": "--dtype bf16",
    "fp16": "--dtype bf16 or --dtype fp32",
    "optim": "the optimizer is AdamW",
    "warmup-steps": "--warmup-ratio, a share of all steps",
    "logging-steps": "every step is in OUT/metrics.jsonl",
    "attn-implementation": "attention over token trees is chosen when the model is loaded",
    "run-name": "a run is named after --output-dir, or by WANDB_NAME",
    "dataset-config": "--input ORG/NAME:CONFIG:SPLIT",
    "dataset-train-split": "--input ORG/NAME:SPLIT",
    "model-revision": "--model ORG/NAME@REVISION",
    "deepspeed": "accelerate launch with a DeepSpeed configuration",
    "fsdp": "--sharding fsdp --num-processes N",
    "hub-model-id": "--push-to-hub ORG/NAME",
    "precompute-ref-log-probs": "reference log-probabilities are always computed once and kept",
    "padding-free": "sequences are always packed, never padded",
}


def own_name(word: str) -> str:
    """The name of a flag as ours: kebab case, and our name of an alias."""
    name = word.replace("_", "-")
    return ALIASES.get(name, name)


def advice(flag: str, known: Iterable[str]) -> str:
    """The end of a message about a flag that a command does not have.

    flag: as the user wrote it. known: the flags of the command.
    """
    name = flag.lstrip("-").replace("_", "-")
    if name in OTHER_FLAGS:
        return f" Here: {OTHER_FLAGS[name]}."
    close = difflib.get_close_matches("--" + name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
