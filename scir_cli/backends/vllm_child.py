"""The child process of vllm.py, the only module that imports vLLM.

It loads the model, answers requests until its pipe closes, and exits.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from scir_cli.processes import exit_with_parent

#: Tokens read, sampled, and read from the prefix cache
OnTokens = Callable[[int, int, int], None]


def serve(
    pipe: Connection, arguments: dict[str, Any], adapter: str | None, log: str, parent: int
) -> None:
    """Loads the model, and answers requests until the pipe closes.

    Receives (operation, prompts), as `VllmBackend._call` sends them, and sends
    - (True, answer) for the load and for each request
    - (False, reason) for an error, and then ends
    - (None, (tokens read, sampled, cached)) while it works

    arguments: of `vllm.LLM`. adapter: folder of a LoRA adapter. log: file for its output.
    parent: process id; the child ends with it, even if it is killed.
    """
    exit_with_parent(parent, signal.SIGKILL)
    _redirect_output(log)
    # vLLM's engine runs in this process: another process would have to be ended, too.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        llm = LLM(**arguments)
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        if lora:
            # An adapter that vLLM does not support fails here, not in the first request.
            llm.llm_engine.add_lora(lora)
        pipe.send((True, None))
        while True:
            operation, prompts = pipe.recv()
            outputs = _run(llm, prompts, lora, lambda *tokens: pipe.send((None, tokens)))
            pipe.send((True, OPERATIONS[operation](outputs)))
    except EOFError:
        # Without this, processes of several GPUs leave shared memory, and Python warns about it
        # on the terminal.
        llm.llm_engine.engine_core.shutdown()
    except Exception as error:
        # Any class: vLLM raises what its parts raise. The traceback goes to the log.
        pipe.send((False, _reason(error)))
        raise


def _redirect_output(log: str) -> None:
    """Appends stdout and stderr, of libraries in C too, to this file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _reason(error: BaseException) -> str:
    """The first line of an error; of a validation error by pydantic, the first three.

    pydantic's first line has only the number of errors.
    """
    stripped = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in stripped if line]
    if not lines:
        return type(error).__name__
    if "validation error" in lines[0]:
        return " ".join(lines[:3])
    return lines[0]


def _run(
    llm: Any,
    prompts: list[tuple[tuple[int, ...], dict[str, Any]]],
    lora: Any,
    on_tokens: OnTokens,
) -> list[Any]:
    """The outputs of `LLM.generate`, one per prompt, in their order.

    prompts: (token ids, arguments of SamplingParams). on_tokens: called when requests finish.
    """
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": list(ids)} for ids, _ in prompts]
    params = [SamplingParams(detokenize=False, **arguments) for _, arguments in prompts]
    llm.enqueue(inputs, params, lora_request=lora, use_tqdm=False)
    done: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        finished = [output for output in llm.llm_engine.step() if output.finished]
        if finished:
            done += finished
            on_tokens(*_counts(finished))
    done.sort(key=lambda output: int(output.request_id))
    return [output.outputs[0] for output in done]


def _counts(finished: list[Any]) -> tuple[int, int, int]:
    """The tokens read, sampled, and read from the prefix cache, of finished requests."""
    n_read = sum(len(output.prompt_token_ids) for output in finished)
    n_sampled = sum(_n_sampled(output.outputs[0]) for output in finished)
    n_cached = sum(output.num_cached_tokens or 0 for output in finished)
    return n_read, n_sampled, n_cached


def _n_sampled(output: Any) -> int:
    """The tokens of a completion; 0 for a request of log-probabilities."""
    return 0 if output.logprobs else len(output.token_ids)


def _completions(outputs: list[Any]) -> list[tuple[list[int], str]]:
    """(token ids, "stop" or "length") of each output."""
    completions = []
    for output in outputs:
        reason = "stop" if output.finish_reason == "stop" else "length"
        completions.append((list(output.token_ids), reason))
    return completions


def _logprobs(outputs: list[Any]) -> list[dict[int, float]]:
    """Token id -> log-probability, of each output.

    Of the requested and the likeliest tokens, before any sampling setting is applied.
    """
    logprobs = []
    for output in outputs:
        position = output.logprobs[0]
        logprobs.append({token: value.logprob for token, value in position.items()})
    return logprobs


#: Operation -> the function that makes its answers from vLLM's outputs
OPERATIONS = {"generate": _completions, "score": _logprobs}
