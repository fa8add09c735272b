"""Backends of workers which are slow, die or fail.

The workers load them by name, as `failing_backends:DiesOnce`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from scir_cli.backends.fake import FakeBackend
from scir_cli.errors import DataError


class Slow(FakeBackend):
    """Takes its time, so that it can be killed in the middle of a part."""

    def generate(self, requests: Any) -> Any:
        time.sleep(float(os.environ.get("SCIR_SLOW", "0.2")))
        return super().generate(requests)


class DiesOnce(FakeBackend):
    """Kills its own process at the first part that any worker makes."""

    def __init__(self, model: Any, sampling: Any, settings: Any) -> None:
        super().__init__(model, sampling)
        self.flag = Path(settings.output_dir) / "died"

    def generate(self, requests: Any) -> Any:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(requests)


class DiesAtSeven(FakeBackend):
    """Kills its process whenever it meets prompt 7, and fails at it in the end."""

    def __init__(self, model: Any, sampling: Any, settings: Any) -> None:
        super().__init__(model, sampling)
        self.tokenizer = model.chat.tokenizer

    def generate(self, requests: Any) -> Any:
        if any("number 7." in self.tokenizer.decode(r.prompt_ids) for r in requests):
            raise MemoryError("out of memory\nand so on")
        return super().generate(requests)


class IsWrong(FakeBackend):
    def generate(self, requests: Any) -> Any:
        raise DataError("these data are wrong")
