"""judge: candidates or labelled pairs -> pairs with the log-odds of every internal reward model asked for.

Reference log-probabilities are stored beside the verdicts under the key of the weights that gave them: the policy's own scores of this iteration
are the next one's reference, and training needs no second model.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from scir_cli import backends, consistency, reward_models, sources, store, workers
from scir_cli.backends import Request, Sampling
from scir_cli.config import BackendSettings, EvalRewardsSettings, EvalWinrateSettings, JudgeSettings, TrainSettings
from scir_cli.errors import ConfigError, DataError, suggest
from scir_cli.meter import Meter
from scir_cli.odds import Odds
from scir_cli.places import place
from scir_cli.reward_models import Context, Pair
from scir_cli.stages.common import LazyPolicy, progress, try_encode
from scir_cli.stages.generate import sample_seed
from scir_cli.store import Json, Part
from scir_cli.trees import Branch

AnySettings = JudgeSettings | EvalRewardsSettings | EvalWinrateSettings | TrainSettings
Row = dict[str, Any]


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
        make_rows = crossed_pairs if choose[0] == "cross" else candidate_pairs
        table: store.Rows = candidates
        dropped: Counter[str] = Counter()
    else:
        table, dropped = sources.open_pairs(settings.input, settings.limit, settings.external)
        bounds = store.part_bounds(table.num_rows, settings.rows_per_part)
        make_rows = given_pairs
    return Work(table, bounds, make_rows, dropped, sources.digest(settings.input), choose)


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
    make_rows: Callable[[list[Row], AnySettings], tuple[list[Row], Counter[str]]]
    dropped: Counter[str]  # before there were rows
    digest: str
    choose: tuple[str, int] = ("all", 0)


@dataclass
class Judging:
    """Makes parts of judged pairs."""

    settings: AnySettings
    scorer: Scorer
    work: Work

    @property
    def meter(self) -> Meter:
        return self.scorer.meter

    def __call__(self, low: int, high: int) -> Part:
        rows, drops = self.work.make_rows(self.work.table.slice(low, high - low).to_pylist(), self.settings)
        n = len(rows) + drops.total()
        rows, more = _sampled(rows, self.work.choose, self.settings.seed)
        rows, unscored = self.scorer.score(rows)
        rows, rest = _best_worst(rows, self.work.choose, self.settings)
        return Part(rows, n, drops + more + unscored + rest)

    def close(self) -> None:
        self.scorer.close()


def judge_table(stage: str, settings: AnySettings, scorer: Scorer, work: Work, share: Any = None) -> Json:
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
    return consistency.summary(consistency.from_tables(made.tables()))


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


def given_pairs(rows: list[Row], settings: AnySettings) -> tuple[list[Row], Counter[str]]:
    return rows, Counter()


def candidate_pairs(rows: list[Row], settings: AnySettings) -> tuple[list[Row], Counter[str]]:
    """All pairs of each prompt's candidates, less those with a duplicate or an empty response."""
    pairs: list[Row] = []
    drops: Counter[str] = Counter()
    for _, group in itertools.groupby(rows, key=lambda row: row["prompt_id"]):
        for first, second in itertools.combinations(list(group), 2):
            if first["duplicate_of"] or second["duplicate_of"]:
                drops["duplicate_candidate"] += 1
            elif not first["response"].strip() or not second["response"].strip():
                drops["empty_response"] += 1
            else:
                pairs.append(_pair_row(first, second, settings.external))
    return pairs, drops


def crossed_pairs(rows: list[Row], settings: AnySettings) -> tuple[list[Row], Counter[str]]:
    """Each candidate beside one of another prompt of the part, the nearest in length; the side does not tell which is whose."""
    usable = [row for row in rows if not row["duplicate_of"] and row["response"].strip()]
    drops = Counter(unusable_candidate=len(rows) - len(usable))
    pairs = []
    for own in usable:
        others = [row for row in usable if row["prompt_id"] != own["prompt_id"]]
        if not others:
            drops["no_other_prompt"] += 1
            continue
        other = min(others, key=lambda row: (abs(len(row["token_ids"]) - len(own["token_ids"])), row["candidate_id"]))
        pair = _pair_row(own, other, settings.external)
        if int(pair["pair_id"], 16) % 2:
            pair = {**_pair_row(other, own, settings.external), **{k: own[k] for k in ("prompt_id", "messages", "subset")}}
        pairs.append(pair)
    return pairs, +drops


def _pair_row(first: Row, second: Row, external: str | None) -> Row:
    rewards = []
    if external:
        if external not in first:
            raise DataError(f"the candidates have no column '{external}'.{suggest(external, first)}")
        a, b = first[external], second[external]
        rewards = [{"reward_model": "external", "log_odds": None if a is None or b is None else a - b}]
    return {
        "pair_id": store.digest_json([first["candidate_id"], second["candidate_id"]])[:16],
        **{name: first[name] for name in ("prompt_id", "messages", "subset")},
        "first": _response(first),
        "second": _response(second),
        "gold": None,
        "rewards": rewards,
        "reference_logps": [],
    }


