"""pyarrow without pandas, for commands that should start at once.

The first array that pyarrow makes from Python values imports pandas, if that is installed, to
recognize its objects. None of ours are; the import takes half of the time of a short command.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

import pyarrow as pa


class _Refusal(MetaPathFinder):
    """Refuses to find pandas."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        """Raises ImportError for pandas; leaves other modules to other finders."""
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)


def keep_out() -> None:
    """Makes pyarrow decide now that there is no pandas in this process.

    Does nothing where pandas, or `datasets`, which hands its objects to pyarrow, is loaded.
    """
    if "pandas" in sys.modules or "datasets" in sys.modules:
        return
    refusal = _Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(refusal)
