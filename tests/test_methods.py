"""SCIR's settings and the rivals' labels where they meet the objectives, the filter and the
trainer; and the guards, each seen to fire.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from helpers import run, train
from torch import Tensor

from scir_cli import config
from scir_cli.data import dataset, files
from scir_cli.engine.chat import Chat
from scir_cli.engine.policy import Policy
from scir_cli.errors import ConfigError, DataError
from scir_cli.rewards.pairs import Pair
from scir_cli.settings import TrainSettings
from scir_cli.training import objectives
from scir_cli.training.objectives import CollapseWarning, Example

LN4 = math.log(4)


def settings(**values: Any) -> TrainSettings:
    base = {
        "model": "m",
        "input": "i",
        "output_dir": "o",
        "reward_reference": "r",
        "implicit_scale": 5.0,
        "penalty_weight": 1.0,
    }
    return config.build(TrainSettings, base, values, where="test")


def example(label: int = 0, label_probability: float = 1.0) -> Example:
    """A pair of 2 and 4 tokens whose references say -1 and -2 for both models."""
    pair = Pair(
        "p",
        [{"role": "user", "content": "q"}],
        (1,),
        ((5, 2), (5, 6, 7, 2)),
        ("x", "y"),
        {"start": (-1.0, -2.0), "base": (-1.0, -2.0)},
    )
    return Example(pair, label, label_probability)


def objective(chat: Chat, **values: Any) -> Any:
    chosen = settings(**values)
    return objectives.TABLE[chosen.objective](chosen, chat, "start", "base")


def logps(*rows: list[float]) -> Tensor:
    """(pairs, 6): log P(A), log P(B) in both orders, then the two responses; nats"""
    return torch.tensor(rows, requires_grad=True)


SURE = [
    math.log(0.8),
    math.log(0.2),
    math.log(0.2),
    math.log(0.8),
]  # the judge: ln 4 for the first, in both orders


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # h = 2 and 0 nats against the start's -1 and -2
        ("dpo", {"beta": 0.1}, math.log(1 + math.exp(-0.2))),
        ("ipo", {"beta": 0.1}, (2 - 5) ** 2),
        ("sppo", {"beta": 0.1}, (2 - 5) ** 2 + (0 + 5) ** 2),
        # mean log-probabilities 1/2 and -2/4 (these are no probabilities; the arithmetic does not
        # mind)
        ("simpo", {"beta": 2.0, "target_margin": 1.6}, math.log(1 + math.exp(-(2 * 1.0 - 1.6)))),
    ],
)
def test_each_preference_loss_reads_the_rewards_it_is_defined_on(
    tiny_policy: Policy, name: str, values: dict[str, float], expected: float
):
    dpo = objective(tiny_policy.chat, objective="dpo", preference_loss=name, **values)
    loss, _ = dpo.loss(logps([1.0, -2.0]), [example(1)])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    # and SCIR takes the same loss where the models agree
    scir = objective(tiny_policy.chat, preference_loss=name, penalty_weight=0, **values)
    loss, metrics = scir.loss(logps([*SURE, 1.0, -2.0]), [example()])
    assert metrics["scir/mask_rate"] == 1
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "sppo", "simpo"])
def test_sft_weight_adds_the_token_loss_of_the_preferred_response(tiny_policy: Policy, name: str):
    def losses(weight: float | None) -> list[float]:
        shared = {"preference_loss": name, "sft_weight": weight}
        dpo = objective(tiny_policy.chat, objective="dpo", **shared)
        scir = objective(tiny_policy.chat, penalty_weight=0, **shared)
        soft = example(1, label_probability=0.75)
        results = [
            dpo.loss(logps([1.0, -2.0]), [example(1)]),
            dpo.loss(logps([1.0, -2.0]), [example(-1)]),
            dpo.loss(logps([1.0, -2.0]), [soft]),
            scir.loss(logps([*SURE, 1.0, -2.0]), [example()]),
        ]
        return [float(loss.detach()) for loss, _ in results]

    # 1/2 and -2/4 nats per token; the agreed label of SCIR's pair is the first
    added = [2 * -0.5, 2 * 0.5, 2 * (0.75 * -0.5 + 0.25 * 0.5), 2 * -0.5]
    without = losses(None)
    assert losses(0.0) == without
    expected = [loss + more for loss, more in zip(without, added, strict=True)]
    assert losses(2.0) == pytest.approx(expected, rel=1e-5)


def test_sft_weight_reports_the_token_loss_and_sft_has_it_by_default(tiny_policy: Policy):
    dpo = objective(tiny_policy.chat, objective="dpo", sft_weight=1.0)
    _, metrics = dpo.loss(logps([1.0, -2.0], [1.0, -2.0]), [example(1), example(-1)])
    assert metrics["sft/answer_nll"] == pytest.approx((-0.5 + 0.5) / 2)
    assert dpo.settings.response_weight == 1
    assert objective(tiny_policy.chat, objective="sft").settings.response_weight == 1
    assert objective(tiny_policy.chat, objective="dpo").settings.response_weight == 0


def test_a_label_that_is_less_than_sure_is_hedged(tiny_policy: Policy):
    dpo = objective(tiny_policy.chat, objective="dpo", beta=0.1)
    loss, _ = dpo.loss(logps([1.0, -2.0]), [example(1, label_probability=0.75)])
    assert float(loss.detach()) == pytest.approx(
        0.75 * math.log(1 + math.exp(-0.2)) + 0.25 * math.log(1 + math.exp(0.2)), rel=1e-5
    )


def test_penalty_only_takes_the_judge_s_label_where_the_implicit_reward_disagrees(
    tiny_policy: Policy,
):
    against = [*SURE, -3.0, 0.0]  # h = -2 and 2: the implicit reward prefers the second
    for target, rate in (("agreed", 0.0), ("judge", 1.0)):
        _, metrics = objective(tiny_policy.chat, target=target).loss(logps(against), [example()])
        assert metrics["scir/mask_rate"] == rate


def test_the_symmetric_kl_is_what_scir_minimizes_where_nothing_is_preferred(tiny_policy: Policy):
    scir = objective(tiny_policy.chat, entropy_weight=0, judge_orders="averaged")
    loss, _ = scir.loss(logps([*SURE, -3.0, 0.0]), [example()])
    # judge ln 4, implicit 5 * 0.1 * (-2 - 2) = -2; they disagree, so nothing is preferred: 1/2 (p -
    # q)(a - b)
    expected = 0.5 * (0.8 - 1 / (1 + math.exp(2))) * (LN4 + 2)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_judge_that_is_not_trained_has_no_gradient_from_the_penalty(tiny_policy: Policy):
    slopes = {}
    for stopped in ("none", "judge"):
        x = logps([*SURE, -3.0, 0.0])  # they disagree, so that the penalty is all there is
        loss, _ = objective(tiny_policy.chat, stop_gradient=stopped).loss(x, [example()])
        slopes[stopped] = torch.autograd.grad(loss, x)[0]
    assert slopes["none"][:, :4].abs().min() > 0
    assert slopes["judge"][:, :4].abs().max() == 0
    assert torch.equal(slopes["judge"][:, 4:], slopes["none"][:, 4:])


def test_a_pair_below_the_smallest_verdict_mass_is_not_preferred_and_still_penalized(
    tiny_policy: Policy,
):
    # P(A) + P(B) is 0.4 in both orders, with odds of 4; the models agree on the first
    unsure = [math.log(0.32), math.log(0.08), math.log(0.08), math.log(0.32)]
    kept = {}
    for least in (0.39, 0.41):
        loss, metrics = objective(tiny_policy.chat, min_verdict_mass=least).loss(
            logps([*unsure, 1.0, -2.0]), [example()]
        )
        kept[least] = metrics["scir/mask_rate"], float(loss.detach())
    (rate, whole), (masked_rate, penalty) = kept[0.39], kept[0.41]
    assert (rate, masked_rate) == (1, 0)
    assert whole - penalty == pytest.approx(
        math.log(1 + math.exp(-0.2)), rel=1e-5
    )  # DPO at h = 2 and 0, beta 0.1
    assert penalty > 0


def test_anchors_teach_the_verdict_and_nothing_else(tiny_policy: Policy):
    x = logps([*SURE, 1.0, -2.0], [*SURE, 1.0, -2.0], [*SURE, 1.0, -2.0])
    scir = objective(tiny_policy.chat, anchor_weight=2.0)
    alone, _ = scir.loss(x[:1], [example()])
    loss, metrics = scir.loss(x, [example(1), example(), example(-1)])
    # the right verdicts: 4/5 and 4/5 for the first, 1/5 and 1/5 for the third
    nll = -(math.log(0.8) + math.log(0.2)) / 2
    assert metrics["anchors/verdict_nll"] == pytest.approx(nll, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(alone.detach()) + 2 * nll, rel=1e-5)
    (slope,) = torch.autograd.grad(loss, x)
    assert slope[[0, 2], 4:].abs().max() == 0


def first_step(folder: Path) -> dict[str, float]:
    """The figures of the first training step in a model folder's log."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(record for record in records if record["kind"] == "train")


