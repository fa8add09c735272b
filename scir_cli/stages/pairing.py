"""Candidates -> pairs: which responses of a prompt are compared (`judge --pairs`)."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from scir_cli.analysis import verdicts
from scir_cli.data import dataset, files, folders, hashing, readers, schemas
from scir_cli.data.storage import to_path
from scir_cli.errors import ConfigError, DataError, suggest
from scir_cli.rewards import reward_models
from scir_cli.rewards.columns import filter_rows, rewards_column
from scir_cli.rewards.log_odds import RewardOutput
from scir_cli.rewards.pairs import SIDES
from scir_cli.settings import JudgeSettings
from scir_cli.stages import damage

Index = np.ndarray  # (pairs,) rows of a table

#: Rows of a part -> the rows that go on, and the others by reason.
PartRule = Callable[[pa.Table], tuple[pa.Table, Counter[str]]]


def keep_all(table: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """All rows: the rule of pairs that are given."""
    return table, Counter()


@dataclass
class PairInput:
    """The pairs to judge: rows of a table, cut into parts, and the rules that turn a part's rows into pairs.

    dropped: input rows that never reached the table, by reason.
    before_scoring, after_scoring: which pairs are scored, and which of the scored pairs are kept.
    """

    table: dataset.Rows
    bounds: list[tuple[int, int]]
    dropped: Counter[str]
    digest: str
    make_pairs: PartRule = keep_all
    before_scoring: PartRule = keep_all
    after_scoring: PartRule = keep_all


def load_pair_input(settings: JudgeSettings) -> PairInput:
    """The pairs of `judge --input`: made from candidates, or given."""
    rule, n_sampled = parse_pair_rule(settings.pairs)
    path = to_path(settings.input)
    if folders.is_dataset(path) and files.read_json(path / "plan.json").get("stage") == "generate":
        candidates = dataset.open_dataset(path, "candidates").head(settings.limit)
        bounds = dataset.group_bounds(candidates, "prompt_id", settings.rows_per_part)
        makers = {"cross": crossed_pairs, "damaged": damage.damaged_pairs}
        make_pairs = makers.get(rule, candidate_pairs)
        pairs = PairInput(candidates, bounds, Counter(), readers.digest(settings.input))
        pairs.make_pairs = partial(make_pairs, external=settings.score_column)
    else:
        table, dropped = readers.open_pairs(settings.input, settings.limit, settings.score_column)
        bounds = dataset.part_bounds(table.num_rows, settings.rows_per_part)
        pairs = PairInput(table, bounds, dropped, readers.digest(settings.input))
    if rule == "random":
        pairs.before_scoring = partial(sample_pairs, n=n_sampled, seed=settings.seed)
    if rule == "best-worst":
        pairs.after_scoring = partial(
            best_and_worst, reward_model=next(iter(reward_models.load_all(settings.reward_models)))
        )
    return pairs


def parse_pair_rule(text: str) -> tuple[str, int]:
    """The name of the rule in --pairs, and K of random:K (0 for the others). Raises ConfigError."""
    name, _, number = text.partition(":")
    if name in ("all", "best-worst", "cross", "damaged") and not number:
        return name, 0
    if name == "random" and number.isdigit() and int(number):
        return name, int(number)
    raise ConfigError(
        f"--pairs is {text!r}; it takes all, best-worst, cross, damaged, or random:K with K pairs a prompt"
    )


def candidate_pairs(table: pa.Table, external: str | None = None) -> tuple[pa.Table, Counter[str]]:
    """All pairs of each prompt's candidates, less those with a duplicate or an empty response.

    external: column of scores, whose difference becomes the verdict of the reward model "external".
    """
    duplicate, empty = _unusable(table)
    combinations = [low + _combinations(high - low) for low, high in prompt_ranges(table)]
    first, second = np.concatenate([np.empty((2, 0), int), *combinations], axis=1)
    repeats = duplicate[first] | duplicate[second]
    blank = empty[first] | empty[second]
    drops = Counter(
        duplicate_candidate=int(repeats.sum()), empty_response=int((blank & ~repeats).sum())
    )
    usable = ~(repeats | blank)
    first, second = first[usable], second[usable]
    return _paired(table, first, second, first, external), +drops


@cache
def _combinations(n: int) -> np.ndarray:
    """Every two of n, as itertools.combinations orders them.  -> (2, pairs)"""
    return np.stack(np.triu_indices(n, 1))


def crossed_pairs(table: pa.Table, external: str | None = None) -> tuple[pa.Table, Counter[str]]:
    """Each candidate beside the one of another prompt of the part that is nearest in length.

    A hash decides which of the two is `first`, so the side does not tell which belongs to the prompt.
    """
    usable = ~np.logical_or(*_unusable(table))
    drops, table = Counter(unusable_candidate=int((~usable).sum())), table.filter(pa.array(usable))
    if not len(table):
        return schemas.schema("judged").empty_table(), +drops
    names = table["candidate_id"].to_pylist()
    rank = np.argsort(
        sorted(range(len(names)), key=names.__getitem__)
    )  # (candidates,) of each id among the ids
    prompts = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    lengths = pc.list_value_length(table["token_ids"]).to_numpy().astype(int)
    other = np.array([_nearest(row, prompts, lengths, rank) for row in range(len(names))])
    own = np.flatnonzero(prompts != prompts[other])
    other = other[own]
    drops["no_other_prompt"] = len(names) - len(own)
    swap = np.array([int(name, 16) % 2 for name in _pair_ids(names, own, other)], bool)
    return _paired(
        table, np.where(swap, other, own), np.where(swap, own, other), own, external
    ), +drops


def _nearest(row: int, prompts: np.ndarray, lengths: np.ndarray, rank: np.ndarray) -> int:
    """The candidate of another prompt that is nearest in length to this row's, the first by id among equals.

    prompts, lengths, rank: (candidates,). Without another prompt, a candidate of the same prompt.
    """
    distance = np.abs(lengths - lengths[row]) * len(rank) + rank
    return int(np.where(prompts == prompts[row], np.iinfo(int).max, distance).argmin())


def _unusable(candidates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Whether each candidate repeats another, and whether it is empty.  (candidates,) each"""
    duplicate = pc.not_equal(candidates["duplicate_of"], "").fill_null(False)
    empty = pc.equal(pc.utf8_trim_whitespace(candidates["response"]), "")
    return duplicate.to_numpy(), empty.to_numpy()


