"""What stages share: progress on a terminal, the model they were told to use, pairs made ready for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import AutoConfig

from scir_cli import model_sources, policy
from scir_cli.chat import Chat
from scir_cli.config import ModelSettings
from scir_cli.errors import DataError
from scir_cli.meter import Meter
from scir_cli.policy import Policy
from scir_cli.reward_models import Pair
from scir_cli.stages.progress import progress as progress

SKIPPED = "already done"


class LazyPolicy:
    """A model spec: its tokenizer and key at once (a plan needs them), its weights only when something is scored."""

    def __init__(self, settings: ModelSettings, spec: str) -> None:
        self.settings = settings
        self.options: dict[str, Any] = {}  # more of policy.load's: adapters, ranks
        self.path = model_sources.resolve(spec)
        tokenizer = policy.load_tokenizer(self.path, settings)
        self.chat = Chat(tokenizer, policy.end_ids(self.path, tokenizer))
        self.key = policy.weights_key(self.path, settings, self.chat)
        self.meter = Meter()

    @property
    def sharded(self) -> bool:
        return self.options.get("ranks") is not None

    @cached_property
    def context_length(self) -> int:
        """Positions the model has, from its config: known before its weights are read."""
        base = model_sources.base(self.path)
        return policy.context_length(AutoConfig.from_pretrained(base, trust_remote_code=self.settings.trust_remote_code))

    @cached_property
    def policy(self) -> Policy:
        loaded = policy.load(self.settings, str(self.path), **self.options)
        loaded.meter = self.meter
        return loaded


def encode_pair(row: Mapping[str, Any], chat: Chat) -> Pair:
    """A row of a judged or preferences dataset as the engine's pair; text without token ids is encoded. Raises DataError (prompt boundary)."""
    sides = (row["first"], row["second"])
    ids = tuple(tuple(side["token_ids"] or chat.response_ids(row["messages"], side["text"])) for side in sides)
    return Pair(
        row["pair_id"],
        row["messages"],
        tuple(chat.prompt_ids(row["messages"])),
        (ids[0], ids[1]),
        (sides[0]["text"], sides[1]["text"]),
        {r["weights"]: (r["first"], r["second"]) for r in row["reference_logps"]},
        {r["reward_model"]: r["written"] for r in row["rewards"] if r.get("written")},
    )


def try_encode(row: Mapping[str, Any], chat: Chat) -> Pair | None:
    """The pair, or None where the chat template cannot tell its prompt from its answers."""
    try:
        return encode_pair(row, chat)
    except DataError:
        return None
