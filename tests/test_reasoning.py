"""Reasoning before an answer: where it ends, who reads it, and what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from helpers import run, train
from hypothesis import given
from hypothesis import strategies as st
from thinking_backends import ANSWER
from toy import make_model
from transformers import AutoTokenizer

from scir_cli import config
from scir_cli.analysis import bias, consistency
from scir_cli.analysis.verdicts import from_table
from scir_cli.data import dataset
from scir_cli.engine import loading
from scir_cli.engine.chat import Chat
from scir_cli.engine.reasoning import Markers
from scir_cli.errors import ConfigError
from scir_cli.report import tables
from scir_cli.rewards import reward_models
from scir_cli.rewards.pairs import Pair, make_pairs, tokenize_pairs
from scir_cli.settings import JudgeSettings, RewardSettings

QUESTION = [{"role": "user", "content": "Which number?"}]
THOUGHT = "<think>\nMaybe 4?\n</think>\n\n"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.chat(root / name) for name, family in FAMILIES.items()}


# ------------------------------------------------------------------------ where it ends


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_the_markers_of_its_template(name: str, chats: dict[str, Chat]):
    assert chats[name].markers == Markers(*FAMILIES[name].reasoning)


def test_a_template_and_a_vocabulary_without_a_marker_have_no_reasoning(tiny_llama: Path):
    chat = Chat(AutoTokenizer.from_pretrained(tiny_llama), frozenset({2}))
    assert chat.markers is None
    text = "Yes.</think>No."
    assert chat.split(text, sampled=True) == ("", text)


def test_the_end_that_the_user_names_takes_the_place_of_the_templates(tmp_path: Path):
    named = Chat(FAMILIES["reasons"].chat(tmp_path).tokenizer, frozenset({2}), {}, "ANSWER:")
    assert named.markers == Markers("", "ANSWER:")
    assert named.split("Maybe 4? ANSWER: It is 5.", sampled=True) == (
        "Maybe 4? ANSWER: ",
        "It is 5.",
    )


@pytest.mark.parametrize(
    ("name", "text", "sampled", "expected"),
    [
        ("reasons", THOUGHT + "It is 5.", True, (THOUGHT, "It is 5.")),
        ("reasons", THOUGHT + "It is 5.", False, (THOUGHT, "It is 5.")),
        ("reasons", "It is </think>.", True, ("", "It is </think>.")),
        ("reasons", "<think>\nMaybe 4?", True, ("<think>\nMaybe 4?", "")),
        ("reasons", "<think>\n\n</think>\n\n5", True, ("<think>\n\n</think>\n\n", "5")),
        ("opened_think", "Maybe 4?\n</think>\n\n5", True, ("Maybe 4?\n</think>\n\n", "5")),
        ("opened_think", "Maybe 4?", True, ("Maybe 4?", "")),
        # no model wrote it after the open block
        ("opened_think", "It is 5.", False, ("", "It is 5.")),
        ("opened_think", THOUGHT + "5", False, (THOUGHT, "5")),
        # only the first marker ends the reasoning: what follows it is read
        ("reasons", THOUGHT + "4</think>5", True, (THOUGHT, "4</think>5")),
        (
            "channels",
            "<|channel|>analysis<|message|>4?<|end|><|start|>assistant<|channel|>final<|message|>5",
            True,
            (
                "<|channel|>analysis<|message|>4?<|end|><|start|>assistant"
                "<|channel|>final<|message|>",
                "5",
            ),
        ),
        (
            "channels",
            "<|channel|>final<|message|>5",
            True,
            ("<|channel|>final<|message|>", "5"),
        ),
    ],
)
def test_an_answer_is_split_at_the_end_of_its_reasoning(
    name: str, text: str, sampled: bool, expected: tuple[str, str], chats: dict[str, Chat]
):
    assert chats[name].split(text, sampled=sampled) == expected


@pytest.mark.parametrize("name", FAMILIES)
@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", "<|channel|>", " "])),
    sampled=st.booleans(),
)
def test_reasoning_and_answer_together_are_the_text(
    name: str, pieces: list[str], sampled: bool, chats: dict[str, Chat]
):
    text = "".join(pieces)
    assert "".join(chats[name].split(text, sampled=sampled)) == text


@pytest.mark.parametrize("name", ["reasons", "opened_think"])
def test_the_reasoning_of_sampled_ids_is_counted_in_their_tokens(name: str, chats: dict[str, Chat]):
    chat = chats[name]
    text = THOUGHT.removeprefix("<think>\n") if name == "opened_think" else THOUGHT
    ids = chat.tokenizer.encode(text + "It is 5.", add_special_tokens=False)
    length = chat.n_reasoning_tokens(ids)
    assert length is not None
    assert chat.tokenizer.decode(ids[:length]).endswith("</think>")
    assert "</think>" not in chat.tokenizer.decode(ids[: length - 1])
    assert chat.n_reasoning_tokens(ids[: length - 1]) is None


# ------------------------------------------------------------------------ who reads it


def thinking_model(folder: Path) -> Path:
    """A tiny model with the template of a reasoning model."""
    make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = FAMILIES["reasons"].template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, and candidates with reasoning that it judged."""
    root = tmp_path_factory.mktemp("thinking")
    thinking_model(root / "policy")
    rows = [{"prompt": f"Which number, {i}?"} for i in range(4)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    generated = run(
        "generate", model=str(root / "policy"), input=str(root / "prompts.jsonl"), n=3,
        max_new_tokens=60, backend="thinking_backends:Thinks", output_dir=root / "candidates",
    )  # fmt: skip
    assert generated["rows_out"] == 12
    run(
        "judge", model=str(root / "policy"), input=str(root / "candidates"),
        reward_models=["judge", "likelihood"], output_dir=root / "judged",
    )  # fmt: skip
    return root


def test_candidates_hold_reasoning_and_answer_and_all_their_tokens(thinking: Path):
    chat = FAMILIES["reasons"]
    tokenizer = AutoTokenizer.from_pretrained(thinking / "policy")
    assert chat.reasoning[1] == "</think>"
    for row in dataset.read_dataset(thinking / "candidates").to_pylist():
        assert row["response"] == ANSWER.format(number=row["seed"] % 1000)
        assert row["reasoning"].endswith("</think>\n\n")
        text = tokenizer.decode(row["token_ids"][:-1])
        assert text == row["reasoning"] + row["response"]


def test_judges_read_the_answer_alone_and_responses_are_scored_whole(thinking: Path):
    settings = config.build(
        RewardSettings, {"model": str(thinking / "policy"), "output_dir": "x"}, where="test"
    )
    chat = loading.load_chat(thinking / "policy", settings)
    table, prompt_ids, drops = tokenize_pairs(dataset.read_dataset(thinking / "judged"), chat)
    assert not drops
    for pair in make_pairs(table, prompt_ids):
        for name in ("judge", "rubric"):
            model = reward_models.make([name], chat, settings)[name]
            for branch in model.branches(pair):
                prompt = chat.tokenizer.decode(branch.ids)
                # what the template writes before the verdict
                assert prompt.count("</think>") == 1
                assert "Verdict: B" not in prompt
                assert "Number" in prompt
        likelihood = reward_models.make(["likelihood"], chat, settings)["likelihood"]
        for branch, ids in zip(likelihood.branches(pair), pair.response_ids, strict=True):
            assert tuple(branch.target_tokens) == ids
            assert "Verdict: B" in chat.tokenizer.decode(ids)


def test_the_reasoning_of_earlier_answers_is_not_part_of_the_question(chats: dict[str, Chat]):
    messages = [
        *QUESTION,
        {"role": "assistant", "content": THOUGHT + "5"},
        {"role": "user", "content": "Sure?"},
    ]
    pair = Pair("0", messages, (), ((), ()), ("Yes.", "No."))
    settings = config.build(RewardSettings, {"model": "m", "output_dir": "x"}, where="test")
    model = reward_models.make(["judge"], chats["trims"], settings)["judge"]
    prompt = chats["trims"].tokenizer.decode(model.branches(pair)[0].ids)
    assert "Assistant: 5\nUser: Sure?" in prompt
    assert "Maybe" not in prompt


def test_pairs_of_a_file_are_split_when_they_are_tokenized_and_rendered_alike_again(
    thinking: Path, tmp_path: Path
):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "Which?", "chosen": THOUGHT + "5", "rejected": THOUGHT + "4"},
        {"prompt": "Sure?", "chosen": "Yes.", "rejected": THOUGHT + "No."},
        {"prompt": "Why?", "chosen": "Well.", "rejected": "<think>\nNo answer follows"},
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    manifest = run(
        "judge", model=str(thinking / "policy"), input=str(pairs), reward_models=["judge"],
        output_dir=tmp_path / "judged",
    )  # fmt: skip
    assert manifest["drops"] == {"no_answer": 1}
    table = dataset.read_dataset(tmp_path / "judged")
    found = {
        (row[side]["reasoning"], row[side]["text"])
        for row in table.to_pylist()
        for side in ("first", "second")
    }
    assert found == {(THOUGHT, "5"), (THOUGHT, "4"), (None, "Yes."), (THOUGHT, "No.")}
    settings = config.build(
        RewardSettings, {"model": str(thinking / "policy"), "output_dir": "x"}, where="test"
    )
    chat = loading.load_chat(thinking / "policy", settings)
    again, prompt_ids, drops = tokenize_pairs(table, chat)
    assert not drops
    assert again.equals(table)
    for pair in make_pairs(again, prompt_ids):
        for ids in pair.response_ids:
            assert "Maybe" in chat.tokenizer.decode(ids) or "Yes." in chat.tokenizer.decode(ids)


