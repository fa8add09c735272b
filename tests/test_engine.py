"""The engine against the model itself: packed trees must score what one sequence at a time scores,
logps and gradients.

The plain scorer below is written independently of scir_cli: a second copy of the model with its own
attention, full logits, log_softmax, gather.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import load_fp32
from peft import LoraConfig, get_peft_model
from plain_scorer import (
    Asked,
    assert_same_gradients,
    assert_same_logps,
    gradients,
    plain_logps,
    plain_model,
    questions,
)
from torch import Tensor, nn
from toy import CHATML, VOCABULARY, make_model

from scir_cli.engine import batches, lm_head, probe, tree_attention, trees
from scir_cli.engine.lm_head import KEEP_BYTES, LogitTransform, logits_of_rows, target_logps
from scir_cli.engine.policy import Policy
from scir_cli.engine.trees import Branch, continuation, verdict

TAKES_TREES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "gpt2",
    "cohere",
    "granite",
    "gpt_oss",
]
CANNOT = ["bloom", "mamba", "qwen3_next", "lfm2", "falcon_h1"]
PEFT_AND_TRANSFORMERS_5_23 = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny model by architecture, made when first asked for."""
    root, made = tmp_path_factory.mktemp("architectures"), {}

    def folder(arch: str) -> Path:
        if arch not in made:
            made[arch] = make_model(root / arch, arch)
        return made[arch]

    return folder


# ------------------------------ packed equals plain


@pytest.mark.parametrize("arch", TAKES_TREES)
def test_a_packed_forest_scores_and_differentiates_like_one_sequence_at_a_time(
    arch: str, folders: Any, capsys: pytest.CaptureFixture[str]
):
    folder = folders(arch)
    packed, plain, asked = load_fp32(folder), plain_model(folder), questions()
    assert packed.takes_trees
    assert capsys.readouterr().err == ""
    forest = trees.build(asked.branches)
    assert len(forest) < 0.6 * sum(
        len(b.ids) for b in asked.branches
    )  # much is shared, so that this tests something
    got, want = packed.branch_logps(asked.branches), plain_logps(plain, asked)
    assert got.dtype == torch.float32
    assert_same_logps(got, want)
    assert_same_gradients(gradients(packed.model, got), gradients(plain, want))


def test_verdicts_and_starts_of_other_paths_share_a_row_of_a_padded_batch():
    asked = [
        continuation([5, 6], [7, 8, 9]),
        verdict([5, 6], 1),
        verdict([5, 6], 2),
        verdict([6, 6], 3),
    ]
    (batch,) = batches.build(asked, "padded", 100)
    # The paths 5 6 7 8 and 6 6, the latter padded with its last token
    assert batch.ids.tolist() == [[5, 6, 7, 8], [6, 6, 6, 6]]
    targets = zip(batch.targets, batch.target_hidden, batch.target_token, strict=True)
    assert sorted(map(tuple, targets)) == [
        (0, 1, 7), (1, 2, 8), (2, 3, 9), (3, 1, 1), (4, 1, 2), (5, 5, 3),
    ]  # fmt: skip

    of_equal_length = batches.build(asked, "equal", 100)
    assert [b.ids.tolist() for b in of_equal_length] == [[[5, 6, 7, 8]], [[5, 6], [6, 6]]]


def test_padded_batches_stay_below_the_limit_of_tokens_and_of_padding():
    long = [verdict(list(range(1000 + i)), 1) for i in range(3)]
    distinct = [verdict([i, *range(n)], 1) for i, n in enumerate((2000, 1900, 1000, 990))]
    sizes = [b.ids.shape for b in batches.build(distinct, "padded", 4002)]
    assert sizes == [(2, 2001), (2, 1001)]
    assert [b.ids.shape for b in batches.build(distinct, "padded", 100)] == [
        (1, 2001), (1, 1901), (1, 1001), (1, 991),
    ]  # fmt: skip
    assert [b.ids.shape for b in batches.build(distinct, "padded", None)] == [(4, 2001)]
    assert [b.ids.shape for b in batches.build(long, "padded", 4000)] == [(1, 1002)]


