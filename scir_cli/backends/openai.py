"""Sampling and verdicts at an OpenAI-compatible endpoint that serves the model.

For example `vllm serve` or SGLang. Requests hold token ids, and sampled answers are token ids.

The endpoint batches; this module has threads that keep it busy, and retries: 429, 5xx and broken
connections are retried after growing delays, or after the delay that the endpoint requests. The
key is read from OPENAI_API_KEY, sent, and never shown.

A verdict token is requested by its id (vLLM's `logprob_token_ids`). An endpoint without that
parameter returns its likeliest tokens, and a verdict that is not among them is unknown.
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

#: HTTP statuses that are retried
BUSY = (408, 429, 500, 502, 503, 504)

#: The start of a token that an endpoint names by its id
ID_PREFIX = "token_id:"

#: Bytes of an answer that an error message quotes
N_QUOTED_BYTES = 200


class OpenAIBackend(VerdictBackend):
    """Samples and scores verdicts over HTTP, with the settings of --endpoint-arg."""

    uses_gpus = False
    truncates_logprobs = True

    def __init__(self, model: Any, sampling: Sampling, settings: BackendSettings) -> None:
        """Opens the connections. Raises ConfigError without a URL or a model name."""
        url = (settings.base_url or "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                "--backend openai needs --base-url, as http://localhost:8000/v1;"
                f" it is {url or 'not given'}"
            )
        self.url = url
        self.sampling = sampling
        self.end_ids = sorted(model.chat.end_ids)
        self.meter = model.meter
        self.tokenizer = model.chat.tokenizer
        self.arguments = settings.endpoint
        self.pool = self._connect()
        self.name = self.arguments.model or self._served_model()

    def _connect(self) -> urllib3.PoolManager:
        """The connections, one per request at a time, with the key and the retries."""
        retry = urllib3.Retry(
            total=self.arguments.retries,
            allowed_methods=None,
            status_forcelist=BUSY,
            backoff_factor=0.5,
            raise_on_status=False,
        )
        key = os.environ.get("OPENAI_API_KEY")
        return urllib3.PoolManager(
            maxsize=self.sampling.batch_size,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            retries=retry,
            timeout=self.arguments.timeout,
        )

    def _served_model(self) -> str:
        """The name of the one model that the endpoint serves.

        Raises ConfigError if it serves none or several.
        """
        models = self._call("GET", "/models").get("data") or []
        names = [str(model.get("id")) for model in models]
        if len(names) != 1:
            raise ConfigError(
                f"{self.url} serves {', '.join(names) or 'no model'};"
                " choose one with --endpoint-arg model=NAME"
            )
        return names[0]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Raises EngineError if the endpoint fails or its answer is not usable.
        """
        completions = []
        with ThreadPoolExecutor(self.sampling.batch_size) as threads:
            answers = threads.map(self._complete, requests)
            for request, (completion, n_cached) in zip(requests, answers, strict=True):
                n_read = len(request.prompt_ids)
                self.meter.count(n_read, len(completion.token_ids), n_cached)
                completions.append(completion)
        return completions

    def score(self, branches: Sequence[Branch]) -> Tensor:
        """Log-probability of the single target of each verdict branch.

        NaN if the endpoint does not return it.  -> (branches,) nats, fp32
        Raises EngineError if the endpoint fails or its answer is not usable.
        """
        tokens = verdict_tokens(branches)
        by_prompt: dict[tuple[int, ...], dict[int, float]] = {}
        with ThreadPoolExecutor(self.sampling.batch_size) as threads:
            answers = threads.map(self._logprobs, tokens, tokens.values())
            for prompt, (logprobs, n_cached) in zip(tokens, answers, strict=True):
                self.meter.count(len(prompt), cached=n_cached)
                by_prompt[prompt] = logprobs
        values = []
        for branch in branches:
            target = branch.target_tokens[0]
            values.append(by_prompt[branch.ids].get(target, float("nan")))
        return torch.tensor(values)

    def _logprobs(
        self, prompt: Sequence[int], tokens: list[int]
    ) -> tuple[dict[int, float], int | None]:
        """Token id -> log-probability after the prompt; the prompt's cached tokens.

        Of the requested tokens, or of the likeliest if the endpoint takes no ids.
        """
        body = {
            "model": self.name,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": self.arguments.top_logprobs,
            "logprob_token_ids": tokens,
            "return_tokens_as_token_ids": True,
        }
        answer = self._call("POST", "/completions", json=body)
        logprobs: dict[int, float] = {}
        try:
            (choice,) = answer["choices"]
            for name, logprob in choice["logprobs"]["top_logprobs"][0].items():
                token = self._token(name)
                value = float(logprob)
                # None: several tokens have this text
                if token is not None:
                    logprobs[token] = value
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.url} returned no log-probabilities, which verdicts need;"
                " use an endpoint that supports logprobs in /completions"
            ) from error
        return logprobs, _cached_tokens(answer)

    def _token(self, name: str) -> int | None:
        """The token of an id or of an unambiguous text; None for any other text."""
        if name.startswith(ID_PREFIX):
            return int(name.removeprefix(ID_PREFIX))
        return self._by_text.get(name)

    @cached_property
    def _by_text(self) -> dict[str, int]:
        """Text -> token id, for texts that exactly one token has."""
        ids = range(len(self.tokenizer))
        texts = self.tokenizer.batch_decode([[token] for token in ids])
        times = Counter(texts)
        return {text: token for token, text in enumerate(texts) if times[text] == 1}

    def _complete(self, request: Request) -> tuple[Completion, int | None]:
        """The completion of a request, and the cached tokens of its prompt."""
        body = {
            "model": self.name,
            "prompt": request.prompt_ids,
            "seed": request.seed,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            **self.sampling.limits(),
            "max_tokens": self.sampling.max_new_tokens,
            "stop_token_ids": self.end_ids,
            "return_token_ids": True,
        }
        answer = self._call("POST", "/completions", json=body)
        try:
            (choice,) = answer["choices"]
            ids = tuple(int(token) for token in choice["token_ids"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.url} returned no token ids, and its text need not encode to the sampled"
                " tokens; serve the model with vLLM 0.10.2 or newer"
            ) from error
        if ids and not 0 <= min(ids) <= max(ids) < len(self.tokenizer):
            raise EngineError(
                f"{self.url} returned token id {max(ids)}, outside the vocabulary of --model"
                f" ({len(self.tokenizer)} tokens); check that it serves the same model"
            )
        stopped = bool(ids) and ids[-1] in self.end_ids
        completion = Completion(ids, "stop" if stopped else "length")
        return completion, _cached_tokens(answer)

    def _call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The endpoint's answer, a JSON object.

        Raises EngineError for any other answer, and for a status other than 200.
        """
        try:
            answer = self.pool.request(method, self.url + path, **body)
            value = answer.json() if answer.status == 200 else None
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise EngineError(
                f"{self.url} cannot be reached: {type(reason).__name__};"
                " check that the endpoint is running"
            ) from error
        except ValueError as error:
            raise EngineError(
                f"{self.url} returned an answer that is not JSON;"
                " check that it is an OpenAI-compatible endpoint"
            ) from error
        if answer.status in (401, 403):
            raise EngineError(
                f"{self.url} rejected the key (status {answer.status});"
                " set OPENAI_API_KEY to a valid one"
            )
        if not isinstance(value, dict):
            start = answer.data[:N_QUOTED_BYTES].decode(errors="replace")
            hint = ""
            if answer.status == 404:
                hint = "; check the end of --base-url, which is usually /v1"
            raise EngineError(f"{self.url}{path} returned status {answer.status}: {start!r}{hint}")
        return value

    def close(self) -> None:
        """Closes the connections."""
        self.pool.clear()


def _cached_tokens(answer: dict[str, Any]) -> int | None:
    """Tokens of the prompt that were in the endpoint's prefix cache.

    None if the endpoint does not report it (vLLM: --enable-prompt-tokens-details).
    """
    try:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    except (KeyError, TypeError, ValueError):
        return None
