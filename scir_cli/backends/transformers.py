"""Sampling with transformers' own generate: left-padded batches of like length, KV cache, one random stream a request.

Each request draws its uniforms from its own seed and its own step, so a row's randomness does not depend on the batch it was in, and a
resumed run repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from scir_cli.backends import Backend, Completion, Request, Sampling
from scir_cli.engine.policy import Policy
from scir_cli.errors import EngineError

NUCLEUS = (
    1024  # tokens looked at first for the nucleus; a full sort only where they do not hold top_p
)


class SeededNucleus(LogitsProcessor):
    """Leaves one token standing: nucleus sampling by inverse CDF with a given uniform for each row and step."""

    def __init__(self, sampling: Sampling, uniforms: Tensor, prompt_length: int) -> None:
        self.sampling, self.uniforms, self.prompt_length = (
            sampling,
            uniforms,
            prompt_length,
        )  # uniforms (rows, max_new_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = self.uniforms[:, input_ids.shape[1] - self.prompt_length]  # (rows,)
        probabilities = (scores.float() / self.sampling.temperature).softmax(-1)  # (rows, vocab)
        top, tokens = probabilities.topk(min(NUCLEUS, probabilities.shape[1]))
        if bool((top.sum(-1) < self.sampling.top_p).any()):
            top, tokens = probabilities.sort(descending=True)
        before = top.cumsum(-1) - top  # mass above each token
        kept = torch.where(before < self.sampling.top_p, top, torch.zeros_like(top))
        cumulative = kept.cumsum(-1)
        pick = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).clamp(
            max=top.shape[1] - 1
        )
        pick = torch.minimum(
            pick, (kept > 0).sum(-1, keepdim=True) - 1
        )  # rounding cannot leave the nucleus
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, pick), 0.0)


class TransformersBackend(Backend):
    def __init__(self, model: Any, sampling: Sampling, settings: Any = None) -> None:
        self.policy: Policy = model.load()
        self.sampling = sampling

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        done: dict[int, Completion] = {}
        with torch.no_grad(), self.policy.plain_attention_mode():
            for low in range(0, len(order), self.sampling.batch_size):
                batch = order[low : low + self.sampling.batch_size]
                done |= dict(zip(batch, self._batch([requests[i] for i in batch]), strict=True))
                read, sampled = (
                    sum(map(len, ids))
                    for ids in zip(
                        *((requests[i].prompt_ids, done[i].token_ids) for i in batch), strict=True
                    )
                )
                self.policy.meter.count(read, sampled)
        return [done[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        s, policy = self.sampling, self.policy
        width = max(len(r.prompt_ids) for r in requests)
        pad = min(policy.chat.end_ids)
        ids = torch.tensor(
            [[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
        )
        mask = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests]
        )
        processors = LogitsProcessorList()
        if s.temperature > 0:
            streams = [
                torch.rand(s.max_new_tokens, generator=torch.Generator().manual_seed(r.seed))
                for r in requests
            ]
            processors.append(SeededNucleus(s, torch.stack(streams).to(policy.device), width))
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=s.max_new_tokens,
            eos_token_id=sorted(policy.chat.end_ids),
            pad_token_id=pad,
        )
        try:
            out = policy.model.generate(
                ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                generation_config=config,
                logits_processor=processors,
            )
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory sampling {len(requests)} answers at a time; lower --batch-size (--rationale-batch-size in judge)"
            ) from error
        return [self._cut(row) for row in out[:, width:].tolist()]

    def _cut(self, row: Sequence[int]) -> Completion:
        for index, token in enumerate(row):
            if token in self.policy.chat.end_ids:
                return Completion(tuple(row[: index + 1]), "stop")
        return Completion(tuple(row), "length")
