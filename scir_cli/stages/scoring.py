"""Pairs -> judged pairs: the log-odds of every internal reward model.

The only module that scores pairs and writes judged datasets.
Used by `judge`, `eval rewards`, `eval winrate` and `train`.
Reference log-probabilities are stored beside the verdicts under the key of their weights: the
policy's own scores of this iteration are the reference of the next, and training needs no second
model.
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
from scir_cli.analysis import consistency, verdicts
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
from scir_cli.rewards.pairs import (
    SIDES,
    Context,
    Pair,
    PromptIds,
    make_pairs,
    tokenize_pairs,
    warn_of_foreign_ids,
    without_foreign_ids,
)
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
    """Computes parts of judged pairs."""

    scorer: Scorer
    pair_input: PairInput

    @property
    def meter(self) -> Meter:
        """Throughput of the scorer."""
        return self.scorer.meter

    def __call__(self, low: int, high: int) -> Part:
        """The judged pairs of the input rows [low, high), and the drops of every step."""
        rows = self.pair_input.table.slice(low, high - low)
        pairs, not_paired = self.pair_input.make_pairs(rows)
        n_pairs = len(pairs) + not_paired.total()

        pairs, not_selected = self.pair_input.before_scoring(pairs)
        own = self.scorer.encoding
        pairs, encoded_again = without_foreign_ids(pairs, self.pair_input.encoding, own)
        pairs, not_scored = self.scorer.score(pairs)
        pairs, not_kept = self.pair_input.after_scoring(pairs)
        drops = not_paired + not_selected + not_scored + not_kept
        return Part(pairs, n_pairs, drops, encoded_again)

    def close(self) -> None:
        """Closes the scorer."""
        self.scorer.close()


def write_judged_dataset(
    stage: str,
    settings: ScoringSettings,
    scorer: Scorer,
    pair_input: PairInput,
    share: Any = None,
) -> Json:
    """Writes the judged dataset of the pairs and returns its manifest.

    stage: name of the command, for the plan and the progress bar.
    share: distributes the parts to worker processes (scir_cli/workers); None: this process computes
        them.
    Raises DataError if there is no pair.
    """
    table = pair_input.table
    dropped = pair_input.dropped
    if not table.num_rows:
        reason = f"dropped rows by reason: {dict(dropped)}" if dropped else "it is empty"
        raise DataError(f"the input holds no usable row ({reason})")

    plan = {
        "stage": stage,
        "settings": settings.plan(),
        "input": pair_input.digest,
        **scorer.keys,
    }
    if settings.dry_run:
        rows_in = table.num_rows + dropped.total()
        return {"dry_run": True, "plan": plan, "rows_in": rows_in}

    inputs = {}
    for name in ("input", "model", "reward_reference"):
        inputs[name] = getattr(settings, name, None)

    def summarize(judged: dataset.Dataset) -> Json:
        figures = consistency.summary_of(judged.tables())
        return figures | count_verdicts_beyond_top_logprobs(judged, scorer)

    with (
        progress(stage, table.num_rows, scorer.meter) as advance,
        closing(JudgePart(scorer, pair_input)) as make,
    ):
        manifest = dataset.write_dataset(
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
            inputs=inputs,
            summarize=summarize,
            encoding=scorer.encoding,
        )
        warn_of_foreign_ids(manifest, str(inputs["input"]), settings.model)
        return manifest


def count_verdicts_beyond_top_logprobs(judged: dataset.Dataset, scorer: Scorer) -> Json:
    """Counts the verdicts whose two tokens an endpoint did not both return, by reward model.

    Empty if the endpoint returned all of them, or if no endpoint was used.
    """
    settings = scorer.backend_settings
    if settings is None or not backends.load(settings.backend).truncates_logprobs:
        return {}

    verdict_readers = [name for name, model in scorer.models.items() if model.reads_verdicts]
    counts: Counter[str] = Counter()
    for table in judged.tables():
        rewards = table["rewards"].combine_chunks().flatten()
        names = rewards.field("reward_model").to_pylist()
        log_odds = rewards.field("log_odds").to_pylist()
        masses = rewards.field("verdict_mass").to_pylist()

        for name, value, mass in zip(names, log_odds, masses, strict=True):
            is_missing = value is None and mass is None
            if is_missing and name in verdict_readers:
                counts[name] += 1
    return {"beyond_top_logprobs": dict(counts)} if counts else {}


class Scorer:
    """A policy, its reward reference, and the reward models that read them.

    backend: settings of the backend that writes rationales and reads verdicts; None: the engine
        does both.
    Raises as LazyPolicy and open_reward_reference.
    """

    def __init__(self, settings: ScoringSettings, backend: BackendSettings | None = None) -> None:
        """Prepares the reward models; weights are loaded on first use.

        Raises ConfigError or ModelError if the models cannot be used with these settings.
        """
        self.settings = settings
        self.backend_settings = backend
        self.meter = Meter()
        self.model = LazyPolicy(settings, settings.model, meter=self.meter)
        self.models = reward_models.make(settings.reward_models, self.model.chat, settings)

        self.reference: LazyPolicy | None = None
        self.reference_key: str | None = None
        needing = [name for name, model in self.models.items() if model.needs_reference]
        if needing:
            self.reference = open_reward_reference(settings, self.model, needing)
            self.reference_key = self.reference.weights_key
        self.keys = {"model": self.model.weights_key, "reward_reference": self.reference_key}
        self.opened = ExitStack()

    @property
    def encoding(self) -> str:
        """Digest of the model's tokenizer and chat template."""
        return self.model.encoding

    @cached_property
    def backend(self) -> Any:
        """Writes rationales and, if it is not transformers, reads the verdicts."""
        settings = self.settings
        name = self.backend_settings.backend if self.backend_settings else "transformers"
        sampling = Sampling(
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=settings.rationale_max_tokens,
            batch_size=settings.rationale_batch_size,
        )
        backend = backends.make(name, self.model, sampling, self.backend_settings)
        self.opened.callback(backend.close)
        return backend

    def close(self) -> None:
        """Closes the backend, if it was opened."""
        self.opened.close()

    @cached_property
    def max_total_tokens(self) -> int:
        """Maximum length of a prompt and its response together, in tokens."""
        context = self.model.context_length
        if self.backend_settings is None:
            return context
        return min(context, self.backend_settings.max_model_len or context)

    def score(self, table: pa.Table) -> tuple[pa.Table, Counter[str]]:
        """The pairs with `rewards` and `reference_logps` filled in, and the drops by reason.

        Drops: as in `tokenize_pairs`, and too_long.
        """
        table, prompt_ids, drops = tokenize_pairs(table, self.model.chat)
        fits = _total_tokens(table, prompt_ids) <= self.max_total_tokens
        table, too_long = filter_rows(table, fits, "too_long")
        drops += too_long

        has_branches = any(model.n_branches for model in self.models.values())
        if not self.reference and not has_branches:
            no_logps = torch.zeros(len(table), 0)
            return self._with_verdicts(table, [], no_logps), drops

        prompt_ids = list(itertools.compress(prompt_ids, fits))
        pairs = make_pairs(table, prompt_ids)
        self._generate_rationales(pairs)

        # The judge's prompts, with the rationales, can be too long although the pair itself fits.
        branches = [reward_models.all_branches(self.models, pair) for pair in pairs]
        lengths = [_longest(group) for group in branches]
        fits = np.array([length < self.max_total_tokens for length in lengths], bool)
        table, too_long = filter_rows(table, fits, "too_long")
        drops += too_long
        if not len(table):
            return table, drops

        pairs = self._with_reference(list(itertools.compress(pairs, fits)))
        logps = self._logps(list(itertools.compress(branches, fits)))
        return self._with_verdicts(table, pairs, logps), drops

    def _generate_rationales(self, pairs: list[Pair]) -> None:
        """Fills in `rationale_token_ids` of each pair, for each model that writes rationales.

        A rationale is the answer to one of the model's `requests`.
        """
        for name, model in self.models.items():
            requests: list[Request] = []
            # for each request, its pair
            requesting: list[Pair] = []
            for pair in pairs:
                for prompt in model.requests(pair):
                    seed = hashing.sample_seed(self.settings.seed, pair.pair_id, 0)
                    requests.append(Request(tuple(prompt), seed))
                    requesting.append(pair)
            if not requests:
                continue

            for pair in pairs:
                pair.rationale_token_ids[name] = []
            backend = self.backend
            with self.meter.timed():
                completions = backend.generate(requests)
            for pair, completion in zip(requesting, completions, strict=True):
                previous = pair.rationale_token_ids[name]
                pair.rationale_token_ids[name] = [*previous, completion.token_ids]

    def _with_verdicts(
        self,
        table: pa.Table,
        pairs: list[Pair],
        logps: torch.Tensor,
    ) -> pa.Table:
        """The table with the reward models' verdicts and the reference log-probabilities.

        pairs: of each row, or empty if no model has branches.
        logps: (pairs, branches), nats.
        """
        context = self._context(table, pairs)
        outputs = reward_models.all_outputs(self.models, logps, context)
        for name, model in self.models.items():
            decided = torch.tensor([model.decides(pair) for pair in pairs], dtype=torch.bool)
            if not decided.all():
                outputs[name] = outputs[name].where(decided)

        policy_logps = reward_models.answer_logps(self.models, logps)
        if policy_logps is not None:
            key = self.model.weights_key
            for pair, (first, second) in zip(pairs, policy_logps.tolist(), strict=True):
                pair.reference_logps[key] = (first, second)

        rationales = []
        for pair in pairs:
            for name in outputs:
                rationales.append(pair.rationale_token_ids.get(name))
        rewards = rewards_column(outputs, rationales, self.settings.min_verdict_mass)
        table = with_column(table, "rewards", rewards)
        if not pairs:
            return table
        return with_column(table, "reference_logps", _reference_logps_column(pairs))

    def _context(self, table: pa.Table, pairs: list[Pair]) -> Context:
        """The inputs of `odds` besides the policy's log-probabilities.

        pairs: of each row, or empty if no model has branches; the reference log-probabilities are
            then unknown.
        """
        log_odds = verdicts.log_odds(table, ["external"])[0]
        external = torch.from_numpy(log_odds)
        if pairs:
            return Context.of(pairs, self.reference_key, external=external)

        # (2, pairs) each
        n_tokens = np.stack(_response_lengths(table))
        unknown = torch.full(n_tokens.shape, torch.nan)
        return Context(
            n_tokens=torch.from_numpy(n_tokens.astype(np.float32)),
            reference_logps=unknown,
            external=external,
        )

    def _logps(self, groups: list[list[Branch]]) -> torch.Tensor:
        """Summed log-probabilities of all branches, nats.

        The engine scores responses. It scores verdicts too, unless the backend reads them.
        groups: the branches of each pair.  -> (pairs, branches)
        """
        reads_verdicts: list[bool] = []
        for model in self.models.values():
            reads_verdicts += [model.reads_verdicts] * model.n_branches

        settings = self.backend_settings
        use_backend = settings is not None and backends.load(settings.backend).reads_verdicts

        # (branches,)
        by_backend = torch.tensor(reads_verdicts, dtype=torch.bool) & use_backend
        logps = torch.zeros(len(groups), len(reads_verdicts))
        for columns, score in (
            (by_backend, self._score_by_backend),
            (~by_backend, self._score_by_engine),
        ):
            if columns.any():
                selection = columns.tolist()
                selected = [list(itertools.compress(group, selection)) for group in groups]
                logps[:, columns] = score(selected)
        return logps

    def _score_by_engine(self, groups: list[list[Branch]]) -> torch.Tensor:
        """Summed log-probabilities under the policy, nats.  -> (pairs, branches)"""
        policy = self.model.load()
        with self.meter.timed():
            logps = policy.score(groups, self.settings.max_tokens_per_pack)
            return torch.stack(list(logps))

    def _score_by_backend(self, groups: list[list[Branch]]) -> torch.Tensor:
        """Log-probabilities of verdict tokens from the backend, nats.  -> (pairs, branches)"""
        backend = self.backend
        branches = list(itertools.chain.from_iterable(groups))
        with self.meter.timed():
            logps = backend.score(branches)
            return logps.reshape(len(groups), -1)

    def _with_reference(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs with log-probabilities under reward_reference.

        Those that the dataset holds are not computed again.
        """
        if self.reference is None:
            return pairs
        return add_missing_logps(pairs, self.reference, self.settings.max_tokens_per_pack)


def _response_lengths(table: pa.Table) -> list[np.ndarray]:
    """Lengths of the first and of the second responses, in tokens.  -> (pairs,) each"""
    lengths = []
    for side in SIDES:
        token_ids = pc.struct_field(table[side], "token_ids")
        lengths.append(pc.list_value_length(token_ids).to_numpy())
    return lengths


def _total_tokens(table: pa.Table, prompt_ids: PromptIds) -> np.ndarray:
    """Length of each pair's prompt and its longer response together, in tokens.  -> (pairs,)"""
    prompt_lengths = np.array([len(ids) for ids in prompt_ids], int)
    first, second = _response_lengths(table)
    return prompt_lengths + np.maximum(first, second)


def _longest(branches: list[Branch]) -> int:
    """Length of the longest branch, in tokens; 0 if there is none."""
    return max((len(branch.ids) for branch in branches), default=0)


def _reference_logps_column(pairs: list[Pair]) -> pa.Array:
    """The `reference_logps` column: each pair's log-probabilities (nats), sorted by weights key."""
    rows = []
    for pair in pairs:
        row = []
        for key, (first, second) in sorted(pair.reference_logps.items()):
            row.append({"weights_key": key, "first": first, "second": second})
        rows.append(row)
    return pa.array(rows, schemas.REFERENCE_LOGPS)
