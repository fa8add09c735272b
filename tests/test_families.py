"""Chat templates of today's families: verdicts, boundaries, content, and text that is data."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import DEPENDS_ON_PROMPT, FAMILIES, Family
from hypothesis import given
from hypothesis import strategies as st

from scir_cli.engine.chat import Chat
from scir_cli.errors import ModelError

QUESTION = [{"role": "user", "content": "Is it A or B?"}]
SCORES = [str(score) for score in range(6)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.chat(root / name) for name, family in FAMILIES.items()}


# ------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("words", [["A", "B"], SCORES])
def test_each_family_has_verdicts_of_one_token(name: str, words: list[str], chats: dict[str, Chat]):
    chat = chats[name]
    answers = chat.verdicts(words)
    assert [chat.tokenizer.decode(ending) for ending in answers.endings] == words
    assert {len(ending) for ending in answers.endings} == {1}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_a_verdict_has_what_the_template_writes_before_an_answer(
    name: str, chats: dict[str, Chat]
):
    chat, family = chats[name], FAMILIES[name]
    generation = chat.prompt_ids(QUESTION)
    prompt = chat.verdicts(["A", "B"]).prompt_ids(generation)
    text = chat.tokenizer.decode(generation)
    assert text.endswith(family.removed)
    expected = text.removesuffix(family.removed) + family.cue
    assert chat.tokenizer.decode(prompt) == expected


@pytest.mark.parametrize("name", FAMILIES)
@given(question=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_prompt_and_verdict_are_the_start_of_the_answered_conversation(
    name: str, question: str, chats: dict[str, Chat]
):
    chat = chats[name]
    messages = [{"role": "user", "content": f"Q{question}Q"}]
    answers = chat.verdicts(["A", "B"])
    prompt = answers.prompt_ids(chat.prompt_ids(messages))
    for word, ending in zip("AB", answers.endings, strict=True):
        full = chat.render([*messages, {"role": "assistant", "content": word}], generation=False)
        assert full[: len(prompt) + 1] == [*prompt, *ending]


def test_a_verdict_whose_position_depends_on_the_prompt_is_refused_by_name(tmp_path: Path):
    chat = Family(DEPENDS_ON_PROMPT).chat(tmp_path)
    with pytest.raises(ModelError) as error:
        chat.verdicts(["A", "B"])
    message = str(error.value)
    assert str(tmp_path) in message
    assert "'A'" in message
    assert "--chat-template" in message
    assert "\n" not in message
