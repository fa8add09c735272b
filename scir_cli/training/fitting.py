"""The scale s and the penalty weight lambda, fitted at the start of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scir_cli import config
from scir_cli.analysis import verdicts
from scir_cli.data import files, manifests
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import warn
from scir_cli.rewards import reward_models
from scir_cli.rewards.pairs import Context, Pair
from scir_cli.rewards.reward_models import RewardModel
from scir_cli.settings import IMPLICIT_SCALE, TrainSettings
from scir_cli.training import losses
from scir_cli.training.trainer import Trainer

#: Steps over whose gradients lambda is fitted.
N_FITTING_STEPS = 4

#: Pairs that the judge scores for the scale, if the data hold no verdicts of it.
N_JUDGED_PAIRS = 256

#: Settings that are fitted, and the value that requests it.
FITTED: dict[str, Any] = {"implicit_scale": "fitted", "penalty_weight": None}


def load_fitted_values(
    model: Path, settings: TrainSettings, reward_key: str | None
) -> dict[str, float]:
    """The scale and lambda that the training of `model` fitted, if they still hold.

    Empty if a setting that affects the fit, or the reward reference (reward_key), has changed.
    A scale that is fitted again in each iteration falls as log-ratios grow, and the penalty's
    effect on the policy falls with it (docs/study.md).
    """
    # The plan has a digest of each prompt file and of each reward model of the user's own.
    now = settings.plan()
    requested = [name for name, value in FITTED.items() if now[name] == value]
    plan = model / "plan.json"
    manifest = model / "manifest.json"
    if not requested or not (plan.exists() and manifest.exists()):
        return {}

    earlier = files.read_json(plan)
    before = earlier["settings"]
    affecting = config.names_with(TrainSettings, "affects_fit")
    same = all(before.get(name) == now[name] for name in affecting)
    if not same or earlier.get("reward_reference") != reward_key:
        return {}

    fitted = manifests.read(model).get("fitted", {})
    values = {}
    for name in requested:
        if name in fitted and before.get(name) == FITTED[name]:
            values[name] = fitted[name]
    return values


def fit_implicit_scale(
    rows: pa.Table,
    pairs: Sequence[Pair],
    models: dict[str, RewardModel],
    policy: LazyPolicy,
    reward_key: str | None,
    settings: TrainSettings,
) -> float:
    """--implicit-scale fitted: s that gives implicit log-odds the judge's median size.

    rows: of the dataset, with the judge's verdicts; without them, the policy scores the first
    pairs as the judge.
    pairs: with log-probabilities under policy.weights_key and reward_key.
    """
    if "judge" in verdicts.model_names([rows]):
        recorded = verdicts.log_odds(rows, ["judge"])[0].astype(np.float32)
        judge = torch.from_numpy(recorded)
    else:
        judge = _judge_log_odds(
            pairs[:N_JUDGED_PAIRS], models["judge"], policy, settings.max_tokens_per_pack
        )
    references = [pair.reference_logps[policy.weights_key] for pair in pairs]
    # (2, pairs)
    logps = torch.tensor(references).T
    unfitted = settings.model_copy(update={"implicit_scale": IMPLICIT_SCALE})
    (model,) = reward_models.make(["implicit"], policy.chat, unfitted).values()
    implicit = model.odds(logps, Context.of(pairs, reward_key)).log_odds
    return IMPLICIT_SCALE * losses.matching_scale(judge, implicit)


def _judge_log_odds(
    pairs: Sequence[Pair], judge: RewardModel, policy: LazyPolicy, max_tokens: int
) -> torch.Tensor:
    """The judge's log-odds under the policy, nats.  -> (pairs,)"""
    branches = [judge.branches(pair) for pair in pairs]
    # (pairs, branches)
    logps = torch.stack(list(policy.load().score(branches, max_tokens)))
    return judge.odds(logps.T, Context.of(pairs, None)).log_odds


def fit_penalty_weight(trainer: Trainer, ratio: float) -> float:
    """--penalty-ratio: lambda that gives the penalty's gradient `ratio` times the norm.

        lambda = ratio |grad preference loss| / |grad penalty|

    Both norms are taken at the first weights, as means over the first steps.
    """
    norms = trainer.gradient_norms_by_term(("preference", "penalty"), N_FITTING_STEPS)
    if not all(norms.values()):
        warn(
            f"--penalty-ratio cannot be fitted: the gradient norms of the first {N_FITTING_STEPS}"
            f" steps are {norms}; lambda is {ratio:g}. Pass --penalty-weight to choose it"
        )
        return ratio
    return ratio * norms["preference"] / norms["penalty"]
