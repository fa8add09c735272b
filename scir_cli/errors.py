"""Every failure a user can cause or repair, and the exit status it ends with.

    ScirError                 1   anything below; one line on stderr, the traceback behind --traceback
    ├── UsageError            2   the command line or a recipe is wrong
    │   └── ConfigError       2   a setting is unknown, of the wrong type, or contradicts another
    ├── DataError             1   an input cannot be read, or is not what the stage needs
    ├── StoreError            1   an output folder cannot be written, or holds something else
    │   └── PlanMismatch      1   the folder was started with other settings; the difference is named
    ├── ModelError            1   a model folder, tokenizer or chat template cannot be used
    ├── EngineError           1   vLLM or an endpoint failed; where to read more is named
    ├── TrainingError         1   training cannot go on (a loss that is not finite, say)
    ├── StageFailed           1   a child process of `scir run` failed
    └── CheckFailed           1   the work was done, and a check the user asked for did not hold (--fail-under)

0 is success, 130 an interrupt (Ctrl-C), 143 an end by SIGTERM. A message says what is wrong with its value, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class ScirError(Exception):
    exit_code = 1


class UsageError(ScirError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(ScirError):
    pass


class StoreError(ScirError):
    pass


class PlanMismatch(StoreError):
    pass


class ModelError(ScirError):
    pass


class EngineError(ScirError):
    pass


class TrainingError(ScirError):
    pass


class StageFailed(ScirError):
    pass


class CheckFailed(ScirError):
    pass


def suggest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where a known word is close, else the known words, as the end of a message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(known)}."


def install_hint(extra: str) -> str:
    """The command that installs an extra of this distribution, for the end of a message."""
    return f"pip install 'scir-cli[{extra}]'"


def warn(message: str) -> None:
    """One line on stderr for something the user should know and that stops nothing."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