def random_tree(seed: int) -> Asked:
    """Contexts and answers at the leaves of a random tree of up to four forks on a path, each run
    of tokens 1 to 9 long.
    """
    random = np.random.default_rng(seed)

    def grow(depth: int) -> list[list[list[int]]]:
        run = random.integers(4, VOCABULARY, random.integers(1, 10)).tolist()
        if depth == 4 or (depth and random.random() < 0.3):
            return [[run]]
        return [[run, *rest] for _ in range(random.integers(1, 4)) for rest in grow(depth + 1)]

    paths = grow(0) + grow(0)
    sequences = [([token for run in path[:-1] for token in run] or [5], path[-1]) for path in paths]
    return Asked([continuation(context, answer) for context, answer in sequences], sequences)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_random_trees_up_to_four_forks_deep_score_and_differentiate_like_one_sequence_at_a_time(
    seed: int, arch: str, folders: Any
):
    packed, plain, asked = load_fp32(folders(arch)), plain_model(folders(arch)), random_tree(seed)
    got, want = packed.branch_logps(asked.branches), plain_logps(plain, asked)
    assert_same_logps(got, want)
    assert_same_gradients(gradients(packed.model, got), gradients(plain, want))


@pytest.mark.parametrize("arch", ["qwen2_moe", "longrope"])
def test_what_a_small_probe_cannot_see_is_right_all_the_same(arch: str, folders: Any):
    """A window that only the mask tells of, and positions that mean something else beside a longer
    sequence.
    """
    folder, asked = folders(arch), questions()
    loaded = load_fp32(folder)
    with torch.no_grad():
        assert_same_logps(
            loaded.branch_logps(asked.branches), plain_logps(plain_model(folder), asked)
        )


@pytest.mark.parametrize("arch", CANNOT)
def test_a_model_that_cannot_take_trees_is_scored_in_padded_batches_with_one_warning(
    arch: str, folders: Any, capsys: pytest.CaptureFixture[str]
):
    folder, asked = folders(arch), questions()
    fallen_back, plain = load_fp32(folder), plain_model(folder)
    assert not fallen_back.takes_trees
    assert fallen_back.batching == "padded"
    assert capsys.readouterr().err.count("warning: ") == 1
    got, want = fallen_back.branch_logps(asked.branches), plain_logps(plain, asked)
    assert_same_logps(got, want)
    assert_same_gradients(gradients(fallen_back.model, got), gradients(plain, want))


def test_a_model_that_looks_ahead_is_scored_in_batches_of_equal_length(
    folders: Any, capsys: pytest.CaptureFixture[str]
):
    """DeepSeek-V3.2's sparse attention selects keys by what follows: padding changes them."""
    folder, asked = folders("deepseek_v32"), questions()
    loaded, plain = load_fp32(folder), plain_model(folder)
    assert loaded.batching == "equal"
    assert not loaded.keeps_ranks_in_step
    assert capsys.readouterr().err.startswith("warning: deepseek_v32 cannot score token trees (")
    with torch.no_grad():
        # The plain scorer's contexts are followed by the last target, which is one token of these.
        want = torch.cat([alone_without_the_last_token(plain, b) for b in asked.branches])
        assert_same_logps(loaded.branch_logps(asked.branches), want)


def alone_without_the_last_token(model: Any, branch: Branch) -> Tensor:
    logits = model(input_ids=torch.tensor([branch.ids]), use_cache=False).logits[0]
    rows = logits[list(branch.target_positions)].log_softmax(-1)
    return rows.gather(1, torch.tensor(branch.target_tokens)[:, None]).sum()[None]


