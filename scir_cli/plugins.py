"""A user's classes, named "module:Class": backends and reward models share the code.

The module is imported like any other. It is also searched for in the current directory, which
`python -m` searches and a console script does not. Child processes (`scir run`, workers, ranks)
inherit the directory and load the class with the same code. This module does not import torch.
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
    """Whether `name` has the form "module:Class"; nothing is imported."""
    return TARGET.fullmatch(name) is not None


def load_class(target: str, base: type[Any], what: str) -> type[Any]:
    """The class that "module:Class" names.

    base: the class from which it must derive.
    what: its role, for messages: "backend" or "reward model".
    Raises ConfigError if the module cannot be imported, has no such class, or the class does not
    derive from `base` or lacks one of its methods.
    """
    module_name, _, class_name = target.partition(":")
    label = f"{what} '{target}'"
    module = _import(module_name, label)

    loaded = getattr(module, class_name, None)
    if loaded is None:
        classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
        hint = suggest(class_name, classes) if classes else ""
        raise ConfigError(f"{label}: {module.__file__} has no class '{class_name}'.{hint}")

    if not (inspect.isclass(loaded) and issubclass(loaded, base)):
        parent = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError(
            f"{label} does not derive from {parent}; write class {class_name}({base.__name__})"
        )

    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        methods = " and ".join(missing)
        raise ConfigError(
            f"{label} lacks {methods}; define every abstract method of {base.__name__}"
        )
    return loaded


def _import(name: str, label: str) -> Any:
    """The module of this name.

    label: what it is imported for, as the start of a message.
    Raises ConfigError, in one line, for anything that the import raises.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        # Last, so that no file of the directory hides a package that is installed.
        sys.path.append(folder)
        importlib.invalidate_caches()

    try:
        return importlib.import_module(name)
    # The module is the user's code and may raise anything.
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        # An ImportError's message needs no name before it.
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ConfigError(f"{label} cannot be imported: {kind}{lines[0]}") from error


def file_digest(target: str) -> str:
    """16 hex digits that identify the source file of the class named "module:Class".

    Raises ConfigError if the module cannot be imported.
    """
    module_name, _, class_name = target.partition(":")
    module = _import(module_name, f"'{target}'")
    source = getattr(module, class_name, module)
    path = inspect.getsourcefile(source) or module.__file__
    content = Path(path).read_bytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def with_digest(name: str) -> str:
    """The name as a plan records it; a "module:Class" with the digest of its source file."""
    if not is_target(name):
        return name
    return f"{name}, a file of digest {file_digest(name)}"
