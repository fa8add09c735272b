"""Pages of the documentation that are generated from the code; a test compares them.

python benchmarks/pages.py    writes docs/settings.md and docs/data.md
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from scir_cli import config, registry
from scir_cli.data import layouts, readers, schemas

DOCS = Path(__file__).parent.parent / "docs"
NOTE = "<!-- Written by benchmarks/pages.py from the code. -->"


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def default(info: object) -> str:
    """The default of a setting as the command line accepts it; empty for none."""
    if info.is_required():  # type: ignore[attr-defined]
        return "required"
    value = info.default  # type: ignore[attr-defined]
    if value is None or value is False or value in ("", []):
        return ""
    return config.list_as_text(value) if isinstance(value, list | tuple) else str(value)


def settings() -> str:
    """Every setting of every command, by the groups of its help."""
    lines = [NOTE, "", "# Settings", ""]
    lines += [
        "A setting is a flag, an entry of a recipe or of a `--config` file, or `NAME=VALUE`.",
        "A number without a default is fitted or not used; a truth value without one is off.",
    ]
    for name, stage in registry.STAGES.items():
        lines += ["", f"## scir {name}", "", stage.about]
        fields = config.fields(stage.settings)
        for group in config.GROUPS:
            members = [
                (field, info)
                for field, info in fields.items()
                if config.group_of(stage.settings, field, info) == group
            ]
            if not members:
                continue
            lines += ["", f"### {group}", "", "| setting | default | meaning |", "|---|---|---|"]
            for field, info in members:
                values = (f"`{field}`", default(info), config.help_text(info))
                lines.append("| " + " | ".join(map(cell, values)) + " |")
    return "\n".join(lines) + "\n"


def description(docstring: str | None) -> str:
    """A module's docstring without its first line."""
    return textwrap.dedent((docstring or "").partition("\n\n")[2]).rstrip()


def data() -> str:
    """What is read, and the columns of every kind of dataset."""
    lines = [NOTE, "", "# Data", "", "## Files that are read", ""]
    formats = ", ".join(f"`{suffix}`" for suffix in readers.READERS)
    packed = " and ".join(f"`{suffix}`" for suffix in readers.COMPRESSIONS)
    lines += [
        f"Extensions: {formats}, each also with {packed}; folders of such files; folders of",
        "`datasets.save_to_disk`; hub ids.",
        "`scir inspect FILE` shows how a file is read.",
        "",
        "```text",
        description(readers.__doc__),
        "```",
        "",
        "Other layouts become these:",
        "",
        "```text",
        description(layouts.__doc__),
        "```",
        "",
        "## Datasets that are written",
    ]
    for kind, columns in schemas.COLUMNS.items():
        lines += ["", f"### {kind}", "", schemas.ROWS[kind], ""]
        lines += ["| column | type | null | meaning |", "|---|---|---|---|"]
        for column in columns:
            may_be_null = "yes" if column.nullable else ""
            kind_of = str(column.dtype).split("<")[0]
            values = (f"`{column.name}`", kind_of, may_be_null, column.meaning)
            lines.append("| " + " | ".join(map(cell, values)) + " |")
            for field in column.fields:
                name = f"`{column.name}.{field.name}`"
                may_be_null = "yes" if field.nullable else ""
                values = (name, str(field.dtype).split("<")[0], may_be_null, field.meaning)
                lines.append("| " + " | ".join(map(cell, values)) + " |")
    return "\n".join(lines) + "\n"


PAGES = {"settings.md": settings, "data.md": data}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
