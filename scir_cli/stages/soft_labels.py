"""Soft labels for `filter`: the pool of the voters, its temperature, and warnings.

The equations are in analysis/consensus.py. A pool is fitted once, to the log-odds of all pairs;
parts are then labeled one by one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scir_cli.analysis import consensus, statistics, verdicts
from scir_cli.analysis.consensus import CalibrationError
from scir_cli.analysis.verdicts import Array
from scir_cli.data import dataset
from scir_cli.data.dataset import Dataset
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
from scir_cli.errors import ConfigError, DataError, suggest, warn
from scir_cli.settings import FilterSettings

#: Fewer pairs than this are no ground for a warning.
MIN_PAIRS = 20

#: From this correlation on, two voters count as one [ours].
ONE_VOTER = 0.98

#: A rank correlation of labels and length beyond this is warned about [ours].
LONG_LABELS = 0.5

#: A rank correlation of labels and length this far from that on the calibration pairs is warned
#: about [ours].
LENGTH_DRIFT = 0.3

#: A temperature whose interval spans more than this factor is warned about [ours].
UNCERTAIN_TEMPERATURE = 3.0

#: A mean certainty outside of these is warned about: hard labels in disguise, or none [ours].
CERTAINTY = (0.55, 0.99)

STUDENT = (
    "the implicit reward is the policy in training, "
    "so its vote confirms what the policy does already"
)


def voters_of(settings: FilterSettings, known: list[str]) -> list[str]:
    """The reward models that vote under --rule consensus.

    Raises ConfigError for a missing or repeated one, and for `implicit` if it is not named.
    known: the reward models of the dataset; "all" stands for all of them.
    """
    voters = known if settings.voters == ["all"] else settings.voters
    if not voters or len(set(voters)) < len(voters):
        raise ConfigError(f"--voters {','.join(voters)}: name at least one reward model, each once")
    for voter in voters:
        if voter not in known:
            raise ConfigError(
                f"--voters: the dataset has no verdicts of '{voter}'.{suggest(voter, known)} "
                f"Run `scir judge --reward-models {','.join(voters)}`, or name other voters"
            )
    if "implicit" in voters:
        if settings.voters == ["all"]:
            raise ConfigError(
                f"--voters all would include 'implicit': {STUDENT}. Name the voters one by one"
            )
        warn(f"--voters includes 'implicit': {STUDENT}")
    return voters


@dataclass(frozen=True)
class Pool:
    """Turns log-odds of some voters into calibrated ones; has figures for the manifest."""

    sizes: Array  # (voters,) nats
    weights: Array  # (voters,), sum 1
    temperature: float
    figures: Json

    def __call__(self, log_odds: Array) -> Array:
        """Calibrated pooled log-odds, nats.  (voters, pairs) -> (1, pairs)"""
        return consensus.pool(log_odds, self.sizes, self.weights)[None] / self.temperature


def fit_pool(settings: FilterSettings, pairs: Dataset, voters: list[str]) -> Pool:
    """The pool of the voters over all pairs.

    Raises DataError for verdicts that cannot be pooled or labeled pairs that fit no temperature.
    """
    log_odds, lengths = _numbers(pairs, voters)
    sizes = check_voters(log_odds, voters, settings.input)
    temperature, calibration = 1.0, None
    weights = np.full(len(voters), 1 / len(voters))
    if settings.label_temperature is not None:
        temperature = settings.label_temperature
    elif settings.calibrate_on is not None:
        calibration = calibrate(settings, voters)
        temperature = calibration["temperature"]
        weights = np.array(list(calibration["weights"].values()))
    elif settings.rule == "consensus":
        warn(
            "the labels have temperature 1, but the sizes of log-odds differ from model to model: "
            "fit it with --calibrate-on LABELED_PAIRS, or give --label-temperature"
        )
    pooled = consensus.pool(log_odds, sizes, weights)
    correlations = {
        f"{voters[i]}, {voters[j]}": _json(value)
        for (i, j), value in consensus.correlations(log_odds).items()
    }
    figures: Json = {
        "voters": dict(zip(voters, sizes.tolist(), strict=True)),
        "weights": dict(zip(voters, weights.tolist(), strict=True)),
        "temperature": temperature,
        "calibration": calibration,
        "mean_certainty": _json(
            statistics.mean_of_known(statistics.confidence_of(pooled / temperature))
        ),
        "correlations": correlations,
        "length_correlation": _json(statistics.spearman(pooled, lengths)),
    }
    figures["warnings"] = guards(figures, pooled)
    for line in figures["warnings"]:
        warn(line)
    return Pool(sizes, weights, temperature, figures)


def _numbers(pairs: Dataset, voters: list[str]) -> tuple[Array, Array]:
    """Log-odds of the voters, and length of first minus second.

    -> (voters, pairs) nats, (pairs,) tokens
    """
    log_odds, lengths = [], []
    for table in pairs.tables():
        log_odds.append(verdicts.log_odds(table, voters))
        lengths.append(verdicts.length_difference(table))
    return np.concatenate(log_odds, axis=1), np.concatenate(lengths)


def check_voters(log_odds: Array, voters: list[str], source: Any) -> Array:
    """The voters' sizes.  -> (voters,) nats

    Raises DataError for a voter without verdicts, a constant one, or a copy of another.
    """
    sizes = consensus.sizes(log_odds)
    for voter, size, row in zip(voters, sizes, log_odds, strict=True):
        if math.isnan(size) or consensus.is_constant(row):
            known = row[~np.isnan(row)]
            what = (
                f"log-odds {known[0]:g} on all of its {len(known)}"
                if len(known)
                else "a verdict on none of the"
            )
            raise DataError(
                f"{source}: '{voter}' has {what} pairs, so it cannot vote; "
                "leave it out of the voters"
            )
    if (~np.isnan(log_odds).any(0)).sum() > 2:
        for (i, j), value in consensus.correlations(log_odds).items():
            if abs(value) > 1 - 1e-9:
                raise DataError(
                    f"{source}: '{voters[i]}' and '{voters[j]}' are the same voter "
                    f"(correlation {value:.3f}); name one of them"
                )
    return sizes


def calibrate(settings: FilterSettings, voters: list[str]) -> Json:
    """The pool's weights and temperature on labeled pairs, and figures of each voter on them.

    Raises DataError if no temperature can be fitted.
    settings.calibrate_on: a judged dataset with gold labels and the voters' verdicts. Sizes are
    matched on these pairs themselves.
    """
    folder = str(settings.calibrate_on)
    pairs = dataset.open_dataset(to_path(folder), "judged")
    missing = [voter for voter in voters if voter not in verdicts.model_names(pairs.tables())]
    if missing:
        raise DataError(f"--calibrate-on {folder}: no verdicts of {', '.join(missing)}")
    log_odds, lengths = _numbers(pairs, voters)
    gold = np.concatenate([verdicts.gold_signs(table["gold_label"]) for table in pairs.tables()])
    sizes = check_voters(log_odds, voters, f"--calibrate-on {folder}")
    weights = np.ones(len(voters))
    try:
        if settings.voter_weights == "calibrated":
            weights = consensus.calibrated_weights(log_odds, gold)
        pooled = consensus.pool(log_odds, sizes, weights)
        fitted = consensus.fit_temperature(pooled, gold)
    except CalibrationError as error:
        raise DataError(
            f"--calibrate-on {folder}: {error}. Give more or harder pairs, or --label-temperature"
        ) from error
    models = {
        voter: _voter_figures(row, gold, lengths)
        for voter, row in zip(voters, log_odds, strict=True)
    }
    known = gold[~np.isnan(gold)]
    return {
        **asdict(fitted),
        "weights": dict(zip(voters, (weights / weights.sum()).tolist(), strict=True)),
        "one_sided": bool((known == known[0]).all()),
        "length_correlation": _json(statistics.spearman(pooled, lengths)),
        "gold_length_correlation": _json(statistics.spearman(gold, lengths)),
        "models": models,
    }


def _voter_figures(log_odds: Array, gold: Array, lengths: Array) -> Json:
    """Accuracy, calibration and temperature (None if none can be fitted) of one voter.

    log_odds, gold, lengths: (pairs,)
    """
    correct = (1 + np.sign(log_odds) * gold) / 2
    figures: Json = {
        **statistics.rate_with_interval("accuracy", correct),
        "calibration_error": _json(statistics.calibration_error(log_odds, correct)),
        "length_correlation": _json(statistics.spearman(log_odds, lengths)),
    }
    ends = ("temperature", "low", "high")
    try:
        fitted = asdict(consensus.fit_temperature(log_odds, gold))
    except CalibrationError as error:
        return figures | dict.fromkeys(ends) | {"no_temperature": str(error)}
    return figures | {name: fitted[name] for name in ends}


def guards(figures: Json, pooled: Array) -> list[str]:
    """Warnings about these labels, one line each.  pooled: (pairs,) nats"""
    known = pooled[~np.isnan(pooled)]
    if len(known) < MIN_PAIRS:
        return []
    lines = [
        f"the voters {names} have become one: correlation {value:.3f}; leave one out"
        for names, value in figures["correlations"].items()
        if value is not None and abs(value) > ONE_VOTER
    ]
    length = figures["length_correlation"]
    if length is not None and abs(length) > LONG_LABELS:
        side = "longer" if length > 0 else "shorter"
        lines.append(
            f"the labels prefer the {side} response (rank correlation with length {length:+.2f}); "
            "--length-neutral takes length out"
        )
    certainty = figures["mean_certainty"]
    if not CERTAINTY[0] <= certainty <= CERTAINTY[1]:
        degree = "sure of everything" if certainty > CERTAINTY[1] else "hardly sure of anything"
        lines.append(
            f"the labels are {degree}: mean certainty {certainty:.3f} "
            f"at temperature {figures['temperature']:.3g}"
        )
    if (np.sign(known) == np.sign(known[0])).all():
        place = "first" if known[0] > 0 else "second"
        lines.append(f"all {len(known)} labels prefer the {place} response of the pair")
    return lines + calibration_guards(figures)


def calibration_guards(figures: Json) -> list[str]:
    """Warnings about the temperature, and about labels that differ from the pairs it is from."""
    calibration = figures["calibration"]
    if calibration is None:
        return []
    lines = []
    if calibration["one_sided"]:
        lines.append(
            "all gold labels of --calibrate-on are on one side: "
            "a voter that prefers that side looks accurate"
        )
    low, high = calibration["low"], calibration["high"]
    if high > UNCERTAIN_TEMPERATURE * low:
        lines.append(
            f"the temperature is uncertain: {calibration['temperature']:.3g}, "
            f"95 % interval {low:.3g} to {high:.3g}; "
            "calibrate on more pairs or on harder ones"
        )
    length, before = figures["length_correlation"], calibration["length_correlation"]
    if None not in (length, before) and abs(length - before) > LENGTH_DRIFT:
        lines.append(
            "the pool has drifted in length: rank correlation with length "
            f"{before:+.2f} on the calibration pairs, {length:+.2f} on these"
        )
    return lines


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