def _paired(
    candidates: pa.Table, first: Index, second: Index, prompt: Index, external: str | None
) -> pa.Table:
    """The pairs of these candidates, under the prompts of these."""
    names = {"text": "response", "author": "weights_key"}
    response = pa.StructArray.from_arrays(
        [
            candidates[names.get(field.name, field.name)].combine_chunks()
            for field in schemas.RESPONSE
        ],
        fields=list(schemas.RESPONSE),
    )
    under = candidates.select(schemas.schema("prompts").names).take(pa.array(prompt))
    columns = {name: under[name].combine_chunks() for name in under.column_names} | {
        "pair_id": pa.array(
            _pair_ids(candidates["candidate_id"].to_pylist(), first, second), pa.string()
        ),
        "first": response.take(pa.array(first)),
        "second": response.take(pa.array(second)),
        "gold_label": pa.nulls(len(first), pa.string()),
        "rewards": _external_rewards(candidates, first, second, external),
        "reference_logps": pa.array([[]] * len(first), schemas.REFERENCE_LOGPS),
    }
    schema = schemas.schema("judged")
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _pair_ids(names: list[str], first: Index, second: Index) -> list[str]:
    quoted = np.array([hashing.canonical_json(name) for name in names], object)
    return [digest[:16] for digest in hashing.digest_lists(quoted[first], quoted[second])]


def _external_rewards(
    candidates: pa.Table, first: Index, second: Index, external: str | None
) -> pa.Array:
    """The difference of the scores in a column of the candidates, as the verdicts of the reward model "external".

    Raises DataError for a column that is missing or holds no numbers.
    """
    if external is None:
        return pa.array([[]] * len(first), schemas.REWARDS)
    if external not in candidates.column_names:
        raise DataError(
            f"the candidates have no column '{external}'.{suggest(external, candidates.column_names)}"
        )
    scores = candidates[external]
    if not (pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type)):
        raise DataError(
            f"the candidates' column '{external}' should hold numbers; it holds {scores.type}"
        )
    scores = pc.cast(scores, pa.float64()).to_numpy()  # null is NaN
    return rewards_column(
        {"external": RewardOutput(torch.from_numpy(scores[first] - scores[second]))}, [], 0.0
    )


def prompt_ranges(table: pa.Table) -> list[tuple[int, int]]:
    """Row ranges of neighbours under one prompt."""
    names = table["prompt_id"].combine_chunks()
    edges = np.flatnonzero(pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)) + 1
    return list(itertools.pairwise([0, *edges.tolist(), len(names)])) if len(names) else []


def sample_pairs(pairs: pa.Table, n: int, seed: int) -> tuple[pa.Table, Counter[str]]:
    """`n` pairs of each prompt, drawn by a hash of (seed, pair): --pairs random:K."""
    drawn = hashing.digest_lists(
        itertools.repeat(str(seed)), map(hashing.canonical_json, pairs["pair_id"].to_pylist())
    )
    keep = np.zeros(len(pairs), bool)
    for low, high in prompt_ranges(pairs):
        keep[sorted(range(low, high), key=drawn.__getitem__)[:n]] = True
    return filter_rows(pairs, keep, "not_sampled")


def best_and_worst(pairs: pa.Table, reward_model: str) -> tuple[pa.Table, Counter[str]]:
    """The pair of each prompt's best and worst candidate by the reward model's mean log-odds against the others."""
    values = np.nan_to_num(verdicts.log_odds(pairs, [reward_model])[0]).tolist()
    candidates = list(
        zip(
            *(pc.struct_field(pairs[side], "candidate_id").to_pylist() for side in SIDES),
            strict=True,
        )
    )
    keep = np.zeros(len(pairs), bool)
    for low, high in prompt_ranges(pairs):
        totals: dict[str, float] = defaultdict(float)
        for (first, second), value in zip(candidates[low:high], values[low:high], strict=True):
            totals[first] += value
            totals[second] -= value
        best = max(totals, key=totals.__getitem__)
        worst = min(totals, key=totals.__getitem__)
        keep[low:high] = [set(both) == {best, worst} for both in candidates[low:high]]
    return filter_rows(pairs, keep, "not_best_worst")
