"""run: the stages of a recipe, one after the other.

Each stage runs in a child process, so that its memory is free for the next stage.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scir_cli import registry
from scir_cli.data import files
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import StageFailed, print_line
from scir_cli.processes import exit_with_parent
from scir_cli.recipe import Step
from scir_cli.report import html, tables
from scir_cli.report.console import PlainConsole


def run(steps: list[Step], *, quiet: bool = False, page: Path | None = None) -> Json:
    """Runs every step and returns the summaries of the agreement stages by folder.

    Prints each step as a shell command on stderr. A finished stage is not computed again.
    quiet: redirect the standard output of the stages to stderr.
    page: file for the HTML report of the whole run, if any.
    Raises StageFailed if a stage ends with an error.
    """
    for index, step in enumerate(steps, start=1):
        print_line(f"[{index}/{len(steps)}] {step.shell_command()}")
        _run_in_child(step, quiet)

    summaries = {}
    for step in steps:
        if registry.STAGES[step.stage].shows_agreement:
            folder = step.settings["output_dir"]
            manifest = files.read_json(to_path(folder) / "manifest.json")
            summaries[str(folder)] = manifest["summary"]

    if page:
        folders = [(step.stage, to_path(step.settings["output_dir"])) for step in steps]
        html.write(page, html.run_page(folders))
    return {"steps": len(steps), "checked": summaries}


def show(result: Json) -> None:
    """Prints the table of agreement by iteration; nothing if no stage measured it."""
    summaries = result["checked"]
    if not summaries:
        return
    # Folders with the same parent are shown without it.
    parents = {str(Path(name).parent) for name in summaries}
    prefix_length = len(parents.pop()) + 1 if len(parents) == 1 else 0
    rows = []
    for name, summary in summaries.items():
        rows.append((name[prefix_length:], summary))
    console = PlainConsole()
    console.print(tables.iterations_table(rows))


def _run_in_child(step: Step, quiet: bool) -> None:
    """Runs one step in a child process. Raises StageFailed if it ends with an error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scir_cli", *step.arguments],
        stdout=sys.stderr if quiet else None,
        preexec_fn=exit_with_parent,
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal has interrupted the child as well.
        process.wait()
        raise
    except SystemExit:
        # SIGTERM reached this process alone.
        process.terminate()
        process.wait()
        raise
    if code == 0:
        return
    status = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    raise StageFailed(
        f"{step.stage} {status}; finished parts are kept."
        f" To continue, run the same command again: {step.shell_command()}"
    )
