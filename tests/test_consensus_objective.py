"""`objective: scir` with `target: consensus`.

The loss and its gradient by hand, and a run from judged pairs to a model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run, train
from torch import Tensor
from toy import make_model

from scir_cli import config
from scir_cli.data import dataset, files
from scir_cli.engine.chat import Chat
from scir_cli.engine.policy import Policy
from scir_cli.errors import ConfigError
from scir_cli.rewards.pairs import Pair
from scir_cli.settings import TrainSettings
from scir_cli.training import losses, metrics
from scir_cli.training.consensus import Consensus, warn_of_hard_labels
from scir_cli.training.objectives import Dpo, Example

LN4 = math.log(4)


def settings(**values: Any) -> TrainSettings:
    base = {
        "model": "m",
        "input": "i",
        "output_dir": "o",
        "target": "consensus",
        "penalty_weight": 0.5,
    }
    return config.build(TrainSettings, base, values, where="test")


def objective(chat: Chat, **values: Any) -> Consensus:
    return Consensus(settings(**values), chat, "start", None)


def example(label: int, label_probability: float) -> Example:
    """A pair of 2 and 4 tokens whose reference gives -1 and -2 nats."""
    messages: list[Any] = [{"role": "user", "content": "q"}]
    ids = ((5, 2), (5, 6, 7, 2))
    pair = Pair("p", messages, (1,), ids, ("x", "y"), {"start": (-1.0, -2.0)})
    return Example(pair, label, label_probability)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


#: log-probabilities of the two responses, then log P(A), log P(B): ln 4 for the first in one order,
#: and for seat A in the other
LOGPS = [1.0, -2.0, math.log(0.8), math.log(0.2), math.log(0.8), math.log(0.2)]


def test_one_sided_cross_entropy_by_hand():
    # t = 0.9 against p = 0.8 and 0.2: -(0.9 ln 0.8 + 0.1 ln 0.2) and -(0.9 ln 0.2 + 0.1 ln 0.8),
    # their mean is 1/2 ln 6.25
    orders = torch.tensor([[LN4], [-LN4]], dtype=torch.float64)
    assert float(losses.one_sided(orders, torch.tensor([0.9]))) == pytest.approx(
        0.5 * math.log(6.25)
    )
    # its least value is the label's own entropy, at p = t
    there = torch.tensor([[math.log(9)]], dtype=torch.float64)
    label = torch.tensor([0.9], dtype=torch.float64)
    assert float(losses.one_sided(there, label)) == pytest.approx(float(losses.entropy(there)))


def test_the_judge_moves_to_the_label_and_the_label_to_nobody():
    orders = torch.tensor([[LN4, 0.0], [-LN4, 0.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0.9, 0.5], dtype=torch.float64, requires_grad=True)
    losses.one_sided(orders, label).sum().backward()
    # (p - t) / 2 in each order: (0.8 - 0.9) / 2, (0.2 - 0.9) / 2, and 0 at p = t
    expected = torch.tensor([[-0.05, 0.0], [-0.35, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(orders.grad, expected)
    assert label.grad is None


@pytest.mark.parametrize(("label", "t"), [(1, 0.75), (-1, 0.25)])
def test_the_loss_is_hedged_dpo_and_the_weighted_cross_entropy(
    tiny_policy: Policy, label: int, t: float
):
    # h = 2 and 0 nats, beta 0.1. The judge says ln 4 for the first, then (the first in seat B) ln 4
    # for the second.
    scir = objective(tiny_policy.chat, beta=0.1)
    logps = torch.tensor([LOGPS])
    loss, figures = scir.loss(logps, [example(label, 0.75)])
    preferred = t * softplus(-0.2) + (1 - t) * softplus(0.2)
    judged = (softplus(LN4) - t * LN4 + softplus(-LN4) + t * LN4) / 2
    assert figures["scir/preference_loss"] == pytest.approx(preferred, rel=1e-5)
    assert figures["scir/inconsistency"] == pytest.approx(judged, rel=1e-5)
    assert float(loss) == pytest.approx(preferred + 0.5 * judged, rel=1e-5)
    assert figures["scir/flip_rate"] == 1
    assert all(metrics.find(name) for name in figures)


def test_its_gradient_is_the_numerical_one(tiny_policy: Policy):
    scir = objective(tiny_policy.chat, beta=0.1)
    examples = [example(1, 0.75), example(-1, 0.6)]
    x = torch.tensor([LOGPS, [-3.0, 0.0, -0.3, -1.4, -1.0, -0.5]], dtype=torch.float64)

    def value(logps: Tensor) -> Tensor:
        terms = scir.loss_terms(logps, examples)
        return terms["preference"] + 0.5 * terms["penalty"]

    slope = torch.autograd.functional.jacobian(value, x)
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
        step = torch.zeros_like(x)
        step[row, column] = 1e-4
        numerical = float(value(x + step) - value(x - step)) / 2e-4
        assert float(slope[row, column]) == pytest.approx(numerical, rel=1e-4, abs=1e-7)


def test_the_policy_s_gradient_is_that_of_soft_dpo_and_it_stands_still_at_the_consensus(
    tiny_policy: Policy,
):
    # d/dh of the hedged loss is beta (sigmoid(beta h) - t): 0 where beta (h_1 - h_2) = logit t;
    # here 0.1 * 10 ln 3 and t = 3/4
    at = [10 * math.log(3) - 1.0, -2.0, *LOGPS[2:]]
    x = torch.tensor([at, LOGPS], requires_grad=True)
    pairs = [example(1, 0.75), example(1, 0.75)]
    loss, _ = objective(tiny_policy.chat, beta=0.1).loss(x, pairs)
    slope = torch.autograd.grad(loss, x)[0][:, :2]
    assert slope[0].abs().max() < 1e-6
    y = x.detach()[:, :2].requires_grad_()
    plain = Dpo(settings(objective="dpo", beta=0.1), tiny_policy.chat, "start", None)
    soft = torch.autograd.grad(plain.loss(y, pairs)[0], y)[0]
    torch.testing.assert_close(slope, soft)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        # (h - 5)^2 and (h + 5)^2 with weights 3/4, 1/4: least at h = 2.5, 75/4
        ("ipo", 18.75),
        # h_1 and h_2 at +-2.5: twice that
        ("sppo", 37.5),
    ],
)
def test_ipo_and_sppo_take_soft_labels(tiny_policy: Policy, name: str, least: float):
    scir = objective(tiny_policy.chat, beta=0.1, preference_loss=name, penalty_weight=0)
    # h_1 - h_2 = 2.5 for ipo; h_1 = 2.5, h_2 = -2.5 for sppo
    responses = [1.5, -2.0] if name == "ipo" else [1.5, -4.5]
    loss, _ = scir.loss(torch.tensor([[*responses, *LOGPS[2:]]]), [example(1, 0.75)])
    assert float(loss) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("values", [{"reward_models": ["implicit"]}, {"anchors": "seed.jsonl"}])
def test_a_consensus_without_a_judge_or_with_anchors_is_refused(values: dict[str, Any]):
    with pytest.raises(ConfigError, match="target consensus trains the reward model 'judge'"):
        settings(**values)


def test_the_papers_form_is_the_default():
    assert TrainSettings.model_fields["target"].default == "agreed"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a policy, and 24 of the policy's own pairs.

    They are judged, calibrated and labeled by consensus.
    """
    root = tmp_path_factory.mktemp("consensus")
    make_model(root / "base", seed=1)
    make_model(root / "policy", seed=2)
    text = "".join(json.dumps({"prompt": f"Tell me of number {i}."}) + "\n" for i in range(8))
    (root / "prompts.jsonl").write_text(text, encoding="utf-8")
    policy = str(root / "policy")
    run(
        "generate",
        model=policy,
        input=str(root / "prompts.jsonl"),
        n=3,
        max_new_tokens=6,
        output_dir=root / "candidates",
    )
    run(
        "judge",
        model=policy,
        input=str(root / "candidates"),
        reward_models=["judge", "likelihood", "pmi"],
        output_dir=root / "judged",
    )
    run(
        "filter",
        input=str(root / "judged"),
        rule="consensus",
        label_temperature=0.2,
        keep_cut=True,
        output_dir=root / "preferences",
    )
    return root


