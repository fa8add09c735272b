"""Candidates -> pairs: which responses to a prompt are compared (`judge --pairs`)."""

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

#: (pairs,) rows of a table
Index = np.ndarray

#: Rows of a part -> the rows that pass, and the number of the others by reason.
PartRule = Callable[[pa.Table], tuple[pa.Table, Counter[str]]]

#: Field of a response in a pair -> the column of candidates that holds it, if the names differ.
_CANDIDATE_COLUMNS = {"text": "response", "author": "weights_key"}


def keep_all(table: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Returns all rows and no drops: the rule for an input that consists of pairs."""
    return table, Counter()


@dataclass
class PairInput:
    """The pairs to judge: rows of a table, cut into parts, and rules applied to each part.

    table: candidates or pairs.
    bounds: row ranges [low, high) of the parts.
    dropped: number of input rows that never reached the table, by reason.
    digest: digest of the input, for the plan.
    make_pairs: rows of the table -> pairs.
    before_scoring: selects the pairs to score.
    after_scoring: selects the scored pairs to keep.
    """

    table: dataset.Rows
    bounds: list[tuple[int, int]]
    dropped: Counter[str]
    digest: str
    make_pairs: PartRule = keep_all
    before_scoring: PartRule = keep_all
    after_scoring: PartRule = keep_all


def load_pair_input(settings: JudgeSettings) -> PairInput:
    """Opens `judge --input`: candidates, from which pairs are made, or pairs.

    Raises ConfigError for an unknown --pairs, DataError for an input that cannot be read.
    """
    rule, n_sampled = parse_pair_rule(settings.pairs)
    path = to_path(settings.input)
    if folders.is_dataset(path) and files.read_json(path / "plan.json").get("stage") == "generate":
        candidates = dataset.open_dataset(path, "candidates").head(settings.limit)
        bounds = dataset.group_bounds(candidates, "prompt_id", settings.rows_per_part)
        pairs = PairInput(candidates, bounds, Counter(), readers.digest(settings.input))
        makers = {"cross": crossed_pairs, "damaged": damage.damaged_pairs}
        make_pairs = makers.get(rule, candidate_pairs)
        pairs.make_pairs = partial(make_pairs, external=settings.score_column)
    else:
        table, dropped = readers.open_pairs(settings.input, settings.limit, settings.score_column)
        bounds = dataset.part_bounds(table.num_rows, settings.rows_per_part)
        pairs = PairInput(table, bounds, dropped, readers.digest(settings.input))

    if rule == "random":
        pairs.before_scoring = partial(sample_pairs, n=n_sampled, seed=settings.seed)
    if rule == "best-worst":
        first_model = next(iter(reward_models.load_all(settings.reward_models)))
        pairs.after_scoring = partial(best_and_worst, reward_model=first_model)
    return pairs


def parse_pair_rule(text: str) -> tuple[str, int]:
    """Returns the name of the rule in --pairs, and K for random:K (0 for the others).

    Raises ConfigError if the text is no rule.
    """
    name, _, number = text.partition(":")
    if name in ("all", "best-worst", "cross", "damaged") and not number:
        return name, 0
    if name == "random" and number.isdigit() and int(number):
        return name, int(number)
    raise ConfigError(
        f"--pairs is {text!r};"
        " pass all, best-worst, cross, damaged, or random:K with K >= 1 pairs per prompt"
    )


def candidate_pairs(table: pa.Table, external: str | None = None) -> tuple[pa.Table, Counter[str]]:
    """Pairs every two candidates of each prompt.

    table: candidates, sorted by prompt.
    external: column of scores; their difference becomes the verdict of the reward model
        "external".
    Drops, in pairs: duplicate_candidate, empty_response.
    Raises DataError if the column is missing or holds no numbers.
    """
    duplicate, empty = _unusable(table)
    combinations = [np.empty((2, 0), int)]
    for low, high in prompt_ranges(table):
        combinations.append(low + _combinations(high - low))
    first, second = np.concatenate(combinations, axis=1)

    # (pairs,)
    has_duplicate = duplicate[first] | duplicate[second]
    has_empty = empty[first] | empty[second]
    drops = Counter(
        duplicate_candidate=int(has_duplicate.sum()),
        empty_response=int((has_empty & ~has_duplicate).sum()),
    )
    usable = ~(has_duplicate | has_empty)
    first = first[usable]
    second = second[usable]
    return _paired(table, first, second, first, external), +drops


@cache
def _combinations(n: int) -> np.ndarray:
    """Every two of n, in the order of itertools.combinations.  -> (2, pairs)"""
    return np.stack(np.triu_indices(n, 1))


def crossed_pairs(table: pa.Table, external: str | None = None) -> tuple[pa.Table, Counter[str]]:
    """Pairs each candidate with the candidate of another prompt nearest in length.

    Both belong to one part. A hash decides which of the two is `first`, so that the side does
    not reveal which response belongs to the prompt.

    table: candidates.
    external: as in `candidate_pairs`, and the same errors.
    Drops, in candidates: unusable_candidate (duplicate or empty), no_other_prompt.
    """
    duplicate, empty = _unusable(table)
    usable = ~np.logical_or(duplicate, empty)
    drops = Counter(unusable_candidate=int((~usable).sum()))
    table = table.filter(pa.array(usable))
    n = len(table)
    if n == 0:
        return schemas.schema("judged").empty_table(), +drops

    names = table["candidate_id"].to_pylist()
    by_name = sorted(range(n), key=names.__getitem__)
    # (candidates,) position of each id among the sorted ids
    rank = np.argsort(by_name)
    prompts = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    lengths = pc.list_value_length(table["token_ids"]).to_numpy().astype(int)
    nearest = np.array([_nearest(row, prompts, lengths, rank) for row in range(n)])

    # (pairs,) each: the candidate under its own prompt, and the one of another prompt
    matching = np.flatnonzero(prompts != prompts[nearest])
    other = nearest[matching]
    drops["no_other_prompt"] = n - len(matching)

    pair_ids = _pair_ids(names, matching, other)
    swap = np.array([int(pair_id, 16) % 2 for pair_id in pair_ids], bool)
    first = np.where(swap, other, matching)
    second = np.where(swap, matching, other)
    return _paired(table, first, second, matching, external), +drops


def _nearest(row: int, prompts: np.ndarray, lengths: np.ndarray, rank: np.ndarray) -> int:
    """The candidate of another prompt nearest in length to this row's; ties go to the first id.

    prompts, lengths, rank: (candidates,).
    If the table holds one prompt only, returns a candidate of the same prompt.
    """
    distance = np.abs(lengths - lengths[row]) * len(rank) + rank
    same_prompt = prompts == prompts[row]
    distance = np.where(same_prompt, np.iinfo(int).max, distance)
    return int(distance.argmin())


def _unusable(candidates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Whether each candidate repeats another, and whether it is empty.  -> (candidates,) each"""
    duplicate = pc.not_equal(candidates["duplicate_of"], "").fill_null(False)
    empty = pc.equal(pc.utf8_trim_whitespace(candidates["response"]), "")
    return duplicate.to_numpy(), empty.to_numpy()


def _paired(
    candidates: pa.Table, first: Index, second: Index, prompt: Index, external: str | None
) -> pa.Table:
    """The pairs of the candidates `first` and `second`, without internal rewards.

    first, second: (pairs,) rows of `candidates`.
    prompt: (pairs,) rows of `candidates` with the prompt and the carried columns of each pair.
    """
    response_columns = []
    for field in schemas.RESPONSE:
        column = _CANDIDATE_COLUMNS.get(field.name, field.name)
        response_columns.append(candidates[column].combine_chunks())
    response = pa.StructArray.from_arrays(response_columns, fields=list(schemas.RESPONSE))

    prompt_names = schemas.schema("prompts").names
    prompts = candidates.select(prompt_names).take(pa.array(prompt))
    columns = {name: prompts[name].combine_chunks() for name in prompts.column_names}

    pair_ids = _pair_ids(candidates["candidate_id"].to_pylist(), first, second)
    n = len(first)
    columns["pair_id"] = pa.array(pair_ids, pa.string())
    columns["first"] = response.take(pa.array(first))
    columns["second"] = response.take(pa.array(second))
    columns["gold_label"] = pa.nulls(n, pa.string())
    columns["rewards"] = _external_rewards(candidates, first, second, external)
    columns["reference_logps"] = pa.array([[]] * n, schemas.REFERENCE_LOGPS)
    schema = schemas.schema("judged")
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _pair_ids(names: list[str], first: Index, second: Index) -> list[str]:
    """16 hex digits per pair, a hash of the two candidate ids in order.

    names: the candidate ids. first, second: (pairs,) rows.
    """
    quoted = np.array([hashing.canonical_json(name) for name in names], object)
    digests = hashing.digest_lists(quoted[first], quoted[second])
    return [digest[:16] for digest in digests]


def _external_rewards(
    candidates: pa.Table, first: Index, second: Index, external: str | None
) -> pa.Array:
    """The `rewards` of each pair: the difference of two scores, as the reward model "external".

    first, second: (pairs,) rows of `candidates`.
    external: column of scores; None: the rewards are empty.  -> (pairs,)
    Raises DataError if the column is missing or holds no numbers.
    """
    if external is None:
        return pa.array([[]] * len(first), schemas.REWARDS)
    if external not in candidates.column_names:
        hint = suggest(external, candidates.column_names)
        raise DataError(f"the candidates have no column '{external}'.{hint}")
    scores = candidates[external]
    if not (pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type)):
        raise DataError(
            f"the candidates' column '{external}' should hold numbers; it holds {scores.type}"
        )
    # A null score is NaN, and its pairs have no verdict.
    values = pc.cast(scores, pa.float64()).to_numpy()
    difference = torch.from_numpy(values[first] - values[second])
    return rewards_column({"external": RewardOutput(difference)}, [], 0.0)


