"""Candidates -> pairs: which responses to a prompt are compared (`judge --pairs`).

all          every two candidates of a prompt
random:K     K of these pairs per prompt, drawn before scoring
best-worst   the pair of the best and the worst candidate of a prompt, selected after scoring
cross        each candidate with the nearest in length of another prompt
damaged      each candidate with itself damaged (cut, shuffled or repeated), and with a response to
             another prompt; the undamaged one has the gold label
"""

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

#: The rows that pass, and the number of the others by reason.
Passed = tuple[pa.Table, Counter[str]]

#: A rule that is applied to the rows of one part.
PartRule = Callable[[pa.Table], Passed]

#: Field of a response in a pair -> the column of candidates that holds it, if the names differ.
_CANDIDATE_COLUMNS = {"text": "response", "author": "weights_key"}


def keep_all(table: pa.Table) -> Passed:
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

    @property
    def encoding(self) -> str | None:
        """Digest of tokenizer and chat template of the token ids; None: unknown, or no ids."""
        return dataset.encoding_of(self.table)


def load_pair_input(settings: JudgeSettings) -> PairInput:
    """Opens `judge --input`: candidates, from which pairs are made, or pairs.

    Raises ConfigError for an unknown --pairs, DataError for an input that cannot be read or has
    one answer per prompt where two are needed.
    """
    rule, n_sampled = parse_pair_rule(settings.pairs)
    path = to_path(settings.input)
    if folders.is_dataset(path) and files.read_json(path / "plan.json").get("stage") == "generate":
        candidates = dataset.open_dataset(path, "candidates").head(settings.limit)
        bounds = dataset.group_bounds(candidates, "prompt_id", settings.rows_per_part)
        pairs = PairInput(candidates, bounds, Counter(), readers.digest(settings.input))
        needs_two = rule not in ("cross", "damaged") and candidates.num_rows
        if needs_two and not _has_two_answers(candidates):
            raise DataError(
                f"{settings.input} has one answer per prompt, so there is nothing to compare: "
                "generate with --n 2 or more, or judge with --pairs cross"
            )
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


def _has_two_answers(candidates: dataset.Dataset) -> bool:
    """Whether a prompt has two candidates or more.  candidates: sorted by prompt"""
    previous = None
    for table in candidates.tables():
        keys = table["prompt_id"].combine_chunks()
        if not len(keys):
            continue
        if keys[0] == previous or pc.any(pc.equal(keys[1:], keys[:-1])).as_py():
            return True
        previous = keys[-1]
    return False


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


def candidate_pairs(
    table: pa.Table,
    external: str | None = None,
) -> Passed:
    """Pairs every two candidates of each prompt.

    table: candidates, sorted by prompt.
    external: column of scores; their difference becomes the verdict of the reward model
        "external".
    Drops, in pairs: duplicate_candidate, empty_response.
    Raises DataError if the column is missing or holds no numbers.
    """
    combinations = [np.empty((2, 0), int)]
    for low, high in prompt_ranges(table):
        combinations.append(low + _combinations(high - low))
    # (pairs,) each
    first, second = np.concatenate(combinations, axis=1)

    # A pair is dropped once, for a duplicate rather than for an empty response.
    duplicate, empty = _unusable(table)
    has_duplicate = duplicate[first] | duplicate[second]
    has_empty = empty[first] | empty[second]
    only_empty = has_empty & ~has_duplicate
    drops = Counter(
        duplicate_candidate=int(has_duplicate.sum()),
        empty_response=int(only_empty.sum()),
    )

    usable = ~(has_duplicate | has_empty)
    first = first[usable]
    second = second[usable]
    pairs = _paired(
        table,
        first,
        second,
        prompt=first,
        external=external,
    )
    return pairs, +drops


@cache
def _combinations(n: int) -> np.ndarray:
    """Every two of n, in the order of itertools.combinations.  -> (2, pairs)"""
    upper_triangle = np.triu_indices(n, 1)
    return np.stack(upper_triangle)


