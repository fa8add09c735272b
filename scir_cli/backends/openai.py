"""Sampling and verdicts at an OpenAI-compatible endpoint that already serves the model (`vllm serve`, SGLang): token ids go in, and out where text is sampled.

The endpoint batches; here are only threads that keep it busy, and retries: 429, 5xx and broken connections are tried again, later each time, or
when the endpoint says. The key is read from OPENAI_API_KEY, sent, and never shown. A verdict token is asked for by its id (vLLM's
`logprob_token_ids`); an endpoint that does not know this gives its likeliest tokens, and what is not among them is unknown.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
import urllib3
from torch import Tensor

from scir_cli.backends import Completion, Request, Sampling, VerdictBackend, verdict_tokens
from scir_cli.engine.trees import Branch
from scir_cli.errors import ConfigError, EngineError
from scir_cli.settings import BackendSettings

BUSY = (408, 429, 500, 502, 503, 504)


class OpenAIBackend(VerdictBackend):
    uses_gpus = False
    truncates_logprobs = True

    def __init__(self, model: Any, sampling: Sampling, settings: BackendSettings) -> None:
        url = (settings.base_url or "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--backend openai needs --base-url, as http://localhost:8000/v1; it is {url or 'not given'}"
            )
        self.url, self.sampling, self.ends = url, sampling, sorted(model.chat.end_ids)
        self.meter, self.tokenizer, self.arguments = (
            model.meter,
            model.chat.tokenizer,
            settings.endpoint,
        )
        key = os.environ.get("OPENAI_API_KEY")
        retry = urllib3.Retry(
            total=self.arguments.retries,
            allowed_methods=None,
            status_forcelist=BUSY,
            backoff_factor=0.5,
            raise_on_status=False,
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.pool = urllib3.PoolManager(
            maxsize=sampling.batch_size,
            headers=headers,
            retries=retry,
            timeout=self.arguments.timeout,
        )
        self.name = self.arguments.model or self._served()

    def _served(self) -> str:
        """The one model the endpoint serves."""
        names = [str(one.get("id")) for one in self._call("GET", "/models").get("data") or []]
        if len(names) != 1:
            raise ConfigError(
                f"{self.url} serves {', '.join(names) or 'no model'}; choose one with --endpoint-arg model=NAME"
            )
        return names[0]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        with ThreadPoolExecutor(self.sampling.batch_size) as threads:
            answers = []
            for request, (answer, cached) in zip(
                requests, threads.map(self._complete, requests), strict=True
            ):
                self.meter.count(len(request.prompt_ids), len(answer.token_ids), cached)
                answers.append(answer)
            return answers

    def score(self, branches: Sequence[Branch]) -> Tensor:
        """Log-probability of the one target of each verdict branch; NaN where the endpoint does not say.  -> (branches,) nats, fp32"""
        wanted = verdict_tokens(branches)
        with ThreadPoolExecutor(self.sampling.batch_size) as threads:
            found = {}
            for prompt, (logprobs, cached) in zip(
                wanted, threads.map(self._logprobs, wanted, wanted.values()), strict=True
            ):
                self.meter.count(len(prompt), cached=cached)
                found[prompt] = logprobs
        return torch.tensor([found[b.ids].get(b.target_tokens[0], float("nan")) for b in branches])

    def _logprobs(
        self, prompt: Sequence[int], tokens: list[int]
    ) -> tuple[dict[int, float], int | None]:
        """Log-probabilities by token id of the next token: of those asked for, or of the likeliest; and as `_cached`."""
        body = {
            "model": self.name, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": self.arguments.top_logprobs,
            "logprob_token_ids": tokens, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = self._call("POST", "/completions", json=body)
        try:
            (choice,) = answer["choices"]
            top = {
                self._token(name): float(logprob)
                for name, logprob in choice["logprobs"]["top_logprobs"][0].items()
            }
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.url} gives no log-probabilities (logprobs of /completions), which verdicts are read from"
            ) from error
        return {token: logprob for token, logprob in top.items() if token is not None}, _cached(
            answer
        )

    def _token(self, name: str) -> int | None:
        """The token that an endpoint calls by its id, or by a text that no other token has."""
        return (
            int(name.removeprefix("token_id:"))
            if name.startswith("token_id:")
            else self._by_text.get(name)
        )

    @cached_property
    def _by_text(self) -> dict[str, int]:
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        times = Counter(texts)
        return {text: token for token, text in enumerate(texts) if times[text] == 1}

    def _complete(self, request: Request) -> tuple[Completion, int | None]:
        s = self.sampling
        body = {
            "model": self.name, "prompt": request.prompt_ids, "seed": request.seed, "temperature": s.temperature, "top_p": s.top_p,
            "max_tokens": s.max_new_tokens, "stop_token_ids": self.ends, "return_token_ids": True,
        }  # fmt: skip
        answer = self._call("POST", "/completions", json=body)
        try:
            (choice,) = answer["choices"]
            ids = tuple(int(token) for token in choice["token_ids"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.url} gives no token ids back, and text would not be the tokens that were sampled; serve the model with vLLM 0.10.2 or newer"
            ) from error
        if ids and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
            raise EngineError(
                f"{self.url} gives the token {max(ids)}, which the tokenizer of --model has not; does it serve another model?"
            )
        return Completion(ids, "stop" if ids and ids[-1] in self.ends else "length"), _cached(
            answer
        )

    def _call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        try:
            answer = self.pool.request(method, self.url + path, **body)
            value = answer.json() if answer.status == 200 else None
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise EngineError(
                f"{self.url} cannot be reached: {type(reason).__name__}; is it running?"
            ) from error
        except ValueError as error:
            raise EngineError(
                f"{self.url} answers something that is not JSON; is it an OpenAI-compatible endpoint?"
            ) from error
        if answer.status in (401, 403):
            raise EngineError(
                f"{self.url} refuses the key (status {answer.status}); it is read from OPENAI_API_KEY"
            )
        if not isinstance(value, dict):
            hint = (
                "; does --base-url end as it should, in /v1 mostly?" if answer.status == 404 else ""
            )
            raise EngineError(
                f"{self.url}{path} answers with status {answer.status}: {answer.data[:200].decode(errors='replace')!r}{hint}"
            )
        return value

    def close(self) -> None:
        self.pool.clear()


def _cached(answer: dict[str, Any]) -> int | None:
    """Tokens of the prompt that the endpoint had in its prefix cache; None where it does not say (vLLM: --enable-prompt-tokens-details)."""
    try:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    except (KeyError, TypeError, ValueError):
        return None
