"""The command line: parse, import the stage, run it, print one line. Options are made from the settings in config.py; torch is not imported here."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from scir_cli import __version__, config, recipe, registry
from scir_cli.errors import ConfigError, ScirError
from scir_cli.registry import Stage
from scir_cli.report import tables
from scir_cli.settings import StageSettings, report_problem

CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}
SHORT = {"output_dir": "-o", "model": "-m", "input": "-i"}

app = typer.Typer(
    no_args_is_help=True,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)
#: Help of the groups of commands: the first word of a stage's name, if it has two
GROUPS = {"eval": "Measure reward models on labelled pairs, and responses against responses."}

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
        "--json", help="Print the manifest as JSON on stdout.", rich_help_panel=config.INPUT_OUTPUT
    ),
]
Traceback = Annotated[
    bool,
    typer.Option(
        "--traceback", help="Print the traceback of an error.", rich_help_panel=config.RARE
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME=VALUE", help="Settings by their names, as lora.rank=8.", show_default=False
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Self-Consistent Internal Rewards (arXiv 2502.08922): align a language model with its own judgement.

    Stages pass Arrow datasets on: generate → judge → check-consistency → filter → train → eval; `run` takes a recipe through all of them.
    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (143 by SIGTERM).
    """
    if version:
        print(f"scir {__version__}")
        raise typer.Exit()


def _stage_command(stage: Stage) -> Callable[..., None]:
    """A Typer command with an option for every setting; an option that is not given is None and leaves the setting to the layers below."""
    settings = stage.settings
    known = config.fields(settings)
    options = {name.replace(".", "_"): name for name in known}

    def command(**given: Any) -> None:
        file, as_json, traceback, overrides = (
            given.pop(k) for k in ("config", "as_json", "traceback", "overrides")
        )
        with _reporting(traceback):
            flags = {options[k]: v for k, v in given.items() if v is not None}
            layers = (recipe.read_yaml(file) if file else {}, flags, _overrides(overrides))
            built = config.build(settings, *layers, where=f"scir {stage.name}")
            from scir_cli.stages import overwrite  # here, so that --help imports no pyarrow

            overwrite.check(built, f"scir {stage.name}")
            manifest = registry.load(stage.run)(built)
            if (
                not _speaks() or "SCIR_LAUNCHED" in os.environ
            ):  # the process that launched this one prints
                return
            print(tables.summary_line(stage.name, str(built.output_dir), manifest), file=sys.stderr)
            print(json.dumps(manifest, ensure_ascii=False)) if as_json else tables.print_results(
                stage, manifest
            )

    parameters = [
        _parameter(settings, flat, name, known[name])
        for flat, name in _in_help_order(settings, options)
    ]
    extra = {
        "config": (ConfigFile, None),
        "as_json": (AsJson, False),
        "traceback": (Traceback, False),
        "overrides": (Overrides, None),
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [
        inspect.Parameter(name, keyword, default=default, annotation=kind)
        for name, (kind, default) in extra.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = stage.about
    return command


def _in_help_order(settings: type[StageSettings], options: dict[str, str]) -> list[tuple[str, str]]:
    """The options by group; within a group required ones first, then the stage's own, then inherited ones."""
    known = config.fields(settings)
    inherited = {name for base in settings.__bases__ for name in getattr(base, "model_fields", {})}

    def rank(option: tuple[str, str]) -> tuple[int, bool, bool]:
        name = option[1]
        group = config.GROUPS.index(config.group_of(settings, name, known[name]))
        return group, not known[name].is_required(), name in inherited

    return sorted(options.items(), key=rank)


def _parameter(settings: type[StageSettings], flat: str, name: str, info: Any) -> inspect.Parameter:
    flag = "--" + flat.replace("_", "-")
    boolean = info.annotation is bool
    names = [
        f"{flag}/--no-{flag[2:]}" if boolean and info.default else flag,
        *([SHORT[flat]] if flat in SHORT else []),
    ]
    default = "required" if info.is_required() else f"default: {_shown(info.default)}"
    text = config.help_text(info)
    if info.default not in (None, "", []) and not (boolean and not info.default):
        text += f" [dim]\\[{default}][/dim]"
    option = typer.Option(
        *names,
        help=text,
        metavar=None if boolean else config.metavar(info),
        show_default=False,
        rich_help_panel=config.group_of(settings, name, info),
    )
    kind = bool if boolean else str
    return inspect.Parameter(
        flat,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _overrides(words: list[str] | None) -> dict[str, Any]:
    pairs = [word.partition("=") for word in words or []]
    for name, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"'{name}' is not a setting; write NAME=VALUE, or a flag with --")
    return {name: value for name, _, value in pairs}


def _speaks() -> bool:
    """Of the processes of one training run, only the first says anything."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _reporting(traceback: bool) -> Iterator[None]:
    """Turns every failure into one line on stderr and an exit status; the traceback is behind --traceback."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # what matters of its warnings is an error line here
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 128 + signal.SIGTERM:
            raise  # rich ends the program so where nobody reads what it prints
        print(
            "scir: interrupted; finished parts are kept, the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(stop.code if isinstance(stop, SystemExit) else 130) from None  # type: ignore[arg-type]
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
    except ScirError as error:
        if traceback:
            tracebacks.print_exc()
        for message in str(error).splitlines() if _speaks() else ():
            print(f"scir: error: {message}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except (
        Exception
    ) as error:  # the last line of defence: a bug of ours, or a library's failure nobody foresaw
        if traceback:
            tracebacks.print_exc()
        first = (str(error).strip().splitlines() or ["no message"])[0]
        if _speaks():
            print(
                f"scir: error: {type(error).__name__}: {first} (unexpected; run again with --traceback to see where)",
                file=sys.stderr,
            )
        raise typer.Exit(1) from None


@app.command("run")
def run_recipe(
    recipe_file: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe; see recipes/.")
    ],
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", "-o", help="Output folder of the whole run, instead of the recipe's."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the run as a shell script, and run nothing.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            help="Also write the run to this file, as one self-contained HTML page.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print all figures as JSON on stdout; the stages' tables go to stderr."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the traceback of an error.")
    ] = False,
) -> None:
    """Run a recipe: every stage of every iteration, each in its own process. The same command resumes an interrupted run."""
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

        result = run.run(steps, quiet=as_json, page=page)
        print(json.dumps(result, ensure_ascii=False)) if as_json else run.show(result)


def add_stages(app: typer.Typer, stages: Iterable[Stage]) -> None:
    """Adds a command for each stage; those of two words, as "eval rewards", in a group of the first."""
    groups: dict[str, typer.Typer] = {}
    for stage in stages:
        *group, name = stage.words
        place = app
        for word in group:
            if word not in groups:
                groups[word] = typer.Typer(
                    no_args_is_help=True, context_settings=CONTEXT, help=GROUPS.get(word)
                )
                app.add_typer(groups[word], name=word)
            place = groups[word]
        place.command(name)(_stage_command(stage))


add_stages(app, registry.STAGES.values())


UsageProblem: Any = typer.BadParameter.__mro__[
    1
]  # every mistake in a command line, wherever this Typer keeps the class


def main() -> None:
    try:
        status = app(prog_name="scir", standalone_mode=False) or 0
    except UsageProblem as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message:  # else the help was printed
            print(f"scir: error: {message} (scir --help)", file=sys.stderr)
        status = 2
    if "WORLD_SIZE" in os.environ:
        # A rank's work is on disk. gloo's threads may still let go of tensors, and that aborts an interpreter that is closing.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