def crossed_pairs(
    table: pa.Table,
    external: str | None = None,
) -> Passed:
    """Pairs each candidate with the candidate of another prompt nearest in length.

    Both belong to one part. A hash decides which of the two is `first`, so that the side does
    not reveal which response belongs to the prompt.

    table: candidates.
    external: as in `candidate_pairs`, and the same errors.
    Drops, in candidates: unusable_candidate (duplicate or empty), no_other_prompt.
    """
    duplicate, empty = _unusable(table)
    unusable = duplicate | empty
    drops = Counter(unusable_candidate=int(unusable.sum()))
    table = table.filter(pa.array(~unusable))
    if not len(table):
        no_pairs = schemas.schema("judged").empty_table()
        return no_pairs, +drops

    # (pairs,) each: the candidate under its own prompt, and the one of another prompt
    matching, other = _nearest_of_other_prompts(table)
    drops["no_other_prompt"] = len(table) - len(matching)

    names = table["candidate_id"].to_pylist()
    pair_ids = _pair_ids(names, matching, other)
    # The last bit of the hash decides the side.
    is_odd = [int(pair_id, 16) % 2 for pair_id in pair_ids]
    swap = np.array(is_odd, bool)
    first = np.where(swap, other, matching)
    second = np.where(swap, matching, other)
    pairs = _paired(
        table,
        first,
        second,
        prompt=matching,
        external=external,
    )
    return pairs, +drops


def _nearest_of_other_prompts(candidates: pa.Table) -> tuple[Index, Index]:
    """Rows of candidates, and for each the row of its nearest candidate of another prompt.

    A row without a candidate of another prompt is left out.  -> (pairs,) each
    """
    names = candidates["candidate_id"].to_pylist()
    by_name = sorted(range(len(names)), key=names.__getitem__)
    # (candidates,) each; rank: position of each id among the sorted ids
    rank = np.argsort(by_name)
    prompt_ids = candidates["prompt_id"].combine_chunks()
    prompts = prompt_ids.dictionary_encode().indices.to_numpy()
    lengths = pc.list_value_length(candidates["token_ids"])
    n_tokens = lengths.to_numpy().astype(int)

    rows = range(len(names))
    nearest = np.array([_nearest(row, prompts, n_tokens, rank) for row in rows])
    is_other_prompt = prompts != prompts[nearest]
    matching = np.flatnonzero(is_other_prompt)
    return matching, nearest[matching]


def _nearest(
    row: int,
    prompts: np.ndarray,
    lengths: np.ndarray,
    rank: np.ndarray,
) -> int:
    """The candidate of another prompt nearest in length to this row's; ties go to the first id.

    prompts, lengths, rank: (candidates,).
    If the table holds one prompt only, returns a candidate of the same prompt.
    """
    difference = np.abs(lengths - lengths[row])
    # rank < len(rank): it decides only between equal differences
    distance = difference * len(rank) + rank
    same_prompt = prompts == prompts[row]
    distance = np.where(same_prompt, np.iinfo(int).max, distance)
    return int(distance.argmin())


