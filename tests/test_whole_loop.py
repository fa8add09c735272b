"""The whole loop on tiny models of today: what they sample is judged, trained and evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from helpers import run, train
from safetensors.torch import load_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import architectures

from scir_cli.data import dataset

#: Architecture and template of a model that reasons, of one with channels, sinks and experts, of a
#: hybrid, and of a wrapper around a text and a vision tower
KINDS = [
    ("qwen3", "empty_think"),
    ("gpt_oss", "channels"),
    ("qwen3_next", "reasons"),
    ("qwen3_5", "empty_think"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("architecture", "family"), KINDS, ids=[kind for kind, _ in KINDS])
def test_the_whole_loop_on_a_model_of_each_kind(architecture: str, family: str, tmp_path: Path):
    for seed, name in enumerate(("base", "policy")):
        folder = architectures.make(tmp_path / name, architecture, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = FAMILIES[family].template
        tokenizer.add_tokens(list(FAMILIES[family].special), special_tokens=True)
        tokenizer.add_tokens(list(FAMILIES[family].words))
        assert len(tokenizer) <= architectures.VOCABULARY
        tokenizer.save_pretrained(folder)
    prompts = [{"prompt": f"Tell me of {word}."} for word in ("cats", "dogs")]
    labeled = [{**row, "chosen": "Soft fur.", "rejected": "No."} for row in prompts]
    for name, rows in (("prompts", prompts), ("labeled", labeled)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    models = {"model": str(tmp_path / "policy"), "reward_reference": str(tmp_path / "base")}

    sampled = run(
        "generate",
        model=models["model"],
        input=str(tmp_path / "prompts.jsonl"),
        n=3,
        max_new_tokens=12,
        output_dir=tmp_path / "candidates",
    )
    assert (sampled["rows_out"], sampled["drops"]) == (6, {})
    judged = run(
        "judge",
        **models,
        input=str(tmp_path / "candidates"),
        reward_models=["judge", "implicit", "likelihood", "pmi"],
        output_dir=tmp_path / "judged",
    )
    assert judged["rows_in"] == judged["rows_out"] + sum(judged["drops"].values()) == 6
    for row in dataset.read_dataset(tmp_path / "judged").to_pylist():
        assert all(reward["log_odds"] is not None for reward in row["rewards"])
    run(
        "filter",
        input=str(tmp_path / "judged"),
        rule="consensus",
        keep_cut=True,
        label_temperature=1.0,
        output_dir=tmp_path / "preferences",
    )
    trained = train(tmp_path, tmp_path / "next", objective="scir", target="consensus", max_steps=1)
    assert trained["rows_out"] >= 2
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("policy", "next"))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    found = run(
        "eval rewards",
        model=str(tmp_path / "next"),
        reward_reference=models["reward_reference"],
        input=str(tmp_path / "labeled.jsonl"),
        output_dir=tmp_path / "eval",
    )
    assert found["summary"]["models"]["judge"]["labeled"] == 2