@pytest.mark.parametrize("arch", ["qwen3_next", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("seed", range(3))
def test_in_bf16_no_hybrid_passes_for_a_tree(arch: str, seed: int, tmp_path: Path):
    """Weak weights hide an error below the noise of bf16; facts and fp32 find it all the same."""
    folder = make_model(tmp_path / arch, arch, seed=seed, initializer_range=0.06)
    assert not load_fp32(folder, dtype="bf16").takes_trees


@pytest.mark.parametrize("seed", range(20))
def test_in_bf16_ignored_sinks_are_found_out_whatever_the_weights(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scale = (0.06, 0.12, 0.25, 0.5)[seed % 4]
    folder = make_model(tmp_path / "gpt_oss", "gpt_oss", seed=seed, initializer_range=scale)
    assert load_fp32(folder, dtype="bf16").takes_trees
    monkeypatch.setattr(tree_attention, "with_sinks", lambda out, lse, sinks: out)
    found_out = load_fp32(folder, dtype="bf16")
    assert not found_out.takes_trees
    assert "differ by up to" in found_out.tree_refusal


def test_fp32_inside_a_model_in_bf16_is_fp32_and_leaves_the_weights_as_they_were(tiny_llama: Path):
    half, asked = load_fp32(tiny_llama, dtype="bf16"), questions()
    before = {name: p.clone() for name, p in half.model.named_parameters()}
    # The same weights, rounded to bf16, in a model in fp32
    exact = plain_model(tiny_llama, torch.bfloat16).float()
    with torch.no_grad(), probe.in_fp32(half):
        got = half.branch_logps(asked.branches)
    assert_same_logps(got, plain_logps(exact, asked).detach())
    for name, p in half.model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("keyword", "value", "is_known"),
    [
        ("novel_bias", torch.ones(1), False),
        ("indices", torch.ones(1), False),
        ("is_causal", False, False),
        ("is_causal", True, True),
        ("novel_bias", None, True),
        ("output_router_logits", True, True),
        ("deterministic", False, True),
    ],
)
def test_a_keyword_that_attention_does_not_know_makes_a_model_no_tree(
    keyword: str, value: Any, is_known: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    """It would be ignored, as attention sinks once were. None says nothing."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    policy = Policy(plain_model(tiny_llama), load_fp32(tiny_llama).chat, "key", tiny_llama, "eager")
    original = LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs, **{keyword: value})

    with monkeypatch.context() as patched:
        patched.setattr(LlamaAttention, "forward", forward)
        assert (probe.select_tree_attention(policy) is not None) == is_known
    refusal = "" if is_known else f"its attention uses {keyword}, which is not supported"
    assert policy.tree_refusal == refusal


@pytest.fixture
def attention_that_ignores_the_tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model that swallows the plan and attends over the flat sequence, as one would that has an
    attention of its own.
    """

    def flat(query: Tensor, key: Tensor, value: Tensor, layout: Any, options: Any) -> Tensor:
        key, value = (
            x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)
        )
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.scaling
        )
        return out.transpose(1, 2)

    with monkeypatch.context() as patched:
        patched.setattr(tree_attention, "tree_attention", flat)
        yield
    tree_attention.register()  # the registry is the process's: put the right one back


@pytest.mark.usefixtures("attention_that_ignores_the_tree")
def test_a_model_that_ignores_the_mask_is_found_out_when_it_is_loaded(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
):
    found_out, asked = load_fp32(tiny_llama), questions()
    assert not found_out.takes_trees
    assert capsys.readouterr().err.splitlines() == [
        "warning: llama cannot score token trees (a token tree and its paths differ by up to 2.9 "
        "nats per token); it is scored in padded batches: same results, slower"
    ]
    plain = plain_model(tiny_llama)
    got, want = found_out.branch_logps(asked.branches), plain_logps(plain, asked)
    assert_same_logps(got, want)
    assert_same_gradients(gradients(found_out.model, got), gradients(plain, want))


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_a_window_smaller_than_a_segment_and_one_that_spans_several_are_right(
    window: int, tmp_path: Path
):
    folder, asked = make_model(tmp_path / "model", "mistral", sliding_window=window), questions()
    assert_same_logps(
        load_fp32(folder).branch_logps(asked.branches).detach(),
        plain_logps(plain_model(folder), asked).detach(),
    )


def test_the_masks_of_a_plan_are_the_visible_keys_of_each_segment():
    forest = trees.build(questions().branches)
    for window in (None, 3, 16):
        mask = trees.visible(forest, window)
        for segment, own in zip(
            forest.segments,
            tree_attention.TreeLayout.of(forest, torch.device("cpu")).mask(window),
            strict=True,
        ):
            keys = [
                k
                for s in (*(forest.segments[a] for a in segment.ancestors), segment)
                for k in range(s.start, s.end)
            ]
            causal = torch.ones(len(keys), len(keys), dtype=torch.bool).tril()  # what None says
            assert (causal if own is None else own).tolist() == mask[segment.start : segment.end][
                :, keys
            ].tolist()


# ------------------------------ gradients of shared targets


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 1.0), (1.0, -1.0), (0.3, -0.7)])
def test_two_answers_that_start_with_the_same_token_give_its_target_one_gradient_each(
    weights: tuple[float, float], tiny_llama: Path
):
    """Two targets with one hidden state and one token.

    Their gradients add up, each counted once.
    """
    packed, plain = load_fp32(tiny_llama), plain_model(tiny_llama)
    asked = Asked(
        [continuation([5, 6, 7], [20, 21]), continuation([5, 6, 7], [20, 22])],
        [([5, 6, 7], [20, 21]), ([5, 6, 7], [20, 22])],
    )
    both = [
        dict(
            zip(
                dict(m.named_parameters()),
                torch.autograd.grad((torch.tensor(weights) * logps).sum(), list(m.parameters())),
                strict=True,
            )
        )
        for m, logps in (
            (packed.model, packed.branch_logps(asked.branches)),
            (plain, plain_logps(plain, asked)),
        )
    ]
    assert_same_gradients(*both)


