"""Every failure that a user can cause or repair, its exit status, and how text is printed.

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

Names from datasets, models, recipes and libraries can hold control characters and secrets. `shown`
makes such text safe to print; `print_line` and `report.console` apply it to all that is printed.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any


class ScirError(Exception):
    """Base of every failure: one or more messages, each of which is printed as one line."""

    exit_code = 1

    def __init__(self, *messages: str) -> None:
        super().__init__(*messages)
        self.messages = messages

    def __str__(self) -> str:
        return "\n".join(map(str, self.messages))


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


# ------------------------------------------------------------------------ text that is printed

#: Characters of a printed line or cell; the middle of longer text is left out.
LONGEST_LINE = 2000

#: Characters in which secrets are looked for
LONGEST_SEARCHED = 20_000

#: Characters without a width that Unicode does not count as controls or formats: fillers, a blank
#: and selectors of variants.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\U000e0100-\U000e01ef]"
)

#: Names of parameters whose values are secret, inside of a URL and elsewhere. max_new_tokens and
#: eos_token=… are no secrets.
SECRET_PARAMETER = r"[\w.-]*(?:token|key|secret|passw|pwd|auth|credential|sig|sas)[\w.-]*"
SECRET_NAME = (
    r"(?<![a-z0-9])(?:api[_-]?key|(?:access|secret)[_-]?key|secret|passw(?:or)?d"
    r"|(?:hf|auth|access|api)[_-]token)"
)
SECRETS = (
    # http://TOKEN@host and s3://user:KEY@host. In abfs://container@account there is no secret.
    (re.compile(r"(https?://)[^\s/?#'\"]*@", re.IGNORECASE), r"\1***@"),
    (re.compile(r"(\w://)[^\s/?#:'\"]*:[^\s/?#'\"]*@"), r"\1***@"),
    # A password with a slash: what follows the colon is not a port.
    (re.compile(r"(\w://)[^\s/?#:'\"]+:(?!\d*(?:[/?#\s]|$))[^\s'\"]*@"), r"\1***@"),
    (re.compile(rf"([?&;#]{SECRET_PARAMETER}=)[^&#;\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(rf"({SECRET_NAME}['\"]?\s*[=:]\s*['\"]?)[^\s&,;'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(sk-|hf_)[A-Za-z0-9_-]{20,}"), r"\1***"),
)  # fmt: skip


def redact(text: str) -> str:
    """The text with `***` in place of passwords, keys and tokens, in URLs and after their names."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def is_visible(character: str) -> bool:
    """False for controls, line separators, formats (bidirectional, of no width) and surrogates."""
    if INVISIBLE.match(character):
        return False
    return character.isprintable() or unicodedata.category(character) == "Zs"


def visible(text: str, *, keep: str = "") -> str:
    """The text with `\\x1b` or `\\u202e` in place of each character that cannot be seen.

    keep: characters that stay as they are
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep or is_visible(character):
            return character
        return character.encode("unicode_escape").decode("ascii")

    return re.sub(r"[^ -~]", escaped, text)


def shortened(text: str, most: int) -> str:
    """The text with its middle left out if it has more than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}… {len(text) - 2 * half} characters …{text[-half:]}"


def shown(text: object, *, keep: str = "", most: int = LONGEST_LINE) -> str:
    """Text of others as it is printed: without secrets, nothing invisible, of bounded length.

    keep: control characters that stay, for example line breaks; most: characters
    """
    # Redacted first: a cut could separate a password from the host that shows it to be one.
    safe = redact(shortened(str(text), LONGEST_SEARCHED))
    return visible(shortened(safe, most), keep=keep)


def print_line(text: object) -> None:
    """Prints one line on stderr, as `shown`."""
    print(shown(text), file=sys.stderr, flush=True)


def json_text(value: Any) -> str:
    """A value as JSON in one line, in which every character is visible."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if is_visible(character):
            return character
        if ord(character) > 0xFFFF:
            return json.dumps(character)[1:-1]
        return f"\\u{ord(character):04x}"

    return re.sub(r"[^ -~]", escaped, json.dumps(value, ensure_ascii=False))


def warn(message: str) -> None:
    """Prints a warning as one line on stderr; the program continues."""
    print_line(f"warning: {message}")
