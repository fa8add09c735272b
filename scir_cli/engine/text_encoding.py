"""Text to token ids, where the special tokens inside a conversation's content are plain text.

A chat template writes the special tokens that open and close turns. The same spellings inside a
user's text or a response are data: as control tokens they would open turns that do not exist.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

#: Private-use characters with a number that no data set can contain: drawn in each process
NONCE = secrets.token_hex(8)
CONTENT_MARK = re.compile(f"\ue000{NONCE}c(\\d+)\ue001")
CONTENT_START = f"\ue000{NONCE}c"


def content_mark(number: int) -> str:
    """The text that replaces special token `number` inside content, until it is encoded."""
    return f"{CONTENT_START}{number}\ue001"


def _template_mark(number: int) -> str:
    """The spelling of special token `number` of the template in the marked tokenizer."""
    return f"\ue000{NONCE}t{number}\ue001"


class TextEncoder:
    """Encodes rendered conversations with a tokenizer.

    `hide` replaces special tokens inside content before a template sees it, and `encode` encodes
    them as text. Text without special tokens is encoded by the tokenizer alone.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        """end_ids: token ids that end a turn; they count as special."""
        self.tokenizer = tokenizer
        named = {*tokenizer.all_special_ids, *end_ids}
        self.special_ids: dict[str, int] = {}
        for token, added in tokenizer.added_tokens_decoder.items():
            if (added.special or token in named) and added.content.strip():
                self.special_ids[added.content] = token
        self.spellings = sorted(self.special_ids, key=lambda text: (-len(text), text))
        self._numbers = {text: number for number, text in enumerate(self.spellings)}
        alternatives = "|".join(map(re.escape, self.spellings))
        # (?!) matches nothing.
        self._special = re.compile(alternatives or "(?!)")

    def hide(self, content: str) -> str:
        """The content with a mark in the place of each special token."""
        return self._special.sub(lambda found: content_mark(self._numbers[found[0]]), content)

    def show(self, text: str) -> str:
        """The text with the special tokens that `hide` replaced."""
        return CONTENT_MARK.sub(lambda mark: self.spellings[int(mark[1])], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text; marks of `hide` become the tokens of their spelling."""
        if CONTENT_START not in text:
            return self._plain_ids(text)
        expected = [self.special_ids[found] for found in self._special.findall(text)]
        if self._marked is not None:
            ids = self._marked_ids(text)
            if self._specials_in(ids) == expected:
                return ids
        return self._cut_ids(text)

    def encode_content(self, content: str) -> list[int]:
        """Token ids of a text in which nothing is a special token."""
        return self.encode(self.hide(content))

    def _plain_ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def _specials_in(self, ids: list[int]) -> list[int]:
        """The special ids among these, without that of unknown characters."""
        specials = set(self.special_ids.values()) - {self.tokenizer.unk_token_id}
        return [token for token in ids if token in specials]

    @cached_property
    def _marked(self) -> tuple[Tokenizer, dict[int, int]] | None:
        """A copy of the tokenizer that spells its special tokens as marks, and its id -> ours.

        None if the tokenizer is not one of the tokenizers library.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        state = json.loads(backend.to_str())
        ids = {}
        for added in state["added_tokens"]:
            number = self._numbers.get(added["content"])
            if number is not None:
                added["content"] = _template_mark(number)
            ids[added["content"]] = added["id"]
        copy = Tokenizer.from_str(json.dumps(state))
        copy.no_truncation()
        copy.no_padding()
        originals: dict[int, int] = {}
        for content, token in ids.items():
            of_copy = copy.token_to_id(content)
            assert of_copy is not None
            originals[of_copy] = token
        return copy, originals

    def _marked_ids(self, text: str) -> list[int]:
        """Token ids by the copy: the template's special tokens are marks, content is bare."""
        assert self._marked is not None
        copy, originals = self._marked
        marked = self._special.sub(lambda found: _template_mark(self._numbers[found[0]]), text)
        ids = copy.encode(self.show(marked), add_special_tokens=False).ids
        return [originals.get(token, token) for token in ids]

    def _cut_ids(self, text: str) -> list[int]:
        """Token ids of pieces that end after the first character of each hidden special token.

        No piece contains a special token of the content as a whole.
        """
        ids: list[int] = []
        start = 0
        head = ""
        for mark in CONTENT_MARK.finditer(text):
            spelling = self.spellings[int(mark[1])]
            ids += self._plain_ids(head + text[start : mark.start()] + spelling[:1])
            head = spelling[1:]
            start = mark.end()
        return ids + self._plain_ids(head + text[start:])
