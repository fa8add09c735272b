"""The child process of vllm.py: the only place that imports vLLM. It loads the model, answers until its pipe closes, and exits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from scir_cli.processes import exit_with_parent


def serve(
    pipe: Connection, arguments: dict[str, Any], adapter: str | None, log: str, parent: int
) -> None:
    """Sends (True, answer) or (False, why) for the load and then for each request, (None, tokens read, sampled, cached) on the way.

    Ends with its parent, however that dies.
    """
    exit_with_parent(parent, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.setdefault(
        "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
    )  # this is its process: one more would only have to be found and ended
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        llm = LLM(**arguments)
        lora = LoRARequest("adapter", 1, adapter) if adapter else None
        if lora:
            llm.llm_engine.add_lora(lora)  # what it refuses is refused now
        pipe.send((True, None))
        while True:
            what, requests = pipe.recv()
            outputs = _run(llm, requests, lora, lambda *tokens: pipe.send((None, tokens)))
            pipe.send((True, ANSWERS[what](outputs)))
    except EOFError:
        llm.llm_engine.engine_core.shutdown()  # else shared memory of several GPUs' processes is left, and Python says so on the terminal
    except Exception as error:  # vLLM raises whatever its parts raise; its traceback goes to the log, one line to the parent
        pipe.send((False, _reason(error)))
        raise


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; pydantic's first line says only how many things did."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ".join(lines[:3]) if "validation error" in lines[0] else lines[0]


def _run(
    llm: Any,
    requests: list[tuple[tuple[int, ...], dict[str, Any]]],
    lora: Any,
    count: Callable[[int, int, int], None],
) -> list[Any]:
    """What `LLM.generate` does, with a word on every request that is done: tokens read, sampled, and read from the prefix cache."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(ids)} for ids, _ in requests]
    params = [SamplingParams(detokenize=False, **given) for _, given in requests]
    llm.enqueue(prompts, params, lora_request=lora, use_tqdm=False)
    done: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        if finished := [output for output in llm.llm_engine.step() if output.finished]:
            done += finished
            counts = (
                (len(o.prompt_token_ids), _sampled(o.outputs[0]), o.num_cached_tokens or 0)
                for o in finished
            )
            count(*map(sum, zip(*counts, strict=True)))
    return [output.outputs[0] for output in sorted(done, key=lambda output: int(output.request_id))]


def _sampled(output: Any) -> int:
    """The tokens that were wanted of it: none where it was asked for log-probabilities."""
    return 0 if output.logprobs else len(output.token_ids)


def _completions(outputs: list[Any]) -> list[tuple[list[int], str]]:
    return [
        (list(out.token_ids), "stop" if out.finish_reason == "stop" else "length")
        for out in outputs
    ]


def _logprobs(outputs: list[Any]) -> list[dict[int, float]]:
    """Log-probabilities by token id, of the tokens asked for and the likeliest, before any sampling setting is applied."""
    return [{token: found.logprob for token, found in out.logprobs[0].items()} for out in outputs]


ANSWERS = {"generate": _completions, "score": _logprobs}
