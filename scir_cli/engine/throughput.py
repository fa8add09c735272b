"""What models have computed while a stage runs: tokens read, sampled, and found in a prefix cache, and how fast. Earlier runs of it are not in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Meter:
    read: int = (
        0  # tokens of prompts and of what is scored; shared ones once where they are computed once
    )
    sampled: int = 0
    looked_up: int = 0  # of those read, in a prefix cache that tells of its hits
    cached: int = 0  # of those looked up, found
    seconds: float = 0.0  # at work, of all processes together; loading a model is not in it
    processes: int = 1
    since: float | None = field(default=None, compare=False)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within it time counts."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.count()
            self.since = None

    def count(self, read: int = 0, sampled: int = 0, cached: int | None = None) -> None:
        """cached: of `read`, found in a prefix cache; None where nobody says."""
        self.read += read
        self.sampled += sampled
        if cached is not None:
            self.looked_up += read
            self.cached += cached
        if self.since is not None:
            now = time.monotonic()
            self.seconds, self.since = self.seconds + now - self.since, now

    def add(self, other: Meter) -> None:
        """What another process has computed."""
        self.read += other.read
        self.sampled += other.sampled
        self.looked_up += other.looked_up
        self.cached += other.cached
        self.seconds += other.seconds

    def pop(self) -> Meter:
        """What was computed since it was last taken."""
        taken = Meter(self.read, self.sampled, self.looked_up, self.cached, self.seconds)
        self.read = self.sampled = self.looked_up = self.cached = 0
        self.seconds = 0.0
        return taken

    @property
    def rates(self) -> tuple[float | None, float | None, float | None]:
        """Tokens read and sampled a second, and the share found in the prefix cache; None where there is nothing to say."""
        wall = self.seconds / self.processes
        read, sampled = (n / wall if n and wall else None for n in (self.read, self.sampled))
        return read, sampled, self.cached / self.looked_up if self.looked_up else None

    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        read, sampled, hits = (value and round(value, 4) for value in self.rates)
        return {
            "tokens_read": self.read, "tokens_sampled": self.sampled, "seconds": round(self.seconds / self.processes, 3),
            "tokens_read_per_second": read, "tokens_sampled_per_second": sampled, "prefix_cache_hit_rate": hits,
        }  # fmt: skip

    def line(self) -> str:
        """For a terminal, in a few words."""
        read, sampled, hits = self.rates
        words = (("in {:,.0f}/s", read), ("out {:,.0f}/s", sampled), ("cached {:.0%}", hits))
        return " ".join(word.format(value) for word, value in words if value is not None)
