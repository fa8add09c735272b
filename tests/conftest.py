"""What every test shares: two threads (or OMP_NUM_THREADS), no network, and one tiny llama."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator

# Two threads that wait for each other spin by default; where other work has the cores, a tiny model
# then takes eighty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import preloaded
import pyarrow as pa
import pytest
import torch
from helpers import PROMPTS, load_fp32, run
from toy import make_model
from transformers.utils import logging as transformers_logging

from scir_cli.data import dataset
from scir_cli.engine import policy

# As many as the worker processes have, which read the variable themselves: with another number,
# sums are rounded otherwise.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
transformers_logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU or vLLM is skipped without one, and said so in the summary.

    `make test-vllm` fails where it cannot be had.
    """
    for item in items:
        if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
            item.add_marker(
                pytest.mark.skip(reason="vLLM has an environment of its own: make test-vllm")
            )
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama and its tokenizer."""
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def scir_command() -> Iterator[list[str]]:
    """The words that run `scir` in a process forked from one that has imported torch.

    `python -m scir_cli` does the same after importing it.
    """
    # The path of a socket may have 107 bytes, which pytest's folders can exceed.
    with tempfile.TemporaryDirectory(prefix="scir") as folder:
        server, words = preloaded.start(Path(folder))
        yield words
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def tiny_policy(tiny_llama: Path) -> policy.Policy:
    """That llama, loaded in fp32. Shared: a test that changes it loads its own."""
    return load_fp32(tiny_llama)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a policy, prompts, labeled pairs, and the chain's datasets up to
    preferences.
    """
    root = tmp_path_factory.mktemp("world")
    make_model(root / "base", seed=1)
    make_model(root / "policy", seed=2)
    words = ["cat", "dog", "sun", "sea", "map", "key"]
    (root / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Tell me of the {w}.", "id": w}) + "\n" for w in words),
        encoding="utf-8",
    )
    gold = [{"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "No."} for w in words]
    (root / "gold.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in gold), encoding="utf-8"
    )
    run(
        "generate",
        model=str(root / "policy"),
        input=str(root / "prompts.jsonl"),
        n=3,
        max_new_tokens=6,
        output_dir=root / "candidates",
        rows_per_part=2,
    )
    models = ["judge", "implicit", "likelihood", "pmi", "rubric"]
    run(
        "judge",
        model=str(root / "policy"),
        reward_reference=str(root / "base"),
        input=str(root / "candidates"),
        reward_models=models,
        output_dir=root / "judged",
        rows_per_part=4,
    )
    run(
        "check-consistency",
        input=str(root / "judged"),
        output_dir=root / "consistency",
        agree_on=["judge", "implicit"],
    )
    run(
        "filter",
        input=str(root / "judged"),
        output_dir=root / "preferences",
        agree_on=["judge", "implicit"],
        keep_unlabeled=True,
        keep_cut=True,
        trl_jsonl=True,
    )
    return root


@pytest.fixture(scope="module")
def scored(world: Path) -> Path:
    """The world with the pairs' scores beside it.

    The judged pairs, given a gold label, as `eval rewards` takes them.
    """
    table = dataset.read_dataset(world / "judged")
    labeled = table.set_column(
        table.column_names.index("gold_label"), "gold_label", pa.array(["first"] * table.num_rows)
    )
    dataset.write_dataset(
        world / "labeled",
        "judged",
        {"stage": "judge"},
        [(0, 1)],
        lambda *_: dataset.Part(labeled, table.num_rows),
    )
    run("eval rewards", input=str(world / "labeled"), output_dir=world / "scores")
    return world


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Tell me of number {i}."}) + "\n" for i in range(PROMPTS)),
        encoding="utf-8",
    )
    return path
