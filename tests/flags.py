"""Every flag of every command, with its default and its group in the help.

python tests/flags.py           counts settings per command and group
python tests/flags.py --write   writes tests/flags.txt, which a test compares with the command line
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from scir_cli import config, registry
from scir_cli.cli import app

FROZEN = Path(__file__).parent / "flags.txt"
MOST_SETTINGS_OF_TRAIN = 60
MOST_IN_FIRST_GROUPS_OF_TRAIN = 20
FIRST_GROUPS_OF_TRAIN = (config.INPUT_OUTPUT, config.OPTIMIZER, config.PREFERENCE_LOSS)


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, click command) of every command, as `eval rewards`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def lines() -> list[str]:
    """One line per flag: command | flag | default | group."""
    rows = []
    for name, command in commands(typer.main.get_command(app)):
        defaults = defaults_of(name)
        for option in command.params:
            if option.param_type_name == "option":
                flag = "/".join([*option.opts, *option.secondary_opts])
                default = defaults.get(option.name, option.default)
                group = getattr(option, "rich_help_panel", None) or "Options"
                rows.append(f"{name} | {flag} | {default} | {group}")
    return rows


def defaults_of(command: str) -> dict[str, str]:
    """The default of each setting of a command, by the name of its option."""
    if command not in registry.STAGES:
        return {}
    found = {}
    for name, info in config.fields(registry.STAGES[command].settings).items():
        found[name.replace(".", "_")] = "required" if info.is_required() else str(info.default)
    return found


def counts() -> dict[str, Counter[str]]:
    """Command -> number of settings in each group, in the order of the help."""
    found = {}
    for command, stage in registry.STAGES.items():
        settings = stage.settings
        fields = config.fields(settings)
        groups = [config.group_of(settings, name, info) for name, info in fields.items()]
        found[command] = Counter(sorted(groups, key=config.GROUPS.index))
    return found


def in_first_groups_of_train() -> int:
    return sum(counts()["train"][group] for group in FIRST_GROUPS_OF_TRAIN)


def main() -> None:
    if "--write" in sys.argv[1:]:
        FROZEN.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    for command, groups in counts().items():
        print(f"{command}: {groups.total()}")
        for group, count in groups.items():
            print(f"  {count:3d}  {group}")
    print(f"train, first three groups: {in_first_groups_of_train()}")


if __name__ == "__main__":
    main()
