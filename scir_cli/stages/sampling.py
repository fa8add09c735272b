"""Prompts -> sampled candidates, for `generate`, `eval responses` and `eval mt-bench`.

Token ids and finish reason are kept: the ids that are sampled are the ids that are trained on.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, closing
from functools import cached_property
from typing import Any

from scir_cli import backends, workers
from scir_cli.backends import Request, Sampling
from scir_cli.data import dataset, hashing, readers
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import DataError
from scir_cli.report.progress import progress
from scir_cli.settings import EvalMtBenchSettings, EvalResponsesSettings, GenerateSettings

#: Setting -> its name in the hash that is a candidate's id: renaming a setting changes no id, and so no pair drawn by ids.
NAME_IN_IDS = {"vllm_arg": "engine_arg"}

SamplerSettings = GenerateSettings | EvalResponsesSettings | EvalMtBenchSettings


def write_candidates(settings: SamplerSettings, model: LazyPolicy | None = None) -> Json:
    """Writes a candidates dataset and returns its manifest; counts are in candidates (prompts times n).

    model: the model of these settings, if it is open already. Raises DataError if there is no prompt.
    """
    settings = settings.model_copy(update={"backend": backends.resolve(settings.backend)})
    prompts, dropped = readers.open_prompts(settings.input, settings.limit)
    if not prompts.num_rows:
        raise DataError(
            f"{settings.input} holds no usable prompt ({dict(dropped) or 'it has no rows'})"
        )
    model = model or LazyPolicy(settings, settings.model)
    plan = {
        "stage": "generate",
        "settings": settings.plan(),
        "input": readers.digest(settings.input),
        "model": model.weights_key,
    }
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": prompts.num_rows * settings.n}
    # What the model computed before is not this dataset's work.
    model.meter.pop()
    with (
        progress("generate", prompts.num_rows * settings.n, model.meter) as advance,
        closing(Sampler(settings, prompts, model)) as make,
    ):
        return dataset.write_dataset(
            settings.output_dir,
            "candidates",
            plan,
            dataset.part_bounds(prompts.num_rows, settings.rows_per_part),
            make,
            overwrite=settings.overwrite,
            dropped_before=Counter(
                {reason: count * settings.n for reason, count in dropped.items()}
            ),
            advance=lambda rows: advance(rows * settings.n),
            share=workers.distribute_parts(
                "scir_cli.stages.sampling:make_part_maker", settings, model.meter
            ),
            work=model.meter.figures,
            inputs={"input": settings.input, "model": settings.model},
        )


def make_part_maker(settings: SamplerSettings) -> Sampler:
    """The callable with which a worker makes parts."""
    prompts, _ = readers.open_prompts(settings.input, settings.limit)
    return Sampler(settings, prompts, LazyPolicy(settings, settings.model))


class Sampler:
    """Makes parts of candidates; the backend starts with the first part and not before."""

    def __init__(self, settings: SamplerSettings, prompts: Any, model: LazyPolicy) -> None:
        self.settings = settings
        self.prompts = prompts
        self.model = model
        self.meter = model.meter
        self.opened = ExitStack()

    @cached_property
    def backend(self) -> backends.Backend:
        s = self.settings
        assert s.temperature is not None  # eval mt-bench chooses one per question
        sampling = Sampling(s.temperature, s.top_p, s.max_new_tokens, s.batch_size)
        backend = backends.make(s.backend, self.model, sampling, s)
        self.opened.callback(backend.close)
        return backend

    def __call__(self, low: int, high: int) -> Part:
        return _candidates(self.prompts.slice(low, high - low).to_pylist(), self)

    def close(self) -> None:
        self.opened.close()


def _candidates(rows: list[dict[str, Any]], sampler: Sampler) -> Part:
    """The candidates of these prompts, and the prompts dropped by reason (prompt_too_long), in candidates."""
    model, settings = sampler.model, sampler.settings
    max_total_tokens = min(model.context_length, settings.max_model_len or model.context_length)
    fitting: list[tuple[dict[str, Any], list[int]]] = []
    drops: Counter[str] = Counter()
    for row in rows:
        if settings.system_prompt:
            row["messages"] = [
                {"role": "system", "content": settings.system_prompt},
                *row["messages"],
            ]
        ids = model.chat.prompt_ids(row["messages"])
        if len(ids) + settings.max_new_tokens > max_total_tokens:
            drops["prompt_too_long"] += settings.n
        else:
            fitting.append((row, ids))
    seeds = [
        (row, ids, hashing.sample_seed(settings.seed, row["prompt_id"], k))
        for row, ids in fitting
        for k in range(settings.n)
    ]
    backend = sampler.backend
    with sampler.meter.timed():
        completions = backend.generate([Request(tuple(ids), seed) for _, ids, seed in seeds])
    out: list[dict[str, Any]] = []
    sampled_with = _id_settings(settings)
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    for (row, _, seed), completion in zip(seeds, completions, strict=True):
        candidate_id = hashing.digest_json(
            [row["prompt_id"], model.weights_key, seed, sampled_with]
        )[:16]
        duplicate_of = seen.setdefault((row["prompt_id"], completion.token_ids), candidate_id)
        text = model.chat.tokenizer.decode(
            [t for t in completion.token_ids if t not in model.chat.end_ids]
        )
        out.append(
            {
                "candidate_id": candidate_id,
                "prompt_id": row["prompt_id"],
                "messages": row["messages"],
                "subset": row["subset"],
                "extra": row["extra"],
                "response": text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "duplicate_of": None if duplicate_of == candidate_id else duplicate_of,
                "weights_key": model.weights_key,
                "seed": seed,
            }
        )
    return Part(out, len(rows) * settings.n, drops)


def _id_settings(settings: SamplerSettings) -> Json:
    """The settings that a candidate's id is a hash of, with the prompt, the model and the seed."""
    plan = {"n": settings.n, **settings.plan()}
    for name, name_in_ids in NAME_IN_IDS.items():
        plan[name_in_ids] = plan.pop(name)
    return plan
