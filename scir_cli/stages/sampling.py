"""Prompts -> sampled candidates, for `generate`, `eval responses` and `eval mt-bench`.

Token ids and finish reason are stored: training uses exactly the ids that were sampled.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow.compute as pc

from scir_cli import backends, workers
from scir_cli.backends import Request, Sampling
from scir_cli.data import dataset, hashing, readers
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json
from scir_cli.engine.chat import Unrenderable
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import DataError
from scir_cli.report.progress import progress
from scir_cli.settings import EvalMtBenchSettings, EvalResponsesSettings, GenerateSettings

#: Setting -> its name in the hash that is a candidate's id.
#: Renaming a setting then changes no id, and so no pair that is drawn by its ids.
NAME_IN_IDS = {"vllm_arg": "engine_arg"}

#: Settings that enter the id only if they differ from these defaults.
#: Another one then changes no id of candidates that do not use it.
DEFAULTS_OUTSIDE_IDS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

SamplerSettings = GenerateSettings | EvalResponsesSettings | EvalMtBenchSettings


def write_candidates(settings: SamplerSettings, model: LazyPolicy | None = None) -> Json:
    """Writes a candidates dataset and returns its manifest.

    Counts are in candidates (prompts times n).
    model: the model of these settings, if it is open already.
    Raises DataError if there is no prompt.
    """
    backend = backends.resolve(settings.backend)
    settings = settings.model_copy(update={"backend": backend})
    prompts, dropped = readers.open_prompts(settings.input, settings.limit)
    if not prompts.num_rows:
        reason = dict(dropped) or "it has no rows"
        raise DataError(f"{settings.input} holds no usable prompt ({reason})")
    model = model or LazyPolicy(settings, settings.model)
    model.chat.check(settings.system_prompt)
    plan = {
        "stage": "generate",
        "settings": settings.plan(),
        "input": readers.digest(settings.input),
        "model": model.weights_key,
    }
    n = settings.n
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": prompts.num_rows * n}

    # Work that the model did before does not count for this dataset.
    model.meter.pop()
    share = workers.distribute_parts(
        "scir_cli.stages.sampling:make_part_maker",
        settings,
        model.meter,
    )
    with (
        progress("generate", prompts.num_rows * n, model.meter) as advance,
        closing(Sampler(settings, prompts, model)) as make,
    ):
        return dataset.write_dataset(
            settings.output_dir,
            "candidates",
            plan,
            dataset.part_bounds(prompts.num_rows, settings.rows_per_part),
            make,
            overwrite=settings.overwrite,
            dropped_before=Counter({reason: count * n for reason, count in dropped.items()}),
            advance=lambda rows: advance(rows * n),
            share=share,
            work=model.meter.figures,
            summarize=_summary,
            inputs={"input": settings.input, "model": settings.model},
            encoding=model.encoding,
        )


def _summary(candidates: dataset.Dataset) -> Json:
    """The number of candidates that the length limit cut, and of those without an answer.

    An answer is missing where a candidate ends inside its reasoning.
    """
    cut = 0
    without_answer = 0
    for table in candidates.tables():
        cut += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
        is_empty = pc.equal(table["response"], "")
        unfinished = pc.and_(is_empty, pc.is_valid(table["reasoning"]))
        without_answer += pc.sum(unfinished).as_py() or 0
    return {"cut": cut, "without_answer": without_answer}


def make_part_maker(settings: SamplerSettings) -> Sampler:
    """Returns the function with which a worker process computes parts."""
    prompts, _ = readers.open_prompts(settings.input, settings.limit)
    model = LazyPolicy(settings, settings.model)
    return Sampler(settings, prompts, model)


class Sampler:
    """Computes parts of candidates; the backend starts with the first part."""

    def __init__(self, settings: SamplerSettings, prompts: Any, model: LazyPolicy) -> None:
        self.settings = settings
        self.prompts = prompts
        self.model = model
        self.meter = model.meter
        self.opened = ExitStack()

    @cached_property
    def backend(self) -> backends.Backend:
        """The backend that generates the responses, started at the first access."""
        settings = self.settings
        # `eval mt-bench` chooses a temperature per question.
        assert settings.temperature is not None
        sampling = Sampling(
            settings.temperature,
            settings.top_p,
            settings.max_new_tokens,
            settings.batch_size,
            settings.top_k,
            settings.min_p,
            settings.repetition_penalty,
        )
        backend = backends.make(settings.backend, self.model, sampling, settings)
        self.opened.callback(backend.close)
        return backend

    def __call__(self, low: int, high: int) -> Part:
        """The candidates of the prompts in rows [low, high)."""
        prompts = self.prompts.slice(low, high - low).to_pylist()
        return _candidates(prompts, self)

    def close(self) -> None:
        """Stops the backend if it has started."""
        self.opened.close()


@dataclass(frozen=True)
class _Sample:
    """One response to sample: the row of its prompt, the prompt's token ids, and the seed."""

    row: dict[str, Any]
    prompt_ids: list[int]
    seed: int