def test_training_reads_all_tokens(thinking: Path, tmp_path: Path):
    run(
        "filter", input=str(thinking / "judged"), rule="judge", trl_jsonl=True,
        output_dir=tmp_path / "preferences",
    )  # fmt: skip
    for row in dataset.read_dataset(tmp_path / "preferences").to_pylist():
        better = row["first"] if row["label"] == "first" else row["second"]
        assert row["chosen"][0]["content"] == better["reasoning"] + better["text"]
    for line in (tmp_path / "preferences" / "trl.jsonl").read_text(encoding="utf-8").splitlines():
        assert "</think>" in json.loads(line)["chosen"][0]["content"]
    manifest = train(
        thinking, tmp_path / "out", input=str(tmp_path / "preferences"), objective="dpo",
        reward_reference=None, max_steps=1, batch_size=2,
    )  # fmt: skip
    assert manifest["drops"] == {}


# ------------------------------------------------------------------------ what is reported


def test_length_is_reported_with_and_without_reasoning(thinking: Path):
    v = from_table(dataset.read_dataset(thinking / "judged"))
    table = dataset.read_dataset(thinking / "judged").to_pylist()
    tokens = [len(row["first"]["token_ids"]) - len(row["second"]["token_ids"]) for row in table]
    letters = [len(row["first"]["text"]) - len(row["second"]["text"]) for row in table]
    np.testing.assert_array_equal(v.length_difference, tokens)
    np.testing.assert_array_equal(v.answer_length_difference, letters)
    summary = consistency.summary(v)
    assert "answer_length_correlation" in summary["models"]["judge"]
    (first, *_) = tables.verdict_tables({"summary": summary})
    assert "length r without reasoning: judge" in str(first.caption)
    sides = bias.properties(v, dataset.read_dataset(thinking / "judged"))
    assert list(sides)[:2] == ["longer", "longer answer"]
    np.testing.assert_array_equal(sides["longer answer"], np.sign(letters))


