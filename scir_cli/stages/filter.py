"""filter: judged pairs -> labeled preference pairs.

Every dropped row is counted under the first reason that applies to it.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scir_cli.analysis import label_rules, statistics, verdicts
from scir_cli.data import dataset, files, hashing, schemas
from scir_cli.data.dataset import Dataset, Part
from scir_cli.data.files import Json
from scir_cli.data.messages import more_of
from scir_cli.data.storage import to_path
from scir_cli.errors import ConfigError, DataError, suggest
from scir_cli.report.progress import progress
from scir_cli.settings import FilterSettings
from scir_cli.stages import soft_labels

#: Why a pair is dropped; "": it is not dropped. A pair's reason is stored as an index into this.
REASONS = (
    "",
    "no_verdict",
    "tie",
    "disagree",
    "below_confidence",
    "below_margin",
    "not_sampled",
    "cut",
    "too_short",
    "too_long",
    "duplicate",
    "over_prompt_cap",
)

#: Up to this reason a dropped pair has no label, and --keep-unlabeled keeps it without one.
LAST_UNLABELED = REASONS.index("not_sampled")

#: Number of rows written to trl.jsonl at a time.
TRL_ROWS = 10_000

#: Bytes at the start of a text; they differ between most texts.
PREFIX_BYTES = 15


@dataclass
class Rule:
    """The parsed --rule.

    models: names of the reward models that vote.
    how: "agree" or "majority", which decides the label.
    rate: share of the pairs that is kept, drawn at random.
    """

    models: list[str]
    how: str
    rate: float = 1.0

    @classmethod
    def of(cls, settings: FilterSettings, known: list[str]) -> Rule:
        """Parses --rule.

        known: names of the reward models with verdicts in the dataset.
        Raises ConfigError if the dataset lacks a model's verdicts, or if the rate is invalid.
        """
        name, _, number = settings.rule.partition(":")
        if name in ("agree", "majority") and not number:
            models = settings.agree_on or known
        elif name == "random":
            number, _, model = number.partition(":")
            models = [model or "judge"]
        elif settings.rule == "consensus":
            models = soft_labels.voters_of(settings, known)
        else:
            models = [settings.rule]
        for model in models:
            if model not in known:
                raise ConfigError(
                    f"--rule {settings.rule}: the dataset has no verdicts of '{model}'."
                    f"{suggest(model, [*known, 'agree', 'majority', 'consensus'])}"
                )
        return cls(
            models,
            "majority" if name == "majority" else "agree",
            _rate(number) if name == "random" else 1.0,
        )


def _rate(number: str) -> float:
    """The rate of --rule random:RATE. Raises ConfigError if it is not in (0, 1]."""
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:
        raise ConfigError(
            f"--rule random:{number} needs a rate above 0 and at most 1, as random:0.5"
        )
    return rate


def run(settings: FilterSettings) -> Json:
    """Writes a preferences dataset and returns its manifest.

    Raises ConfigError if a setting does not fit the dataset, DataError if there is no pair.
    """
    path = to_path(settings.input)
    pairs = (
        dataset.open_dataset(path, "judged")
        .head(settings.limit)
        .select(schemas.schema("judged").names)
    )
    if not pairs.num_rows:
        raise DataError(f"{path} holds no pairs")
    rule = Rule.of(settings, verdicts.model_names(pairs.tables()))
    digests = {
        "input": hashing.digest_path(path),
        "previous": settings.cream_previous
        and hashing.digest_path(to_path(settings.cream_previous)),
        "calibration": settings.calibrate_on
        and hashing.digest_path(to_path(settings.calibrate_on)),
    }
    plan = {"stage": "filter", "settings": settings.plan(), **digests}
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": pairs.num_rows}
    out = settings.output_dir
    label = PairLabeler(settings, pairs, rule)
    with progress("filter", pairs.num_rows) as advance:
        manifest = dataset.write_dataset(
            out,
            "preferences",
            plan,
            dataset.part_bounds(pairs.num_rows, settings.rows_per_part),
            label,
            overwrite=settings.overwrite,
            advance=advance,
            summarize=lambda made: _summary(made) | label.figures,
            inputs={
                "input": settings.input,
                "previous": settings.cream_previous,
                "calibration": settings.calibrate_on,
            },
            encoding=pairs.encoding,
        )
    if settings.trl_jsonl and not (out / "trl.jsonl").exists():
        write_trl(dataset.open_dataset(out, "preferences"), out / "trl.jsonl")
    return manifest


class PairLabeler:
    """Computes parts of preferences.

    Some rules depend on all rows. The constructor reads them part by part and stores numbers only,
    no texts.
    """

    def __init__(self, settings: FilterSettings, pairs: Dataset, rule: Rule) -> None:
        """Computes what depends on all pairs: fitted values, label probabilities, repetitions.

        Raises ConfigError or DataError if the settings do not fit the pairs.
        """
        self.settings, self.pairs, self.rule = settings, pairs, rule
        self.pool: soft_labels.Pool | None = None
        if settings.is_soft:
            self.pool = soft_labels.fit_pool(settings, pairs, rule.models)
        # (models that label, 1) nats per token
        self.per_token: np.ndarray | None = None
        if settings.length_neutral:
            *votes, lengths = self._of_all(
                lambda table: np.vstack([self.votes(table), verdicts.length_difference(table)])
            )
            self.per_token = np.array([[label_rules.length_neutral(a, lengths)[1]] for a in votes])
        self.label_probability = (
            self._label_probability(to_path(settings.cream_previous))
            if settings.cream_previous
            else None
        )
        # (pairs,) reasons that depend on other rows, as indices into REASONS
        self.dropped = np.zeros(pairs.num_rows, np.int8)
        if settings.dedup:
            self.dropped[self._repeated()] = REASONS.index("duplicate")
        if settings.max_pairs_per_prompt is not None:
            self.dropped[self._beyond(settings.max_pairs_per_prompt)] = REASONS.index(
                "over_prompt_cap"
            )

    def __call__(self, low: int, high: int) -> Part:
        """The preferences of the rows [low, high), and the number of dropped rows by reason."""
        table = self.pairs.slice(low, high - low)
        reasons, sign, margin = self.decide(table, low)
        kept = (reasons == 0) | (self.settings.keep_unlabeled & (reasons <= LAST_UNLABELED))
        drops = {
            REASONS[one["values"]]: one["counts"]
            for one in pc.value_counts(pa.array(reasons[~kept])).to_pylist()
        }
        if self.pool:
            probability = statistics.confidence_of(margin)
        elif self.label_probability is not None:
            probability = self.label_probability[low:high]
        else:
            probability = np.full(len(kept), np.nan)
        return Part(
            _preferences(table, kept, np.where(reasons, 0.0, sign), margin, probability),
            high - low,
            Counter(drops),
        )

    @property
    def figures(self) -> Json:
        """Entries of the manifest's summary beside the counts of labels."""
        return {"soft_labels": self.pool.figures} if self.pool else {}

    def _of_all(self, numbers: Callable[[pa.Table], np.ndarray]) -> np.ndarray:
        """The numbers of all parts, concatenated along the last axis.  -> (…, pairs)"""
        return np.concatenate([numbers(table) for table in self.pairs.tables()], axis=-1)

    def _repeated(self) -> np.ndarray:
        """Rows whose two texts, in either order, an earlier row has under the same prompt."""
        glance = self._of_all(lambda table: _cheap_pair_hash(_texts(table)))
        order = np.argsort(glance)
        glance.sort()
        same = np.append(glance[1:] == glance[:-1], False)
        # Whole texts are hashed only of these few rows.
        alike = np.zeros(len(glance), bool)
        alike[order[same | np.roll(same, 1)]] = True
        of_part = iter(np.split(alike, self.pairs.ends))
        known_by = self._of_all(
            lambda table: _pair_hash(_texts(table).filter(pa.array(next(of_part))))
        )
        return np.flatnonzero(alike)[hashing.later_duplicates(known_by)]

    def votes(self, table: pa.Table) -> np.ndarray:
        """The log-odds by which each model votes, nats.  -> (models that label, pairs)

        A pool of them votes as one model.
        """
        votes = verdicts.log_odds(table, self.rule.models)
        if self.pool:
            votes = self.pool(votes)
        return (
            votes
            if self.per_token is None
            else votes - self.per_token * verdicts.length_difference(table)
        )

    def decide(self, table: pa.Table, low: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Why each row is dropped, the sign of its label, and its margin.

        low: index of the table's first row in the dataset.
        -> (pairs,) each: indices into REASONS, signs, and margins in nats
        """
        settings, votes = self.settings, self.votes(table)
        sign = np.sign(np.sign(votes).sum(0)) if self.rule.how == "majority" else np.sign(votes[0])
        margin = np.abs(votes).min(0)
        sides = [
            pc.list_value_length(pc.struct_field(table[side], "token_ids")).to_numpy()
            for side in ("first", "second")
        ]
        dropped = self.dropped[low : low + len(margin)]
        # The first test that is true gives the reason.
        tests = [
            (dropped > 0, dropped),
            (np.isnan(votes).any(0), "no_verdict"),
            (sign == 0, "tie"),
            ((statistics.agreement(votes).agree != 1.0) & (self.rule.how == "agree"), "disagree"),
            (1 / (1 + np.exp(-margin)) < settings.min_confidence, "below_confidence"),
            (margin < settings.min_margin, "below_margin"),
            (~self._drawn(table), "not_sampled"),
            (_cut(table) & (not settings.keep_cut), "cut"),
            (np.minimum(*sides) < settings.min_response_tokens, "too_short"),
            (np.maximum(*sides) > (settings.max_response_tokens or np.inf), "too_long"),
        ]
        hits, why = zip(*tests, strict=True)
        return (
            np.select(hits, [REASONS.index(w) if isinstance(w, str) else w for w in why]).astype(
                np.int8
            ),
            sign,
            margin,
        )

    def _drawn(self, table: pa.Table) -> np.ndarray:
        """Whether each pair is in the random share of the rule.  -> (pairs,) bool"""
        if self.rule.rate == 1:
            return np.ones(table.num_rows, bool)
        drawn = hashing.digest_lists(
            itertools.repeat(str(self.settings.seed)),
            map(hashing.canonical_json, table["pair_id"].to_pylist()),
        )
        return np.array([int(digest[:15], 16) for digest in drawn]) / 16**15 < self.rule.rate

    def _label_probability(self, previous: Path) -> np.ndarray:
        """The probability that each label is correct.  -> (pairs,)

        It is the consistency of the ranking with that of --cream-previous for the same answers
        (CREAM). If --cream-previous holds a pair id twice, the last row counts.
        Raises ConfigError if --cream-previous lacks the reward model's verdicts, DataError if it
        holds none of the pairs.
        """
        before, settings = dataset.open_dataset(previous, "judged"), self.settings
        names, name = (
            verdicts.model_names(before.tables()),
            settings.cream_reward_model or self.rule.models[0],
        )
        if name not in names:
            raise ConfigError(
                f"--cream-previous {previous} has no verdicts of '{name}'.{suggest(name, names)}"
            )
        there = np.concatenate([verdicts.log_odds(table, [name])[0] for table in before.tables()])
        here, known = (
            np.concatenate([hashing.hash_texts(t["pair_id"]) for t in pairs.tables()])
            for pairs in (self.pairs, before)
        )
        place = (
            pc.index_in(pa.array(here), value_set=pa.array(known[::-1]))
            .fill_null(len(there))
            .to_numpy()
        )
        past = np.append(there[::-1], np.nan)[place]
        if np.isnan(past).all():
            raise DataError(
                f"--cream-previous {previous} holds verdicts of none of these pairs; "
                "judge the same candidates with the previous model"
            )
        now = self._of_all(lambda table: self.votes(table)[0])
        return label_rules.rank_consistency(
            now, past, self._of_all(_prompts), settings.cream_average == "all"
        )

    def _beyond(self, most: int) -> np.ndarray:
        """Rows of each prompt beyond the `most` rows with the largest margins.

        Rows that are dropped for another reason do not count.  -> (rows,) indices
        """
        margins: list[np.ndarray] = []
        for table in self.pairs.tables():
            reasons, _, margin = self.decide(table, sum(map(len, margins)))
            margins.append(np.where(reasons, np.nan, margin))
        margin, prompts = np.concatenate(margins), self._of_all(_prompts)
        rows = np.flatnonzero(~np.isnan(margin))
        rows = rows[np.lexsort((-margin[rows], prompts[rows]))]
        rank = np.arange(len(rows)) - np.searchsorted(prompts[rows], prompts[rows])
        return rows[rank >= most]


def _prompts(table: pa.Table) -> np.ndarray:
    """Hashes of the prompt ids.  -> (pairs,)"""
    return hashing.hash_texts(table["prompt_id"])


def _cut(table: pa.Table) -> np.ndarray:
    """Whether the length limit cut one of the two responses.  -> (pairs,) bool"""
    reasons = [pc.struct_field(table[side], "finish_reason") for side in ("first", "second")]
    return np.logical_or(*[pc.equal(reason, "length").to_numpy() for reason in reasons])


def _texts(table: pa.Table) -> pa.Table:
    """The prompt ids and the texts of both responses."""
    return pa.table(
        {"prompt_id": table["prompt_id"]}
        | {side: pc.struct_field(table[side], "text") for side in ("first", "second")}
    )


def _cheap_pair_hash(texts: pa.Table) -> np.ndarray:
    """One number per pair, from the beginnings and lengths of its texts.  -> (pairs,)

    Equal for pairs for which `_pair_hash` is equal.
    """
    whole = [texts[side].cast(pa.binary()) for side in ("first", "second")]
    begins = [hashing.hash_texts(pc.binary_slice(side, 0, PREFIX_BYTES)) for side in whole]
    lengths = [pc.binary_length(side).to_numpy().astype(np.uint64) for side in whole]
    return (
        hashing.splitmix64(_prompts(texts))
        + hashing.splitmix64(begins[0] + lengths[0])
        + hashing.splitmix64(begins[1] + lengths[1])
    )


def _pair_hash(texts: pa.Table) -> np.ndarray:
    """Two numbers per pair, equal for the same prompt and texts in either order.  -> (2, pairs)"""
    first, second = (
        hashing.splitmix64(hashing.hash_texts(texts[side])) for side in ("first", "second")
    )
    return np.stack([_prompts(texts), first + second])


def _preferences(
    part: pa.Table, kept: np.ndarray, sign: np.ndarray, margin: np.ndarray, probability: np.ndarray
) -> pa.Table:
    """The kept rows as preferences.

    Adds the columns label, margin (nats), label_probability, prompt, chosen and rejected; without a
    label, all but prompt are null.
    kept, sign, margin, probability: (pairs,).
    """
    part, sign, margin, probability = (
        part.filter(pa.array(kept)),
        sign[kept],
        margin[kept],
        probability[kept],
    )
    known = pa.array(sign != 0)
    first_better = pa.array(sign > 0)
    texts = [_whole_text(part[side]) for side in ("first", "second")]
    words = pc.if_else(first_better, pa.scalar("first"), pa.scalar("second"))
    part = part.append_column("label", pc.if_else(known, words, pa.scalar(None, pa.string())))
    part = part.append_column("margin", pa.array(margin, mask=np.isnan(margin) | (sign == 0)))
    part = part.append_column(
        "label_probability", pa.array(probability, mask=np.isnan(probability) | (sign == 0))
    )
    part = part.append_column("prompt", part["messages"])
    part = part.append_column("chosen", _assistant(pc.if_else(first_better, *texts), sign != 0))
    return part.append_column(
        "rejected", _assistant(pc.if_else(first_better, *reversed(texts)), sign != 0)
    )


def _whole_text(side: pa.ChunkedArray) -> pa.Array:
    """The responses of one side with their reasoning.  -> (pairs,)"""
    reasoning, text = (
        pc.struct_field(side, name).combine_chunks() for name in ("reasoning", "text")
    )
    if reasoning.null_count == len(reasoning):
        return text
    return pc.binary_join_element_wise(reasoning.fill_null(""), text, "")


def _assistant(texts: pa.Array, known: np.ndarray) -> pa.Array:
    """One assistant message per row, null if the pair has no label.

    texts, known: (pairs,); known: whether the pair has a label.
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    turns = pa.StructArray.from_arrays(
        [pa.repeat("assistant", len(texts)), texts, pa.nulls(len(texts), pa.string())],
        names=["role", "content", "more"],
    )
    return pa.ListArray.from_arrays(
        pa.array(np.arange(len(texts) + 1), pa.int32()),
        turns,
        type=schemas.MESSAGES,
        mask=pa.array(~known),
    )


def _summary(made: Dataset) -> Json:
    """Number of pairs with and without label, and the labels' accuracy on pairs with gold label."""
    counts = np.zeros(4, int)
    for table in made.tables():
        label, gold = (verdicts.gold_signs(table[name]) for name in ("label", "gold_label"))
        both = label * gold
        counts += [
            (~np.isnan(label)).sum(),
            np.isnan(label).sum(),
            (~np.isnan(both)).sum(),
            (both > 0).sum(),
        ]
    labeled, unlabeled, with_gold, right = counts.tolist()
    accuracy = right / with_gold if with_gold else None
    return {
        "labeled": labeled,
        "unlabeled": unlabeled,
        "label_accuracy": accuracy,
        "with_gold": with_gold,
    }


def write_trl(pairs: Dataset, path: Path) -> None:
    """Writes the labeled pairs as JSON lines, in the format of TRL's DPOTrainer.

    Each line holds prompt, chosen and rejected as lists of messages.
    """
    with files.atomic_write(path) as temporary, temporary.open("wb") as file:
        for table in pairs.tables():
            known = table.select(["prompt", "chosen", "rejected"]).filter(
                pc.is_valid(table["chosen"])
            )
            for batch in known.to_batches(max_chunksize=TRL_ROWS):
                prompt, chosen, rejected = (_json(column) for column in batch.columns)
                parts = (
                    '{"prompt": [',
                    prompt,
                    '], "chosen": [',
                    chosen,
                    '], "rejected": [',
                    rejected,
                    "]}\n",
                )
                _, _, data = pc.binary_join_element_wise(*parts, "").buffers()
                file.write(data)


def _json(messages: pa.ListArray) -> pa.StringArray:
    """The messages of each list as JSON, without the brackets, as `json.dumps` writes them."""
    turns = messages.flatten()
    role, content = (_escaped(turns.field(name)) for name in ("role", "content"))
    objects = pc.binary_join_element_wise('{"role": "', role, '", "content": "', content, '"}', "")
    objects = _with_more(objects, turns)
    ends = np.append(0, np.cumsum(pc.list_value_length(messages)))
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), objects), ", ")


def _with_more(objects: pa.StringArray, turns: pa.StructArray) -> pa.StringArray:
    """The JSON of messages, with the fields of `more` among those of a message that has some."""
    has_more = pc.is_valid(turns.field("more"))
    if not pc.any(has_more).as_py():
        return objects
    whole = []
    for turn in turns.filter(has_more).to_pylist():
        message = {"role": turn["role"], "content": turn["content"], **more_of(turn)}
        message.pop("tools", None)
        whole.append(json.dumps(message, ensure_ascii=False))
    return pc.replace_with_mask(objects, has_more, pa.array(whole, objects.type))


def _escaped(texts: pa.StringArray) -> pa.StringArray:
    """The texts as `json.dumps` writes them between quotation marks (ensure_ascii=False)."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset :]
    letters = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[len(texts)]]
    # The backslash is replaced first: the other replacements insert backslashes.
    special = [code for code in (ord("\\"), ord('"')) if (letters == code).any()]
    for letter in map(chr, [*special, *np.unique(letters[letters < 32])]):
        texts = pc.replace_substring(texts, letter, json.dumps(letter)[1:-1])
    return texts
