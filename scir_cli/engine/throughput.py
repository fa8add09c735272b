"""Throughput of a stage: tokens read, tokens sampled, and prefix cache hits.

A meter counts the current run only; an earlier, interrupted run of the same stage is not included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Meter:
    """Counts tokens and seconds of one process, or the sums over several."""

    #: Tokens of prompts and of scored text; a shared token counts once if it is computed once.
    read: int = 0
    sampled: int = 0
    #: Those of `read` that were looked up in a prefix cache which reports its hits.
    looked_up: int = 0
    #: Those of `looked_up` that were in the cache.
    cached: int = 0
    #: Seconds of computing, summed over all processes, without the loading of models.
    seconds: float = 0.0
    processes: int = 1
    since: float | None = field(default=None, compare=False)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the seconds spent inside the context."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.count()
            self.since = None

    def count(self, read: int = 0, sampled: int = 0, cached: int | None = None) -> None:
        """Adds tokens, and the seconds since the last count.

        cached: tokens of `read` served from a prefix cache; None if the backend does not report it.
        """
        self.read += read
        self.sampled += sampled
        if cached is not None:
            self.looked_up += read
            self.cached += cached
        if self.since is not None:
            now = time.monotonic()
            self.seconds = self.seconds + now - self.since
            self.since = now

    def add(self, other: Meter) -> None:
        """Adds the counts of another process."""
        self.read += other.read
        self.sampled += other.sampled
        self.looked_up += other.looked_up
        self.cached += other.cached
        self.seconds += other.seconds

    def pop(self) -> Meter:
        """A copy with the counts since the last call; resets this meter to zero."""
        popped = Meter(self.read, self.sampled, self.looked_up, self.cached, self.seconds)
        self.read = 0
        self.sampled = 0
        self.looked_up = 0
        self.cached = 0
        self.seconds = 0.0
        return popped

    @property
    def rates(self) -> tuple[float | None, float | None, float | None]:
        """Tokens read per second, tokens sampled per second, and the prefix cache hit rate.

        A rate is None if nothing was counted for it.
        """
        wall = self.seconds / self.processes
        read = self.read / wall if self.read and wall else None
        sampled = self.sampled / wall if self.sampled and wall else None
        hits = self.cached / self.looked_up if self.looked_up else None
        return read, sampled, hits

    def figures(self) -> dict[str, Any]:
        """The figures that a manifest holds: tokens, seconds, tokens per second, hit rate."""
        read, sampled, hits = (value and round(value, 4) for value in self.rates)
        return {
            "tokens_read": self.read,
            "tokens_sampled": self.sampled,
            "seconds": round(self.seconds / self.processes, 3),
            "tokens_read_per_second": read,
            "tokens_sampled_per_second": sampled,
            "prefix_cache_hit_rate": hits,
        }

    def line(self) -> str:
        """The rates in a few words, for a terminal."""
        read, sampled, hits = self.rates
        words = []
        if read is not None:
            words.append(f"in {read:,.0f}/s")
        if sampled is not None:
            words.append(f"out {sampled:,.0f}/s")
        if hits is not None:
            words.append(f"cached {hits:.0%}")
        return " ".join(words)