def _response(candidate: Row) -> Row:
    return {"candidate_id": candidate["candidate_id"], "text": candidate["response"], "author": candidate["model"]} | {
        k: candidate[k] for k in ("token_ids", "finish_reason")
    }


def _by_prompt(rows: Iterable[Row]) -> Iterable[list[Row]]:
    return (list(group) for _, group in itertools.groupby(rows, key=lambda row: row["prompt_id"]))


def _sampled(rows: list[Row], choose: tuple[str, int], seed: int) -> tuple[list[Row], Counter[str]]:
    """K pairs of each prompt, drawn by a hash of (seed, pair): --pairs random:K."""
    if choose[0] != "random":
        return rows, Counter()
    kept = {
        id(row)
        for group in _by_prompt(rows)
        for row in sorted(group, key=lambda r: store.digest_json([seed, r["pair_id"]]))[: choose[1]]
    }
    out = [row for row in rows if id(row) in kept]
    return out, Counter(not_sampled=len(rows) - len(out))


def _best_worst(rows: list[Row], choose: tuple[str, int], settings: AnySettings) -> tuple[list[Row], Counter[str]]:
    """The pair of each prompt's best and worst candidate by the first reward model's mean log-odds against the others."""
    if choose[0] != "best-worst":
        return rows, Counter()
    out = []
    for group in _by_prompt(rows):
        totals: dict[str, float] = defaultdict(float)
        for row in group:
            value = next(r["log_odds"] for r in row["rewards"] if r["reward_model"] == settings.reward_models[0]) or 0.0
            totals[row["first"]["candidate_id"]] += value
            totals[row["second"]["candidate_id"]] -= value
        best, worst = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
        out += [row for row in group if {row["first"]["candidate_id"], row["second"]["candidate_id"]} == {best, worst}]
    return out, Counter(not_best_worst=len(rows) - len(out))


# ---------------------------------------------------------------------------------------------------------------------- scoring pairs


class Scorer:
    """A policy, its reward reference, and the reward models that read them."""

    def __init__(self, settings: AnySettings, backend: BackendSettings | None = None) -> None:
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

    def score(self, rows: list[Row]) -> tuple[list[Row], Counter[str]]:
        """The rows with `rewards` and `reference_logps` filled in, and those that could not be scored by reason."""
        drops: Counter[str] = Counter()
        ready: list[tuple[Row, Pair]] = []
        for row in rows:
            pair = try_encode(row, self.model.chat)
            if pair is None:
                drops["prompt_boundary"] += 1
            elif len(pair.prompt_ids) + max(map(len, pair.response_ids)) > self.room:
                drops["too_long"] += 1
            else:
                ready.append((row, pair))
        self._write([pair for _, pair in ready])
        asked = [reward_models.ask(self.models, pair) for _, pair in ready]
        fits = [max((len(b.ids) for b in branches), default=0) < self.room for branches in asked]
        drops["too_long"] += fits.count(False)
        ready, asked = list(itertools.compress(ready, fits)), list(itertools.compress(asked, fits))
        return self._verdicts(ready, asked), +drops

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

    def _verdicts(self, ready: list[tuple[Row, Pair]], asked: list[Any]) -> list[Row]:
        if not ready:
            return []
        pairs = self._with_reference([pair for _, pair in ready])
        logps = self._logps(asked)
        answers = reward_models.answer(self.models, logps, Context.of(pairs, self.reference_key))
        own = _own_logps(self.models, logps)
        for index, ((row, _), pair) in enumerate(zip(ready, pairs, strict=True)):
            row["rewards"] = [
                _reward(name, odds, index, self.settings.min_verdict_mass) | {"written": pair.written.get(name)}
                for name, odds in answers.items()
            ]
            known = dict(pair.reference_logps)
            if own is not None:
                known[self.model.key] = (float(own[index, 0]), float(own[index, 1]))
            row["reference_logps"] = [{"weights": key, "first": a, "second": b} for key, (a, b) in sorted(known.items())]
            for side, ids in zip(("first", "second"), pair.response_ids, strict=True):
                row[side] = {**row[side], "token_ids": ids}
        return [row for row, _ in ready]

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


def _reward(name: str, odds: Odds, index: int, min_mass: float) -> Row:
    def number(values: Any) -> float | None:
        value = float(values[index]) if values is not None else float("nan")
        return None if value != value else value

    mass = number(odds.verdict_mass)
    silent = mass is not None and mass < min_mass  # the judge is not answering the question
    return {
        "reward_model": name,
        "log_odds": None if silent else number(odds.log_odds),
        "forward_log_odds": number(odds.seats[0]) if odds.seats is not None else None,
        "swapped_log_odds": number(odds.seats[1]) if odds.seats is not None else None,
        "verdict_mass": mass,
    }
