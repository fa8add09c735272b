"""`scir` in processes of its own that share one import of torch and transformers.

A test that starts many commands would spend most of its time on importing. `server` imports once,
then forks for each command; `client`, this file run as a program, hands it a command's arguments,
environment, folder and open files, waits, and ends with its status. If the client is killed, so is
the command. A client imports only the standard library.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "scir_cli.cli",
    "scir_cli.stages.train",
    "scir_cli.stages.generate",
    "scir_cli.stages.judge",
    "scir_cli.stages.eval_rewards",
    "scir_cli.stages.eval_winrate",
    "scir_cli.report.html",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
)


def start(folder: Path) -> tuple[subprocess.Popen[bytes], list[str]]:
    """A server, and the words that run `scir` by it: append the arguments."""
    path = folder / "socket"
    program = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = subprocess.Popen([*program, "serve", str(path)], env=environment)
    while not path.exists():
        assert server.poll() is None, "the server ended"
        select.select([], [], [], 0.02)
    return server, [sys.executable, "-S", "-E", __file__, "client", str(path)]


def client(path: str, arguments: list[str]) -> NoReturn:
    """Has the server run a command; ends as it ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        files = array.array("i", [0, 1, 2])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
        connection.sendmsg([b"x"], ancillary)
        connection.sendall(json.dumps(request).encode() + b"\n")
        status = int(connection.makefile().readline() or -signal.SIGKILL)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(path: str) -> NoReturn:
    """Imports, listens, and forks for each connection."""
    import importlib

    from scir_cli.data import without_pandas
    from scir_cli.processes import exit_with_parent

    exit_with_parent()
    without_pandas.keep_out()
    for module in MODULES:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path + ".new")
        listener.listen(64)
        os.rename(path + ".new", path)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                watch(connection)
            connection.close()


def watch(connection: socket.socket) -> NoReturn:
    """Runs one command in a child; kills it if its client is gone; else sends its status."""
    data = array.array("i")
    _, ancillary, *_ = connection.recvmsg(1, socket.CMSG_SPACE(3 * data.itemsize))
    data.frombytes(ancillary[0][2])
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    os.setsid()
    child = os.fork()
    if child == 0:
        connection.close()
        become(request, list(data))
    for descriptor in data:
        os.close(descriptor)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.killpg(0, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    sys.exit(0)


def become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """`scir` with the arguments, environment, folder and open files of the client."""
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["scir", *request["arguments"]]
    from scir_cli import cli

    cli.main()
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    client(sys.argv[2], sys.argv[3:])
