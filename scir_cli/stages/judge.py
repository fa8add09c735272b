"""judge: candidates or labelled pairs -> pairs with the log-odds of every internal reward model asked for.

Reference log-probabilities are stored beside the verdicts under the key of the weights that gave them: the policy's own scores of this iteration
are the next one's reference, and training needs no second model.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from scir_cli import backends, consistency, reward_models, schemas, sources, store, workers
from scir_cli.backends import Request, Sampling
from scir_cli.config import BackendSettings, JudgeSettings, JudgingSettings, TrainSettings
from scir_cli.errors import ConfigError, DataError, suggest
from scir_cli.meter import Meter
from scir_cli.odds import Odds
from scir_cli.places import place
from scir_cli.reward_models import Context, Pair
from scir_cli.stages.common import LazyPolicy, encode_pair, progress
from scir_cli.stages.generate import sample_seed
from scir_cli.store import Json, Part
from scir_cli.trees import Branch

Index = np.ndarray  # (pairs,) rows of a table
SIDES = ("first", "second")


def run(settings: JudgeSettings) -> Json:
    """Writes a judged dataset and returns its manifest; counts are in pairs."""
    settings = settings.model_copy(update={"backend": backends.resolve(settings.backend)})
    scorer = Scorer(settings, settings)
    share = workers.share("scir_cli.stages.judge:opened", settings, scorer.meter)
    return judge_table("judge", settings, scorer, work_of(settings), share)


def opened(settings: JudgeSettings) -> Judging:
    """What a worker makes parts with."""
    return Judging(settings, Scorer(settings, settings), work_of(settings))


def work_of(settings: JudgeSettings) -> Work:
    """The pairs that are to be judged."""
    choose = _pair_rule(settings.pairs)
    path = place(settings.input)
    if store.is_dataset(path) and store.read_json(path / "plan.json").get("stage") == "generate":
        candidates = store.open_dataset(path, "candidates").head(settings.limit)
        bounds = store.group_bounds(candidates, "prompt_id", settings.rows_per_part)
        make_pairs = crossed_pairs if choose[0] == "cross" else candidate_pairs
        table: store.Rows = candidates
        dropped: Counter[str] = Counter()
    else:
        table, dropped = sources.open_pairs(settings.input, settings.limit, settings.score_column)
        bounds = store.part_bounds(table.num_rows, settings.rows_per_part)
        make_pairs = given_pairs
    return Work(table, bounds, make_pairs, dropped, sources.digest(settings.input), choose)


def _pair_rule(text: str) -> tuple[str, int]:
    name, _, number = text.partition(":")
    if name in ("all", "best-worst", "cross") and not number:
        return name, 0
    if name == "random" and number.isdigit() and int(number):
        return name, int(number)
    raise ConfigError(f"--pairs is {text!r}; it takes all, best-worst, cross, or random:K with K pairs a prompt")


@dataclass
class Work:
    """What there is to judge: rows of a table, cut into parts, and how a part's rows become pairs."""

    table: store.Rows
    bounds: list[tuple[int, int]]
    make_pairs: Callable[[pa.Table, JudgingSettings], tuple[pa.Table, Counter[str]]]
    dropped: Counter[str]  # before there were rows
    digest: str
    choose: tuple[str, int] = ("all", 0)


@dataclass
class Judging:
    """Makes parts of judged pairs."""

    settings: JudgingSettings
    scorer: Scorer
    work: Work

    @property
    def meter(self) -> Meter:
        return self.scorer.meter

    def __call__(self, low: int, high: int) -> Part:
        pairs, drops = self.work.make_pairs(self.work.table.slice(low, high - low), self.settings)
        n = len(pairs) + drops.total()
        pairs, more = _sampled(pairs, self.work.choose, self.settings.seed)
        pairs, unscored = self.scorer.score(pairs)
        pairs, rest = _best_worst(pairs, self.work.choose, self.settings)
        return Part(pairs, n, drops + more + unscored + rest)

    def close(self) -> None:
        self.scorer.close()


