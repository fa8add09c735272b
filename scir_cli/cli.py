"""The command line: parse, import the stage, run it, print its result.

The options are generated from the declarations in settings.py. This module does not import torch.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from scir_cli import __version__, config, recipe, registry
from scir_cli.errors import ConfigError, ScirError, json_text, print_line, shown
from scir_cli.registry import Stage
from scir_cli.report import tables
from scir_cli.settings import StageSettings, report_problem

CONTEXT = {
    "token_normalize_func": config.own_name,
    "help_option_names": ["-h", "--help"],
}
SHORT = {"output_dir": "-o", "model": "-m", "input": "-i"}

#: The program, by name, for the child processes of a recipe
MAIN = "scir_cli.cli:main"

#: Exit status after Ctrl-C, as shells report it: 128 + SIGINT.
INTERRUPTED = 130

#: Characters of a traceback that are printed
LONGEST_TRACEBACK = 20_000

app = typer.Typer(
    no_args_is_help=True,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)
#: Help of the groups of commands: the first word of a stage's name, if it has two
GROUPS = {"eval": "Measure reward models on labeled pairs, and responses against responses."}

TRACEBACK_HELP = "If the command fails, print the Python traceback."

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file of settings; flags take precedence.",
        metavar="PATH",
        rich_help_panel=config.INPUT_OUTPUT,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the manifest as JSON on stdout.",
        rich_help_panel=config.INPUT_OUTPUT,
    ),
]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback",
        help=TRACEBACK_HELP,
        rich_help_panel=config.RARE,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="Names of columns in the input: prompt=question,chosen=answer_a.",
        metavar="A=B,…",
        rich_help_panel=config.INPUT_OUTPUT,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        help="Then upload the folder to this repository of the hub; a new one is private.",
        metavar="ORG/NAME",
        rich_help_panel=config.INPUT_OUTPUT,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME=VALUE",
        help="Settings by name, for example lora.rank=8.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Self-Consistent Internal Rewards (arXiv 2502.08922).

    Align a language model with its own judgment. The stages:
    generate → judge → check-consistency → filter → train → eval.
    Each reads a dataset and writes one. `run` runs all stages of a recipe.

    Exit status: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
    """
    if version:
        print(f"scir {__version__}")
        raise typer.Exit()


# ------------------------------------------------------------------------ commands of stages


def _stage_command(stage: Stage) -> Callable[..., None]:
    """A Typer command with an option for each setting of the stage.

    An option that the user omits is None, and leaves the setting to --config or its default.
    """
    settings = stage.settings
    fields = config.fields(settings)
    options = {name.replace(".", "_"): name for name in fields}

    def command(**values: Any) -> None:
        file = values.pop("config")
        as_json = values.pop("as_json")
        traceback = values.pop("traceback")
        overrides = values.pop("overrides")
        columns = values.pop("columns", None)
        repository = values.pop("push_to_hub")
        with _reporting(traceback):
            flags = {options[flat]: value for flat, value in values.items() if value is not None}
            layers = (recipe.read_yaml(file) if file else {}, flags, _overrides(overrides))
            _run(stage, layers, as_json, columns, repository)

    parameters = []
    for flat, name in _in_help_order(settings, options):
        parameters.append(_parameter(settings, flat, name, fields[name]))
    parameters += [
        _keyword("config", ConfigFile, None),
        _keyword("push_to_hub", PushToHub, None),
        _keyword("as_json", AsJson, False),
        _keyword("traceback", Traceback, False),
        _keyword("overrides", Overrides, None),
    ]
    if stage.reads_rows:
        parameters.append(_keyword("columns", Columns, None))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = stage.about
    return command


def _run(
    stage: Stage,
    layers: tuple[dict[str, Any], ...],
    as_json: bool,
    columns: str | None,
    repository: str | None,
) -> None:
    """Runs a stage and prints its result.

    layers: values of settings; later layers take precedence.
    columns: of --columns. repository: of --push-to-hub.
    """
    command = f"scir {stage.name}"
    settings = config.build(stage.settings, *layers, where=command)
    if columns:
        settings = settings.model_copy(update={"input": f"{settings.input}?{columns}"})

    # Imported here, so that --help imports no pyarrow.
    from scir_cli.data import hub
    from scir_cli.stages import finished, overwrite

    overwrite.check(settings, command)
    if repository:
        hub.check(repository, settings.output_dir)
    manifest = finished.run(stage, settings)

    # With --num-processes, the process that launched the ranks prints.
    is_launched = "SCIR_LAUNCHED" in os.environ
    if is_launched or not _is_first_rank():
        return
    if as_json:
        print_line(tables.summary_line(stage.name, str(settings.output_dir), manifest))
        print(json_text(manifest))
    else:
        tables.print_stage(stage, str(settings.output_dir), manifest)
    if repository and not settings.dry_run:
        print_line(f"uploaded to {hub.push(settings.output_dir, manifest, repository)}")