def test_a_model_learns_the_consensus_in_its_judge_and_in_its_answers(judged: Path, tmp_path: Path):
    common = {"target": "consensus", "num_epochs": 10, "batch_size": 24, "warmup_ratio": 0.0}
    manifest = train(judged, tmp_path / "m", reward_reference=None, penalty_ratio=1.0, **common)
    labels = dataset.read_dataset(judged / "preferences")["label_probability"].to_pylist()
    assert manifest["rows_out"] == len(labels)
    assert set(manifest["fitted"]) == {"penalty_weight"}
    lines = (tmp_path / "m" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines if json.loads(line)["kind"] == "train"]
    # at step 0 the policy is its own reference: ln 2 under any label
    assert steps[0]["scir/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    for term in ("scir/preference_loss", "scir/inconsistency"):
        assert steps[-1][term] < steps[0][term], term
    assert steps[0]["loss"] == pytest.approx(
        steps[0]["scir/preference_loss"]
        + manifest["fitted"]["penalty_weight"] * steps[0]["scir/inconsistency"],
        rel=1e-4,
    )


def test_packs_do_not_change_a_step_and_lambda_is_kept_by_the_next_iteration(
    judged: Path, tmp_path: Path
):
    common = {"target": "consensus", "max_steps": 1, "batch_size": 8, "reward_reference": None}
    whole = train(judged, tmp_path / "whole", **common)
    parts = train(judged, tmp_path / "parts", max_tokens_per_pack=300, **common)
    for name in ("loss", "grad_norm"):
        assert parts["summary"][name] == pytest.approx(whole["summary"][name], rel=1e-3)
    assert parts["summary"]["packs"] > whole["summary"]["packs"]
    train(judged, tmp_path / "next", model=str(tmp_path / "whole"), **common)
    after = files.read_json(tmp_path / "next" / "manifest.json")["fitted"]
    assert after == whole["fitted"]


@pytest.mark.parametrize(("probabilities", "warned"), [((1.0, 1.0), True), ((1.0, 0.9), False)])
def test_labels_that_are_all_certain_are_warned_about(
    probabilities: tuple[float, float], warned: bool, capsys: pytest.CaptureFixture[str]
):
    warn_of_hard_labels([example(1, probability) for probability in probabilities])
    assert ("every label of the input counts as certain" in capsys.readouterr().err) == warned


def test_a_run_on_hard_labels_prints_the_warning_once_and_trains(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(
        "filter",
        input=str(judged / "judged"),
        rule="judge",
        keep_cut=True,
        output_dir=tmp_path / "hard",
    )
    common = {"target": "consensus", "max_steps": 1, "batch_size": 8, "reward_reference": None}
    train(judged, tmp_path / "m", input=str(tmp_path / "hard"), **common)
    assert capsys.readouterr().err.count("every label of the input counts as certain") == 1
    train(judged, tmp_path / "soft", **common)
    assert "counts as certain" not in capsys.readouterr().err