def judge_table(stage: str, settings: JudgingSettings, scorer: Scorer, work: Work, share: Any = None) -> Json:
    """Writes the judged dataset of a table of candidates or pairs: the one place where pairs are scored and written."""
    if not work.table.num_rows:
        raise DataError(f"the input holds no usable row ({dict(work.dropped) or 'it is empty'})")
    plan = {"stage": stage, "settings": settings.plan(), "input": work.digest, **scorer.keys}
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": work.table.num_rows + work.dropped.total()}
    with progress(stage, work.table.num_rows, scorer.meter) as advance, closing(Judging(settings, scorer, work)) as make:
        return store.write_dataset(
            settings.output_dir,
            "judged",
            plan,
            work.bounds,
            make,
            overwrite=settings.overwrite,
            dropped_before=work.dropped,
            advance=advance,
            share=share,
            work=scorer.meter.figures,
            summarise=lambda made: summarise(made) | unseen(made, scorer),
        )


def summarise(made: store.Dataset) -> Json:
    return consistency.summary_of(made.tables())


def unseen(made: store.Dataset, scorer: Scorer) -> Json:
    """Verdicts that are missing because an endpoint did not show both of their tokens, by reward model; nothing where it showed all."""
    if scorer.backend_settings is None or scorer.backend_settings.backend != "openai":
        return {}
    reading = [name for name, model in scorer.models.items() if model.reads_verdicts]
    counts: Counter[str] = Counter()
    for table in made.tables():
        rewards = table["rewards"].combine_chunks().flatten()
        columns = (rewards.field(name).to_pylist() for name in ("reward_model", "log_odds", "verdict_mass"))
        counts.update(name for name, odds, mass in zip(*columns, strict=True) if name in reading and odds is None and mass is None)
    return {"beyond_top_logprobs": dict(counts)} if counts else {}


# ---------------------------------------------------------------------------------------------------------------------- making pairs


def given_pairs(table: pa.Table, settings: JudgingSettings) -> tuple[pa.Table, Counter[str]]:
    return table, Counter()


def candidate_pairs(table: pa.Table, settings: JudgingSettings) -> tuple[pa.Table, Counter[str]]:
    """All pairs of each prompt's candidates, less those with a duplicate or an empty response."""
    duplicate, empty = _unusable(table)
    seats = [low + _combinations(high - low) for low, high in _prompts(table)]
    first, second = np.concatenate([np.empty((2, 0), int), *seats], axis=1)
    repeats, blank = duplicate[first] | duplicate[second], empty[first] | empty[second]
    drops = Counter(duplicate_candidate=int(repeats.sum()), empty_response=int((blank & ~repeats).sum()))
    good = ~(repeats | blank)
    first, second = first[good], second[good]
    return _paired(table, first, second, first, settings.score_column), +drops


@cache
def _combinations(n: int) -> np.ndarray:
    """Every two of n, as itertools.combinations orders them.  -> (2, pairs)"""
    return np.stack(np.triu_indices(n, 1))


def crossed_pairs(table: pa.Table, settings: JudgingSettings) -> tuple[pa.Table, Counter[str]]:
    """Each candidate beside one of another prompt of the part, the nearest in length; the side does not tell which is whose."""
    usable = ~np.logical_or(*_unusable(table))
    drops, table = Counter(unusable_candidate=int((~usable).sum())), table.filter(pa.array(usable))
    if not len(table):
        return schemas.schema("judged").empty_table(), +drops
    names = table["candidate_id"].to_pylist()
    by_name = np.argsort(sorted(range(len(names)), key=names.__getitem__))  # (candidates,) place of each among their ids
    prompts = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    lengths = pc.list_value_length(table["token_ids"]).to_numpy().astype(int)
    far = np.iinfo(int).max
    other = np.array(  # the first by name of the nearest in length
        [
            np.where(prompts == p, far, np.abs(lengths - n) * len(names) + by_name).argmin()
            for p, n in zip(prompts, lengths, strict=True)
        ]
    )
    own = np.flatnonzero(prompts != prompts[other])
    other = other[own]
    drops["no_other_prompt"] = len(names) - len(own)
    swap = np.array([int(name, 16) % 2 for name in _pair_ids(names, own, other)], bool)
    return _paired(table, np.where(swap, other, own), np.where(swap, own, other), own, settings.score_column), +drops


