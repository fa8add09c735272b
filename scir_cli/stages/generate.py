"""generate: prompts -> N sampled candidates each. Token ids and finish reason are kept; the ids sampled are the ids trained on."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from functools import cached_property
from typing import Any

from scir_cli import backends, sources, store, workers
from scir_cli.backends import Request, Sampling
from scir_cli.config import EvalResponsesSettings, GenerateSettings
from scir_cli.errors import DataError
from scir_cli.stages.common import LazyPolicy, progress
from scir_cli.store import Json, Part

#: Setting -> its name in the hash that is a candidate's id: renaming a setting changes no id, and so no pair drawn by ids.
NAME_IN_IDS = {"vllm_arg": "engine_arg"}
SamplerSettings = GenerateSettings | EvalResponsesSettings


def run(settings: SamplerSettings) -> Json:
    """Writes a candidates dataset and returns its manifest; counts are in candidates (prompts times n)."""
    settings = settings.model_copy(update={"backend": backends.resolve(settings.backend)})
    prompts, dropped = sources.open_prompts(settings.input, settings.limit)
    if not prompts.num_rows:
        raise DataError(f"{settings.input} holds no usable prompt ({dict(dropped) or 'it has no rows'})")
    model = LazyPolicy(settings, settings.model)
    plan = {"stage": "generate", "settings": settings.plan(), "input": sources.digest(settings.input), "model": model.key}
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": prompts.num_rows * settings.n}
    with (
        progress("generate", prompts.num_rows * settings.n, model.meter) as advance,
        closing(Sampler(settings, prompts, model)) as make,
    ):
        return store.write_dataset(
            settings.output_dir,
            "candidates",
            plan,
            store.part_bounds(prompts.num_rows, settings.rows_per_part),
            make,
            overwrite=settings.overwrite,
            dropped_before=Counter({reason: count * settings.n for reason, count in dropped.items()}),
            advance=lambda rows: advance(rows * settings.n),
            share=workers.share("scir_cli.stages.generate:opened", settings, model.meter),
            work=model.meter.figures,
        )


def opened(settings: SamplerSettings) -> Sampler:
    """What a worker makes parts with."""
    return Sampler(settings, sources.open_prompts(settings.input, settings.limit)[0], LazyPolicy(settings, settings.model))


class Sampler:
    """Makes parts of candidates; the backend starts with the first part there is to make, and not before."""

    def __init__(self, settings: SamplerSettings, prompts: Any, model: LazyPolicy) -> None:
        self.settings, self.prompts, self.model = settings, prompts, model
        self.meter = model.meter

    @cached_property
    def backend(self) -> backends.Backend:
        s = self.settings
        return backends.make(s.backend, self.model, Sampling(s.temperature, s.top_p, s.max_new_tokens, s.batch_size), s)

    def __call__(self, low: int, high: int) -> Part:
        return _candidates(self.prompts.slice(low, high - low).to_pylist(), self)

    def close(self) -> None:
        if "backend" in vars(self):
            self.backend.close()


def _candidates(rows: list[dict[str, Any]], sampler: Sampler) -> Part:
    model, settings = sampler.model, sampler.settings
    room = min(model.context_length, settings.max_model_len or model.context_length)
    asked: list[tuple[dict[str, Any], list[int]]] = []
    drops: Counter[str] = Counter()
    for row in rows:
        if settings.system_prompt:
            row["messages"] = [{"role": "system", "content": settings.system_prompt}, *row["messages"]]
        ids = model.chat.prompt_ids(row["messages"])
        if len(ids) + settings.max_new_tokens > room:
            drops["prompt_too_long"] += settings.n
        else:
            asked.append((row, ids))
    seeds = [(row, ids, sample_seed(settings.seed, row["prompt_id"], k)) for row, ids in asked for k in range(settings.n)]
    backend = sampler.backend
    with sampler.meter.working():
        completions = backend.generate([Request(tuple(ids), seed) for _, ids, seed in seeds])
    out: list[dict[str, Any]] = []
    sampled_with = _id_settings(settings)
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    for (row, _, seed), completion in zip(seeds, completions, strict=True):
        candidate_id = store.digest_json([row["prompt_id"], model.key, seed, sampled_with])[:16]
        duplicate_of = seen.setdefault((row["prompt_id"], completion.token_ids), candidate_id)
        text = model.chat.tokenizer.decode([t for t in completion.token_ids if t not in model.chat.end_ids])
        out.append(
            {
                "candidate_id": candidate_id,
                "prompt_id": row["prompt_id"],
                "messages": row["messages"],
                "subset": row["subset"],
                "response": text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "duplicate_of": None if duplicate_of == candidate_id else duplicate_of,
                "model": model.key,
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


def sample_seed(seed: int, row_id: str, sample: int) -> int:
    """The seed of one sample, from the run's seed and the row alone.  -> 63 bits"""
    return int(store.digest_json([seed, row_id, sample])[:16], 16) >> 1