def test_without_reasoning_nothing_is_reported_of_it(world: Path):
    table = dataset.read_dataset(world / "judged")
    v = from_table(table)
    assert np.isnan(v.answer_length_difference).all()
    assert "longer answer" not in bias.properties(v, table)
    assert "answer_length_correlation" not in consistency.summary(v)["models"]["judge"]


# ------------------------------------------------------------------------ rationales


def judged(thinking: Path, out: Path, backend: str, **values: Any) -> list[dict[str, Any]]:
    run(
        "judge", model=str(thinking / "policy"), input=str(thinking / "candidates"), limit=3,
        reward_models=["rationale", "judge"], backend=f"thinking_backends:{backend}",
        output_dir=out, **values,
    )  # fmt: skip
    return dataset.read_dataset(out).to_pylist()


def test_a_rationale_that_ends_inside_its_reasoning_is_no_verdict(thinking: Path, tmp_path: Path):
    for name, backend, tokens in (("never", "NeverAnswers", 100), ("cut", "Thinks", 12)):
        rows = judged(thinking, tmp_path / name, backend, rationale_max_tokens=tokens)
        assert rows
        for row in rows:
            rationale, judge = row["rewards"]
            assert rationale["log_odds"] is None
            assert rationale["forward_log_odds"] is None
            assert rationale["swapped_log_odds"] is None
            assert judge["log_odds"] is not None
    manifest = dataset.open_dataset(tmp_path / "cut", "judged")
    assert manifest.num_rows == len(rows)
    filtered = run("filter", input=str(tmp_path / "cut"), rule="rationale",
                   output_dir=tmp_path / "filtered")  # fmt: skip
    assert filtered["drops"] == {"no_verdict": len(rows)}


def test_a_pair_without_a_finished_rationale_is_not_trained_with_it(thinking: Path, tmp_path: Path):
    judged(thinking, tmp_path / "judged", "Thinks", rationale_max_tokens=12)
    make_model(tmp_path / "base", seed=5)
    tokenizer = AutoTokenizer.from_pretrained(thinking / "policy")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(Exception, match="'unfinished_rationale': 3"):
        train(
            thinking, tmp_path / "out", input=str(tmp_path / "judged"), max_steps=1,
            reward_models=["judge", "implicit", "rationale"], batch_size=2,
            reward_reference=str(tmp_path / "base"),
        )  # fmt: skip


