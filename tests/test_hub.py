"""--push-to-hub against a hub on loopback: what is created and uploaded, and each refusal."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scir_cli.training.model_folder import front_matter


class Hub(BaseHTTPRequestHandler):
    """The four calls of an upload; every file is small enough to be part of the commit."""

    server: FakeHub

    def reply(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.reply({"siblings": [], "sha": "0" * 40, "id": "me/it", "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.reply({"error": "Invalid token"}, 401)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply({"url": f"{self.server.address}/datasets/me/it"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self.reply({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/me/it/commit/{'0' * 40}"
            self.reply({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self.reply({"errors": [], "warnings": []})

    def log_message(self, *values: Any) -> None: ...


class FakeHub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(
    hub: FakeHub, world: Path, out: Path, name: str = "me/it", **variables: str
) -> subprocess.CompletedProcess[str]:
    words = ["filter", "-i", world / "judged", "--rule", "judge", "-o", out, "--push-to-hub", name]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_right",
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "scir_cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_a_dataset_is_uploaded_to_a_private_repository_with_its_card(
    hub: FakeHub, world: Path, tmp_path: Path
):
    done = push(hub, world, tmp_path / "f")
    assert done.returncode == 0, done.stderr
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("it", "me")
    # Versions of the client say it in two ways.
    is_private = created.get("private") or created.get("visibility") == "private"
    assert (created["type"], is_private) == ("dataset", True)
    assert done.stderr.splitlines()[-1] == f"uploaded to {hub.address}/datasets/me/it"
    for name in ("README.md", "manifest.json", "data-00000.arrow", "plan.json"):
        assert hub.files[name] == (tmp_path / "f" / name).read_bytes()
    assert not [name for name in hub.files if name.split("/")[-1].startswith(".")]
    assert b"pretty_name: scir preferences" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("name", "variables", "status", "message"),
    [
        ("me/it", {"HF_TOKEN": "hf_wrong"}, 1, "set HF_TOKEN to a token that may write to it"),
        ("me/it", {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set; unset it"),
        ("it", {}, 2, "expected ORG/NAME"),
        ("me/it", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "could not be uploaded to me/it"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    name: str,
    variables: dict[str, str],
    status: int,
    message: str,
    hub: FakeHub,
    world: Path,
    tmp_path: Path,
):
    done = push(hub, world, tmp_path / "f", name, **variables)
    assert done.returncode == status
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("scir: error: ")]
    assert message in line
    # What is known beforehand is said before the work; the folder of the work is kept.
    assert (tmp_path / "f" / "manifest.json").exists() == (status == 1)


def test_a_model_card_names_base_model_license_data_and_task(tmp_path: Path):
    first = front_matter("org/base@v1 | package:base", ["org/data@r:cfg:train", "mine.jsonl"])
    assert "base_model: org/base" in first and "datasets: [org/data]" in first
    assert "pipeline_tag: text-generation" in first
    # The next iteration is trained from a folder.
    card = "\n".join([*first[:-1], "license: apache-2.0", "---"])
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    second = front_matter(str(tmp_path), ["mine.jsonl"])
    assert "base_model: org/base" in second and "license: apache-2.0" in second
    assert not [line for line in second if line.startswith("datasets")]
