"""Each figure that training logs has one entry, under a key that no setting changes.

The view and the page read that list.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from typing import Any

import pytest
from rich.console import Console
from toy import make_model

from scir_cli import config, stages
from scir_cli.report import html
from scir_cli.report.training_view import View
from scir_cli.settings import REWARD_MODELS, TrainSettings
from scir_cli.training import metrics

RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo"},
    "sft": {"objective": "sft"},
    "scir": {"objective": "scir", "reward_models": ["judge", "implicit", "rubric"]},
    "ipo": {"objective": "scir", "preference_loss": "ipo"},
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """metrics.jsonl of one run of each kind, two steps on a toy, by name.

    The folders are beside "folder".
    """
    root = tmp_path_factory.mktemp("metrics")
    make_model(root / "base", seed=1)
    make_model(root / "policy", seed=2)
    pairs = [
        {"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "No."}
        for w in ("cat", "dog", "sun", "sea")
    ]
    (root / "gold.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8"
    )
    common = {
        "model": str(root / "policy"),
        "reward_reference": str(root / "base"),
        "input": str(root / "gold.jsonl"),
    }
    common |= {
        "validation": str(root / "gold.jsonl"),
        "batch_size": 2,
        "learning_rate": 1e-3,
        "dtype": "fp32",
        "device": "cpu",
    }
    logged = {}
    for name, values in RUNS.items():
        settings = config.build(
            TrainSettings, {**common, **values, "output_dir": root / name}, where="test"
        )
        stages.load("train")(settings)
        text = (root / name / "metrics.jsonl").read_text(encoding="utf-8")
        logged[name] = [{**json.loads(line), "folder": root / name} for line in text.splitlines()]
    return logged


def keys(found: list[dict[str, Any]]) -> set[str]:
    return {key for record in found for key in record} - {"step", "kind", "folder"}


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_that_is_logged_has_an_entry(
    name: str, records: dict[str, list[dict[str, Any]]]
):
    found = keys(records[name])
    assert {"loss", "grad_norm", "tokens", "validation/accuracy/judge"} <= found
    assert sorted(key for key in found if metrics.find(key) is None) == []


def test_every_entry_is_logged_by_some_run(records: dict[str, list[dict[str, Any]]]):
    found = set().union(*map(keys, records.values()))
    dead = [
        metric.key for metric in metrics.METRICS if not any(metric.covers(key) for key in found)
    ]
    # They need --anchors (test_methods.py) and a mixture of experts (test_router_loss.py).
    assert dead == ["anchors/verdict_nll", "router_loss"]


def test_ipo_logs_the_same_keys_as_dpo_and_both_show_their_preference_loss(
    records: dict[str, list[dict[str, Any]]],
):
    with_dpo, with_ipo = (
        {key for key in keys(records[name]) if key.startswith("scir/")} for name in ("scir", "ipo")
    )
    assert with_dpo == with_ipo >= {"scir/preference_loss", "scir/inconsistency"}
    for name in ("scir", "ipo"):
        view = View("train", 2)
        steps = [record for record in records[name] if record["kind"] == "train"]
        for record in steps:
            view.see(
                record["step"],
                {
                    key: value
                    for key, value in record.items()
                    if key not in ("step", "kind", "folder")
                },
            )
        console = Console(file=io.StringIO(), width=80)
        console.print(view)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "preference loss" in shown
        assert "inconsistency" in shown
        assert "preference loss" in html.render(html.training_page(steps[0]["folder"]))


def test_validation_looks_at_every_reward_model(records: dict[str, list[dict[str, Any]]]):
    assert {f"validation/accuracy/{name}" for name in ("judge", "implicit", "rubric")} <= keys(
        records["scir"]
    )
    assert "validation/accuracy/implicit" not in keys(records["dpo"])  # dpo has no reward reference


def test_figures_of_one_picture_share_section_unit_and_scale():
    pictures = defaultdict(set)
    for metric in metrics.METRICS:
        if metric.picture is not None:
            pictures[metric.picture].add((metric.section, metric.unit, metric.is_rate))
    assert [title for title, kinds in pictures.items() if len(kinds) > 1] == []


def test_keys_and_labels_are_distinct_and_fit_the_view():
    names = [metric.key for metric in metrics.METRICS]
    labels = [metric.label for metric in metrics.METRICS]
    assert len(set(names)) == len(set(labels)) == len(names)
    for metric in metrics.METRICS:
        for model in (*REWARD_MODELS, "rationale_forward") if metric.in_view else ():
            if (
                "validation" not in metric.key or "_" not in model
            ):  # validation has one verdict of both orders
                assert len(metric.full_label(metric.key + model)) <= 30


def test_a_prefix_names_the_reward_model_after_its_label_and_alone_in_its_picture():
    metric = metrics.find("abs_log_odds/my_model")
    assert metric is not None
    assert metric.full_label("abs_log_odds/my_model") == "|log-odds| my_model"
    assert metric.short_label("abs_log_odds/my_model") == "my_model"
    assert metrics.find("loss/other") is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "train/loss"),
        ("rewards/margins", "train/rewards/margins"),
        ("validation/accuracy/judge", "eval/accuracy/judge"),
    ],
)
def test_dashboards_have_the_names_of_the_fields_trainers(key: str, name: str):
    assert metrics.tracker_name(key) == name