@pytest.fixture
def chain(request: pytest.FixtureRequest) -> Path:
    """The folder of test_chain's world."""
    return request.getfixturevalue("world")


# ------------------------------ guards


def test_a_collapsing_judge_is_warned_about_once(capsys: pytest.CaptureFixture[str]):
    guard = CollapseWarning(2)
    for size, flips in ((4.0, 0.2), (4.0, 0.3), (1.0, 0.9)):
        guard(size, flips)
    assert capsys.readouterr().err == ""  # the last two looks: |a| 2.5, flips 0.6
    guard(0.5, 0.9)
    said = capsys.readouterr().err
    assert "judge is collapsing: mean |log-odds| 4.00 -> 0.75, flip rate 25% -> 90%" in said
    guard(0.1, 1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seen", [[(4.0, 0.2), (1.0, 0.2)], [(4.0, 0.2), (4.0, 0.9)]])
def test_a_judge_that_only_grows_unsure_or_only_flips_is_not_collapsing(
    seen: list[tuple[float, float]], capsys: pytest.CaptureFixture[str]
):
    guard = CollapseWarning(1)
    for look in seen:
        guard(*look)
    assert capsys.readouterr().err == ""


def test_scir_warns_that_its_judge_collapses_without_any_validation_pairs(
    tiny_policy: Policy, capsys: pytest.CaptureFixture[str]
):
    scir = objective(tiny_policy.chat)
    always_a = [math.log(0.5), math.log(0.4), math.log(0.5), math.log(0.4)]
    for step in range(45):
        scir.loss(logps([*(SURE if step < 20 else always_a), 1.0, -2.0]), [example()])
    assert capsys.readouterr().err.count("judge is collapsing") == 1


@pytest.mark.parametrize(
    ("orders", "weight", "ceiling"), [("averaged", 4.0, "4"), ("separate", 3.0, "3")]
)
def test_alpha_has_a_ceiling_that_depends_on_the_number_of_models(
    orders: str, weight: float, ceiling: str
):
    with pytest.raises(ConfigError, match=f"Use less than {ceiling}"):
        settings(judge_orders=orders, entropy_weight=weight)
    settings(judge_orders=orders, entropy_weight=weight - 0.1)


def test_a_large_alpha_and_a_degenerate_reference_are_spoken_of_in_the_run(
    chain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    train(chain, tmp_path / "m", entropy_weight=0.6, max_steps=1)
    assert "warning: --entropy-weight 0.6 is large" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="same weights"):
        train(chain, tmp_path / "same", reward_reference=str(chain / "policy"))


# ------------------------------ filter, train


def test_cream_s_labels_are_as_certain_as_the_previous_model_ranks_alike(
    chain: Path, tmp_path: Path
):
    run(
        "judge",
        model=str(chain / "base"),
        input=str(chain / "candidates"),
        reward_models=["likelihood"],
        output_dir=tmp_path / "before",
    )
    common = {
        "input": str(chain / "judged"),
        "rule": "implicit",
        "cream_previous": str(tmp_path / "before"),
        "cream_reward_model": "likelihood",
        "keep_cut": True,
    }
    run("filter", **common, output_dir=tmp_path / "average")
    run("filter", **common, cream_average="prompt", output_dir=tmp_path / "prompt")
    rows = dataset.read_dataset(tmp_path / "prompt", "preferences").to_pylist()
    (one,) = set(
        dataset.read_dataset(tmp_path / "average", "preferences")["label_probability"].to_pylist()
    )
    by_prompt = {row["prompt_id"]: row["label_probability"] for row in rows}
    assert {round(3 * c, 9) for c in by_prompt.values()} <= {
        0,
        1,
        2,
        3,
    }  # three pairs a prompt: tau is -1, -1/3, 1/3 or 1
    assert one == pytest.approx(sum(by_prompt.values()) / len(by_prompt))
    train(chain, tmp_path / "m", objective="dpo", input=str(tmp_path / "prompt"), max_steps=1)
    with pytest.raises(ConfigError, match="no verdicts of 'implicit'"):
        run("filter", **{**common, "cream_reward_model": None}, output_dir=tmp_path / "no")
    with pytest.raises(DataError, match="holds verdicts of none of these pairs"):
        table = dataset.read_dataset(tmp_path / "before")
        other = table.set_column(0, "pair_id", pa.array([f"other {i}" for i in range(len(table))]))
        dataset.write_dataset(
            tmp_path / "other",
            "judged",
            {"stage": "judge"},
            [(0, 1)],
            lambda *_: dataset.Part(other, len(other)),
        )
        run(
            "filter",
            **{**common, "cream_previous": str(tmp_path / "other")},
            output_dir=tmp_path / "none",
        )


def test_judge_writes_no_verdict_below_the_smallest_verdict_mass(chain: Path, tmp_path: Path):
    def verdicts(folder: Path) -> list[dict[str, Any]]:
        rows = dataset.read_dataset(folder, "judged").to_pylist()
        return [
            reward for row in rows for reward in row["rewards"] if reward["reward_model"] == "judge"
        ]

    before = verdicts(chain / "judged")
    least = sorted(verdict["verdict_mass"] for verdict in before)[len(before) // 2]
    common = {
        "model": str(chain / "policy"),
        "reward_models": ["judge"],
        "input": str(chain / "candidates"),
    }
    manifest = run("judge", **common, min_verdict_mass=least, output_dir=tmp_path / "judged")
    after = verdicts(tmp_path / "judged")
    assert [v["log_odds"] is None for v in after] == [v["verdict_mass"] < least for v in before]
    assert sum(v["log_odds"] is None for v in after) == len(before) // 2
    assert manifest["summary"]["models"]["judge"]["verdicts"] == len(before) - len(before) // 2


def test_length_neutral_labels_are_of_equal_length_on_average(chain: Path, tmp_path: Path):
    def difference(folder: Path) -> float:
        rows = dataset.read_dataset(folder, "preferences").to_pylist()
        signed = [
            (1 if r["label"] == "first" else -1)
            * (len(r["first"]["token_ids"]) - len(r["second"]["token_ids"]))
            for r in rows
        ]
        return abs(sum(signed) / len(signed))

    common = {"input": str(chain / "judged"), "rule": "likelihood", "keep_cut": True}
    run("filter", **common, output_dir=tmp_path / "plain")
    run("filter", **common, length_neutral=True, output_dir=tmp_path / "neutral")
    assert difference(tmp_path / "neutral") <= difference(tmp_path / "plain")


def test_a_fitted_scale_is_found_on_the_judged_data_and_used(chain: Path, tmp_path: Path):
    train(chain, tmp_path / "m", max_steps=1)
    rows = dataset.read_dataset(chain / "judged").to_pylist()
    sizes = {
        name: torch.tensor(
            [
                abs(r["log_odds"])
                for row in rows
                for r in row["rewards"]
                if r["reward_model"] == name
            ]
        ).median()
        for name in ("judge", "implicit")
    }
    assert first_step(tmp_path / "m")["scir/scale"] == pytest.approx(
        float(5 * sizes["judge"] / sizes["implicit"]), rel=0.02
    )
    asked = train(
        chain, tmp_path / "asked", input=str(chain / "gold.jsonl"), max_steps=1
    )  # no verdicts there: the judge is asked
    assert asked["summary"]["scir/scale"] not in (0, 1, 5)


def test_a_scale_that_is_given_is_used_as_it_is(chain: Path, tmp_path: Path):
    assert (
        train(chain, tmp_path / "m", implicit_scale=7.0, max_steps=1)["summary"]["scir/scale"] == 7
    )
    given = {"model": "m", "input": "i", "output_dir": "o"}
    assert config.build(TrainSettings, given, where="test").implicit_scale == "fitted"
    assert (
        config.build(TrainSettings, given, {"implicit_scale": "2.5"}, where="test").implicit_scale
        == 2.5
    )
    with pytest.raises(
        ConfigError,
        match="'implicit_scale' is '-1': expected a number above 0, at most 1e[+]06, or fitted$",
    ):
        config.build(TrainSettings, given, {"implicit_scale": "-1"}, where="test")


def test_lambda_is_fitted_to_a_ratio_of_the_gradients_that_training_meets(
    chain: Path, tmp_path: Path
):
    def norm(folder: str, weight: float) -> float:
        """Of the first step's gradient under this lambda."""
        train(chain, tmp_path / folder, penalty_weight=weight, max_steps=1)
        return first_step(tmp_path / folder)["grad_norm"]

    preference, penalty = norm("without", 0.0), norm("nothing else", 1e6) / 1e6
    fitted = train(chain, tmp_path / "m", penalty_ratio=2.0, max_steps=1)
    assert fitted["fitted"]["penalty_weight"] == pytest.approx(2 * preference / penalty, rel=1e-3)
    assert fitted["summary"]["scir/penalty_weight"] == pytest.approx(
        fitted["fitted"]["penalty_weight"], rel=1e-5
    )
    assert (
        train(chain, tmp_path / "given", penalty_weight=0.3, max_steps=1)["summary"][
            "scir/penalty_weight"
        ]
        == 0.3
    )


def test_lambda_is_the_ratio_where_no_pair_has_a_preference_to_compare_with(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fitted = train(chain, tmp_path / "m", penalty_ratio=0.7, min_confidence=0.999, max_steps=1)
    assert fitted["fitted"]["penalty_weight"] == 0.7
    assert "lambda is 0.7" in " ".join(capsys.readouterr().err.split())


def test_what_was_fitted_is_kept_by_the_next_iteration_while_the_reward_reference_is_the_same(
    chain: Path, tmp_path: Path
):
    def fitted(folder: str, **values: Any) -> dict[str, float]:
        return dict(train(chain, tmp_path / folder, max_steps=1, **values)["fitted"])

    first = fitted("m2", learning_rate=1e-2)
    assert fitted("m3", model=str(tmp_path / "m2")) == first
    assert files.read_json(tmp_path / "m3" / "plan.json")["kept"] == first
    given = fitted("given", model=str(tmp_path / "m2"), penalty_weight=0.3)
    assert given == {"implicit_scale": first["implicit_scale"], "penalty_weight": 0.3}
    again = fitted("again", model=str(tmp_path / "m2"), implicit_beta=0.2)
    assert all(again[name] != first[name] for name in first)


def test_a_lambda_that_was_given_is_not_taken_for_a_fitted_one(chain: Path, tmp_path: Path):
    given = train(chain, tmp_path / "m2", penalty_weight=0.3, max_steps=1)["fitted"]
    fitted = train(chain, tmp_path / "m3", model=str(tmp_path / "m2"), max_steps=1)["fitted"]
    assert fitted["implicit_scale"] == given["implicit_scale"]
    assert fitted["penalty_weight"] != given["penalty_weight"]


@pytest.mark.parametrize("changed", ["likelihood_scale", "judge_prompt"])
def test_what_was_fitted_for_another_scale_or_prompt_is_not_kept(
    chain: Path, tmp_path: Path, changed: str
):
    prompt = tmp_path / "judge.txt"
    prompt.write_text("{question} A: {a} B: {b} Which?", encoding="utf-8")
    values = {"reward_models": ["judge", "implicit", "likelihood"], "judge_prompt": str(prompt)}
    train(chain, tmp_path / "m2", **values, max_steps=1)
    train(chain, tmp_path / "m3", **values, model=str(tmp_path / "m2"), max_steps=1)
    assert "kept" in files.read_json(tmp_path / "m3" / "plan.json")
    if changed == "judge_prompt":
        prompt.write_text(
            "{question} A: {a} B: {b} Which one?", encoding="utf-8"
        )  # the same file, another content
    else:
        values["likelihood_scale"] = 3.0
    train(chain, tmp_path / "other", **values, model=str(tmp_path / "m2"), max_steps=1)
    assert "kept" not in files.read_json(tmp_path / "other" / "plan.json")


def test_rubric_and_rationale_are_third_and_fourth_reward_models_of_the_penalty(
    chain: Path, tmp_path: Path
):
    names = ["judge", "implicit", "rubric", "rationale"]
    with pytest.raises(DataError, match="hold no rationales"):
        train(chain, tmp_path / "none", reward_models=names, max_steps=1)
    common = {
        "model": str(chain / "policy"),
        "reward_reference": str(chain / "base"),
        "reward_models": names,
    }
    run(
        "judge",
        **common,
        input=str(chain / "candidates"),
        rationale_max_tokens=4,
        output_dir=tmp_path / "judged",
    )
    row = dataset.read_dataset(tmp_path / "judged").to_pylist()[0]
    assert [len(r["rationale_token_ids"]) for r in row["rewards"] if r["rationale_token_ids"]] == [
        2
    ]  # the rationale's, in both orders
    train(chain, tmp_path / "m", input=str(tmp_path / "judged"), reward_models=names, max_steps=1)
    first = first_step(tmp_path / "m")
    rows = dataset.read_dataset(tmp_path / "judged").to_pylist()
    for name in ("judge", "implicit", "rubric"):  # step 0 reads what `judge` wrote
        sizes = [
            abs(r["log_odds"]) for row in rows for r in row["rewards"] if r["reward_model"] == name
        ]
        assert first[f"abs_log_odds/{name}"] > 0
        assert min(sizes) <= first[f"abs_log_odds/{name}"] <= max(sizes)
    assert {"abs_log_odds/rationale_forward", "abs_log_odds/rationale_swapped"} <= set(first)
    with pytest.raises(ConfigError, match="from 2.4 on"):
        train(chain, tmp_path / "over", reward_models=names, entropy_weight=2.45)


def test_anchors_are_mixed_into_the_steps_and_change_the_plan(chain: Path, tmp_path: Path):
    manifest = train(chain, tmp_path / "m", anchors=str(chain / "gold.jsonl"), batch_size=24)
    plain = train(chain, tmp_path / "plain", batch_size=24)
    assert manifest["rows_in"] == plain["rows_in"] + 6
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["drops"].values())
    assert "anchors/verdict_nll" in (tmp_path / "m" / "metrics.jsonl").read_text()
    assert files.read_json(tmp_path / "m" / "plan.json")["anchors"] is not None
