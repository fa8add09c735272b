"""A child process that ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal

# The option of prctl(2).
PR_SET_PDEATHSIG = 1


def exit_with_parent(parent: int | None = None, on_death: signal.Signals = signal.SIGTERM) -> None:
    """Makes the kernel send this process a signal when its parent dies, for any reason.

    parent: process id of the parent; if it has died before this call, this process exits at once.
    on_death: the signal. SIGTERM allows a clean exit, SIGKILL also ends a process that is busy.
    Does nothing on a system without prctl (macOS).
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, on_death)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
