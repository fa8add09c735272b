"""Pairs -> judged pairs: the log-odds of every internal reward model. The one place where pairs are scored and written.

Used by `judge`, `eval rewards`, `eval winrate` and `train`.
Reference log-probabilities are stored beside the verdicts under the key of their weights: the policy's own scores of
this iteration are the reference of the next, and training needs no second model.
"""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from scir_cli import backends
from scir_cli.analysis import consistency
from scir_cli.analysis import verdicts as verdicts_
from scir_cli.backends import Request, Sampling
from scir_cli.data import dataset, hashing, schemas
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.engine.throughput import Meter
from scir_cli.engine.trees import Branch
from scir_cli.errors import DataError
from scir_cli.report.progress import progress
from scir_cli.rewards import reward_models
from scir_cli.rewards.columns import filter_rows, rewards_column, with_column
from scir_cli.rewards.pairs import SIDES, Context, Pair, make_pairs, tokenize_pairs
from scir_cli.rewards.references import add_missing_logps, open_reward_reference
from scir_cli.settings import (
    BackendSettings,
    EvalRewardsSettings,
    EvalWinrateSettings,
    JudgeSettings,
)
from scir_cli.stages.pairing import PairInput

ScoringSettings = JudgeSettings | EvalRewardsSettings | EvalWinrateSettings


@dataclass
class JudgePart:
    """Makes parts of judged pairs."""

    scorer: Scorer
    pair_input: PairInput

    @property
    def meter(self) -> Meter:
        return self.scorer.meter

    def __call__(self, low: int, high: int) -> Part:
        made, not_made = self.pair_input.make_pairs(self.pair_input.table.slice(low, high - low))
        chosen, not_chosen = self.pair_input.before_scoring(made)
        scored, not_scored = self.scorer.score(chosen)
        kept, not_kept = self.pair_input.after_scoring(scored)
        return Part(
            kept, len(made) + not_made.total(), not_made + not_chosen + not_scored + not_kept
        )

    def close(self) -> None:
        self.scorer.close()


def write_judged_dataset(
    stage: str, settings: ScoringSettings, scorer: Scorer, pair_input: PairInput, share: Any = None
) -> Json:
    """Writes the judged dataset of the pairs and returns its manifest.

    share: has the parts made by workers (workers.py), in place of this process. Raises DataError if there is no pair.
    """
    table, dropped = pair_input.table, pair_input.dropped
    if not table.num_rows:
        raise DataError(f"the input holds no usable row ({dict(dropped) or 'it is empty'})")
    plan = {"stage": stage, "settings": settings.plan(), "input": pair_input.digest, **scorer.keys}
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": table.num_rows + dropped.total()}

    def summarise(made: dataset.Dataset) -> Json:
        return consistency.summary_of(made.tables()) | count_verdicts_beyond_top_logprobs(
            made, scorer
        )

    with (
        progress(stage, table.num_rows, scorer.meter) as advance,
        closing(JudgePart(scorer, pair_input)) as make,
    ):
        return dataset.write_dataset(
            settings.output_dir,
            "judged",
            plan,
            pair_input.bounds,
            make,
            overwrite=settings.overwrite,
            dropped_before=dropped,
            advance=advance,
            share=share,
            work=scorer.meter.figures,
            inputs={
                name: getattr(settings, name, None)
                for name in ("input", "model", "reward_reference")
            },
            summarise=summarise,
        )


def count_verdicts_beyond_top_logprobs(made: dataset.Dataset, scorer: Scorer) -> Json:
    """Verdicts that are missing because an endpoint did not return both of their tokens, by reward model.

    Empty if the endpoint returned all, or if no endpoint was used.
    """
    if (
        scorer.backend_settings is None
        or not backends.load(scorer.backend_settings.backend).truncates_logprobs
    ):
        return {}
    reading = [name for name, model in scorer.models.items() if model.reads_verdicts]
    counts: Counter[str] = Counter()
    for table in made.tables():
        rewards = table["rewards"].combine_chunks().flatten()
        columns = (
            rewards.field(name).to_pylist() for name in ("reward_model", "log_odds", "verdict_mass")
        )
        verdicts = zip(*columns, strict=True)
        counts.update(
            name
            for name, log_odds, mass in verdicts
            if name in reading and log_odds is None and mass is None
        )
    return {"beyond_top_logprobs": dict(counts)} if counts else {}


