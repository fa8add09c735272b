"""Frozen models beside the policy: the reward reference, and response log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.engine.trees import continuation
from scir_cli.errors import ConfigError
from scir_cli.rewards.pairs import Pair
from scir_cli.settings import RewardSettings


def open_reward_reference(
    settings: RewardSettings, model: LazyPolicy, needing: Sequence[str], **options: Any
) -> LazyPolicy:
    """The model of --reward-reference.

    needing: names of the reward models that read it; options: more arguments of LazyPolicy.
    Raises ConfigError if the setting is missing, if the model has the policy's own weights, or if
    it has another tokenizer or chat template.
    """
    if settings.reward_reference is None:
        raise ConfigError(
            f"the {' and '.join(needing)} reward needs --reward-reference MODEL "
            "(the SFT model the policy came from), "
            f"or leave '{needing[0]}' out of --reward-models"
        )

    reference = LazyPolicy(settings, settings.reward_reference, meter=model.meter, **options)
    if reference.weights_key == model.weights_key:
        raise ConfigError(
            f"--reward-reference {settings.reward_reference} holds the same weights as "
            f"--model {settings.model}: every implicit log-odds would be 0. "
            "Name the model the policy was tuned from (M_0, or M_t-1)"
        )
    if reference.chat.template_digest() != model.chat.template_digest():
        raise ConfigError(
            "--reward-reference and --model have different tokenizers or chat templates, "
            "so their log-probabilities are not of the same tokens"
        )
    return reference


def add_missing_logps(pairs: Sequence[Pair], reference: LazyPolicy, max_tokens: int) -> list[Pair]:
    """The pairs, after adding response log-probabilities under `reference` to those without them.

    The log-probabilities are summed over the tokens of a response, in nats.
    max_tokens: tokens per forward pass.
    Collective with sharded weights: all ranks must call this at the same time.
    """
    key = reference.weights_key
    missing = [pair for pair in pairs if key not in pair.reference_logps]

    groups = []
    for pair in missing:
        groups.append([continuation(pair.prompt_ids, ids) for ids in pair.response_ids])

    scored = reference.load().score(groups, max_tokens) if missing or reference.sharded else []
    with reference.meter.timed():
        for pair, logps in zip(missing, scored, strict=True):
            pair.reference_logps[key] = (float(logps[0]), float(logps[1]))
    return list(pairs)
