"""Each internal reward model on a tiny llama.

What it asks, what it says, and that swapping the pair negates it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_fp32
from torch import Tensor
from toy import END, START
from transformers import AutoModelForCausalLM

from scir_cli import config
from scir_cli.engine import trees
from scir_cli.engine.policy import Policy
from scir_cli.engine.trees import continuation
from scir_cli.errors import ConfigError, ModelError
from scir_cli.rewards import prompts, reward_models
from scir_cli.rewards.log_odds import RewardOutput
from scir_cli.rewards.pairs import Context, Pair
from scir_cli.settings import REWARD_MODELS, RewardSettings

REFERENCE = "reference"
BRANCHES = {
    "judge": 4,
    "implicit": 2,
    "rubric": 12,
    "rationale": 4,
    "likelihood": 2,
    "pmi": 4,
    "external": 0,
}
RATIONALES = (
    "The first is shorter.",
    "The second says more, and says it twice.",
)  # for the pair as it stands, and for the other order

# question, first, second, external log-odds; lengths differ, answers share starts, one has braces
TEXTS = [
    ("What is the capital of France?", "Paris.", "Paris is the capital of France, I think.", 1.5),
    ("Sort 3 1 2.", "1 2 3", "3 2 1", -0.5),
    ("What does {a} mean in a judge prompt?", "Nothing: {b} {question}", "It is answer A.", 0.25),
]
EXTERNAL = [text[3] for text in TEXTS]


def settings(**values: Any) -> RewardSettings:
    given = {"model": "unused", "output_dir": "unused", "reward_models": list(BRANCHES)}
    return config.build(RewardSettings, given | values, where="test")


def make_pair(policy: Policy, number: int) -> Pair:
    question, first, second, _ = TEXTS[number]
    messages = [{"role": "user", "content": question}]
    responses = tuple(tuple(policy.chat.response_ids(messages, text)) for text in (first, second))
    return Pair(
        pair_id=str(number),
        messages=messages,
        prompt_ids=tuple(policy.chat.prompt_ids(messages)),
        response_ids=responses,  # type: ignore[arg-type]
        texts=(first, second),
        reference_logps={REFERENCE: (-20.0 - number, -30.0 + number)},
    )


def swapped(pair: Pair) -> Pair:
    """The same pair with its responses exchanged, and everything that belongs to them."""
    return replace(
        pair,
        response_ids=pair.response_ids[::-1],
        texts=pair.texts[::-1],
        reference_logps={key: logps[::-1] for key, logps in pair.reference_logps.items()},
    )


def said(
    policy: Policy,
    names: Sequence[str],
    pairs: Sequence[Pair],
    written: Sequence[Sequence[str]] | None = None,
    external: Sequence[float] = EXTERNAL,
    **values: Any,
) -> dict[str, RewardOutput]:
    """The models' log-odds of the pairs, scored by the policy, pair by pair in packs."""
    models = reward_models.make(names, policy.chat, settings(**values))
    texts = written or [RATIONALES] * len(pairs)
    asked = [
        reward_models.all_branches(models, with_written(policy, pair, each))
        for pair, each in zip(pairs, texts, strict=True)
    ]
    context = Context.of(pairs, REFERENCE, external=torch.tensor(external[: len(pairs)]))
    return reward_models.all_outputs(models, torch.stack(list(policy.score(asked, 300))), context)


def with_written(policy: Policy, pair: Pair, texts: Sequence[str]) -> Pair:
    return replace(
        pair,
        rationale_token_ids={
            "rationale": [policy.chat.tokenizer(text)["input_ids"] for text in texts]
        },
    )


