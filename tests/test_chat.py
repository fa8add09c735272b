"""Text to token ids.

Boundaries, BOS and end tokens, verdict tokens, judge prompts, and one clear line for what cannot be
used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import load_fp32
from hypothesis import assume, given
from hypothesis import strategies as st
from toy import BOS, CHATML, END, PAD, START, make_tokenizer
from transformers import AutoTokenizer

from scir_cli import config
from scir_cli.engine import loading
from scir_cli.engine.chat import Chat
from scir_cli.errors import ConfigError, DataError, ModelError
from scir_cli.rewards import prompts
from scir_cli.settings import ModelSettings

USER = [{"role": "user", "content": "What is 2 + 2?"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is {this} a question?"},
    {"role": "assistant", "content": "Yes: ünïcödé 🙂."},
    {"role": "user", "content": "And\n\nthis?"},
]
CLOSING_THINK = CHATML.replace(
    "message['content']",
    (
        "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') + "
        "message['content']"
    ),
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def toy_chat(folder: Path, **kind: Any) -> Chat:
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder, **kind))
    return Chat(tokenizer, frozenset({tokenizer.eos_token_id}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return toy_chat(tmp_path_factory.mktemp("chat") / "plain")


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return toy_chat(tmp_path_factory.mktemp("chat") / "bos", bos=True)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------ boundaries


def test_the_toy_tokenizer_has_a_token_for_each_verdict_and_score(plain: Chat):
    assert len(plain.tokenizer) == 400
    assert [len(plain.tokenizer(text)["input_ids"]) for text in "AB012345"] == [1] * 8
    assert (plain.tokenizer.pad_token, plain.tokenizer.eos_token) == (PAD, END)


def test_a_prompt_ends_where_the_assistants_answer_begins(plain: Chat):
    text = plain.tokenizer.decode(plain.prompt_ids(USER))
    assert text == f"{START}user\nWhat is 2 + 2?{END}\n{START}assistant\n"


def test_a_response_is_its_text_and_the_end_of_its_turn(plain: Chat):
    ids = plain.response_ids(USER, "It is 4.")
    assert (
        plain.tokenizer.decode(ids) == f"It is 4.{END}"
    )  # and not the newline the template writes behind it
    assert ids.count(plain.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("messages", [USER, LONG])
@pytest.mark.parametrize("kind", ["plain", "with_bos"])
def test_a_prompt_is_a_token_prefix_of_prompt_and_response(
    messages: list[dict[str, str]], kind: str, request: pytest.FixtureRequest
):
    talk: Chat = request.getfixturevalue(kind)
    answer = {"role": "assistant", "content": "Four, I'd say."}
    prompt, response = talk.prompt_ids(messages), talk.response_ids(messages, answer["content"])
    assert [
        *prompt,
        *response,
        *talk.tokenizer("\n", add_special_tokens=False)["input_ids"],
    ] == talk.render([*messages, answer], generation=False)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_answer_comes_back_from_its_ids(plain: Chat, text: str):
    assume(
        not text[:1].isspace()
    )  # white space at the start may melt into the template's newline, which is an error: see below
    assume("<|" not in text)
    ids = plain.response_ids(USER, text)
    assert ids[-1] == plain.tokenizer.eos_token_id
    assert plain.tokenizer.decode(ids[:-1]) == text


def test_bos_stands_once_where_the_template_writes_it(with_bos: Chat):
    bos = with_bos.tokenizer.bos_token_id
    assert (
        with_bos.tokenizer("x")["input_ids"][0] == bos
    )  # this tokenizer adds one of its own to plain text, as Llama's does
    assert [i for i, token in enumerate(with_bos.prompt_ids(LONG)) if token == bos] == [0]
    assert bos not in with_bos.response_ids(LONG, "Yes.")


def test_bos_is_not_invented_where_the_template_has_none(plain: Chat, tmp_path: Path):
    assert plain.tokenizer.convert_tokens_to_ids(BOS) not in plain.prompt_ids(LONG)
    silent = toy_chat(tmp_path / "silent", bos=True)
    silent.tokenizer.chat_template = (
        CHATML  # the tokenizer would add a BOS, the template does not ask for it
    )
    assert silent.tokenizer.bos_token_id not in silent.prompt_ids(LONG)
    assert silent.prompt_ids(LONG) == plain.prompt_ids(LONG)


def test_an_end_token_is_added_where_the_template_writes_none(tmp_path: Path):
    talk = toy_chat(tmp_path / "tokenizer", template=WITHOUT_END)
    ids = talk.response_ids(USER, "It is 4.")
    assert ids[-1] == talk.tokenizer.eos_token_id
    assert ids.count(talk.tokenizer.eos_token_id) == 1
    assert talk.tokenizer.decode(ids[:-1]).strip() == "It is 4."


def test_a_template_that_renders_an_answered_prompt_otherwise_is_an_error(tmp_path: Path):
    opening = CHATML.replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
    )  # the prompt opens a think block
    for number, template in enumerate(
        (
            opening,
            CHATML.replace(
                "message['role'] +", "message['role'] + (' (last)' if loop.last else '') +"
            ),
        )
    ):
        talk = toy_chat(tmp_path / str(number), template=template)
        with pytest.raises(DataError) as error:
            talk.response_ids(USER, "It is 4.")
        assert "'It is 4.'" in one_line(error)
        assert "--chat-template" in str(error.value)


def test_a_think_block_put_before_the_answer_counts_as_the_answer_or_is_an_error(tmp_path: Path):
    """The prompt stays a prefix here.

    What follows it is what the model would have to write, think block included.
    """
    talk = toy_chat(tmp_path / "tokenizer", template=CLOSING_THINK)
    assert talk.tokenizer.decode(talk.response_ids(USER, "4")) == f"<think>\n\n</think>\n\n4{END}"
    # and before a verdict it belongs to the prompt
    answers = talk.verdicts(["A", "B"])
    assert talk.tokenizer.decode(answers.cue) == "<think>\n\n</think>\n\n"


def test_an_answer_that_melts_into_the_prompts_last_token_is_an_error(tmp_path: Path):
    talk = toy_chat(tmp_path / "tokenizer")
    talk.tokenizer.add_tokens(["\n\n"])  # a token in most vocabularies
    with pytest.raises(DataError) as error:
        talk.response_ids(USER, "\nFour.")  # the template's newline and this one
    assert r"'\nFour.'" in one_line(error)


# ------------------------------ verdicts


@pytest.mark.parametrize("words", [("A", "B"), ("0", "1", "2", "3", "4", "5")])
def test_a_verdict_is_the_one_token_the_assistant_would_answer(
    words: tuple[str, ...], plain: Chat, with_bos: Chat
):
    for talk in (plain, with_bos):
        answers = talk.verdicts(words)
        assert [talk.tokenizer.decode(ending) for ending in answers.endings] == list(words)
        assert answers.prompt_ids(talk.prompt_ids(LONG)) == talk.prompt_ids(LONG)


def test_a_verdict_of_several_tokens_is_an_error_that_shows_them(plain: Chat):
    with pytest.raises(ModelError) as error:
        plain.verdicts(["Zq", "B"])
    assert "'Zq' is 2 tokens ['Z', 'q']" in one_line(error)
    assert "--verdict-tokens" in str(error.value)


def test_what_verdicts_share_goes_into_the_prompt(plain: Chat):
    answers = plain.verdicts(["Zq", "ZA"])
    assert plain.tokenizer.decode(answers.cue) == "Z"
    assert [plain.tokenizer.decode(ending) for ending in answers.endings] == ["q", "A"]


def test_an_empty_verdict_is_an_error(plain: Chat):
    with pytest.raises(ModelError, match="'' is 0 tokens"):
        plain.verdicts(["", "B"])


def test_answers_of_several_tokens_keep_their_ends(plain: Chat):
    answers = plain.answer_options(["1", "10"])
    assert plain.tokenizer.decode(answers.cue) == "1"
    assert [plain.tokenizer.decode(ending) for ending in answers.endings] == [END, f"0{END}"]


# ------------------------------ judge prompts


def test_braces_in_what_users_wrote_mean_nothing():
    filled = prompts.fill(
        "Q: {question}\nA: {a}\nB: {b}", question="{a} {b} {{x}} {0} \\1 \\g<0>", a="f'{b}'", b="{"
    )
    assert filled == [
        {"role": "user", "content": "Q: {a} {b} {{x}} {0} \\1 \\g<0>\nA: f'{b}'\nB: {"}
    ]


def test_a_field_nobody_gave_stays_as_it_is_written():
    assert (
        prompts.fill('{question} as {"json": 1} and {other}', question="q")[0]["content"]
        == 'q as {"json": 1} and {other}'
    )


def test_a_prompt_holds_a_single_question_unchanged_and_a_longer_conversation_with_its_roles():
    assert prompts.question_text(USER) == "What is 2 + 2?"
    assert (
        prompts.question_text([LONG[0], *USER]) == "What is 2 + 2?"
    )  # the system turn is left out
    assert (
        prompts.question_text(LONG)
        == "User: Is {this} a question?\nAssistant: Yes: ünïcödé 🙂.\nUser: And\n\nthis?"
    )


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        (prompts.PAIRWISE, "question a b"),
        (prompts.PAIRWISE_RATIONALE, "question a b"),
        (prompts.RUBRIC, "question response"),
    ],
)
def test_our_own_judge_prompts_have_their_fields(template: str, fields: str):
    filled = prompts.fill(template, **{name: f"<{name}>" for name in fields.split()})[0]["content"]
    assert all(filled.count(f"<{name}>") == 1 for name in fields.split())
    assert "{" not in filled


def test_a_judge_prompt_is_read_from_its_file_and_the_default_without_one(tmp_path: Path):
    path = tmp_path / "judge.txt"
    path.write_text("{question} | {a} | {b} – which?", encoding="utf-8")
    assert (
        prompts.load_template(path, "default", ("question", "a", "b"))
        == "{question} | {a} | {b} – which?"
    )
    assert prompts.load_template(None, "default", ("question", "a", "b")) == "default"


def test_a_judge_prompt_without_a_field_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "judge.txt"
    path.write_text("{question} {a} and B")
    with pytest.raises(ConfigError) as error:
        prompts.load_template(path, "default", ("question", "a", "b"))
    assert (
        one_line(error)
        == f"the judge prompt {path} has no {{b}}; it needs {{question}}, {{a}}, {{b}}"
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_judge_prompt_that_cannot_be_read_is_one_line(content: bytes | None, tmp_path: Path):
    path = tmp_path / "judge.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        prompts.load_template(path, "default", ("question",))
    assert f"the judge prompt {path} cannot be read" in one_line(error)


# ------------------------------ the digest


def test_the_digest_is_that_of_template_and_vocabulary(plain: Chat, with_bos: Chat, tmp_path: Path):
    again = toy_chat(tmp_path / "again")
    assert again.template_digest() == plain.template_digest()
    assert with_bos.template_digest() != plain.template_digest()
    again.tokenizer.chat_template += " "
    assert again.template_digest() != plain.template_digest()
    more = toy_chat(tmp_path / "more")
    more.tokenizer.add_tokens(["one more"])
    assert more.template_digest() != plain.template_digest()


# ------------------------------ tokenizers on disk


def settings(folder: Path, **values: Any) -> ModelSettings:
    return config.build(
        ModelSettings, {"model": str(folder), "output_dir": "unused"} | values, where="test"
    )


def test_a_missing_chat_template_is_one_line(tmp_path: Path):
    folder = make_tokenizer(tmp_path / "tokenizer", template=None)
    with pytest.raises(ModelError) as error:
        loading.load_tokenizer(folder, settings(folder))
    assert one_line(error) == (
        f"the tokenizer in {folder} has no chat template; pass one with --chat-template FILE.jinja"
    )


def test_a_chat_template_in_a_file_takes_the_place_of_the_models_own(tmp_path: Path):
    folder, path = (
        make_tokenizer(tmp_path / "tokenizer", template=None),
        tmp_path / "template.jinja",
    )
    path.write_text(CHATML)
    assert (
        loading.load_tokenizer(folder, settings(folder, chat_template=str(path))).chat_template
        == CHATML
    )
    with pytest.raises(ModelError) as error:
        loading.load_tokenizer(folder, settings(folder, chat_template=str(tmp_path / "none.jinja")))
    assert "none.jinja cannot be read" in one_line(error)


def test_a_tokenizer_without_an_end_token_is_one_line(tmp_path: Path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key != "eos_token"
            }
        )
    )
    with pytest.raises(ModelError) as error:
        loading.load_tokenizer(folder, settings(folder))
    assert "no end-of-sequence token" in one_line(error)


def test_a_folder_without_a_tokenizer_is_one_line(tiny_llama: Path, tmp_path: Path):
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(ModelError) as error:
        loading.load_tokenizer(tmp_path, settings(tmp_path))
    assert f"the tokenizer in {tmp_path} cannot be loaded" in one_line(error)


def test_a_folder_with_torn_weights_is_one_line(tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "torn"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError) as error:
        load_fp32(folder)
    assert f"the model in {folder} cannot be loaded" in one_line(error)


def test_answers_end_at_every_end_token_of_the_generation_config(tmp_path: Path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loading.end_ids(folder, tokenizer) == {tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert loading.end_ids(folder, tokenizer) == {tokenizer.eos_token_id, 7, 9}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 11}))
    assert loading.end_ids(folder, tokenizer) == {tokenizer.eos_token_id, 11}
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert loading.end_ids(folder, tokenizer) == {tokenizer.eos_token_id}
