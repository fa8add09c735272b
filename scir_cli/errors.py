"""Every failure that a user can cause or repair, and its exit status.

    ScirError                 1   any of the below: one line on stderr; --traceback shows more
    ├── UsageError            2   the command line or a recipe is wrong
    │   └── ConfigError       2   a setting is unknown, has the wrong type, or contradicts another
    ├── DataError             1   an input cannot be read, or lacks something that the stage needs
    ├── StoreError            1   an output folder cannot be written, or holds something else
    │   └── PlanMismatch      1   the folder was started with other settings; names the difference
    ├── ModelError            1   a model folder, tokenizer or chat template cannot be used
    ├── EngineError           1   vLLM or an endpoint failed; names the log or address to look at
    ├── TrainingError         1   training cannot continue (for example, a loss is not finite)
    ├── StageFailed           1   a child process of `scir run` failed
    └── CheckFailed           1   the stage finished, but a check of the user failed (--fail-under)

Success is 0, an interrupt (Ctrl-C) 130, an end by SIGTERM 143.
A message states what is wrong with its value, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class ScirError(Exception):
    """Base of every failure that is reported in one line."""

    exit_code = 1


class UsageError(ScirError):
    """The command line or a recipe is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(ScirError):
    """An input cannot be read, or lacks something that the stage needs."""


class StoreError(ScirError):
    """An output folder cannot be written, or holds something else."""


class PlanMismatch(StoreError):
    """The output folder was started with other settings."""


class ModelError(ScirError):
    """A model folder, tokenizer or chat template cannot be used."""


class EngineError(ScirError):
    """vLLM or an endpoint failed."""


class TrainingError(ScirError):
    """Training cannot continue."""


class StageFailed(ScirError):
    """A child process of `scir run` failed."""


class CheckFailed(ScirError):
    """The stage finished, but a check that the user requested failed."""


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: a close match, else all valid words.

    Returns `" Did you mean 'x'?"` or `" Known: x, y."`, with a leading space.
    """
    valid = sorted(known)
    close = difflib.get_close_matches(word, valid, n=1)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(valid)}."


def install_hint(extra: str) -> str:
    """The command that installs an extra of this distribution, for the end of a message."""
    return f"pip install 'scir-cli[{extra}]'"


def warn(message: str) -> None:
    """Prints a warning as one line on stderr; the program continues."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