def _unusable(candidates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Whether each candidate repeats another, and whether it is empty.  (candidates,) each"""
    duplicate = pc.not_equal(candidates["duplicate_of"], "").fill_null(False)
    empty = pc.equal(pc.utf8_trim_whitespace(candidates["response"]), "")
    return duplicate.to_numpy(), empty.to_numpy()


def _paired(candidates: pa.Table, first: Index, second: Index, prompt: Index, external: str | None) -> pa.Table:
    """The pairs of these candidates, under the prompts of these."""
    names = {"text": "response", "author": "model"}
    response = pa.StructArray.from_arrays(
        [candidates[names.get(field.name, field.name)].combine_chunks() for field in schemas.RESPONSE],
        fields=list(schemas.RESPONSE),
    )
    under = candidates.select(["prompt_id", "messages", "subset"]).take(pa.array(prompt))
    columns = {name: under[name].combine_chunks() for name in under.column_names} | {
        "pair_id": pa.array(_pair_ids(candidates["candidate_id"].to_pylist(), first, second), pa.string()),
        "first": response.take(pa.array(first)),
        "second": response.take(pa.array(second)),
        "gold": pa.nulls(len(first), pa.string()),
        "rewards": _given(candidates, first, second, external),
        "reference_logps": pa.array([[]] * len(first), schemas.REFERENCE_LOGPS),
    }
    schema = schemas.schema("judged")
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _pair_ids(names: list[str], first: Index, second: Index) -> list[str]:
    quoted = np.array([store.to_json(name) for name in names], object)
    return [digest[:16] for digest in store.digest_lists(quoted[first], quoted[second])]


def _given(candidates: pa.Table, first: Index, second: Index, external: str | None) -> pa.Array:
    """The difference of the scores that came with the candidates, as the verdicts of the reward model "external"."""
    if external is None:
        return pa.array([[]] * len(first), schemas.REWARDS)
    if external not in candidates.column_names:
        raise DataError(f"the candidates have no column '{external}'.{suggest(external, candidates.column_names)}")
    scores = candidates[external]
    if not (pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type)):
        raise DataError(f"the candidates' column '{external}' should hold numbers; it holds {scores.type}")
    scores = pc.cast(scores, pa.float64()).to_numpy()  # null is NaN
    return _rewards({"external": Odds(torch.from_numpy(scores[first] - scores[second]))}, [], 0.0)


def _prompts(table: pa.Table) -> list[tuple[int, int]]:
    """Row ranges of neighbours under one prompt."""
    names = table["prompt_id"].combine_chunks()
    edges = np.flatnonzero(pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)) + 1
    return list(itertools.pairwise([0, *edges.tolist(), len(names)])) if len(names) else []


def _kept(table: pa.Table, kept: np.ndarray, reason: str) -> tuple[pa.Table, Counter[str]]:
    return table.filter(pa.array(kept)), +Counter({reason: int((~kept).sum())})


def _sampled(pairs: pa.Table, choose: tuple[str, int], seed: int) -> tuple[pa.Table, Counter[str]]:
    """K pairs of each prompt, drawn by a hash of (seed, pair): --pairs random:K."""
    if choose[0] != "random":
        return pairs, Counter()
    drawn = store.digest_lists(itertools.repeat(str(seed)), map(store.to_json, pairs["pair_id"].to_pylist()))
    kept = np.zeros(len(pairs), bool)
    for low, high in _prompts(pairs):
        kept[sorted(range(low, high), key=drawn.__getitem__)[: choose[1]]] = True
    return _kept(pairs, kept, "not_sampled")


def _best_worst(pairs: pa.Table, choose: tuple[str, int], settings: JudgingSettings) -> tuple[pa.Table, Counter[str]]:
    """The pair of each prompt's best and worst candidate by the first reward model's mean log-odds against the others."""
    if choose[0] != "best-worst":
        return pairs, Counter()
    values = np.nan_to_num(consistency.log_odds(pairs, [settings.reward_models[0]])[0]).tolist()
    seats = list(zip(*(pc.struct_field(pairs[side], "candidate_id").to_pylist() for side in SIDES), strict=True))
    kept = np.zeros(len(pairs), bool)
    for low, high in _prompts(pairs):
        totals: dict[str, float] = defaultdict(float)
        for (first, second), value in zip(seats[low:high], values[low:high], strict=True):
            totals[first] += value
            totals[second] -= value
        best, worst = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
        kept[low:high] = [set(seat) == {best, worst} for seat in seats[low:high]]
    return _kept(pairs, kept, "not_best_worst")


# ---------------------------------------------------------------------------------------------------------------------- scoring pairs


class Scorer:
    """A policy, its reward reference, and the reward models that read them."""

    def __init__(self, settings: JudgingSettings | TrainSettings, backend: BackendSettings | None = None) -> None:
        self.settings, self.backend_settings = settings, backend
        self.model = LazyPolicy(settings, settings.model)
        self.models = reward_models.make(settings.reward_models, self.model.chat, settings)
        self.reference = self._reference()
        self.meter = self.model.meter
        if self.reference:
            self.reference.meter = self.meter
        self.reference_key = self.reference.key if self.reference else None
        self.keys = {"model": self.model.key, "reward_reference": self.reference_key}

    def _reference(self) -> LazyPolicy | None:
        if "implicit" not in self.models:
            return None
        if self.settings.reward_reference is None:
            raise ConfigError(
                "the implicit reward needs --reward-reference MODEL (the SFT model the policy came from), or leave 'implicit' out of --reward-models"
            )
        reference = LazyPolicy(self.settings, self.settings.reward_reference)
        if reference.key == self.model.key:
            raise ConfigError(
                f"--reward-reference {self.settings.reward_reference} holds the same weights as --model {self.settings.model}: every implicit "
                "log-odds would be 0. Name the model the policy was tuned from (M_0, or M_t-1)"
            )
        if reference.chat.template_digest() != self.model.chat.template_digest():
            raise ConfigError(
                "--reward-reference and --model have different tokenizers or chat templates, so their log-probabilities are not of the same tokens"
            )
        return reference

    @cached_property
    def backend(self) -> Any:
        """Who writes rationales and, where it is not transformers, reads the verdicts."""
        assert isinstance(self.settings, JudgingSettings)  # `train` writes no rationale
        sampling = Sampling(0.0, 1.0, self.settings.rationale_max_tokens, self.settings.rationale_batch_size)
        return backends.make(
            self.backend_settings.backend if self.backend_settings else "transformers", self.model, sampling, self.backend_settings
        )

    def close(self) -> None:
        if "backend" in vars(self):
            self.backend.close()

    @cached_property
    def room(self) -> int:
        """Positions that a prompt and its answer may take."""
        room = self.model.context_length
        return min(room, (self.backend_settings and self.backend_settings.max_model_len) or room)

    def score(self, table: pa.Table) -> tuple[pa.Table, Counter[str]]:
        """The pairs with `rewards` and `reference_logps` filled in, and those that could not be scored by reason."""
        table, drops = self._encoded(table)
        chat = self.model.chat
        prompts = [(len(chat.prompt_ids(table["messages"][low].as_py())), high - low) for low, high in _prompts(table)]
        taken = np.repeat(*np.array(prompts, int).reshape(-1, 2).T)  # (pairs,) tokens of the prompt
        taken += np.maximum(*(pc.list_value_length(pc.struct_field(table[side], "token_ids")).to_numpy() for side in SIDES))
        table, more = _kept(table, taken <= self.room, "too_long")
        drops += more
        if not any(model.n_branches for model in self.models.values()):
            return self._answered(table, [], torch.zeros(len(table), 0)), drops
        pairs = [encode_pair(row, chat) for row in table.to_pylist()]
        self._write(pairs)
        asked = [reward_models.ask(self.models, pair) for pair in pairs]
        fits = np.array([max((len(b.ids) for b in branches), default=0) < self.room for branches in asked], bool)
        table, more = _kept(table, fits, "too_long")
        if not len(table):
            return table, drops + more
        pairs = self._with_reference(list(itertools.compress(pairs, fits)))
        return self._answered(table, pairs, self._logps(list(itertools.compress(asked, fits)))), drops + more

    def _encoded(self, table: pa.Table) -> tuple[pa.Table, Counter[str]]:
        """The pairs with the token ids of both responses, less those where the chat template cannot tell its prompt from its answers."""
        fields = [{f.name: pc.struct_field(table[side], f.name).combine_chunks() for f in schemas.RESPONSE} for side in SIDES]
        lacking = [pc.list_value_length(side["token_ids"]).fill_null(0).to_numpy() == 0 for side in fields]
        if not np.any(lacking):
            return table, Counter()
        messages = table["messages"].to_pylist()
        texts, ids = ([side[name].to_pylist() for side in fields] for name in ("text", "token_ids"))
        told = np.ones(len(table), bool)
        for row in np.flatnonzero(np.any(lacking, axis=0)):
            try:
                for text, one in zip(texts, ids, strict=True):
                    one[row] = one[row] or self.model.chat.response_ids(messages[row], text[row])
            except DataError:
                told[row] = False
        for name, side, encoded in zip(SIDES, fields, ids, strict=True):
            side["token_ids"] = pa.array(encoded, side["token_ids"].type)
            response = pa.StructArray.from_arrays(list(side.values()), fields=list(schemas.RESPONSE))
            table = _with_column(table, name, response)
        return _kept(table, told, "prompt_boundary")

    def _write(self, pairs: list[Pair]) -> None:
        """Has each model that writes first do so about each pair."""
        for name, model in self.models.items():
            requests = [(i, tuple(p)) for i, pair in enumerate(pairs) for p in model.requests(pair)]
            if not requests:
                continue
            for pair in pairs:
                pair.written[name] = []
            seeds = [sample_seed(self.settings.seed, pairs[i].pair_id, 0) for i, _ in requests]
            backend = self.backend
            with self.meter.working():
                answers = backend.generate([Request(prompt, seed) for (_, prompt), seed in zip(requests, seeds, strict=True)])
            for (i, _), completion in zip(requests, answers, strict=True):
                pairs[i].written[name] = [*pairs[i].written[name], completion.token_ids]

    def _answered(self, table: pa.Table, pairs: list[Pair], logps: torch.Tensor) -> pa.Table:
        """The table with what the reward models say; `pairs` may be left out where none of them asks anything."""
        external = torch.from_numpy(consistency.log_odds(table, ["external"])[0].astype(np.float32))
        none = torch.empty(2, len(table))
        context = Context.of(pairs, self.reference_key) if pairs else Context(none, none, external)
        answers = reward_models.answer(self.models, logps, context)
        own = _own_logps(self.models, logps)
        if own is not None:
            for pair, (first, second) in zip(pairs, own.tolist(), strict=True):
                pair.reference_logps[self.model.key] = (first, second)
        written = [pair.written.get(name) for pair in pairs for name in answers]
        table = _with_column(table, "rewards", _rewards(answers, written, self.settings.min_verdict_mass))
        known = [[{"weights": k, "first": a, "second": b} for k, (a, b) in sorted(p.reference_logps.items())] for p in pairs]
        return _with_column(table, "reference_logps", pa.array(known, schemas.REFERENCE_LOGPS)) if pairs else table

    def _logps(self, asked: list[list[Branch]]) -> torch.Tensor:
        """Summed log-probabilities of all branches: of answers by the engine, of verdicts by another backend where it was asked for.  # (pairs, branches)"""
        flags = [model.reads_verdicts for model in self.models.values() for _ in range(model.n_branches)]
        verdicts = torch.tensor(flags, dtype=torch.bool) & (
            self.backend_settings is not None and self.backend_settings.backend != "transformers"
        )
        logps = torch.zeros(len(asked), len(flags))
        for chosen, score in ((verdicts, self._by_backend), (~verdicts, self._by_engine)):
            if chosen.any():
                logps[:, chosen] = score([list(itertools.compress(branches, chosen.tolist())) for branches in asked])
        return logps

    def _by_engine(self, groups: list[list[Branch]]) -> torch.Tensor:
        policy = self.model.policy
        with self.meter.working():
            return torch.stack(list(policy.score(groups, self.settings.max_tokens_per_pack)))

    def _by_backend(self, groups: list[list[Branch]]) -> torch.Tensor:
        backend = self.backend
        with self.meter.working():
            return backend.score([branch for group in groups for branch in group]).reshape(len(groups), -1)

    def _with_reference(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs with log-probabilities under reward_reference; those the dataset already holds are not computed again."""
        if self.reference is None:
            return pairs
        return with_reference(pairs, self.reference, self.settings.max_tokens_per_pack)


def with_reference(pairs: Sequence[Pair], reference: LazyPolicy, max_tokens: int) -> list[Pair]:
    """The pairs with summed response log-probabilities under `reference` added where they are missing."""
    missing = [pair for pair in pairs if reference.key not in pair.reference_logps]
    groups = [[reward_models.continuation(pair.prompt_ids, ids) for ids in pair.response_ids] for pair in missing]
    scored = reference.policy.score(groups, max_tokens) if missing or reference.sharded else []
    with reference.meter.working():
        for pair, logps in zip(missing, scored, strict=True):
            pair.reference_logps[reference.key] = (float(logps[0]), float(logps[1]))
    return list(pairs)


def _own_logps(models: dict[str, Any], logps: torch.Tensor) -> torch.Tensor | None:
    """The policy's own response log-probabilities, where some reward model has asked for them.  # (pairs, 2)"""
    parts = reward_models.columns(models)
    return next((logps[:, parts[name]][:, :2] for name in ("implicit", "likelihood", "pmi") if name in parts), None)


def _rewards(answers: dict[str, Odds], written: list[Any], min_mass: float) -> pa.Array:
    """The verdicts of each pair, one reward model after the other; no verdict where the judge is not answering the question.

    written: what each model wrote about each pair, in that order; empty where none wrote.
    """
    n = len(next(iter(answers.values())).log_odds)

    def column(values: Sequence[torch.Tensor | None]) -> pa.Array:
        numbers = np.stack([np.full(n, np.nan) if v is None else v.double().numpy() for v in values], axis=1).ravel()
        return pa.array(numbers, mask=np.isnan(numbers))

    said = answers.values()
    silent = [None if one.verdict_mass is None else one.verdict_mass.double() < min_mass for one in said]
    odds = [one.log_odds if no is None else one.log_odds.masked_fill(no, torch.nan) for one, no in zip(said, silent, strict=True)]
    seats = [column([None if one.seats is None else one.seats[seat] for one in said]) for seat in range(2)]
    columns = [pa.array([*answers] * n, pa.string()), column(odds), *seats, column([one.verdict_mass for one in said])]
    columns.append(pa.array(written or [None] * (n * len(answers)), schemas.REWARDS.value_type.field("written").type))
    verdicts = pa.StructArray.from_arrays(columns, fields=list(schemas.REWARDS.value_type))
    ends = pa.array(np.arange(n + 1) * len(answers), pa.int32())
    return pa.ListArray.from_arrays(ends, verdicts, type=schemas.REWARDS)


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)