class Scorer:
    """A policy, its reward reference, and the reward models that read them.

    backend: the settings of who writes rationales and reads verdicts; without them the engine does both.
    Raises as LazyPolicy and open_reward_reference.
    """

    def __init__(self, settings: ScoringSettings, backend: BackendSettings | None = None) -> None:
        self.settings = settings
        self.backend_settings = backend
        self.meter = Meter()
        self.model = LazyPolicy(settings, settings.model, meter=self.meter)
        self.models = reward_models.make(settings.reward_models, self.model.chat, settings)
        needing = [name for name, model in self.models.items() if model.needs_reference]
        self.reference = open_reward_reference(settings, self.model, needing) if needing else None
        self.reference_key = self.reference.weights_key if self.reference else None
        self.keys = {"model": self.model.weights_key, "reward_reference": self.reference_key}
        self.opened = ExitStack()

    @cached_property
    def backend(self) -> Any:
        """Writes rationales and, if it is not transformers, reads the verdicts."""
        name = self.backend_settings.backend if self.backend_settings else "transformers"
        sampling = Sampling(
            0.0, 1.0, self.settings.rationale_max_tokens, self.settings.rationale_batch_size
        )
        backend = backends.make(name, self.model, sampling, self.backend_settings)
        self.opened.callback(backend.close)
        return backend

    def close(self) -> None:
        self.opened.close()

    @cached_property
    def max_total_tokens(self) -> int:
        """Positions that a prompt and its response may take together."""
        context = self.model.context_length
        return min(
            context, (self.backend_settings and self.backend_settings.max_model_len) or context
        )

    def score(self, table: pa.Table) -> tuple[pa.Table, Counter[str]]:
        """The pairs with `rewards` and `reference_logps` filled in, and those that could not be scored by reason.

        Drops: prompt_boundary, too_long.
        """
        table, prompt_ids, drops = tokenize_pairs(table, self.model.chat)
        lengths = [
            pc.list_value_length(pc.struct_field(table[side], "token_ids")).to_numpy()
            for side in SIDES
        ]
        total = np.array([len(ids) for ids in prompt_ids], int) + np.maximum(*lengths)
        fits = total <= self.max_total_tokens
        table, too_long = filter_rows(table, fits, "too_long")
        drops += too_long
        if not self.reference and not any(model.n_branches for model in self.models.values()):
            return self._with_verdicts(table, [], torch.zeros(len(table), 0)), drops
        encoded = make_pairs(table, list(itertools.compress(prompt_ids, fits)))
        self._generate_rationales(encoded)
        branches = [reward_models.all_branches(self.models, pair) for pair in encoded]
        longest = [max((len(b.ids) for b in group), default=0) for group in branches]
        fits = np.array([n < self.max_total_tokens for n in longest], bool)
        table, too_long = filter_rows(table, fits, "too_long")
        drops += too_long
        if not len(table):
            return table, drops
        encoded = self._with_reference(list(itertools.compress(encoded, fits)))
        logps = self._logps(list(itertools.compress(branches, fits)))
        return self._with_verdicts(table, encoded, logps), drops

    def _generate_rationales(self, pairs: list[Pair]) -> None:
        """Fills in `rationale_token_ids` of each pair for each model that writes before its verdict is read."""
        for name, model in self.models.items():
            requests = [
                (i, tuple(prompt))
                for i, pair in enumerate(pairs)
                for prompt in model.requests(pair)
            ]
            if not requests:
                continue
            for pair in pairs:
                pair.rationale_token_ids[name] = []
            seeds = [
                hashing.sample_seed(self.settings.seed, pairs[i].pair_id, 0) for i, _ in requests
            ]
            backend = self.backend
            with self.meter.timed():
                prompts = [
                    Request(prompt, seed) for (_, prompt), seed in zip(requests, seeds, strict=True)
                ]
                completions = backend.generate(prompts)
            for (i, _), completion in zip(requests, completions, strict=True):
                pairs[i].rationale_token_ids[name] = [
                    *pairs[i].rationale_token_ids[name],
                    completion.token_ids,
                ]

    def _with_verdicts(self, table: pa.Table, pairs: list[Pair], logps: torch.Tensor) -> pa.Table:
        """The table with the reward models' verdicts and the reference log-probabilities.

        pairs: of each row, or empty if no model has branches. logps: (pairs, branches), nats.
        """
        external = torch.from_numpy(verdicts_.log_odds(table, ["external"])[0])
        if pairs:
            context = Context.of(pairs, self.reference_key, external=external)
        else:
            sides = [pc.struct_field(table[side], "token_ids") for side in SIDES]
            n_tokens = np.stack([pc.list_value_length(ids).to_numpy() for ids in sides])
            unknown = torch.full(n_tokens.shape, torch.nan)
            context = Context(torch.from_numpy(n_tokens.astype(np.float32)), unknown, external)
        answers = reward_models.all_outputs(self.models, logps, context)
        policy_logps = reward_models.answer_logps(self.models, logps)
        if policy_logps is not None:
            for pair, (first, second) in zip(pairs, policy_logps.tolist(), strict=True):
                pair.reference_logps[self.model.weights_key] = (first, second)
        rationales = [pair.rationale_token_ids.get(name) for pair in pairs for name in answers]
        table = with_column(
            table, "rewards", rewards_column(answers, rationales, self.settings.min_verdict_mass)
        )
        if not pairs:
            return table
        stored = [
            [
                {"weights_key": key, "first": a, "second": b}
                for key, (a, b) in sorted(pair.reference_logps.items())
            ]
            for pair in pairs
        ]
        return with_column(table, "reference_logps", pa.array(stored, schemas.REFERENCE_LOGPS))

    def _logps(self, groups: list[list[Branch]]) -> torch.Tensor:
        """Summed log-probabilities of all branches, nats: of responses by the engine, of verdicts by the backend, if there is another.

        groups: the branches of each pair.  -> (pairs, branches)
        """
        flags = [
            model.reads_verdicts for model in self.models.values() for _ in range(model.n_branches)
        ]
        by_backend = (
            self.backend_settings is not None
            and backends.load(self.backend_settings.backend).reads_verdicts
        )
        verdicts = torch.tensor(flags, dtype=torch.bool) & by_backend
        logps = torch.zeros(len(groups), len(flags))
        for chosen, score in ((verdicts, self._by_backend), (~verdicts, self._by_engine)):
            if chosen.any():
                logps[:, chosen] = score(
                    [list(itertools.compress(group, chosen.tolist())) for group in groups]
                )
        return logps

    def _by_engine(self, groups: list[list[Branch]]) -> torch.Tensor:
        policy = self.model.load()
        with self.meter.timed():
            return torch.stack(list(policy.score(groups, self.settings.max_tokens_per_pack)))

    def _by_backend(self, groups: list[list[Branch]]) -> torch.Tensor:
        backend = self.backend
        with self.meter.timed():
            return backend.score([branch for group in groups for branch in group]).reshape(
                len(groups), -1
            )

    def _with_reference(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs with log-probabilities under reward_reference; those that the dataset holds are not computed again."""
        if self.reference is None:
            return pairs
        return add_missing_logps(pairs, self.reference, self.settings.max_tokens_per_pack)


def _policy_logps(models: dict[str, Any], logps: torch.Tensor) -> torch.Tensor | None:
    """The policy's own log-probabilities of both responses, if some reward model scores responses.  -> (pairs, 2) nats"""
    parts = reward_models.branch_slices(models)
    return next(
        (
            logps[:, parts[name]][:, :2]
            for name in ("implicit", "likelihood", "pmi")
            if name in parts
        ),
        None,
    )
