"""Models of a hub on loopback: what is downloaded, at which revision, and what a gate answers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c" * 40
#: Files of the repository; the content of a file is its name.
FILES = [
    "config.json",
    "tokenizer.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.safetensors",
    "consolidated-00001.safetensors",
    "original/model.safetensors",
    "original/params.json",
    "metal/model.safetensors",
    "onnx/config.json",
    "pytorch_model.bin",
    "picture.png",
]
#: Prints the files of a model, or its error.
PROGRAM = """
import sys
from scir_cli.engine import model_files
from scir_cli.errors import ModelError
try:
    folder = model_files.resolve(sys.argv[1])
except ModelError as error:
    sys.exit(str(error))
print(*sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
"""


class Hub(BaseHTTPRequestHandler):
    """A repository with one commit, also named v2, beside a gated one."""

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if "gated" in path:
            self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is gated")
        elif path[:5] == ["api", "models", "org", "model", "tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(name), "oid": name} for name in FILES
            ]
            self.answer(200, json.dumps(entries).encode())
        elif path[:4] == ["api", "models", "org", "model"] and path[-1] in ("main", "v2", COMMIT):
            siblings = [{"rfilename": name} for name in FILES]
            model = {"id": "org/model", "modelId": "org/model", "sha": COMMIT}
            self.answer(200, json.dumps(model | {"siblings": siblings}).encode())
        elif path[:3] == ["org", "model", "resolve"]:
            content = "/".join(path[4:]).encode()
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")

    def log_message(self, *values: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolved(hub: str, spec: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", PROGRAM, spec]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("spec", ["org/model", "org/model@v2"])
def test_a_model_is_downloaded_once_and_not_in_the_formats_of_others(
    hub: str, spec: str, tmp_path: Path
):
    done = resolved(hub, spec, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(FILES[:4])


def test_a_gated_model_names_its_license_and_the_variable(hub: str, tmp_path: Path):
    done = resolved(hub, "org/gated", tmp_path)
    assert done.stderr.strip() == (
        f"org/gated is gated: accept its license at {hub}/org/gated and set HF_TOKEN to a token of "
        "that account"
    )


@pytest.mark.parametrize("spec", ["org/model@v3", "org/other"])
def test_a_model_or_revision_that_does_not_exist_is_one_line(hub: str, spec: str, tmp_path: Path):
    done = resolved(hub, spec, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{spec} is not a folder and is not available from the hub")
    assert done.stderr.count("\n") == 1