def _in_help_order(settings: type[StageSettings], options: dict[str, str]) -> list[tuple[str, str]]:
    """The options by group; within a group the required ones, the stage's, then the inherited ones.

    options: name of the option -> dotted name of the setting
    """
    fields = config.fields(settings)
    inherited: set[str] = set()
    for base in settings.__bases__:
        inherited |= set(getattr(base, "model_fields", {}))

    def rank(option: tuple[str, str]) -> tuple[int, bool, bool]:
        _, name = option
        info = fields[name]
        group = config.GROUPS.index(config.group_of(settings, name, info))
        return group, not info.is_required(), name in inherited

    return sorted(options.items(), key=rank)


def _parameter(settings: type[StageSettings], flat: str, name: str, info: Any) -> inspect.Parameter:
    """The option of one setting.

    flat: name of the option (lora_rank); name: dotted name of the setting (lora.rank)
    """
    is_flag = info.annotation is bool
    is_on = is_flag and info.default
    flag = "--" + flat.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}" if is_on else flag]
    if flat in SHORT:
        names.append(SHORT[flat])

    text = config.help_text(info)
    has_default = info.default not in (None, "", [])
    if has_default and (is_on or not is_flag):
        default = "required" if info.is_required() else f"default: {_as_text(info.default)}"
        text += f" [dim]\\[{default}][/dim]"

    option = typer.Option(
        *names,
        help=text,
        metavar=None if is_flag else config.metavar(info),
        show_default=False,
        rich_help_panel=config.group_of(settings, name, info),
    )
    kind = bool if is_flag else str
    return _keyword(flat, Annotated[kind | None, option], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _as_text(value: Any) -> str:
    """A default as the command line accepts it: lists with commas."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _overrides(words: list[str] | None) -> dict[str, Any]:
    """The settings that are written NAME=VALUE; raises ConfigError if a word has another form."""
    values = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(
                f"'{word}' is not a setting; write NAME=VALUE, or a flag that begins with --"
            )
        values[name] = value
    return values


# ------------------------------------------------------------------------ errors


def _is_first_rank() -> bool:
    """True in the one process of a training run that prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _reporting(traceback: bool) -> Iterator[None]:
    """Turns each failure into one line on stderr and an exit status.

    traceback: also print the traceback
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Warnings of transformers that matter are errors of this program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        status = stop.code if isinstance(stop, SystemExit) else INTERRUPTED
        if isinstance(stop, SystemExit) and status != 128 + signal.SIGTERM:
            # rich exits in this way if nobody reads its output.
            raise
        print(
            "scir: interrupted; finished parts are kept, run the same command again to continue",
            file=sys.stderr,
        )
        raise typer.Exit(status) from None  # type: ignore[arg-type]
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
    except ScirError as error:
        _print_error(error.messages, traceback)
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        # A bug of this program, or an unforeseen failure of a library.
        first = (str(error).strip().splitlines() or ["no message"])[0]
        hint = "unexpected; run the command again with --traceback for details"
        _print_error([f"{type(error).__name__}: {first} ({hint})"], traceback)
        raise typer.Exit(1) from None


def _print_error(messages: Sequence[str], traceback: bool) -> None:
    """Prints an error on stderr, one line per message; other ranks than the first are silent."""
    if traceback:
        print(shown(tracebacks.format_exc(), keep="\n", most=LONGEST_TRACEBACK), file=sys.stderr)
    if _is_first_rank():
        for message in messages:
            print_line(f"scir: error: {message}")


# ------------------------------------------------------------------------ scir run

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe; recipes/ has examples.")
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--output-dir",
        "-o",
        help="Output folder of the whole run. Default: the recipe's.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the run as a shell script and run nothing.")
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Also write the results of the run to this file, as one self-contained HTML page.",
    ),
]
RunAsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print all figures as JSON on stdout; the tables of the stages go to stderr.",
    ),
]
RunTraceback = Annotated[
    bool,
    typer.Option("--traceback", help=TRACEBACK_HELP),
]


@app.command("run")
def run_recipe(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    output_dir: RunFolder = None,
    dry_run: DryRun = False,
    page: Page = None,
    as_json: RunAsJson = False,
    traceback: RunTraceback = False,
) -> None:
    """Run a recipe: each stage of each iteration in its own process.

    Run the same command again to continue an interrupted run.
    """
    with _reporting(traceback):
        steps = recipe.load(recipe_file, output_dir, _overrides(overrides))

        from scir_cli.stages import overwrite

        overwrite.check_steps(steps, str(recipe_file))
        if dry_run:
            print("#!/bin/sh\nset -e")
            print("\n".join(step.shell_command() for step in steps))
            return
        if page and (problem := report_problem(page)):
            raise ConfigError(f"--report {page}: {problem}")

        from scir_cli.stages import run

        result = run.run(steps, MAIN, quiet=as_json, page=page)
        if as_json:
            print(json_text(result))
        else:
            run.show(result)


# ------------------------------------------------------------------------ scir inspect

Inspected = Annotated[
    str,
    typer.Argument(
        metavar="FILE|FOLDER", help="An input file, a hub id, or a folder that scir wrote."
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="ORDER",
        help="Show judged pairs by disagreement, or by confident-mistakes.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, max=10_000, help="Number of examples or pairs to show."),
]
InspectColumns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="A=B,…",
        help="Names of columns in the input: prompt=question,chosen=answer_a.",
    ),
]
InspectAsJson = Annotated[
    bool, typer.Option("--json", help="Print what was found as JSON on stdout.")
]


@app.command("inspect")
def inspect_input(
    path: Inspected,
    sort: Sort = None,
    limit: Limit = None,
    columns: InspectColumns = None,
    as_json: InspectAsJson = False,
    traceback: RunTraceback = False,
) -> None:
    """Show what an input or a dataset holds; writes nothing.

    Of an input file: layout, columns, first row, and which rows would be dropped and why.
    Of a folder of scir: rows, drops, digest and examples; judged pairs side by side.
    """
    with _reporting(traceback):
        from scir_cli.report import reading
        from scir_cli.stages import inspect as inspection

        found = inspection.look(f"{path}?{columns}" if columns else path, sort, limit)
        if as_json:
            print(json_text(found))
        else:
            reading.show(found)


# ------------------------------------------------------------------------ scir env

EnvAsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON on stdout.")]


@app.command("env")
def env(as_json: EnvAsJson = False, traceback: RunTraceback = False) -> None:
    """Show versions, hardware and variables, to paste into an issue."""
    with _reporting(traceback):
        from scir_cli.report import reading
        from scir_cli.stages import environment

        found = environment.describe()
        if as_json:
            print(json_text(found))
        else:
            reading.show_environment(found)


# ------------------------------------------------------------------------ the app


def add_stages(app: typer.Typer, stages: Iterable[Stage]) -> None:
    """Adds a command for each stage; "eval rewards" is the command rewards of the group eval."""
    groups: dict[str, typer.Typer] = {}
    for stage in stages:
        *words, name = stage.words
        parent = app
        for word in words:
            if word not in groups:
                groups[word] = typer.Typer(
                    no_args_is_help=True, context_settings=CONTEXT, help=GROUPS.get(word)
                )
                app.add_typer(groups[word], name=word)
            parent = groups[word]
        parent.command(name)(_stage_command(stage))


add_stages(app, registry.STAGES.values())

#: The class of all mistakes in a command line. Its module depends on the version of Typer.
UsageProblem: Any = typer.BadParameter.__mro__[1]


def _usage_message(error: Any) -> str:
    """The message for a mistake in the command line; of an unknown flag with what to write."""
    flag = getattr(error, "option_name", None)
    if flag is None or error.ctx is None or getattr(error, "possibilities", None) is None:
        return str(error.format_message())
    known = [name for option in error.ctx.command.params for name in option.opts]
    return f"there is no {flag}.{config.advice(flag, known)}"


def main() -> None:
    """Runs the command line and exits with its status."""
    try:
        status = app(prog_name="scir", standalone_mode=False) or 0
    except UsageProblem as error:
        message = _usage_message(error)
        # The message is empty if the help was printed.
        if message:
            print_line(f"scir: error: {message} (scir --help)")
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        # Before the command begins; while it runs, `_reporting` says more.
        print_line("scir: interrupted")
        status = INTERRUPTED
    if "WORLD_SIZE" in os.environ:
        # A rank's work is on disk. gloo's threads may still release tensors, which aborts an
        # interpreter that is closing.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