# ------------------------------ precision and the head


def test_in_bf16_trees_are_as_near_to_fp32_as_the_model_itself(tiny_llama: Path):
    exact, half, packed = (
        plain_model(tiny_llama),
        plain_model(tiny_llama, torch.bfloat16),
        load_fp32(tiny_llama, dtype="bf16"),
    )
    assert packed.takes_trees
    ours, own = [], []  # errors a token, nats
    with torch.no_grad():
        for seed in range(4):
            asked = questions(seed)
            n_tokens = torch.tensor([len(answer) for _, answer in asked.sequences])
            want, got = plain_logps(exact, asked), packed.branch_logps(asked.branches)
            assert got.dtype == torch.float32
            ours.append((got - want) / n_tokens)
            own.append((plain_logps(half, asked) - want) / n_tokens)
    rms, own_rms = (torch.cat(errors).square().mean().sqrt().item() for errors in (ours, own))
    assert (
        rms < 1.5 * own_rms
    )  # 64 branches: chance alone moves such a ratio by about 1 / sqrt(2 * 64), a tenth
    assert own_rms < 0.05  # and neither is noise: answers differ by whole nats a token


def a_head(vocabulary: int, width: int, dtype: torch.dtype) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(width, vocabulary, bias=True, dtype=dtype)


def test_verdict_margins_below_the_resolution_of_bf16_survive():
    lm_head = nn.Linear(2, 3, bias=False, dtype=torch.bfloat16)
    lm_head.weight.data = torch.tensor(
        [[1.0, 2.0], [1.0, 2.015625], [0.0, 0.0]], dtype=torch.bfloat16
    )  # bf16 holds 2 + 1/64 exactly
    hidden = torch.tensor([[8.0, 1.0]], dtype=torch.bfloat16)
    assert len(set(lm_head(hidden)[0, :2].tolist())) == 1  # 10 and 10 + 1/64 are one number in bf16
    forest = trees.build([verdict([5], 0), verdict([5], 1)])
    a, b = target_logps(hidden, lm_head, LogitTransform(), forest).tolist()
    assert b - a == pytest.approx(1 / 64, abs=1e-6)


def test_the_head_on_two_hidden_states_by_hand():
    lm_head = nn.Linear(1, 3)
    lm_head.weight.data, lm_head.bias.data = (
        torch.tensor([[1.0], [2.0], [0.0]]),
        torch.tensor([0.0, 0.0, math.log(2)]),
    )
    forest = trees.build([Branch((7, 8), (0, 1), (1, 2))])
    # hidden 0: logits 0, 0, ln 2 -> 1/4, 1/4, 1/2; hidden ln 2: logits ln 2, ln 4, ln 2 -> 1/4,
    # 1/2, 1/4
    logps = target_logps(torch.tensor([[0.0], [math.log(2)]]), lm_head, LogitTransform(), forest)
    assert logps.tolist() == pytest.approx([math.log(1 / 4), math.log(1 / 4)])