def test_a_verdict_is_read_after_the_reasoning_of_its_rationale(thinking: Path, tmp_path: Path):
    rows = judged(thinking, tmp_path / "judged", "Thinks")
    settings = config.build(
        RewardSettings, {"model": str(thinking / "policy"), "output_dir": "x"}, where="test"
    )
    chat = loading.load_chat(thinking / "policy", settings)
    model = reward_models.make(["rationale"], chat, settings)["rationale"]
    table, prompt_ids, _ = tokenize_pairs(dataset.read_dataset(tmp_path / "judged"), chat)
    for row, pair in zip(rows, make_pairs(table, prompt_ids), strict=True):
        assert row["rewards"][0]["log_odds"] is not None
        for branch in model.branches(pair):
            _, _, written = chat.tokenizer.decode(branch.ids).rpartition("assistant\n")
            # the reasoning has a verdict of its own, which does not end the rationale
            assert written.count("Verdict:") == 2
            assert written.endswith(".\n\nVerdict:")
            assert "</think>\n\nNumber" in written


# ------------------------------------------------------------------------ the setting


def test_the_marker_is_a_setting_of_stages_that_read_texts():
    values = {"model": "m", "input": "i", "output_dir": "x"}
    plain = config.build(JudgeSettings, values, where="test")
    named = config.build(JudgeSettings, values | {"think_end": "</done>"}, where="test")
    assert "think_end" not in plain.plan()
    assert named.plan()["think_end"] == "</done>"
    with pytest.raises(ConfigError, match="expected the text that ends the reasoning"):
        config.build(JudgeSettings, values | {"think_end": " "}, where="test")


def test_a_template_that_refuses_reasoning_is_searched_for_a_common_marker(tmp_path: Path):
    chat = FAMILIES["trims"].chat(tmp_path)
    refusing = (
        "{% if messages[-1]['thinking'] %}{{ raise_exception('unknown key') }}{% endif %}"
        + chat.tokenizer.chat_template
    )
    chat.tokenizer.chat_template = refusing
    assert chat.markers == Markers("<think>", "</think>")


# ------------------------------------------------------------------------ the whole loop


@pytest.mark.parametrize(
    ("name", "backend"), [("reasons", "Thinks"), ("channels", "WritesInChannels")]
)
def test_a_loop_over_answers_with_reasoning_trains_and_evaluates(
    name: str, backend: str, tmp_path: Path
):
    for seed, folder in enumerate(("base", "policy")):
        make_model(tmp_path / folder, seed=seed, vocab_size=440)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        tokenizer.chat_template = FAMILIES[name].template
        tokenizer.add_tokens(list(FAMILIES[name].special), special_tokens=True)
        tokenizer.save_pretrained(tmp_path / folder)
    models = {
        "model": str(tmp_path / "policy"),
        "reward_reference": str(tmp_path / "base"),
    }
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Which?"}\n', encoding="utf-8")
    (tmp_path / "labeled.jsonl").write_text(
        json.dumps({"prompt": "Which?", "chosen": "Number 4.", "rejected": "No."}) + "\n",
        encoding="utf-8",
    )
    run(
        "generate", model=models["model"], input=str(tmp_path / "prompts.jsonl"), n=3,
        max_new_tokens=90, backend=f"thinking_backends:{backend}",
        output_dir=tmp_path / "candidates",
    )  # fmt: skip
    for row in dataset.read_dataset(tmp_path / "candidates").to_pylist():
        assert row["response"] == ANSWER.format(number=row["seed"] % 1000)
        assert "Verdict: B" in row["reasoning"]
    judged = run(
        "judge", **models, input=str(tmp_path / "candidates"), output_dir=tmp_path / "judged"
    )
    assert (judged["rows_out"], judged["drops"]) == (3, {})
    run(
        "filter", input=str(tmp_path / "judged"), keep_unlabeled=True,
        output_dir=tmp_path / "preferences",
    )  # fmt: skip
    trained = train(tmp_path, tmp_path / "next", batch_size=3, max_steps=1)
    assert (trained["rows_out"], trained["drops"]) == (3, {})
    evaluated = run(
        "eval rewards", model=str(tmp_path / "next"), reward_reference=models["reward_reference"],
        input=str(tmp_path / "labeled.jsonl"), output_dir=tmp_path / "eval",
    )  # fmt: skip
    assert evaluated["summary"]["models"]["judge"]["labeled"] == 1
