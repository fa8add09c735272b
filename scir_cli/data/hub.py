"""A finished folder -> a repository of the Hugging Face hub.

The hub's own variables count: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. A repository that is made is
private. Models become model repositories, all other kinds become data sets; the README.md of the
folder is the card. Hidden files (locks, records, drafts) stay here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from scir_cli.data import storage
from scir_cli.data.files import Json
from scir_cli.errors import ConfigError, EngineError

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

#: Never uploaded: hidden files, and caches that can be computed again
LEFT_OUT = [".*", "**/.*", "reference_logps-*.arrow", "*.log"]


def check(repository: str, folder: Path) -> None:
    """Raises ConfigError if a folder cannot be pushed, for reasons that are known beforehand."""
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push-to-hub {repository}: expected ORG/NAME")
    if storage.is_remote(folder):
        raise ConfigError("--push-to-hub needs an output folder on this machine")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError("--push-to-hub needs the hub, and HF_HUB_OFFLINE is set; unset it")


def push(folder: Path, manifest: Json, repository: str) -> str:
    """Uploads a finished folder; returns the address of the repository.

    Raises EngineError, in one line, if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    kind = "model" if manifest["kind"] == "model" else "dataset"
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        created = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type=kind,
            ignore_patterns=LEFT_OUT,
            commit_message=f"scir {manifest['kind']} {manifest['digest'][:8]}",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        hint = ""
        if status in (401, 403):
            hint = "; set HF_TOKEN to a token that may write to it, or run 'hf auth login'"
        reason = str(error).strip().splitlines()[-1]
        raise EngineError(
            f"the hub refused {repository} (status {status}): {reason}{hint}"
        ) from error
    # The client also raises the errors of its HTTP library, which differs by version.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{folder} could not be uploaded to {repository}: {reason}") from error
    return str(created)
