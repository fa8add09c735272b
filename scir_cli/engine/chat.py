"""Conversations and judge prompts -> token ids, with checked boundaries.

The ids that are sampled are the ids that are trained on. Text from elsewhere is encoded through the chat template, once, without adding special
tokens (the template writes BOS), and a prompt must be a token prefix of prompt + response. Nothing downstream decodes and encodes again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from scir_cli.errors import DataError, ModelError

Message = Mapping[str, str]


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template, and the token ids that end a turn."""

    tokenizer: Any
    end_ids: frozenset[int]
    _last: dict[Any, list[int]] = field(
        default_factory=dict, compare=False, repr=False
    )  # the last prompt and its ids

    def render(self, messages: Sequence[Message], *, generation: bool) -> list[int]:
        conversation = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation
            )
        except (
            TemplateError
        ) as error:  # it is no Jinja, or it refuses this conversation (a system turn, say)
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the chat template fails at {str(conversation)[:80]}: {reason}; give another with --chat-template"
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant's answer begins. Pairs of a prompt are neighbours, so the last prompt is not encoded again."""
        key = (self.tokenizer.chat_template, *((m["role"], m["content"]) for m in messages))
        if key not in self._last:
            ids = self.render(messages, generation=True)
            self._last.clear()
            self._last[key] = ids
        return list(self._last[key])

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Token ids of a finished answer, its end-of-turn token included; raises DataError where the prompt is not a token prefix."""
        prompt = self.prompt_ids(messages)
        full = self.render(
            [*messages, {"role": "assistant", "content": response}], generation=False
        )
        if full[: len(prompt)] != prompt:
            raise DataError(
                "the chat template does not render prompt + response as a continuation of the prompt, so the answer's tokens cannot be told "
                f"from the prompt's; it happens at the answer {response[:40]!r}: use another template (--chat-template)"
            )
        ids = full[len(prompt) :]
        ends = [index for index, token in enumerate(ids) if token in self.end_ids]
        return ids[: ends[-1] + 1] if ends else [*ids, self.tokenizer.eos_token_id]

    def answer_token(self, messages: Sequence[Message], word: str) -> int:
        """The single token with which the assistant answers `word`; raises ModelError where the tokenizer needs several."""
        ids = self.response_ids(messages, word)
        body = [token for token in ids if token not in self.end_ids]
        if len(body) != 1:
            pieces = [self.tokenizer.decode([token]) for token in body]
            raise ModelError(
                f"the verdict {word!r} is {len(body)} tokens {pieces} for this tokenizer and must be one; choose others with --verdict-tokens"
            )
        return body[0]

    def template_digest(self) -> str:
        """A digest of all that decides how text becomes ids."""
        state = hashlib.blake2b(digest_size=16)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state.update(
            (
                backend.to_str()
                if backend is not None
                else repr(sorted(self.tokenizer.get_vocab().items()))
            ).encode()
        )
        state.update(str(self.tokenizer.chat_template).encode())
        return state.hexdigest()
