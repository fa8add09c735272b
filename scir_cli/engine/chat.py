"""Conversations and judge prompts -> token ids, with checked boundaries.

The ids that are sampled are the ids that are trained on.
Text from elsewhere is encoded once, through the chat template and without adding special tokens
(the template writes BOS), and a prompt must be a token prefix of prompt + response.
Nothing downstream decodes ids and encodes them again.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from scir_cli.data.messages import more_of
from scir_cli.engine import reasoning
from scir_cli.engine.reasoning import Markers
from scir_cli.engine.text_encoding import TextEncoder
from scir_cli.errors import DataError, ModelError

Message = Mapping[str, Any]

#: Errors of a template that cannot render a conversation
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

#: Answers without reasoning that share no first token
OPENING_ANSWERS = ("Yes.", "No.", "4711", "(b)", "* one")

#: Two short conversations that every chat template renders
PROBES = (
    [{"role": "user", "content": "Reply with A or B."}],
    [{"role": "user", "content": "Which of the two is it, 1 or 2?"}],
)
PROBE_ANSWER = {"role": "assistant", "content": "Number 4711"}
PROBE_REASONING = "It could be number 2917"

ADVICE = (
    "pass --chat-template-kwargs that its template reads (enable_thinking=false, for example), "
    "or another template with --chat-template"
)


class Unrenderable(DataError):
    """A conversation that the chat template cannot render.

    reason: its name among the drops: template_refused, content_missing,
        tools_not_rendered or prompt_boundary.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class AnswerOptions:
    """Several answers to one prompt, split at the first token in which they differ.

    What they share after the generation prompt, such as an empty think block, belongs to the
    prompt.
    """

    # Tokens at the end of the generation prompt that an answered prompt does not have
    n_removed: int
    # Tokens that replace them
    cue: tuple[int, ...]
    # Of each answer: its first token that differs from the others, up to the end of its turn
    endings: tuple[tuple[int, ...], ...]

    @property
    def changes_prompt(self) -> bool:
        """Whether `prompt_ids` differs from the generation prompt."""
        return self.n_removed > 0 or bool(self.cue)

    def prompt_ids(self, generation_prompt: Sequence[int]) -> list[int]:
        """Token ids of a prompt up to the position where the answers differ."""
        end = len(generation_prompt) - self.n_removed
        return [*generation_prompt[:end], *self.cue]


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template, and the token ids that end a turn.

    template_kwargs: further variables of the template, as enable_thinking.
    think_end: the text that ends an answer's reasoning; None: the template's own.
    """

    tokenizer: Any
    end_ids: frozenset[int]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    think_end: str | None = None
    # The last prompt and its ids.
    _last_prompt: dict[Any, list[int]] = field(default_factory=dict, compare=False, repr=False)
    # (template, answers) -> `answer_options` of them.
    _options: dict[Any, AnswerOptions] = field(default_factory=dict, compare=False, repr=False)
    # Template -> whether it reads content as a list of parts.
    _reads_parts: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)
    # Template -> the markers around reasoning.
    _markers: dict[str, Markers | None] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.end_ids)

    @property
    def _name(self) -> str:
        """The chat template and its model, for error messages."""
        return f"the chat template of {self.tokenizer.name_or_path or 'the model'}"

    def check(self, system_prompt: str | None = None) -> None:
        """Raises an error if the template cannot render a question, or not with its content.

        system_prompt: content of a system turn before every question.
        Raises ModelError without it, else Unrenderable.
        """
        messages = PROBES[0]
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        self.render(messages, generation=True)

    def render(self, messages: Sequence[Message], *, generation: bool) -> list[int]:
        """Token ids of a conversation; `generation` opens the assistant's turn at its end.

        Special tokens inside the content are encoded as text.
        Raises Unrenderable if the chat template refuses the conversation or drops its content,
        ModelError if it renders no conversation at all.
        """
        hidden = [self._hidden(message) for message in messages]
        text = self._text(hidden, generation, self.reads_parts)
        for index, message in enumerate(hidden):
            if not _contains(text, message) and self._is_dropped(hidden, index, generation):
                content = self.encoder.show(message["content"])
                raise Unrenderable(
                    f"{self._name} leaves out the {message['role']} turn {content[:40]!r}; "
                    "pass another template with --chat-template",
                    "content_missing",
                )
        self._check_tools(text, hidden)
        return self.encoder.encode(text)

    def _hidden(self, message: Message) -> dict[str, Any]:
        """A message with all its fields, in which special tokens are replaced by marks."""

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return self.encoder.hide(value)
            if isinstance(value, dict):
                return {hide(name): hide(item) for name, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        fields = {"role": message["role"], "content": hide(message["content"])}
        return {**hide(more_of(message)), **fields} if message.get("more") else fields

    def _check_tools(self, text: str, messages: Sequence[Message]) -> None:
        """Raises Unrenderable if a rendered conversation lacks the name of a tool or tool call."""
        for message in messages:
            for field_name in ("tools", "tool_calls"):
                for tool in message.get(field_name, ()):
                    name = tool.get("function", tool).get("name")
                    if name and str(name) not in text:
                        raise Unrenderable(
                            f"{self._name} does not render {field_name} ({name}); "
                            "pass another template with --chat-template, or remove such rows",
                            "tools_not_rendered",
                        )

    def _is_dropped(self, messages: Sequence[Message], index: int, generation: bool) -> bool:
        """Whether the template writes nothing of a turn's content.

        A template may change a content, and remove the reasoning of an earlier answer.
        """
        probe = {**messages[index], "content": PROBE_ANSWER["content"]}
        probed = [*messages[:index], probe, *messages[index + 1 :]]
        return not _contains(self._text(probed, generation, self.reads_parts), probe)

    def _text(self, messages: Sequence[Message], generation: bool, parts: bool) -> str:
        """The conversation as the template renders it; parts: content as a list of parts.

        Raises Unrenderable if the template refuses it, ModelError if it is not Jinja.
        """
        conversation: list[dict[str, Any]] = []
        tools = None
        for message in messages:
            content: Any = message["content"]
            if not content and message.get("tool_calls"):
                content = None
            elif parts:
                content = [{"type": "text", "text": content}]
            turn = {**message, "content": content}
            tools = turn.pop("tools", None) or tools
            conversation.append(turn)
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=generation,
                tools=tools,
                **self.template_kwargs,
            )
        except RENDER_ERRORS as error:
            shown = self.encoder.show(str(conversation))
            reason = " ".join(str(error).split())
            problem = (
                f"the chat template fails on the conversation {shown[:80]}: {reason}; "
                "pass another template with --chat-template"
            )
            if isinstance(error, TemplateSyntaxError):
                raise ModelError(problem) from error
            raise Unrenderable(problem, "template_refused") from error
        return str(text)

    @property
    def reads_parts(self) -> bool:
        """Whether the template reads content as a list of parts, and drops plain text.

        Raises ModelError if it renders a short conversation without its content in both forms.
        """
        template = str(self.tokenizer.chat_template)
        if template not in self._reads_parts:
            self._reads_parts[template] = self._find_content_form()
        return self._reads_parts[template]

    def _find_content_form(self) -> bool:
        """Whether the template needs content as a list of parts: the first form that it renders.

        Raises ModelError if it renders neither.
        """
        messages = [*PROBES[0], PROBE_ANSWER]
        refusal = None
        for parts in (False, True):
            try:
                text = self._text(messages, False, parts)
            except Unrenderable as error:
                refusal = refusal or error
                continue
            if all(_contains(text, message) for message in messages):
                return parts
        if refusal:
            raise ModelError(str(refusal)) from refusal
        raise ModelError(
            f"{self._name} renders conversations without their content, as text and as a list of "
            "parts; pass another template with --chat-template"
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the start of the assistant's answer.

        Pairs of one prompt are neighbors, so the ids of the last prompt are cached.
        Raises Unrenderable or ModelError as `render` does.
        """
        turns = [(m["role"], m["content"], m.get("more")) for m in messages]
        key = (str(self.tokenizer.chat_template), *turns)
        if key not in self._last_prompt:
            ids = self.render(messages, generation=True)
            self._last_prompt.clear()
            self._last_prompt[key] = ids
        return list(self._last_prompt[key])

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """Token ids of a finished answer, including its end-of-turn token.

        Raises Unrenderable if the prompt's ids are not a prefix of the ids of prompt + response,
        and as `render` does.
        """
        prompt = self.prompt_ids(messages)
        full = self._answered(messages, response)
        if full[: len(prompt)] != prompt:
            raise Unrenderable(
                f"{self._name} does not render prompt + response as a continuation of the "
                "prompt, so the tokens of the answer cannot be separated from those of the prompt "
                f"(answer: {response[:40]!r}); {ADVICE}",
                "prompt_boundary",
            )
        return self._finished(full[len(prompt) :])

    def labeled_ids(
        self, messages: Sequence[Message], responses: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of finished answers to it that no model sampled.

        What the template writes before an answer without reasoning, such as an empty think block,
        belongs to the prompt: it is not trained.
        Raises Unrenderable as `response_ids` does.
        """
        generation_prompt = self.prompt_ids(messages)
        answered = [self._answered(messages, response) for response in responses]
        if self.opening is not None:
            prompt = self.opening.prompt_ids(generation_prompt)
            if all(ids[: len(prompt)] == prompt for ids in answered):
                return prompt, [self._finished(ids[len(prompt) :]) for ids in answered]
        ids = [self.response_ids(messages, response) for response in responses]
        return generation_prompt, ids

    @property
    def opening(self) -> AnswerOptions | None:
        """The start of an answer without reasoning; its `endings` have no use.

        None if it depends on the prompt, or does not continue the text of the generation prompt.
        """
        try:
            options = self.answer_options(OPENING_ANSWERS)
        except ModelError:
            return None
        prompt = self.prompt_ids(PROBES[0])
        removed = prompt[len(prompt) - options.n_removed :]
        cue = self.tokenizer.decode(list(options.cue))
        return options if cue.startswith(self.tokenizer.decode(removed)) else None

    def _answered(self, messages: Sequence[Message], response: str) -> list[int]:
        """Token ids of a conversation with the assistant's answer."""
        answer = {"role": "assistant", "content": response}
        return self.render([*messages, answer], generation=False)

    def _finished(self, ids: list[int]) -> list[int]:
        """An answer's token ids up to its end token, which is added if the template has none."""
        end_positions = [index for index, token in enumerate(ids) if token in self.end_ids]
        if not end_positions:
            return [*ids, self.tokenizer.eos_token_id]
        return ids[: end_positions[-1] + 1]

    def answer_options(self, texts: Sequence[str]) -> AnswerOptions:
        """These answers, split at the first token in which they differ.

        Raises ModelError if their position after a prompt depends on the prompt.
        """
        key = (str(self.tokenizer.chat_template), *texts)
        if key not in self._options:
            first, second = (self._options_after(probe, texts) for probe in PROBES)
            if first != second:
                raise ModelError(
                    f"{self._name} renders the answer {texts[0]!r} differently after different "
                    f"prompts, so the position of a verdict is unknown; {ADVICE}"
                )
            self._options[key] = first
        return self._options[key]

    def _options_after(self, messages: Sequence[Message], texts: Sequence[str]) -> AnswerOptions:
        """These answers to a conversation, split at the first token in which they differ."""
        prompt = self.prompt_ids(messages)
        answered = [self._answered(messages, text) for text in texts]
        shared = n_shared(answered)
        start = n_shared([prompt, answered[0][:shared]])
        endings = tuple(tuple(self._finished(ids[shared:])) for ids in answered)
        return AnswerOptions(len(prompt) - start, tuple(answered[0][start:shared]), endings)

    def verdicts(self, words: Sequence[str]) -> AnswerOptions:
        """The answers that consist of one of these words, each with one token of its own.

        `endings` holds that token alone.
        Raises ModelError if a word is unknown to the tokenizer, or if it is several tokens, or
        none, beside what all words share.
        """
        options = self.answer_options(words)
        unknown = self.tokenizer.unk_token_id
        for word in words:
            if unknown is not None and unknown in self.encoder.encode_content(word):
                raise ModelError(
                    f"the verdict {word!r} is not in the vocabulary of this tokenizer "
                    f"(model: {self.tokenizer.name_or_path}); choose others with --verdict-tokens"
                )
        tails = [ending[::-1] for ending in options.endings]
        n_after = n_shared(tails)
        bodies = []
        for ending in options.endings:
            end = len(ending) - n_after
            bodies.append(tuple(t for t in ending[:end] if t not in self.end_ids))
        for word, body in zip(words, bodies, strict=True):
            if len(body) != 1:
                pieces = [self.tokenizer.decode([token]) for token in body]
                raise ModelError(
                    f"the verdict {word!r} is {len(body)} tokens {pieces} for this tokenizer "
                    f"and must be one (model: {self.tokenizer.name_or_path}); "
                    "choose others with --verdict-tokens"
                )
        return AnswerOptions(options.n_removed, options.cue, tuple(bodies))

    @property
    def markers(self) -> Markers | None:
        """The texts around an answer's reasoning; None if the model writes none."""
        template = str(self.tokenizer.chat_template)
        if template not in self._markers:
            self._markers[template] = self._find_markers(template)
        return self._markers[template]

    def _find_markers(self, template: str) -> Markers | None:
        """The markers, from what the template renders of an answer with reasoning and without."""
        answer = {**PROBE_ANSWER, **dict.fromkeys(reasoning.KEYS, PROBE_REASONING)}
        generation = plain = reasoned = ""
        try:
            generation = self._text(PROBES[0], True, self.reads_parts)
            if self.think_end:
                return reasoning.with_end(self.think_end, generation)
            plain = self._text([*PROBES[0], PROBE_ANSWER], False, self.reads_parts)
            reasoned = self._text([*PROBES[0], answer], False, self.reads_parts)
        except Unrenderable:
            # A template that refuses one of them may still name a common marker.
            reasoned = ""
        texts = (PROBE_REASONING, PROBE_ANSWER["content"])
        found = reasoning.from_rendered(generation, plain, reasoned, *texts)
        return found or reasoning.from_spelling(generation, template, self._added_tokens)

    @property
    def _added_tokens(self) -> set[str]:
        return {added.content for added in self.tokenizer.added_tokens_decoder.values()}

    def split(self, text: str, *, sampled: bool) -> tuple[str, str]:
        """The reasoning of an answer, "" if it has none, and the rest of the answer.

        The rest is "" if the text ends inside its reasoning.
        sampled: the text follows the generation prompt; else it is from a file.
        """
        return self.markers.split(text, sampled=sampled) if self.markers else ("", text)

    def n_reasoning_tokens(self, sampled: Sequence[int]) -> int | None:
        """Length of the reasoning at the start of sampled ids; None if they end inside it."""
        text = self.tokenizer.decode(list(sampled))
        thought, answer = self.split(text, sampled=True)
        if not thought:
            return 0
        if not answer and self.markers and self.markers.end not in text:
            return None

        def ends_within(length: int) -> bool:
            assert self.markers
            return self.markers.end in self.tokenizer.decode(list(sampled[:length]))

        return bisect.bisect_left(range(len(sampled)), True, key=ends_within)

    def encoding_digest(self) -> str:
        """A hex digest of vocabulary and chat template: token ids are valid for equal ones only."""
        state = hashlib.blake2b(digest_size=16)
        state.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        state.update(str(self.tokenizer.chat_template).encode())
        return state.hexdigest()

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
        if self.template_kwargs:
            state.update(json.dumps(dict(self.template_kwargs), sort_keys=True).encode())
        return state.hexdigest()


def n_shared(sequences: Sequence[Sequence[int]]) -> int:
    """The length of the longest common prefix."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _contains(text: str, message: Message) -> bool:
    """Whether a rendered conversation contains a message's content, without outer white space."""
    return message["content"].strip() in text
