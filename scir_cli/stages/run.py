"""run: the stages of a recipe one after the other, each in a child process so that its memory is free for the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from scir_cli import registry
from scir_cli.data import files
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import StageFailed
from scir_cli.processes import exit_with_parent
from scir_cli.recipe import Step
from scir_cli.report import html, tables


def run(steps: list[Step], *, quiet: bool = False, page: Path | None = None) -> Json:
    """Runs every step, prints each as a shell line on stderr, and returns the figures of what was checked; done steps are found done.

    page: where the story of the run is written, if anywhere.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for index, step in enumerate(steps, start=1):
        console.print(f"[bold]\\[{index}/{len(steps)}][/bold] ", end="")
        console.print(step.shell_command(), markup=False)
        _child(step, quiet)
    figures = {}
    for step in steps:
        if registry.STAGES[step.stage].shows_agreement:
            manifest = files.read_json(to_path(step.settings["output_dir"]) / "manifest.json")
            figures[str(step.settings["output_dir"])] = manifest["summary"]
    if page:
        folders = [(step.stage, to_path(step.settings["output_dir"])) for step in steps]
        html.write(page, html.run_page(folders))
    return {"steps": len(steps), "checked": figures}


def show(result: Json) -> None:
    if result["checked"]:
        names = list(result["checked"])
        prefix = (
            len(str(Path(names[0]).parent)) + 1 if len({Path(n).parent for n in names}) == 1 else 0
        )
        Console(markup=False).print(
            tables.iterations_table(
                [(name[prefix:], figures) for name, figures in result["checked"].items()]
            )
        )


def _child(step: Step, quiet: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scir_cli", *step.arguments],
        stdout=sys.stderr if quiet else None,
        preexec_fn=exit_with_parent,
    )
    try:
        code = process.wait()
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit):
            process.terminate()  # SIGTERM reached us alone; the terminal has interrupted the child as well
        process.wait()
        raise
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise StageFailed(
            f"{step.stage} {how}; what it finished is kept, the same command goes on from there: {step.shell_command()}"
        )