def _candidates(rows: list[dict[str, Any]], sampler: Sampler) -> Part:
    """The candidates of these prompts, `n` per prompt, in the order of the prompts.

    Drops, counted in candidates: as in `_samples`.
    """
    samples, drops = _samples(rows, sampler)
    backend = sampler.backend
    with sampler.meter.timed():
        requests = [Request(tuple(sample.prompt_ids), sample.seed) for sample in samples]
        completions = backend.generate(requests)

    model = sampler.model
    id_settings = _id_settings(sampler.settings)
    candidates: list[dict[str, Any]] = []
    # (prompt, response) -> the first candidate with this response
    first_ids: dict[tuple[str, tuple[int, ...]], str] = {}
    for sample, completion in zip(samples, completions, strict=True):
        row = sample.row
        id_parts = [row["prompt_id"], model.weights_key, sample.seed, id_settings]
        candidate_id = hashing.digest_json(id_parts)[:16]
        response = (row["prompt_id"], completion.token_ids)
        first_id = first_ids.setdefault(response, candidate_id)
        text_ids = [token for token in completion.token_ids if token not in model.chat.end_ids]
        text = model.chat.tokenizer.decode(text_ids)
        reasoning, answer = model.chat.split(text, sampled=True)
        candidates.append(
            {
                "candidate_id": candidate_id,
                "prompt_id": row["prompt_id"],
                "messages": row["messages"],
                "subset": row["subset"],
                "extra": row["extra"],
                "reasoning": reasoning or None,
                "response": answer,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "duplicate_of": None if first_id == candidate_id else first_id,
                "weights_key": model.weights_key,
                "seed": sample.seed,
            }
        )
    return Part(candidates, len(rows) * sampler.settings.n, drops)


def _samples(rows: list[dict[str, Any]], sampler: Sampler) -> tuple[list[_Sample], Counter[str]]:
    """The responses to sample, `n` for each prompt that fits the context, and the drops.

    Adds --system-prompt to the messages of each row, in place.
    Drops, counted in candidates: prompt_too_long, template_refused, content_missing.
    """
    model = sampler.model
    settings = sampler.settings
    max_total_tokens = min(model.context_length, settings.max_model_len or model.context_length)
    samples: list[_Sample] = []
    drops: Counter[str] = Counter()
    for row in rows:
        if settings.system_prompt:
            system = {"role": "system", "content": settings.system_prompt}
            row["messages"] = [system, *row["messages"]]
        try:
            prompt_ids = model.chat.prompt_ids(row["messages"])
        except Unrenderable as error:
            drops[error.reason] += settings.n
            continue
        if len(prompt_ids) + settings.max_new_tokens > max_total_tokens:
            drops["prompt_too_long"] += settings.n
            continue
        for index in range(settings.n):
            seed = hashing.sample_seed(settings.seed, row["prompt_id"], index)
            samples.append(_Sample(row, prompt_ids, seed))
    return samples, drops


def _id_settings(settings: SamplerSettings) -> Json:
    """The settings that enter a candidate's id, beside the prompt, the model and the seed."""
    plan = {"n": settings.n, **settings.plan()}
    for name, name_in_ids in NAME_IN_IDS.items():
        plan[name_in_ids] = plan.pop(name)
    for name, default in DEFAULTS_OUTSIDE_IDS.items():
        if plan[name] == default:
            del plan[name]
    return plan