@pytest.mark.parametrize(
    "arch", ["llama", "phi", "gemma2", "cohere"]
)  # plain; with a bias; capped; scaled
def test_chunks_of_the_head_kept_or_computed_again_change_neither_logps_nor_gradients(
    arch: str, folders: Any, monkeypatch: pytest.MonkeyPatch
):
    packed, asked = load_fp32(folders(arch)), questions()
    whole = packed.branch_logps(asked.branches)
    whole_gradients = gradients(packed.model, whole)
    sizes: list[int] = []
    original = logits_of_rows
    monkeypatch.setattr(
        lm_head,
        "logits_of_rows",
        lambda h, *rest, **out: (sizes.append(len(h)), original(h, *rest, **out))[1],
    )
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", {"cpu": 1})  # the least: 16 rows per chunk
    for keep in (0, KEEP_BYTES["cpu"]):
        monkeypatch.setattr(lm_head, "KEEP_BYTES", {"cpu": keep})
        sizes.clear()
        chunked = packed.branch_logps(asked.branches)
        n_forward = len(sizes)
        assert n_forward > 3
        assert max(sizes) == 16
        assert torch.allclose(chunked, whole, rtol=1e-6, atol=0)
        assert_same_gradients(gradients(packed.model, chunked), whole_gradients)
        assert len(sizes) == (
            n_forward if keep and arch != "gemma2" else 2 * n_forward
        )  # kept, or once more in backward
    with torch.no_grad():
        assert torch.allclose(packed.branch_logps(asked.branches), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_probability_is_never_above_zero(dtype: torch.dtype):
    """Also where one token has nearly all the mass, in bf16 as well.

    Its exact logit stands in its own normalizer.
    """
    lm_head = a_head(50, 16, dtype)
    lm_head.weight.data[3] *= 400
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    forest = trees.build(
        [Branch(tuple(range(200)), tuple(range(200)), (token,) * 200) for token in (3, 4)]
    )
    logps = target_logps(hidden, lm_head, LogitTransform(), forest)
    assert logps.shape == (400,)
    assert logps.max() <= 0
    assert logps[:200].max() > -1e-6  # sure of token 3 somewhere


def test_no_branches_give_no_logps(tiny_policy: Policy):
    assert tiny_policy.branch_logps([]).shape == (0,)


def test_a_branch_without_targets_scores_nothing_beside_one_that_does(tiny_policy: Policy):
    scored = continuation([5, 6, 7], [20, 21])
    with torch.no_grad():
        alone, beside = (
            tiny_policy.branch_logps([scored]),
            tiny_policy.branch_logps([Branch((5, 9), (), ()), scored]),
        )
    assert beside[0] == 0
    assert beside[1].item() == pytest.approx(alone[0].item(), rel=1e-5)


def test_an_empty_response_beside_others_scores_zero_and_leaves_them_as_they_are(
    tiny_policy: Policy,
):
    scored = continuation([5, 6, 7], [20, 21])
    with torch.no_grad():
        alone = tiny_policy.branch_logps([scored])
        beside = tiny_policy.branch_logps([continuation([5, 6, 7], []), scored])
    assert beside.tolist() == pytest.approx([0.0, alone[0].item()], rel=1e-5)


# ------------------------------ score


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_score_gives_the_same_numbers_for_any_number_of_tokens_a_pack(
    max_tokens: int, tiny_policy: Policy, tiny_llama: Path
):
    asked = questions()
    bounds = [0, 2, 2, 3, 7, len(asked.branches)]  # groups of different sizes, one of them empty
    groups = [asked.branches[low:high] for low, high in itertools.pairwise(bounds)]
    scored = list(tiny_policy.score(groups, max_tokens))
    assert [len(s) for s in scored] == [len(g) for g in groups]
    assert not any(s.requires_grad for s in scored)
    assert_same_logps(torch.cat(scored), plain_logps(plain_model(tiny_llama), asked).detach())


def test_score_of_no_groups_is_nothing(tiny_policy: Policy):
    assert list(tiny_policy.score([], 100)) == []


def test_within_its_own_attention_the_model_answers_whole_sequences_and_scores_trees_afterwards(
    tiny_llama: Path,
):
    loaded, plain, asked = load_fp32(tiny_llama), plain_model(tiny_llama), questions()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = loaded.branch_logps(asked.branches)
        with pytest.raises(ValueError, match="stop"), loaded.plain_attention_mode():
            assert torch.allclose(
                loaded.model(input_ids=ids).logits,
                plain(input_ids=ids).logits,
                rtol=1e-4,
                atol=1e-4,
            )
            raise ValueError("stop")  # an error on the way out changes nothing
        assert torch.equal(loaded.branch_logps(asked.branches), before)


# ------------------------------ training


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # its new name is missing from transformers 5.16
def test_gradient_checkpointing_changes_neither_logps_nor_gradients(tiny_llama: Path):
    asked = questions()
    stored, recomputed = load_fp32(tiny_llama), load_fp32(tiny_llama)
    recomputed.model.gradient_checkpointing_enable()
    recomputed.model.train()
    passes = []
    recomputed.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    logps = [p.branch_logps(asked.branches) for p in (recomputed, stored)]
    assert_same_logps(*logps)
    got = gradients(recomputed.model, logps[0])
    assert len(passes) == 2  # once forward, once more in the backward pass: checkpointing was on
    assert_same_gradients(got, gradients(stored.model, logps[1]))


@pytest.mark.parametrize("arch", ["gpt2", "phi"])
def test_dropout_is_off_in_train_mode_too(arch: str, folders: Any):
    packed, asked = load_fp32(folders(arch)), questions()  # gpt2's default is dropout at 0.1
    with torch.no_grad():
        evaluated = packed.branch_logps(asked.branches)
        packed.model.train()
        assert torch.equal(packed.branch_logps(asked.branches), evaluated)


def adapted(model: Any, target_modules: str = "all-linear") -> Any:
    """The model with LoRA adapters that are not zero, the same for the same model."""
    adapters = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, task_type="CAUSAL_LM")
    )
    random = torch.Generator().manual_seed(5)
    for name, parameter in adapters.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    return adapters


