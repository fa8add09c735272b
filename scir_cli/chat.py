"""Conversations and judge prompts -> token ids, with checked boundaries.

The ids that are sampled are the ids that are trained on. Text from elsewhere is encoded through the chat template, once, without adding special
tokens (the template writes BOS), and a prompt must be a token prefix of prompt + response. Nothing downstream decodes and encodes again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from scir_cli.errors import ConfigError, DataError, ModelError

Message = Mapping[str, str]

PAIRWISE = """Which answer to the question is better?

Question: {question}

Answer A: {a}

Answer B: {b}

Reply with A or B."""

PAIRWISE_RATIONALE = """Compare two answers to a question.

Question: {question}

Answer A: {a}

Answer B: {b}

First explain in a few sentences which answer is better and why. Then write "Verdict:" and A or B."""

#: The additive five-point rubric of Self-Rewarding Language Models (arXiv 2401.10020), in our words.
RUBRIC = """Score how well a response answers a question. Start at 0 and add a point for each of these that holds:
it is relevant to the question; it answers a good part of it; it answers the question usefully and completely; it is well written and clearly
meant for the asker; it could hardly be better.

Question: {question}

Response: {response}

Reply with the score, a single digit from 0 to 5."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template, and the token ids that end a turn."""

    tokenizer: Any
    end_ids: frozenset[int]
    _last: dict[Any, list[int]] = field(default_factory=dict, compare=False, repr=False)  # the last prompt and its ids

    def render(self, messages: Sequence[Message], *, generation: bool) -> list[int]:
        conversation = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:  # it is no Jinja, or it refuses this conversation (a system turn, say)
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
        full = self.render([*messages, {"role": "assistant", "content": response}], generation=False)
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
        state.update((backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))).encode())
        state.update(str(self.tokenizer.chat_template).encode())
        return state.hexdigest()


def question_text(messages: Sequence[Message]) -> str:
    """A conversation as a judge reads it: the bare text of a single user turn, else each turn with its role; the system turn is left out."""
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in turns)


def fill(template: str, **values: str) -> list[Message]:
    """A judge prompt as a one-turn conversation. Values go in as they are: braces in them mean nothing."""
    text = re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), template)
    return [{"role": "user", "content": text}]


def load_template(path: Path | None, default: str, fields: Sequence[str]) -> str:
    """The judge prompt in a text file, or the default; raises ConfigError where a field is missing."""
    if path is None:
        return default
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the judge prompt {path} cannot be read: {error}") from error
    missing = [name for name in fields if "{" + name + "}" not in text]
    if missing:
        raise ConfigError(f"the judge prompt {path} has no {{{missing[0]}}}; it needs {', '.join('{' + f + '}' for f in fields)}")
    return text
