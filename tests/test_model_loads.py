"""A stage hashes the weights of each model once, loads its tokenizer once, and reads its weights at
most once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toy import make_model

from scir_cli import config, registry, stages
from scir_cli.data import hashing
from scir_cli.engine import loading
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.settings import ModelSettings


@dataclass
class Reads:
    """How often each model folder was read, by its name."""

    hashed: Counter[str] = field(default_factory=Counter)
    tokenizers: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Counts from here on; what is counted is still done."""
    found = Reads()

    def count(
        module: Any, name: str, counter: Counter[str], folder_of: Callable[[Path], Path | None]
    ) -> None:
        function = getattr(module, name)

        def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
            if folder := folder_of(path):
                counter[folder.name] += 1
            return function(path, *args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(
        hashing,
        "digest_file",
        found.hashed,
        lambda path: path.parent if path.suffix == ".safetensors" else None,
    )
    count(loading, "load_tokenizer", found.tokenizers, lambda path: path)
    count(loading, "load_model", found.weights, lambda path: path)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "base", seed=1, max_position_embeddings=2048)
    make_model(folder / "policy", seed=2, max_position_embeddings=2048)
    pairs = [
        {"prompt": f"Say {word}.", "chosen": f"The {word}.", "rejected": "No."}
        for word in ("cat", "dog", "sun")
    ]
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 82, "category": "math", "turns": ["1 + 1?", "And 1?"]},
    ]
    for name, rows in (("pairs", pairs), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


def run(stage: str, root: Path, out: Path, **values: Any) -> None:
    common = {"model": str(root / "policy"), "output_dir": out, "dtype": "fp32", "device": "cpu"}
    stages.load(stage)(config.build(registry.STAGES[stage].settings, common, values, where="test"))


def test_judge_reads_the_policy_and_the_reward_reference_once(
    root: Path, tmp_path: Path, reads: Reads
):
    run(
        "judge",
        root,
        tmp_path / "judged",
        input=str(root / "pairs.jsonl"),
        reward_reference=str(root / "base"),
        rows_per_part=1,
    )
    assert reads == Reads(*[Counter(policy=1, base=1)] * 3)


@pytest.mark.parametrize("lora", [0, 2])
def test_train_reads_the_policy_and_the_reward_reference_once(
    root: Path, tmp_path: Path, reads: Reads, lora: int
):
    data = {
        "input": str(root / "pairs.jsonl"),
        "validation": str(root / "pairs.jsonl"),
        "reward_reference": str(root / "base"),
    }
    run("train", root, tmp_path / "trained", **data, max_steps=1, lora={"rank": lora})
    assert reads.tokenizers == reads.weights == Counter(policy=1, base=1)
    # Its own weights for the manifest; the adapter's for base.json as well.
    written = Counter(trained=1, adapter=2) if lora else Counter(trained=1)
    assert reads.hashed == Counter(policy=1, base=1) + written


def test_mt_bench_reads_a_model_once_for_all_turns_and_temperatures(
    root: Path, tmp_path: Path, reads: Reads
):
    run(
        "eval mt-bench",
        root,
        tmp_path / "graded",
        input=str(root / "questions.jsonl"),
        max_new_tokens=4,
    )
    folders = sorted(path.name for path in (tmp_path / "graded").glob("turn-*") if path.is_dir())
    assert folders == ["turn-1-0.0", "turn-1-0.7", "turn-2-0.0", "turn-2-0.7"]
    assert reads == Reads(*[Counter(policy=1)] * 3)


def test_mt_bench_reads_the_judge_once_beside_the_model(root: Path, tmp_path: Path, reads: Reads):
    judge = str(root / "base")
    run(
        "eval mt-bench",
        root,
        tmp_path / "graded",
        input=str(root / "questions.jsonl"),
        judge=judge,
        max_new_tokens=4,
    )
    assert reads == Reads(*[Counter(policy=1, base=1)] * 3)


def test_a_lazy_policy_reads_its_weights_on_demand_and_again_after_unload(root: Path, reads: Reads):
    settings = config.build(
        ModelSettings,
        {"model": str(root / "policy"), "output_dir": "o", "device": "cpu"},
        where="test",
    )
    lazy = LazyPolicy(settings, settings.model)
    assert lazy.context_length == 2048
    assert not lazy.loaded and not reads.weights
    loaded = lazy.load()
    assert lazy.load() is loaded and lazy.loaded
    assert (loaded.chat, loaded.weights_key, loaded.path, loaded.meter) == (
        lazy.chat,
        lazy.weights_key,
        lazy.path,
        lazy.meter,
    )
    lazy.unload()
    assert not lazy.loaded
    assert lazy.load() is not loaded
    assert reads == Reads(Counter(policy=1), Counter(policy=1), Counter(policy=2))
