"""Classes of a user's own, named "module:Class": backends and reward models share the code.

The module is imported as any other, and is also searched for in the current directory, which a
console script, unlike `python -m`, does not search. Child processes (`scir run`, workers, ranks)
inherit the directory and load the class by this same code. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from scir_cli.errors import ConfigError, suggest

TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_target(name: str) -> bool:
    """Whether `name` is written "module:Class"; nothing is imported."""
    return TARGET.fullmatch(name) is not None


def load_class(target: str, base: type[Any], what: str) -> type[Any]:
    """The class that "module:Class" names.

    base: the class it has to derive from.
    what: what it is, for messages: "backend" or "reward model".
    Raises ConfigError if the module cannot be imported, has no such class, or the class does not
    derive from `base` or lacks one of its methods.
    """
    module_name, _, class_name = target.partition(":")
    module = _import(module_name, f"{what} '{target}'")
    found = getattr(module, class_name, None)
    if found is None:
        classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
        hint = suggest(class_name, classes) if classes else ""
        raise ConfigError(
            f"{what} '{target}': {module.__file__} has no class '{class_name}'.{hint}"
        )
    if not (inspect.isclass(found) and issubclass(found, base)):
        parent = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError(
            f"{what} '{target}' does not derive from {parent}; write class {class_name}({base.__name__})"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(
            f"{what} '{target}' lacks {' and '.join(missing)}; define what {base.__name__} leaves open"
        )
    return found


def _import(name: str, what: str) -> Any:
    """The module of this name; raises ConfigError, in one line, for anything that its import raises."""
    folder = os.getcwd()
    if folder not in sys.path:
        # Last, so that no file of the directory hides a package that is installed.
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module is the user's code, and may raise anything
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ConfigError(f"{what} cannot be imported: {kind}{reason}") from error


def file_digest(target: str) -> str:
    """A digest of the source file of the class that "module:Class" names; raises ConfigError."""
    module_name, _, class_name = target.partition(":")
    module = _import(module_name, f"'{target}'")
    found = getattr(module, class_name, module)
    path = inspect.getsourcefile(found) or module.__file__
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def with_digest(name: str) -> str:
    """As a plan records the name: of a class of the user's own, with a digest of its source file."""
    return f"{name}, a file of digest {file_digest(name)}" if is_target(name) else name