def prompt_ranges(table: pa.Table) -> list[tuple[int, int]]:
    """Row ranges [low, high) of adjacent rows with the same prompt."""
    names = table["prompt_id"].combine_chunks()
    if not len(names):
        return []
    changes = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    edges = np.flatnonzero(changes) + 1
    return list(itertools.pairwise([0, *edges.tolist(), len(names)]))


def sample_pairs(pairs: pa.Table, n: int, seed: int) -> tuple[pa.Table, Counter[str]]:
    """Returns `n` random pairs per prompt, for --pairs random:K.

    The pairs with the smallest hashes of (seed, pair id) are drawn, so the draw does not depend
    on the parts. Drops: not_sampled.
    """
    pair_ids = map(hashing.canonical_json, pairs["pair_id"].to_pylist())
    digests = hashing.digest_lists(itertools.repeat(str(seed)), pair_ids)
    keep = np.zeros(len(pairs), bool)
    for low, high in prompt_ranges(pairs):
        by_digest = sorted(range(low, high), key=digests.__getitem__)
        keep[by_digest[:n]] = True
    return filter_rows(pairs, keep, "not_sampled")


def best_and_worst(pairs: pa.Table, reward_model: str) -> tuple[pa.Table, Counter[str]]:
    """Returns the pair of each prompt's best and worst candidate, for --pairs best-worst.

    A candidate's score is the sum of the reward model's log-odds (nats) for it against the
    others; a missing verdict counts as 0. Drops: not_best_worst.
    """
    log_odds = verdicts.log_odds(pairs, [reward_model])[0]
    values = np.nan_to_num(log_odds).tolist()
    sides = [pc.struct_field(pairs[side], "candidate_id").to_pylist() for side in SIDES]
    candidates = list(zip(*sides, strict=True))
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
