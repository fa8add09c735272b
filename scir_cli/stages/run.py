"""run: the stages of a recipe, one after the other.

A stage that is finished is recognized in this process. Every other runs in a child process, so that
its memory is free for the next stage.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from scir_cli import config, registry
from scir_cli.data import manifests, without_pandas
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import StageFailed, print_line
from scir_cli.recipe import Step
from scir_cli.report import tables
from scir_cli.report.console import PlainConsole
from scir_cli.stages import finished
from scir_cli.stages.children import Stages


def run(steps: list[Step], main: str, *, quiet: bool = False, page: Path | None = None) -> Json:
    """Runs every step and returns the summaries of the agreement stages by folder.

    Prints each step as a shell command on stderr. A finished stage is not computed again.
    main: the program of a child, as of `children.Stages`.
    quiet: redirect the standard output of the stages to stderr.
    page: file for the HTML report of the whole run, if any.
    Raises StageFailed if a stage ends with an error.
    """
    without_pandas.keep_out()
    modules = [registry.STAGES[step.stage].run.partition(":")[0] for step in steps]
    with Stages(main, sorted(set(modules)), quiet) as stages:
        for index, step in enumerate(steps, start=1):
            print_line(f"[{index}/{len(steps)}] {step.shell_command()}")
            if not _show_finished(step, quiet):
                _check_status(step, stages.run(step.arguments))

    summaries = {}
    for step in steps:
        if registry.STAGES[step.stage].shows_agreement:
            folder = step.settings["output_dir"]
            manifest = manifests.read(to_path(folder))
            summaries[str(folder)] = manifest["summary"]

    if page:
        from scir_cli.report import html

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


def _show_finished(step: Step, quiet: bool) -> bool:
    """Prints the result of a step that is finished already; False if it is not.

    quiet: print on stderr.
    """
    stage = registry.STAGES[step.stage]
    settings = config.build(stage.settings, step.settings, where=step.stage)
    manifest = finished.find(stage, settings)
    if manifest is None:
        return False
    with redirect_stdout(sys.stderr) if quiet else nullcontext():
        tables.print_stage(stage, str(settings.output_dir), manifest)
    return True


def _check_status(step: Step, code: int) -> None:
    """Raises StageFailed, with the command that continues, if the exit status is not 0."""
    if code == 0:
        return
    status = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    raise StageFailed(
        f"{step.stage} {status}; finished parts are kept."
        f" To continue, run the same command again: {step.shell_command()}"
    )
