"""Recognizes a finished stage without its libraries, its models and its input.

A stage that has finished leaves OUT/.finished.json: its settings, and the size and times of every
file that it read and wrote. Where all of them are as they were, the manifest is the result, and
neither torch nor a tokenizer is loaded. Where anything differs, or nothing was recorded, the stage
itself decides by digests whether it is finished, and records the files anew.
The hub is not asked: a model or data set of the hub counts as unchanged while its cached revision
is the same.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from scir_cli import __version__, config, registry
from scir_cli.data import files, folders, manifests, schemas, storage, without_pandas
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.engine import model_files
from scir_cli.errors import DataError, ScirError
from scir_cli.registry import Stage
from scir_cli.settings import StageSettings

RECORD = ".finished.json"

#: Settings that neither change a row nor name a file that is read
IGNORED = {"output_dir", "overwrite", "dry_run", "report"}


def run(stage: Stage, settings: StageSettings) -> Json:
    """The manifest of a stage, which runs unless it is finished; raises what the stage raises."""
    if not stage.needs_torch:
        without_pandas.keep_out()
    manifest = find(stage, settings)
    if manifest is not None:
        return manifest

    # Before the stage runs: what changes meanwhile must not count as read.
    seen = None if settings.dry_run else _evidence(stage, settings)
    manifest = registry.load(stage.run)(settings)
    if seen is not None and seen == _evidence(stage, settings):
        out = settings.output_dir
        # Without a record, only the time of the next run is lost.
        with suppress(ScirError):
            files.write_json(out / RECORD, {"read": seen, "written": _written(out)})
    return dict(manifest)


def find(stage: Stage, settings: StageSettings) -> Json | None:
    """The manifest of a finished stage with "reused": true, after its page and its checks.

    None if the output folder does not prove that these settings are finished. A stage that is
    light enough runs again: it finds its rows finished, and checks and prints what is asked.
    """
    out = settings.output_dir
    if settings.overwrite or settings.dry_run or storage.is_remote(out):
        return None
    if not (out / RECORD).is_file() or not (out / "manifest.json").is_file():
        return None
    if not _is_as_recorded(stage, settings):
        return None

    if not stage.needs_torch and _asks_for_more(settings):
        return dict(registry.load(stage.run)(settings))
    try:
        manifest = manifests.read(out)
    except DataError:
        # The stage itself writes a damaged manifest again.
        return None
    _write_page(stage, settings, manifest)
    return {**manifest, "reused": True}


def _is_as_recorded(stage: Stage, settings: StageSettings) -> bool:
    """Whether settings and files are those of the record in the output folder."""
    out = settings.output_dir
    try:
        recorded = files.read_json(out / RECORD)
        now = {"read": _evidence(stage, settings), "written": _written(out)}
    except (ScirError, OSError):
        return False
    # As it is after a round trip through JSON: tuples become lists.
    return now["read"] is not None and recorded == json.loads(json.dumps(now))


def _asks_for_more(settings: StageSettings) -> bool:
    """Whether a setting that affects no row differs from its default."""
    for name, info in type(settings).model_fields.items():
        is_extra = not (info.is_required() or config.role(info, "affects_output"))
        if is_extra and getattr(settings, name) != info.default:
            return True
    return False


def _write_page(stage: Stage, settings: Any, manifest: Json) -> None:
    """Writes the page of --report, if the stage has one."""
    if getattr(settings, "report", None) is None or stage.page is None:
        return
    from scir_cli.report import html

    more = {}
    if stage.shows_agreement:
        judged = settings.output_dir / "judged"
        is_beside = folders.is_dataset(judged)
        more["judged"] = judged if is_beside else to_path(manifest["inputs"]["input"])
    html.write_for(stage.name, settings, **more)


def _evidence(stage: Stage, settings: StageSettings) -> Json | None:
    """What a stage's rows depend on, as far as settings and the file system show it.

    None if a part of it is on another file system, or if the settings cannot be recorded.
    """
    if "WORLD_SIZE" in os.environ or storage.is_remote(settings.output_dir):
        return None
    sources: dict[str, Any] = {}
    try:
        plan = settings.plan()
        for name in config.names_with(type(settings), "path"):
            value: Any = getattr(settings, name) or []
            for spec in value if isinstance(value, list) else [value]:
                sources[f"{name} {spec}"] = [_state(part) for part in str(spec).split("|")]
    except (ScirError, OSError):
        # The stage itself reports what is wrong.
        return None
    values = settings.model_dump(mode="json", exclude=IGNORED)
    return {
        "scir": __version__,
        "schema_version": schemas.VERSION,
        "stage": stage.name,
        "settings": config.without_secrets(values),
        "plan": config.without_secrets(plan),
        "sources": config.without_secrets(sources),
    }


def _state(spec: str) -> Any:
    """The state of a file, folder, installed package, or repository in the hub's cache.

    An adapter has the state of its base model too.
    Raises OSError if a file cannot be read, ScirError if it is on another file system.
    """
    spec = spec.strip()
    if spec.startswith("package:"):
        name = spec.removeprefix("package:")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return None
        return [version, _stats(model_files.cache_folder() / "models" / f"{name}-{version}")]

    path = to_path(spec)
    if storage.is_remote(path):
        raise ScirError(f"{spec} is on another file system")
    if not path.exists():
        # The names of columns, or the split of a folder
        for mark in "?:":
            shorter, found, _ = spec.rpartition(mark)
            if found and not to_path(spec).exists():
                spec = shorter
        path = to_path(spec)
    if not path.exists():
        return _hub_revisions(spec)

    base = model_files.base_model_name(path)
    return [_stats(path), _state(base) if base else None]


def _hub_revisions(spec: str) -> list[str]:
    """The cached revisions of a repository of the hub, models before data sets."""
    from huggingface_hub import constants

    repository = spec.removeprefix("hf://").removeprefix("datasets/")
    name = re.split("[:@]", repository)[0].replace("/", "--")
    revisions = []
    for kind in ("models", "datasets"):
        references = Path(constants.HF_HUB_CACHE) / f"{kind}--{name}" / "refs"
        for file in sorted(references.glob("**/*")):
            if file.is_file():
                revisions.append(f"{kind} {file.name} {file.read_text(encoding='utf-8')}")
    return revisions


def _written(out: Path) -> dict[str, list[int]]:
    """The state of the files of an output folder that were there when it was finished."""
    manifest = files.read_json(out / "manifest.json")
    names = {part["file"] for part in manifest.get("parts", [])}
    for pattern in ("*.json", "*.jsonl", "*.safetensors"):
        names |= {path.name for path in out.glob(pattern) if not path.name.startswith(".")}
    return {name: _stat(out / name) for name in sorted(names)}


def _stats(path: Path) -> Any:
    """The state of a file, or of the files in a folder that are not hidden; None if it is missing.

    Of a finished dataset only its parts count, as its digest covers them alone.
    """
    if not path.exists():
        return None
    if path.is_file():
        return _stat(path)
    manifest = path / "manifest.json"
    parts = files.read_json(manifest).get("parts") if manifest.is_file() else None
    if parts is not None:
        names = ["manifest.json", *(part["file"] for part in parts)]
        return {name: _stat(path / name) for name in names}
    states = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            states[file.relative_to(path).as_posix()] = _stat(file)
    return states


def _stat(file: Path) -> list[int]:
    """Inode, size in bytes, and the times of the last change in ns; [] if the file is missing."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return []
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
