"""The child processes of a recipe's stages, which share one import of torch and transformers.

`Stages` starts one server process. It imports the modules of the stages once, then forks itself for
each stage, so that a stage has a process of its own whose memory is free for the next.
The server computes nothing and starts no CUDA. Ranks of --num-processes, vLLM and workers start
processes of their own, as they do outside of a recipe: a GPU cannot be used after a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from scir_cli.processes import exit_with_parent

#: What a server process runs; its arguments are two file descriptors and the modules.
PROGRAM = (
    "import sys; from scir_cli.stages import children; "
    "children.serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])"
)


class Stages:
    """Runs stages one after the other, each in a child process; used as a context.

    main: the program of a child, "module:function", which reads sys.argv.
    modules: those that the stages import.
    quiet: redirect the standard output of the stages to stderr.
    """

    def __init__(self, main: str, modules: Sequence[str], quiet: bool) -> None:
        self.main = main
        self.modules = modules
        self.quiet = quiet
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *failure: object) -> None:
        """Ends the server, if it was started, and waits for it."""
        if self.process is None:
            return
        self.requests.close()
        if isinstance(failure[1], SystemExit):
            # SIGTERM reached this process alone.
            self.process.terminate()
        self.process.wait()
        self.replies.close()

    def run(self, arguments: Sequence[str]) -> int:
        """The exit status of `scir ARGUMENTS`, negative if a signal has killed it."""
        if self.process is None:
            self._start()
        request = {"arguments": list(arguments), "main": self.main, "quiet": self.quiet}
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        reply = self.replies.readline()
        # The server itself was killed.
        return int(reply) if reply else -signal.SIGKILL

    def _start(self) -> None:
        """Starts the server."""
        reads, requests = os.pipe()
        replies, writes = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(reads), str(writes), *self.modules],
            stdin=subprocess.DEVNULL,
            pass_fds=(reads, writes),
            preexec_fn=exit_with_parent,
        )
        os.close(reads)
        os.close(writes)
        self.requests = os.fdopen(requests, "w", encoding="utf-8")
        self.replies = os.fdopen(replies, encoding="utf-8")


def serve(reads: int, writes: int, modules: Sequence[str]) -> None:
    """Forks a child for each request until there are no more; its exit status is the reply.

    reads, writes: file descriptors of requests (JSON, one per line) and replies (a number each).
    """
    # Ctrl-C is for the stage, which then ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = 0

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if child:
            with suppress(ProcessLookupError):
                os.kill(child, number)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    for module in modules:
        # A module that cannot be imported is reported by the stage that needs it.
        with suppress(Exception):
            importlib.import_module(module)

    with os.fdopen(reads, encoding="utf-8") as requests:
        for line in requests:
            request = json.loads(line)
            server = os.getpid()
            child = os.fork()
            if child == 0:
                os.close(writes)
                _become_stage(server, request)
            _, status = os.waitpid(child, 0)
            child = 0
            os.write(writes, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become_stage(server: int, request: dict[str, Any]) -> NoReturn:
    """Runs a stage in this process and exits.  server: process id of the parent"""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_with_parent(server)
    if request["quiet"]:
        os.dup2(2, 1)
    sys.argv = ["scir", *request["arguments"]]
    module, _, function = request["main"].partition(":")
    main: Callable[[], None] = getattr(importlib.import_module(module), function)
    main()
    sys.exit(0)