def with_adapters(base: Policy, target_modules: str = "all-linear") -> Policy:
    return replace(base, model=adapted(base.model, target_modules))


@PEFT_AND_TRANSFORMERS_5_23
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning"
)  # peft's word on GPT-2's transposed weights, which it then corrects
def test_with_lora_adapters_trees_equal_plain_and_without_them_the_base(arch: str, folders: Any):
    folder, asked = folders(arch), questions()
    packed, plain = with_adapters(load_fp32(folder)), adapted(plain_model(folder))
    got, want = packed.branch_logps(asked.branches), plain_logps(plain, asked)
    base = plain_logps(plain_model(folder), asked)
    assert (want - base).abs().min() > 1e-2  # the adapters do something to every branch
    assert_same_logps(got, want)
    assert_same_gradients(gradients(packed.model, got), gradients(plain, want))
    with packed.model.disable_adapter():
        assert_same_logps(packed.branch_logps(asked.branches), base)
    assert torch.equal(packed.branch_logps(asked.branches), got)  # and on again


@PEFT_AND_TRANSFORMERS_5_23
def test_adapters_on_the_head_count_as_well(tiny_llama: Path):
    asked = questions()
    packed, plain = (
        with_adapters(load_fp32(tiny_llama), ".*lm_head"),
        adapted(plain_model(tiny_llama), ".*lm_head"),
    )
    got, want = packed.branch_logps(asked.branches), plain_logps(plain, asked)
    assert_same_logps(got, want)
    assert_same_gradients(gradients(packed.model, got), gradients(plain, want))


# ------------------------------ the weights key


def test_the_weights_key_does_not_depend_on_the_folders_name(
    tiny_llama: Path, tiny_policy: Policy, tmp_path: Path
):
    shutil.copytree(tiny_llama, tmp_path / "another name")
    assert load_fp32(tmp_path / "another name").weights_key == tiny_policy.weights_key
    assert len(tiny_policy.weights_key) == 16


def test_the_weights_key_changes_with_weights_precision_and_template(
    tiny_llama: Path, tiny_policy: Policy, tmp_path: Path
):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("assistant", "helper"))
    keys = {
        "as it is": tiny_policy.weights_key,
        "other weights": load_fp32(make_model(tmp_path / "other", "llama", seed=1)).weights_key,
        "bf16": load_fp32(tiny_llama, dtype="bf16").weights_key,
        "other template": load_fp32(tiny_llama, chat_template=str(template)).weights_key,
        "other tokenizer": load_fp32(make_model(tmp_path / "bos", "llama", bos=True)).weights_key,
    }
    assert len(set(keys.values())) == len(keys), keys
