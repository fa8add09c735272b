"""Chat templates written for these tests, each with the habits of a family of today's models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy import make_tokenizer
from transformers import AutoTokenizer

from scir_cli.engine.chat import Chat

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
REFUSE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(
    answer: str,
    opening: str = "<|im_start|>assistant\n",
    *,
    content: str = "m['content']",
    end: str = "<|im_end|>\n",
    before: str = "",
) -> str:
    """A template that writes `answer` before, and `end` after, the content of an answer.

    opening: the generation prompt, and the start of an answer's turn.
    """
    return (
        f"{before}{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}"
        f"{answer}{{{{ {content} }}}}{end}{{% else %}}{TURN}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


@dataclass(frozen=True)
class Family:
    """A template, its further tokens, and what an answer's turn has between header and answer."""

    template: str
    #: text before the verdict that is not in the generation prompt
    cue: str = ""
    #: text at the end of the generation prompt that an answered prompt does not have
    removed: str = ""
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ("<think>", "</think>")
    #: special tokens that end an answer, beside the tokenizer's end token
    ends: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: the markers of reasoning, and whether the generation prompt ends inside it
    reasoning: tuple[str, str, bool] = ("<think>", "</think>", False)

    def chat(self, folder: Path, **kwargs: Any) -> Chat:
        tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder, template=self.template))
        tokenizer.add_tokens(list(self.special), special_tokens=True)
        tokenizer.add_tokens(list(self.words))
        # as in large vocabularies
        tokenizer.add_tokens(["\n\n"])
        ends = [tokenizer.eos_token, *self.ends]
        end_ids = frozenset(tokenizer.convert_tokens_to_ids(ends))
        return Chat(tokenizer, end_ids, self.kwargs | kwargs)


HEADER = "<|im_start|>assistant\n"
EMPTY_THINK = "<think>\n\n</think>\n\n"
NO_THINKING = "{% if enable_thinking is defined and not enable_thinking %}"
CHANNEL = "<|channel|>final<|message|>"

#: an answer's reasoning where the template gets some, else an empty block
REASONED = (
    "<think>\n{% if m['reasoning_content'] %}{{ m['reasoning_content'] }}{% endif %}"
    "{{ '\n</think>\n\n' }}"
)
ANALYSIS = (
    "{% if m['thinking'] %}<|channel|>analysis<|message|>{{ m['thinking'] }}<|end|>"
    "<|start|>assistant{% endif %}"
)

FAMILIES = {
    # an empty reasoning block before an answer without reasoning
    "empty_think": Family(turns(HEADER + EMPTY_THINK), cue=EMPTY_THINK),
    # the same, and the generation prompt has it if thinking is off
    "thinking_off": Family(
        turns(HEADER + EMPTY_THINK, HEADER + NO_THINKING + EMPTY_THINK + "{% endif %}"),
        kwargs={"enable_thinking": False},
    ),
    # reasoning from the message's own key
    "reasons": Family(turns(HEADER + REASONED), cue=EMPTY_THINK),
    # the generation prompt opens a reasoning block, which an answer closes at once
    "opened_think": Family(
        turns(HEADER + REASONED, HEADER + "<think>\n"),
        cue="\n\n</think>\n\n",
        removed="\n",
        reasoning=("<think>", "</think>", True),
    ),
    # the generation prompt opens a reasoning block, and no answer has one
    "stripped_think": Family(
        turns(HEADER, HEADER + "<think>\n", content="m['content'].split('</think>')[-1]"),
        removed="<think>\n",
        reasoning=("<think>", "</think>", True),
    ),
    # an answer without its newline: the reasoning block is one line
    "closed_think": Family(
        turns("<|im_start|>assistant\n<think></think>\n", "<|im_start|>assistant"),
        cue="\n<think></think>\n",
    ),
    # a channel header before the answer
    "channels": Family(
        turns(
            "<|start|>assistant" + ANALYSIS + CHANNEL,
            "<|start|>assistant",
            end="{{ '<|return|>' if loop.last else '<|end|>' }}",
        ),
        cue=CHANNEL,
        special=("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"),
        ends=("<|return|>",),
        reasoning=("<|channel|>analysis<|message|>", CHANNEL, False),
    ),
    # a token between the answer and the end of its turn
    "trailing": Family(
        turns(HEADER, end="<|end_response|><|im_end|>"), special=("<|end_response|>",)
    ),
    "trims": Family(turns(HEADER, content="m['content'] | trim")),
    "parts": Family(PARTS),
    "refuses_system": Family(turns(HEADER, before=REFUSE_SYSTEM)),
    "alternates": Family(turns(HEADER, before=ALTERNATE)),
}

#: a template that writes roles and no content
WITHOUT_CONTENT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: a template that leaves out system turns
WITHOUT_SYSTEM = turns(HEADER).replace("{% else %}", "{% elif m['role'] == 'user' %}")
#: a template in which the answer's position depends on the prompt
DEPENDS_ON_PROMPT = turns(
    HEADER + "{{ 'Re ' + (messages[0]['content'] | length | string) + ': ' }}"
)
