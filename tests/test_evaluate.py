"""eval, through the stages.

Figures that depend on the data alone, files of responses, bad input.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import shown
from toy import make_model

from scir_cli import config, registry, stages
from scir_cli.data import dataset
from scir_cli.errors import ConfigError, DataError
from scir_cli.report import tables


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    make_model(root / "m0", seed=1)
    make_model(root / "m1", seed=2)
    return root


def run(stage: str, **values: Any) -> Any:
    return stages.load(stage)(config.build(registry.STAGES[stage].settings, values, where="test"))


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number in nested figures, by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in numbers(item, f"{path}/{key}").items()}
    return {path: value} if isinstance(value, int | float) else {}


# Rewards


@pytest.mark.slow
def test_figures_do_not_depend_on_packs_or_the_order_of_the_rows(models: Path, tmp_path: Path):
    rows = [
        {
            "prompt": f"Say {i}.",
            "chosen": "Yes " * (i % 5 + 1),
            "rejected": f"No {i}.",
            "subset": f"s{i % 2}",
        }
        for i in range(24)
    ]
    found = []
    for name, pack, seed in (("one", 16384, None), ("other", 300, 5)):
        mixed = random.Random(seed).sample(rows, len(rows)) if seed else rows
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in mixed), encoding="utf-8"
        )
        common = {
            "model": str(models / "m1"),
            "reward_reference": str(models / "m0"),
            "dtype": "fp32",
            "max_tokens_per_pack": pack,
        }
        found.append(
            run(
                "eval rewards",
                **common,
                input=str(tmp_path / f"{name}.jsonl"),
                output_dir=tmp_path / name,
            )["summary"]
        )
    one, other = map(numbers, found)
    assert len(one) > 200
    assert other == pytest.approx(one, abs=1e-4)  # float noise of nats of about 1


def test_accuracy_tables_are_whole_at_eighty_columns():
    rate = {"accuracy": 1.0, "accuracy_low": 0.9, "accuracy_high": 1.0}
    points = [{"coverage": 1.0, "accuracy": 1.0}]
    names = ["judge", "implicit", "likelihood", "external"]
    benchmark = {
        "name": "RewardBench",
        "models": {
            n: {"sections": {"Reasoning": 1.0}, "score": 1.0, "missing": ["a"] * 9} for n in names
        },
    }
    model = rate | {
        "calibration_error": 0.5,
        "verdicts": 100_000,
        "labeled": 9,
        "median_abs_log_odds": 99.99,
        "verdict_mass": 0.99,
    }
    model |= {"flip_rate": 1.0, "length_correlation": -0.99}
    summary = {
        "pairs": 100_000,
        "models": dict.fromkeys(names, model),
        "between": [],
        "agreed": {"pairs": 1, "rate": 1.0, "rate_low": 0.5, "rate_high": 1.0} | rate,
    }
    summary["agreed"]["labeled"] = 1
    summary |= {"curves": {"risk_coverage": dict.fromkeys([*names, "agreed"], points)}}
    subsets = {"llmbar-adver-neighbor": {"pairs": 1000, "models": summary["models"]}}
    text = shown(
        *tables.consistency_tables(summary),
        *tables.accuracy_tables(summary | {"benchmark": benchmark}),
        tables.subset_table(subsets, names),
        tables.subset_table(subsets, names[:2]),
    )
    assert "…" not in text.replace("a …", "")
    assert max(map(len, text.splitlines())) <= 80
    assert all(
        word in text
        for word in (
            "likelihood",
            "llmbar-adver-neighbor",
            "100.0% [90%, 100%]",
            "Reasoning",
            "no examples of a, a, a, a …",
        )
    )


@pytest.mark.slow
def test_pairs_without_any_label_are_refused_and_counted(models: Path, tmp_path: Path):
    pairs = [{"prompt": "Hi.", "chosen": "Yes.", "rejected": "No."}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs[0]) + "\n", encoding="utf-8")
    run(
        "judge",
        model=str(models / "m1"),
        reward_models=["judge"],
        input=str(tmp_path / "pairs.jsonl"),
        output_dir=tmp_path / "j",
    )
    (row,) = dataset.read_dataset(tmp_path / "j", "judged").to_pylist()
    plan = {"stage": "judge", "unlabeled": True}
    dataset.write_dataset(
        tmp_path / "u",
        "judged",
        plan,
        [(0, 1)],
        lambda low, high: dataset.Part([row | {"gold_label": None}], 1),
    )
    with pytest.raises(DataError, match="0 of 1 pairs have a gold label"):
        run("eval rewards", input=str(tmp_path / "u"), output_dir=tmp_path / "o")


# Responses


@pytest.mark.slow
def test_responses_are_in_alpaca_evals_form_one_for_each_instruction(models: Path, tmp_path: Path):
    asked = [
        {
            "instruction": f"Say {i}.",
            "output": "theirs",
            "dataset": f"d{i % 2}",
            "generator": "base",
        }
        for i in range(3)
    ]
    (tmp_path / "set.json").write_text(json.dumps(asked), encoding="utf-8")
    values = {
        "model": str(models / "m1"),
        "input": str(tmp_path / "set.json"),
        "max_new_tokens": 8,
        "system_prompt": "Be short.",
    }
    manifest = run("eval responses", **values, generator="mine", output_dir=tmp_path / "o")
    found = json.loads((tmp_path / "o" / "responses.json").read_text(encoding="utf-8"))
    assert manifest["rows_out"] == 3
    assert [list(row) for row in found] == [["dataset", "instruction", "output", "generator"]] * 3
    assert [(row["instruction"], row["dataset"], row["generator"]) for row in found] == [
        (f"Say {i}.", f"d{i % 2}", "mine") for i in range(3)
    ]
    assert all(isinstance(row["output"], str) for row in found)
    with pytest.raises(ConfigError, match="unknown setting 'n'"):
        run("eval responses", **values, n=2, output_dir=tmp_path / "p")
