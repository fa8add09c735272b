"""Models and inputs at the edge: one line each, counted by reason, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import HEADER, WITHOUT_SYSTEM, turns
from helpers import run, run_command
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import make_adapter, make_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scir_cli import config
from scir_cli.data import dataset
from scir_cli.engine import model_files
from scir_cli.engine.chat import Chat
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import DataError, ModelError
from scir_cli.rewards.prompts import PAIRWISE, load_template
from scir_cli.settings import ModelSettings

#: Words of the texts with which a template's position of an answer is found
PROBES = ["4711", "(", ")", "Yes", "No", ".", "b", "*", "one"]
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def generate(model: Path, source: Path, out: Path) -> dict[str, Any]:
    return run(
        "generate", model=str(model), input=str(source), n=2, max_new_tokens=4, output_dir=out
    )


def test_an_answer_in_the_prompts_place_is_an_empty_prompt(tiny_llama: Path, tmp_path: Path):
    answer = {"role": "assistant", "content": "Yes."}
    source = lines(tmp_path / "a.jsonl", {"messages": [answer]}, {"prompt": "Hi."})
    manifest = generate(tiny_llama, source, tmp_path / "out")
    assert (manifest["rows_out"], manifest["drops"]) == (2, {"empty_prompt": 2})
    with pytest.raises(DataError, match=r"holds no usable prompt \(\{'empty_prompt': 1\}\)"):
        generate(tiny_llama, lines(tmp_path / "b.jsonl", {"messages": [answer]}), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_template_that_drops_system_turns_drops_those_rows_and_answers_the_others(
    tmp_path: Path,
):
    model = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = WITHOUT_SYSTEM
    tokenizer.save_pretrained(model)
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hi."}
    source = lines(tmp_path / "p.jsonl", {"messages": [system, user]}, {"messages": [user]})
    manifest = generate(model, source, tmp_path / "out")
    assert (manifest["rows_out"], manifest["drops"]) == (2, {"content_missing": 2})
    pair = {"chosen": "Yes.", "rejected": "No."}
    source = lines(
        tmp_path / "pairs.jsonl", {"messages": [system, user]} | pair, {"messages": [user]} | pair
    )
    manifest = run(
        "judge", model=str(model), input=str(source), reward_models=["judge"],
        output_dir=tmp_path / "judged",
    )  # fmt: skip
    assert (manifest["rows_out"], manifest["drops"]) == (1, {"content_missing": 1})


@pytest.mark.parametrize("known", [(), ("B",)])
def test_a_tokenizer_without_the_verdict_word_is_refused_by_name(known: tuple[str, ...]):
    template = turns(HEADER)
    missing = {"A", "B"} - {*known}
    words = sorted({*PAIRWISE.split(), *PROBES, *known} - missing)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"], name_or_path="small",
    )  # fmt: skip
    tokenizer.chat_template = template
    chat = Chat(tokenizer, frozenset({vocabulary["<|im_end|>"]}))
    with pytest.raises(ModelError) as error:
        chat.verdicts(["A", "B"])
    assert str(error.value) == (
        "the verdict 'A' is not in the vocabulary of this tokenizer (model: small); "
        "choose others with --verdict-tokens"
    )


def test_a_config_without_an_end_token_uses_the_tokenizers(tmp_path: Path):
    model = make_model(tmp_path / "model", eos_token_id=None)
    for name in ("config.json", "generation_config.json"):
        path = model / name
        written = json.loads(path.read_text(encoding="utf-8"))
        written.pop("eos_token_id", None)
        path.write_text(json.dumps(written), encoding="utf-8")
    source = lines(tmp_path / "p.jsonl", {"prompt": "Hi."})
    run("generate", model=str(model), input=str(source), n=20, max_new_tokens=60, temperature=3.0,
        output_dir=tmp_path / "out")  # fmt: skip
    rows = dataset.read_dataset(tmp_path / "out").to_pylist()
    reasons = {row["finish_reason"] for row in rows}
    assert "stop" in reasons
    for row in rows:
        assert (row["token_ids"][-1] == 2) == (row["finish_reason"] == "stop")
        assert 2 not in row["token_ids"][:-1]


def test_what_does_not_fit_into_sixteen_tokens_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    model = make_model(tmp_path / "model", max_position_embeddings=16)
    source = lines(tmp_path / "p.jsonl", {"prompt": "Hi."}, {"prompt": "Say a long word."})
    manifest = generate(model, source, tmp_path / "candidates")
    assert (manifest["rows_out"], manifest["drops"]) == (2, {"prompt_too_long": 2})
    pairs = lines(tmp_path / "pairs.jsonl", {"prompt": "Hi.", "chosen": "Yes.", "rejected": "No."})
    manifest = run("judge", model=str(model), input=str(pairs), reward_models=["judge"],
                   output_dir=tmp_path / "judged")  # fmt: skip
    assert (manifest["rows_out"], manifest["drops"]) == (0, {"too_long": 1})
    long = lines(tmp_path / "l.jsonl", {"prompt": "Hi. " * 9, "chosen": "Yes.", "rejected": "No."})
    words = ["train", "--objective", "dpo", "-m", str(model), "-i", str(long)]
    assert run_command([*words, "-o", str(tmp_path / "trained")], monkeypatch) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "leaves no pair to train on: {'too_long': 1}" in line
    assert not list((tmp_path / "trained").glob("*.safetensors"))


def test_one_answer_per_prompt_is_refused_with_what_to_do(world: Path, tmp_path: Path):
    common = {"model": str(world / "policy"), "output_dir": tmp_path / "c"}
    run("generate", **common, input=str(world / "prompts.jsonl"), n=1, max_new_tokens=4)
    judge = {**common, "input": str(tmp_path / "c"), "reward_models": ["judge"]}
    with pytest.raises(DataError, match="one answer per prompt.* --n 2 or more"):
        run("judge", **judge | {"output_dir": tmp_path / "j"})
    assert not (tmp_path / "j").exists()
    crossed = run("judge", **judge | {"output_dir": tmp_path / "x"}, pairs="cross")
    assert crossed["rows_in"] == 6


def test_a_file_in_a_models_place_and_an_old_adapter_are_named(world: Path, tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"x\.gguf is a file; a model is a folder.* gguf_file"):
        model_files.resolve(str(tmp_path / "x.gguf"))
    adapter = make_adapter(tmp_path / "adapter", world / "policy")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors; its adapter_model"):
        model_files.base_model_path(adapter)


def test_a_byte_order_mark_is_no_part_of_a_template_or_prompt(tmp_path: Path, tiny_llama: Path):
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    path = tmp_path / "t.jinja"
    path.write_text(template, encoding="utf-8-sig")
    settings = {"model": str(tiny_llama), "output_dir": "o", "chat_template": str(path)}
    chat = LazyPolicy(config.build(ModelSettings, settings, where="test"), str(tiny_llama)).chat
    assert chat.tokenizer.chat_template == template
    prompt = tmp_path / "p.txt"
    prompt.write_text("{question} {a} {b}?", encoding="utf-8-sig")
    assert load_template(prompt, "", ("question", "a", "b")) == "{question} {a} {b}?"
