"""Token ids of another tokenizer or chat template: the texts are encoded again, and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import load_fp32, run, train
from toy import make_model
from transformers import AutoTokenizer

from scir_cli.data import dataset
from scir_cli.data.files import read_json

#: Tokens of the other tokenizer, of the 400 of the world's
SMALLER = 300


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its base, whose tokenizer lacks the last merges: other ids for a text."""
    folder = make_model(tmp_path_factory.mktemp("other") / "model", seed=7)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    n_merges = len(model["merges"]) - (len(model["vocab"]) - SMALLER)
    model["merges"] = model["merges"][:n_merges]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < SMALLER}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    base = make_model(folder.parent / "base", seed=8)
    shutil.copy(path, base / "tokenizer.json")
    return folder


def is_in_ids_of(model: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether the token ids of all responses are those of the model's own chat template."""
    chat = load_fp32(model).chat
    for row in rows:
        for side in ("first", "second"):
            if row[side]["token_ids"] != chat.response_ids(row["messages"], row[side]["text"]):
                return False
    return True


def test_a_judge_with_another_tokenizer_encodes_the_texts_again_and_counts_them(
    world: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    models = ["likelihood", "pmi"]
    manifest = run(
        "judge",
        model=str(other),
        input=str(world / "candidates"),
        reward_models=models,
        output_dir=tmp_path / "judged",
        rows_per_part=4,
    )
    judged = dataset.read_dataset(tmp_path / "judged").to_pylist()
    assert manifest["encoded_again"] == len(judged) == manifest["rows_out"]
    assert f"{len(judged)} pairs hold token ids of another tokenizer" in capsys.readouterr().err
    assert is_in_ids_of(other, judged)
    assert all(max(row["first"]["token_ids"]) < SMALLER for row in judged)

    # The same texts from a file have the same log-odds.
    pairs = [{"messages": r["messages"], "first": r["first"], "id": r["pair_id"]} for r in judged]
    path = tmp_path / "pairs.jsonl"
    lines = []
    for pair, row in zip(pairs, judged, strict=True):
        texts = {"chosen": row["first"]["text"], "rejected": row["second"]["text"]}
        messages = [{key: m[key] for key in ("role", "content")} for m in pair["messages"]]
        lines.append(json.dumps({"messages": messages, "id": pair["id"], **texts}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    again = run(
        "judge",
        model=str(other),
        input=str(path),
        reward_models=models,
        output_dir=tmp_path / "again",
    )
    assert "encoded_again" not in again
    expected = {row["pair_id"]: row["rewards"] for row in judged}
    for row in dataset.read_dataset(tmp_path / "again").to_pylist():
        sign = 1 if row["gold_label"] == "first" else -1
        for verdict, reward in zip(
            row["rewards"], expected[json.loads(row["extra"])["id"]], strict=True
        ):
            assert sign * verdict["log_odds"] == pytest.approx(reward["log_odds"], abs=1e-3)


@pytest.mark.parametrize("objective", ["dpo", "scir"])
def test_training_a_model_with_another_tokenizer_encodes_the_texts_again(
    world: Path, other: Path, tmp_path: Path, objective: str
):
    manifest = train(
        world,
        tmp_path / "trained",
        model=str(other),
        reward_reference=str(other.parent / "base"),
        objective=objective,
    )
    assert manifest["encoded_again"] > 0
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["drops"].values())


def test_ids_of_the_models_own_tokenizer_stay_also_after_training(world: Path, tmp_path: Path):
    train(world, tmp_path / "trained", objective="sft")
    assert "encoded_again" not in read_json(tmp_path / "trained" / "manifest.json")
    manifest = run(
        "judge",
        model=str(tmp_path / "trained"),
        input=str(world / "candidates"),
        reward_models=["likelihood"],
        output_dir=tmp_path / "judged",
    )
    assert "encoded_again" not in manifest
    encodings = {
        read_json(world / name / "manifest.json")["encoding"]
        for name in ("candidates", "judged", "preferences")
    }
    assert encodings == {manifest["encoding"]}
    sampled = {
        row["candidate_id"]: row["token_ids"]
        for row in dataset.read_dataset(world / "candidates").to_pylist()
    }
    for row in dataset.read_dataset(tmp_path / "judged").to_pylist():
        assert row["first"]["token_ids"] == sampled[row["first"]["candidate_id"]]


def test_another_chat_template_makes_the_ids_foreign(world: Path, tmp_path: Path):
    model = make_model(tmp_path / "model", seed=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_start|>")
    tokenizer.save_pretrained(model)
    manifest = run(
        "judge",
        model=str(model),
        input=str(world / "judged"),
        reward_models=["likelihood"],
        output_dir=tmp_path / "judged",
    )
    assert manifest["encoded_again"] == manifest["rows_out"] > 0
    assert is_in_ids_of(model, dataset.read_dataset(tmp_path / "judged").to_pylist())
