"""Sampling with transformers' own generate, in left-padded batches of similar length.

Each request draws its uniform numbers from its own seed, one per step. A row's randomness does not
depend on its batch, and a resumed run repeats the output of an uninterrupted one.
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

#: Likeliest tokens among which the nucleus is searched; all tokens are sorted only if these
#: hold less than top_p.
NUCLEUS = 1024


class SeededNucleus(LogitsProcessor):
    """Nucleus sampling by inverse CDF: removes all tokens but the sampled one.

    uniforms: (rows, max_new_tokens), one number per row and step. prompt_length: tokens.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, prompt_length: int) -> None:
        self.sampling = sampling
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for the sampled token of each row, -inf for the others.

        input_ids: (rows, tokens); scores: (rows, vocabulary) logits -> (rows, vocabulary)
        """
        step = input_ids.shape[1] - self.prompt_length
        # (rows,)
        u = self.uniforms[:, step]
        # (rows, vocabulary)
        probabilities = (scores.float() / self.sampling.temperature).softmax(-1)
        # (rows, candidates), in descending order
        top, tokens = probabilities.topk(min(NUCLEUS, probabilities.shape[1]))
        if self._needs_all(top):
            top, tokens = probabilities.sort(descending=True)
        nucleus = self._nucleus(top)
        cumulative = nucleus.cumsum(-1)
        target = u[:, None] * cumulative[:, -1:]
        # (rows, 1)
        pick = torch.searchsorted(cumulative, target, right=True)
        pick = pick.clamp(max=top.shape[1] - 1)
        # Rounding must not select a token outside the nucleus.
        last = (nucleus > 0).sum(-1, keepdim=True) - 1
        pick = torch.minimum(pick, last)
        removed = torch.full_like(scores, -torch.inf)
        return removed.scatter(1, tokens.gather(1, pick), 0.0)

    def _needs_all(self, top: Tensor) -> bool:
        """Whether tokens beyond the candidates could be sampled.

        top: (rows, candidates) probabilities in descending order
        """
        if 0 < self.sampling.top_k <= top.shape[1]:
            return False
        if self.sampling.min_p > 0:
            return bool((top[:, -1] >= self.sampling.min_p * top[:, 0]).any())
        return bool((top.sum(-1) < self.sampling.top_p).any()) or self.sampling.top_k > 0

    def _nucleus(self, top: Tensor) -> Tensor:
        """The probabilities of the tokens that can be sampled, and 0 for the others.

        top: (rows, candidates) in descending order -> (rows, candidates), not normalized
        """
        sampling = self.sampling
        limit: Tensor | float = sampling.top_p
        if sampling.top_k or sampling.min_p:
            likely = top >= sampling.min_p * top[:, :1]
            if sampling.top_k:
                likely[:, sampling.top_k :] = False
            top = top * likely
            limit = sampling.top_p * top.sum(-1, keepdim=True)
        # Probability of the tokens that are likelier than each, (rows, candidates)
        before = top.cumsum(-1) - top
        return torch.where(before < limit, top, torch.zeros_like(top))


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens of the prompt and the response less likely (CTRL, arXiv 1909.05858).

    penalty: above 1. n_padded: (rows,) padding tokens on the left of each prompt, which do not
    count: an answer depends on no other request of its batch.
    """

    def __init__(self, penalty: float, n_padded: Tensor) -> None:
        self.penalty = penalty
        self.n_padded = n_padded

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits, with those of tokens that were there before made smaller.

        input_ids: (rows, tokens); scores: (rows, vocabulary) logits -> (rows, vocabulary)
        """
        rows, vocabulary = scores.shape
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Padding marks an extra column.
        tokens = input_ids.masked_fill(places < self.n_padded[:, None], vocabulary)
        seen = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=scores.device)
        seen = seen.scatter(1, tokens, value=True)[:, :vocabulary]
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, penalized, scores)


class TransformersBackend(Backend):
    """Samples with the policy that the stage has loaded, in this process."""

    def __init__(self, model: Any, sampling: Sampling, settings: Any = None) -> None:
        self.policy: Policy = model.load()
        self.sampling = sampling

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Raises EngineError if memory runs out.
        """
        # Similar lengths in one batch need little padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        size = self.sampling.batch_size
        completions: dict[int, Completion] = {}
        with torch.no_grad(), self.policy.plain_attention_mode():
            for start in range(0, len(order), size):
                indices = order[start : start + size]
                batch = [requests[i] for i in indices]
                sampled = self._sample(batch)
                completions |= dict(zip(indices, sampled, strict=True))
                n_read = sum(len(request.prompt_ids) for request in batch)
                n_sampled = sum(len(completion.token_ids) for completion in sampled)
                self.policy.meter.count(n_read, n_sampled)
        return [completions[i] for i in range(len(requests))]

    def _sample(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of one batch, in the order of the requests."""
        policy = self.policy
        pad = min(policy.chat.end_ids)
        width = max(len(request.prompt_ids) for request in requests)
        # (rows, width), padded on the left
        ids = torch.full((len(requests), width), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            start = width - len(request.prompt_ids)
            ids[row, start:] = torch.tensor(request.prompt_ids)
            mask[row, start:] = 1
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=sorted(policy.chat.end_ids),
            pad_token_id=pad,
        )
        try:
            tokens = policy.model.generate(
                ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                generation_config=config,
                logits_processor=self._processors(requests, width),
            )
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory sampling {len(requests)} answers at a time; lower --batch-size"
                " (--rationale-batch-size in judge)"
            ) from error
        return [self._completion(row) for row in tokens[:, width:].tolist()]

    def _processors(self, requests: Sequence[Request], width: int) -> LogitsProcessorList:
        """The sampler of the settings; for greedy decoding at most the repetition penalty.

        width: of the padded prompts, tokens.
        """
        processors = LogitsProcessorList()
        if self.sampling.repetition_penalty != 1:
            n_padded = torch.tensor([width - len(request.prompt_ids) for request in requests])
            n_padded = n_padded.to(self.policy.device)
            processors.append(RepetitionPenalty(self.sampling.repetition_penalty, n_padded))
        if self.sampling.temperature > 0:
            streams = []
            for request in requests:
                generator = torch.Generator().manual_seed(request.seed)
                streams.append(torch.rand(self.sampling.max_new_tokens, generator=generator))
            # (rows, max_new_tokens)
            uniforms = torch.stack(streams).to(self.policy.device)
            processors.append(SeededNucleus(self.sampling, uniforms, width))
        return processors

    def _completion(self, row: Sequence[int]) -> Completion:
        """A row up to its first end token."""
        for index, token in enumerate(row):
            if token in self.policy.chat.end_ids:
                return Completion(tuple(row[: index + 1]), "stop")
        return Completion(tuple(row), "length")
