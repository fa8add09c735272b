"""Conversations and judge prompts -> token ids, with checked boundaries.

The ids that are sampled are the ids that are trained on.
Text from elsewhere is encoded once, through the chat template and without adding special tokens
(the template writes BOS), and a prompt must be a token prefix of prompt + response.
Nothing downstream decodes ids and encodes them again.
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
    # The last prompt and its ids.
    _last_prompt: dict[Any, list[int]] = field(default_factory=dict, compare=False, repr=False)

    def render(self, messages: Sequence[Message], *, generation: bool) -> list[int]:
        """Token ids of a conversation; `generation` opens the assistant's turn at its end.

        Raises ModelError if the chat template cannot render the conversation.
        """
        conversation = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except TemplateError as error:
            # It is no Jinja, or it refuses this conversation (a system turn, for example).
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the chat template fails on the conversation {str(conversation)[:80]}: {reason}; "
                "pass another template with --chat-template"
            ) from error
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the start of the assistant's answer.

        Pairs of one prompt are neighbors, so the ids of the last prompt are cached.
        Raises ModelError if the chat template cannot render the prompt.
        """
        turns = [(m["role"], m["content"]) for m in messages]
        key = (self.tokenizer.chat_template, *turns)
        if key not in self._last_prompt:
            ids = self.render(messages, generation=True)
            self._last_prompt.clear()
            self._last_prompt[key] = ids
        return list(self._last_prompt[key])

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Token ids of a finished answer, including its end-of-turn token.

        Raises DataError if the prompt's ids are not a prefix of the ids of prompt + response.
        """
        prompt = self.prompt_ids(messages)
        answer = {"role": "assistant", "content": response}
        full = self.render([*messages, answer], generation=False)
        if full[: len(prompt)] != prompt:
            raise DataError(
                "the chat template does not render prompt + response as a continuation of the "
                "prompt, so the tokens of the answer cannot be separated from those of the prompt "
                f"(answer: {response[:40]!r}); pass another template with --chat-template"
            )

        ids = full[len(prompt) :]
        end_positions = [index for index, token in enumerate(ids) if token in self.end_ids]
        if not end_positions:
            return [*ids, self.tokenizer.eos_token_id]
        return ids[: end_positions[-1] + 1]

    def answer_token(self, messages: Sequence[Message], word: str) -> int:
        """The single token with which the assistant answers `word`.

        Raises ModelError if the tokenizer needs several tokens, or none, for the word.
        """
        ids = self.response_ids(messages, word)
        body = [token for token in ids if token not in self.end_ids]
        if len(body) != 1:
            pieces = [self.tokenizer.decode([token]) for token in body]
            raise ModelError(
                f"the verdict {word!r} is {len(body)} tokens {pieces} for this tokenizer "
                "and must be one; choose others with --verdict-tokens"
            )
        return body[0]

    def template_digest(self) -> str:
        """A hex digest of everything that determines how text becomes ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            encoding = backend.to_str()
        else:
            encoding = repr(sorted(self.tokenizer.get_vocab().items()))

        state = hashlib.blake2b(digest_size=16)
        state.update(encoding.encode())
        state.update(str(self.tokenizer.chat_template).encode())
        return state.hexdigest()