@pytest.fixture(scope="module")
def pairs(tiny_policy: Policy) -> list[Pair]:
    return [make_pair(tiny_policy, number) for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Any:
    """A second copy of the model, with its own attention."""
    return AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def next_logps(plain: Any, ids: Sequence[int]) -> Tensor:
    return plain(input_ids=torch.tensor([list(ids)])).logits[0, -1].log_softmax(-1)


@torch.no_grad()
def answer_logp(plain: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    logps = plain(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


# ------------------------------ all of them


def test_every_reward_model_of_the_settings_is_in_the_table():
    assert tuple(reward_models.TABLE) == REWARD_MODELS == tuple(BRANCHES)


@pytest.mark.parametrize("name", BRANCHES)
def test_swapping_first_and_second_negates_the_log_odds(
    name: str, tiny_policy: Policy, pairs: list[Pair]
):
    there = said(tiny_policy, [name], pairs)[name]
    negated = [-value for value in EXTERNAL]
    back = said(
        tiny_policy, [name], [swapped(p) for p in pairs], [RATIONALES[::-1]] * len(pairs), negated
    )[name]
    assert there.log_odds.shape == (len(pairs),)
    assert there.log_odds.abs().min() > 1e-3  # it says something about every pair
    assert torch.allclose(back.log_odds, -there.log_odds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["judge", "rationale"])
def test_swapping_first_and_second_negates_and_exchanges_the_orders(
    name: str, tiny_policy: Policy, pairs: list[Pair]
):
    there = said(tiny_policy, [name], pairs)[name]
    back = said(
        tiny_policy, [name], [swapped(p) for p in pairs], written=[RATIONALES[::-1]] * len(pairs)
    )[name]
    assert there.orders is not None
    assert back.orders is not None
    assert there.orders.shape == (2, len(pairs))
    assert (there.orders[0] + there.orders[1]).abs().min() > 1e-3
    assert torch.allclose(back.orders, -there.orders.flip(0), rtol=0, atol=1e-4)
    assert torch.allclose(there.log_odds, 0.5 * (there.orders[0] + there.orders[1]))


@pytest.mark.parametrize("name", BRANCHES)
def test_the_number_of_branches_is_the_same_for_every_pair(
    name: str, tiny_policy: Policy, pairs: list[Pair]
):
    model = reward_models.make([name], tiny_policy.chat, settings())[name]
    asked = [model.branches(with_written(tiny_policy, pair, RATIONALES)) for pair in pairs]
    assert (
        [len(branches) for branches in asked]
        == [BRANCHES[name]] * len(pairs)
        == [model.n_branches] * len(pairs)
    )


@pytest.mark.parametrize("name", BRANCHES)
def test_only_the_rationale_model_needs_a_sampled_text_first(
    name: str, tiny_policy: Policy, pairs: list[Pair]
):
    model = reward_models.make([name], tiny_policy.chat, settings())[name]
    assert len(model.requests(pairs[0])) == (2 if name == "rationale" else 0)


def test_all_models_together_equal_each_alone(tiny_policy: Policy, pairs: list[Pair]):
    together = said(tiny_policy, list(BRANCHES), pairs)
    assert list(together) == list(BRANCHES)
    for name in BRANCHES:
        assert torch.allclose(
            together[name].log_odds,
            said(tiny_policy, [name], pairs)[name].log_odds,
            rtol=0,
            atol=1e-4,
        )


def test_models_that_compare_or_score_have_a_verdict_mass_and_the_others_none(
    tiny_policy: Policy, pairs: list[Pair]
):
    for name, odds in said(tiny_policy, list(BRANCHES), pairs).items():
        if name in ("judge", "rationale", "rubric"):
            assert odds.verdict_mass is not None
            assert odds.verdict_mass.shape == (len(pairs),)
            assert odds.verdict_mass.min() > 0
            assert odds.verdict_mass.max() < 1
        else:
            assert odds.verdict_mass is None
            assert odds.orders is None


def test_gradients_reach_the_policy_through_every_model_it_scores(tiny_llama: Path):
    policy = load_fp32(tiny_llama)
    pair = with_written(policy, make_pair(policy, 0), RATIONALES)
    for name in ("judge", "implicit", "rubric", "rationale", "likelihood", "pmi"):
        models = reward_models.make([name], policy.chat, settings())
        logps = policy.branch_logps(reward_models.all_branches(models, pair))[None]
        odds = reward_models.all_outputs(models, logps, Context.of([pair], REFERENCE))[name]
        (slope,) = torch.autograd.grad(
            odds.log_odds.sum(), policy.model.get_input_embeddings().weight
        )
        assert slope.norm() > 0
        assert slope.isfinite().all()


# ------------------------------ judge


def test_the_judge_is_read_where_the_answer_begins_with_first_in_seat_a_and_then_second(
    tiny_policy: Policy, pairs: list[Pair], plain: Any
):
    tokenizer = tiny_policy.chat.tokenizer
    a, b = tokenizer("A")["input_ids"] + tokenizer("B")["input_ids"]
    odds = said(tiny_policy, ["judge"], pairs)["judge"]
    assert odds.orders is not None
    assert odds.verdict_mass is not None
    for number, (question, first, second, _) in enumerate(TEXTS):
        masses = []
        for order, (in_a, in_b) in enumerate(((first, second), (second, first))):
            text = (
                f"{START}user\nWhich answer to the question is better?\n\nQuestion: "
                f"{question}\n\nAnswer A: {in_a}\n\nAnswer B: {in_b}\n\n"
                f"Reply with A or B.{END}\n{START}assistant\n"
            )
            logps = next_logps(plain, tokenizer(text)["input_ids"])
            sign = 1 if order == 0 else -1  # the first response has seat A, then seat B
            assert odds.orders[order, number].item() == pytest.approx(
                sign * (logps[a] - logps[b]).item(), abs=1e-4
            )
            masses.append((logps[a].exp() + logps[b].exp()).item())
        assert odds.verdict_mass[number].item() == pytest.approx(sum(masses) / 2, rel=1e-4)


def test_a_judge_prompt_from_a_file_replaces_the_default(
    tiny_policy: Policy, pairs: list[Pair], tmp_path: Path
):
    path = tmp_path / "judge.txt"
    path.write_text("{b} or {a}? {question}")
    model = reward_models.make(["judge"], tiny_policy.chat, settings(judge_prompt=str(path)))[
        "judge"
    ]
    asked = {tiny_policy.chat.tokenizer.decode(branch.ids) for branch in model.branches(pairs[1])}
    assert asked == {
        f"{START}user\n{texts}? Sort 3 1 2.{END}\n{START}assistant\n"
        for texts in ("3 2 1 or 1 2 3", "1 2 3 or 3 2 1")
    }


def test_each_way_of_judging_has_its_own_prompt(
    tiny_policy: Policy, pairs: list[Pair], tmp_path: Path
):
    files = {
        f"{name}_prompt": tmp_path / f"{name}.txt" for name in ("judge", "rationale", "rubric")
    }
    files["judge_prompt"].write_text("J {question} {a} {b}")
    files["rationale_prompt"].write_text("W {question} {a} {b}")
    files["rubric_prompt"].write_text("S {question} {response}")
    models = reward_models.make(
        ["judge", "rationale", "rubric"],
        tiny_policy.chat,
        settings(**{k: str(v) for k, v in files.items()}),
    )
    pair = replace(pairs[1], rationale_token_ids={"rationale": [[5], [6]]})
    said = {
        name: {
            tiny_policy.chat.tokenizer.decode(b.ids).split("\n")[1].split(END)[0]
            for b in model.branches(pair)
        }
        for name, model in models.items()
    }
    assert said["judge"] == {"J Sort 3 1 2. 1 2 3 3 2 1", "J Sort 3 1 2. 3 2 1 1 2 3"}
    assert said["rationale"] == {"W Sort 3 1 2. 1 2 3 3 2 1", "W Sort 3 1 2. 3 2 1 1 2 3"}
    assert said["rubric"] == {"S Sort 3 1 2. 1 2 3", "S Sort 3 1 2. 3 2 1"}


@pytest.mark.parametrize(
    ("name", "field"), [("judge", "b"), ("rationale", "b"), ("rubric", "response")]
)
def test_a_prompt_without_a_field_is_a_settings_error(
    name: str, field: str, tiny_policy: Policy, pairs: list[Pair], tmp_path: Path
):
    path = tmp_path / "judge.txt"
    path.write_text("{question} {a}")
    model = reward_models.make([name], tiny_policy.chat, settings(**{f"{name}_prompt": str(path)}))[
        name
    ]
    with pytest.raises(ConfigError, match=rf"has no \{{{field}\}}"):
        model.branches(replace(pairs[0], rationale_token_ids={"rationale": [[5], [6]]}))


def test_other_verdicts_are_read_where_they_are_named(tiny_policy: Policy, pairs: list[Pair]):
    model = reward_models.make(["judge"], tiny_policy.chat, settings(verdict_tokens=["1", "2"]))[
        "judge"
    ]
    asked = [
        tiny_policy.chat.tokenizer.decode(branch.target_tokens)
        for branch in model.branches(pairs[0])
    ]
    assert asked == ["1", "2", "1", "2"]


@pytest.mark.parametrize("name", ["judge", "rationale"])
def test_verdicts_of_several_tokens_are_refused(name: str, tiny_policy: Policy, pairs: list[Pair]):
    model = reward_models.make([name], tiny_policy.chat, settings(verdict_tokens=["Zq", "Qz"]))[
        name
    ]
    with pytest.raises(ModelError, match="'Zq'.*--verdict-tokens"):
        model.branches(replace(pairs[0], rationale_token_ids={"rationale": [[5], [6]]}))


def test_two_verdicts_that_are_one_word_are_refused():
    with pytest.raises(ConfigError, match="it names 'A' twice"):
        settings(verdict_tokens=["A", "A"])


# ------------------------------ rationale


def rationale_texts(policy: Policy, pair: Pair, written: Sequence[str]) -> list[str]:
    model = reward_models.make(["rationale"], policy.chat, settings())["rationale"]
    branches = model.branches(with_written(policy, pair, written))
    return [policy.chat.tokenizer.decode(branch.ids) for branch in branches]


def test_a_rationale_is_read_behind_its_cue_in_both_orders(tiny_policy: Policy, pairs: list[Pair]):
    texts = rationale_texts(tiny_policy, pairs[1], RATIONALES)
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    for text, reasons, (a, b) in (
        (texts[0], RATIONALES[0], ("1 2 3", "3 2 1")),
        (texts[2], RATIONALES[1], ("3 2 1", "1 2 3")),
    ):
        assert text.endswith(f"{START}assistant\n{reasons}\n\nVerdict:")
        assert f"Answer A: {a}\n\nAnswer B: {b}\n\n" in text


def test_a_verdict_the_rationale_gave_itself_is_left_out(tiny_policy: Policy, pairs: list[Pair]):
    bare = rationale_texts(tiny_policy, pairs[0], RATIONALES)
    for own in ("\n\nVerdict: B", f" Verdict: A{END}", f"\n{END}"):
        assert rationale_texts(tiny_policy, pairs[0], [text + own for text in RATIONALES]) == bare


def test_a_rationales_requests_are_the_judges_prompts_in_both_orders(
    tiny_policy: Policy, pairs: list[Pair]
):
    model = reward_models.make(["rationale"], tiny_policy.chat, settings())["rationale"]
    first, second = (tiny_policy.chat.tokenizer.decode(ids) for ids in model.requests(pairs[1]))
    assert "Answer A: 1 2 3\n\nAnswer B: 3 2 1" in first
    assert "Answer A: 3 2 1\n\nAnswer B: 1 2 3" in second
    assert first.endswith(f"{START}assistant\n")


# ------------------------------ rewards of one response


def test_the_implicit_reward_is_the_scaled_log_ratio_against_the_reference(
    tiny_policy: Policy, pairs: list[Pair], plain: Any
):
    got = said(tiny_policy, ["implicit"], pairs, implicit_scale=3.0, implicit_beta=0.2)[
        "implicit"
    ].log_odds
    for number, pair in enumerate(pairs):
        h = [
            answer_logp(plain, pair.prompt_ids, ids) - ref
            for ids, ref in zip(pair.response_ids, pair.reference_logps[REFERENCE], strict=True)
        ]
        assert got[number].item() == pytest.approx(3.0 * 0.2 * (h[0] - h[1]), abs=1e-3)


def test_the_implicit_reward_is_a_difference_of_sums_whatever_the_lengths(tiny_policy: Policy):
    model = reward_models.make(["implicit"], tiny_policy.chat, settings())["implicit"]
    context = Context(
        torch.tensor([[4.0], [8.0]]), torch.tensor([[-11.0], [-10.0]]), torch.tensor([math.nan])
    )
    # h = -10 + 11 = 1 and -12 + 10 = -2, s * beta = 5 * 0.1
    assert model.odds(torch.tensor([[-10.0], [-12.0]]), context).log_odds.tolist() == pytest.approx(
        [0.5 * (1 - -2)]
    )


@pytest.mark.parametrize("known", [{}, {"another model": (-1.0, -2.0)}])
def test_without_a_reference_the_implicit_reward_has_no_verdict(
    known: dict[str, tuple[float, float]], tiny_policy: Policy, pairs: list[Pair]
):
    got = said(tiny_policy, ["implicit"], [pairs[0], replace(pairs[1], reference_logps=known)])[
        "implicit"
    ].log_odds
    assert got.isnan().tolist() == [False, True]


def test_a_missing_external_verdict_stays_missing(tiny_policy: Policy, pairs: list[Pair]):
    got = said(tiny_policy, ["external"], pairs, external=[1.5, float("nan"), 0.25])[
        "external"
    ].log_odds
    assert got[[0, 2]].tolist() == [1.5, 0.25]
    assert got[1].isnan()


def test_likelihood_is_the_difference_of_mean_token_log_probabilities(
    tiny_policy: Policy, pairs: list[Pair], plain: Any
):
    got = said(tiny_policy, ["likelihood"], pairs, likelihood_scale=2.0)["likelihood"].log_odds
    for number, pair in enumerate(pairs):
        means = [answer_logp(plain, pair.prompt_ids, ids) / len(ids) for ids in pair.response_ids]
        assert got[number].item() == pytest.approx(2.0 * (means[0] - means[1]), abs=1e-4)


def test_pmi_takes_out_what_the_answer_is_worth_without_its_question(
    tiny_policy: Policy, pairs: list[Pair], plain: Any
):
    nothing = tiny_policy.chat.tokenizer(f"{START}user\n{END}\n{START}assistant\n")["input_ids"]
    got = said(tiny_policy, ["pmi"], pairs)["pmi"].log_odds
    for number, pair in enumerate(pairs):
        gains = [
            (answer_logp(plain, pair.prompt_ids, ids) - answer_logp(plain, nothing, ids)) / len(ids)
            for ids in pair.response_ids
        ]
        assert got[number].item() == pytest.approx(gains[0] - gains[1], abs=1e-4)


def test_the_rubric_is_the_difference_of_expected_scores(
    tiny_policy: Policy, pairs: list[Pair], plain: Any
):
    tokenizer = tiny_policy.chat.tokenizer
    digits = [tokenizer(str(score))["input_ids"][0] for score in range(6)]
    odds = said(tiny_policy, ["rubric"], pairs)["rubric"]
    for number, (question, *answers, _) in enumerate(TEXTS):
        expected, mass = [], []
        for text in answers:
            prompt = (
                prompts.RUBRIC.replace("{response}", "\0")
                .replace("{question}", question)
                .replace("\0", text)
            )
            p = next_logps(
                plain, tokenizer(f"{START}user\n{prompt}{END}\n{START}assistant\n")["input_ids"]
            )[digits].exp()
            expected.append(sum(score * p[score].item() for score in range(6)) / p.sum().item())
            mass.append(p.sum().item())
        assert odds.log_odds[number].item() == pytest.approx(expected[0] - expected[1], abs=1e-4)
        assert odds.verdict_mass is not None
        assert odds.verdict_mass[number].item() == pytest.approx(sum(mass) / 2, rel=1e-4)


# ------------------------------ context


def test_the_context_has_pairs_along_the_last_axis(pairs: list[Pair]):
    context = Context.of(pairs, REFERENCE, external=torch.tensor(EXTERNAL))
    assert context.n_tokens.tolist() == [
        [len(p.response_ids[seat]) for p in pairs] for seat in (0, 1)
    ]
    assert context.reference_logps.tolist() == [[-20.0, -21.0, -22.0], [-30.0, -29.0, -28.0]]
    assert context.external.tolist() == [1.5, -0.5, 0.25]
    without = Context.of(pairs, None)
    assert without.reference_logps.isnan().all()
    assert without.external.isnan().tolist() == [True, True, True]


def test_answers_are_shared_out_pair_by_pair_and_model_by_model(
    tiny_policy: Policy, pairs: list[Pair]
):
    models = reward_models.make(
        ["implicit", "external", "likelihood"],
        tiny_policy.chat,
        settings(implicit_scale=1.0, implicit_beta=1.0),
    )
    context = Context(
        torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.zeros(2, 2), torch.tensor([7.0, 8.0])
    )
    # pair 1: implicit -1, -2, likelihood -3, -5; pair 2: implicit -10, -40, likelihood -20, -80
    logps = torch.tensor([[-1.0, -2.0, -3.0, -5.0], [-10.0, -40.0, -20.0, -80.0]])
    odds = reward_models.all_outputs(models, logps, context)
    assert odds["implicit"].log_odds.tolist() == [1.0, 30.0]
    assert odds["external"].log_odds.tolist() == [7.0, 8.0]
    assert odds["likelihood"].log_odds.tolist() == [2.0, 10.0]  # -3 + 5; -20/2 + 80/4


def test_what_the_models_share_is_scored_once(tiny_policy: Policy, pairs: list[Pair]):
    """Implicit and likelihood ask for the same branches, so both cost what one costs."""
    models = reward_models.make(["implicit", "likelihood"], tiny_policy.chat, settings())
    alone = [continuation(pairs[0].prompt_ids, ids) for ids in pairs[0].response_ids]
    assert len(trees.build(reward_models.all_branches(models, pairs[0]))) == len(trees.build(alone))