def _unusable(candidates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Whether each candidate repeats another, and whether it is empty.  -> (candidates,) each"""
    duplicate = pc.not_equal(candidates["duplicate_of"], "")
    # Null: no other candidate has the same text.
    duplicate = duplicate.fill_null(False)
    text = pc.utf8_trim_whitespace(candidates["response"])
    empty = pc.equal(text, "")
    return duplicate.to_numpy(), empty.to_numpy()


def _paired(
    candidates: pa.Table,
    first: Index,
    second: Index,
    prompt: Index,
    external: str | None,
) -> pa.Table:
    """The pairs of the candidates `first` and `second`, without internal rewards.

    first, second: (pairs,) rows of `candidates`.
    prompt: (pairs,) rows of `candidates` with the prompt and the carried columns of each pair.
    """
    prompt_names = schemas.schema("prompts").names
    prompts = candidates.select(prompt_names).take(pa.array(prompt))
    columns = {}
    for name in prompt_names:
        columns[name] = prompts[name].combine_chunks()

    names = candidates["candidate_id"].to_pylist()
    pair_ids = _pair_ids(names, first, second)
    columns["pair_id"] = pa.array(pair_ids, pa.string())

    responses = _responses(candidates)
    columns["first"] = responses.take(pa.array(first))
    columns["second"] = responses.take(pa.array(second))

    n = len(first)
    columns["gold_label"] = pa.nulls(n, pa.string())
    columns["rewards"] = _external_rewards(candidates, first, second, external)
    columns["reference_logps"] = pa.array([[]] * n, schemas.REFERENCE_LOGPS)

    schema = schemas.schema("judged")
    in_order = [columns[name] for name in schema.names]
    return pa.Table.from_arrays(in_order, schema=schema)


def _responses(candidates: pa.Table) -> pa.StructArray:
    """The response of each candidate, as a side of a pair holds it.  -> (candidates,)"""
    fields = list(schemas.RESPONSE)
    arrays = []
    for field in fields:
        column = _CANDIDATE_COLUMNS.get(field.name, field.name)
        arrays.append(candidates[column].combine_chunks())
    return pa.StructArray.from_arrays(arrays, fields=fields)


def _pair_ids(names: list[str], first: Index, second: Index) -> list[str]:
    """16 hex digits per pair, a hash of the two candidate ids in order.

    names: the candidate ids.
    first, second: (pairs,) rows of the candidates.
    """
    # Each name is quoted once, although it is part of several pairs.
    quoted = np.array([hashing.canonical_json(name) for name in names], object)
    digests = hashing.digest_lists(quoted[first], quoted[second])
    return [digest[:16] for digest in digests]


def _external_rewards(
    candidates: pa.Table,
    first: Index,
    second: Index,
    external: str | None,
) -> pa.Array:
    """The `rewards` of each pair: the difference of two scores, as the reward model "external".

    first, second: (pairs,) rows of `candidates`.
    external: column of scores; None: the rewards are empty.
    -> (pairs,); the score of `first` minus the score of `second` is the log-odds, nats.
    Raises DataError if the column is missing or holds no numbers.
    """
    if external is None:
        return pa.array([[]] * len(first), schemas.REWARDS)
    if external not in candidates.column_names:
        hint = suggest(external, candidates.column_names)
        raise DataError(f"the candidates have no column '{external}'.{hint}")
    scores = candidates[external]
    is_number = pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type)
    if not is_number:
        raise DataError(
            f"the candidates' column '{external}' should hold numbers; it holds {scores.type}"
        )
    # A null score is NaN, and its pairs have no verdict.
    values = pc.cast(scores, pa.float64()).to_numpy()
    difference = values[first] - values[second]
    output = RewardOutput(torch.from_numpy(difference))
    return rewards_column({"external": output}, rationales=[], min_mass=0.0)


def prompt_ranges(table: pa.Table) -> list[tuple[int, int]]:
    """Row ranges [low, high) of adjacent rows with the same prompt; empty for an empty table."""
    names = table["prompt_id"].combine_chunks()
    if not len(names):
        return []

    # A range starts at row 0 and at each row whose prompt differs from that of the row before.
    current = names[1:]
    previous = names[:-1]
    changes = pc.not_equal(current, previous).to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(changes) + 1
    edges = [0, *starts.tolist(), len(names)]
    return list(itertools.pairwise(edges))


def sample_pairs(pairs: pa.Table, n: int, seed: int) -> Passed:
    """Returns `n` random pairs per prompt, for --pairs random:K.

    The pairs with the smallest hashes of (seed, pair id) are drawn, so the draw does not depend
    on the parts.
    pairs: adjacent if they have the same prompt.
    Drops: not_sampled.
    """
    pair_ids = pairs["pair_id"].to_pylist()
    quoted = map(hashing.canonical_json, pair_ids)
    digests = hashing.digest_lists(itertools.repeat(str(seed)), quoted)

    keep = np.zeros(len(pairs), bool)
    for low, high in prompt_ranges(pairs):
        by_digest = sorted(range(low, high), key=digests.__getitem__)
        sampled = by_digest[:n]
        keep[sampled] = True
    return filter_rows(pairs, keep, "not_sampled")


def best_and_worst(pairs: pa.Table, reward_model: str) -> Passed:
    """Returns the pair of each prompt's best and worst candidate, for --pairs best-worst.

    A candidate's score is the sum of the reward model's log-odds (nats) for it against the
    others; a missing verdict counts as 0.
    pairs: adjacent if they have the same prompt.
    Drops: not_best_worst.
    """
    log_odds = verdicts.log_odds(pairs, [reward_model])[0]
    values = np.nan_to_num(log_odds).tolist()
    sides = []
    for side in SIDES:
        candidate_ids = pc.struct_field(pairs[side], "candidate_id")
        sides.append(candidate_ids.to_pylist())
    candidates = list(zip(*sides, strict=True))

    keep = np.zeros(len(pairs), bool)
    for low, high in prompt_ranges(pairs):
        compared = candidates[low:high]
        totals: dict[str, float] = defaultdict(float)
        for (first, second), value in zip(compared, values[low:high], strict=True):
            totals[first] += value
            totals[second] -= value

        best = max(totals, key=totals.__getitem__)
        worst = min(totals, key=totals.__getitem__)
        extremes = {best, worst}
        keep[low:high] = [set(both) == extremes for both in compared]
    return filter_rows(pairs, keep, "not_best_worst")
