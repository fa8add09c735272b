"""Which way of scoring is exact for a model: trees, padded batches, or one path at a time.

A small forest is scored in each way and compared with the model itself, one path at a time with
full logits. In half precision a wrong model can hide in the noise of rounding, so trees are
compared in fp32, block by block, and only the kernels in the model's precision. Where fp32 is out
of reach (quantized or sharded weights), the difference has to be as small as the noise between the
model alone and the same model in padded batches.
What a small forest cannot show is read from the config and from the calls of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scir_cli.engine import tree_attention, trees
from scir_cli.engine.batches import Batching
from scir_cli.engine.policy import Policy
from scir_cli.engine.tree_attention import SDPA, TreeLayout, UnsupportedAttentionError
from scir_cli.engine.trees import Branch

#: Difference, relative to 1 + |logp|, up to which two log-probabilities are equal in fp32.
FP32_TOLERANCE = 1e-3

#: In half precision, the root mean square of the differences may be this many times the noise,
MAX_NOISE_RATIO = 3.0
#: and this many nats in any case.
NOISE_FLOOR = 0.03

#: Layers whose attention trees reproduce; a config without `layer_types` has no others.
TREE_LAYER_TYPES = ("full_attention", "sliding_attention")

#: Layers in which tokens to the right change nothing. Others may select or compress keys by what
#: follows, which a small batch need not show.
CAUSAL_LAYER_TYPES = frozenset(
    {
        *TREE_LAYER_TYPES,
        "attention",
        "chunked_attention",
        "conv",
        "hybrid",
        "linear_attention",
        "mamba",
        "mlp",
        "moe",
    }
)

#: What model code raises if it cannot compute something.
MODEL_ERRORS = (
    TypeError,
    AssertionError,
    AttributeError,
    RuntimeError,
    ValueError,
    ImportError,
    LookupError,
    NotImplementedError,
)


@torch.no_grad()
def select_tree_attention(policy: Policy) -> str | None:
    """The first tree attention that scores a small forest like the model's plain attention.

    Sets it on the model. Returns None, sets the plain attention and policy.tree_refusal, if there
    is no such one.
    """
    config = policy.model.config.get_text_config()
    try:
        _check_config(config)
        _check_blocks(policy.scorer.blocks)
        name = _first_exact(policy, config)
    except UnsupportedAttentionError as error:
        policy.model.set_attn_implementation(policy.plain_attention)
        policy.tree_refusal = str(error)
        return None
    policy.model.set_attn_implementation(name)
    policy.tree_refusal = ""
    return name


@torch.no_grad()
def select_batching(policy: Policy) -> Batching:
    """The first way of batching that scores paths like the model alone.

    policy: with its plain attention.
    """
    if _can_compute_in_fp32(policy):
        with in_fp32(policy):
            try:
                return _first_exact_batching(policy, _is_close)
            except MODEL_ERRORS:
                pass
    return _first_exact_batching(
        policy, _is_close if policy.model.dtype == torch.float32 else _is_close_in_half
    )


def _first_exact_batching(policy: Policy, is_close: Callable[[Tensor, Tensor], bool]) -> Batching:
    """As select_batching; is_close: compares log-probabilities with those of the model alone."""
    config = policy.model.config.get_text_config()
    branches = _batching_branches(config.vocab_size)
    alone = policy.alone_logps(branches)
    types = set(getattr(config, "layer_types", None) or ())
    in_any_batch = types <= CAUSAL_LAYER_TYPES and not _depends_on_length(config)
    ways: list[Batching] = ["padded", "equal"] if in_any_batch else ["equal"]
    for batching in ways:
        try:
            logps = policy.batched_logps(branches, batching)
        except MODEL_ERRORS:
            continue
        if is_close(logps, alone):
            return batching
    return "alone"


def _first_exact(policy: Policy, config: Any) -> str:
    """The name of the first tree attention that is exact.

    Raises UnsupportedAttentionError with the reason against the last one if there is none.
    """
    branches = _probe_branches(config.vocab_size)
    plain = policy.alone_logps(branches)
    exact = _check_in_fp32(policy, branches, config)
    noise = _padding_noise(policy, branches, plain) if exact is None else _rms(plain - exact)
    reason = ""
    for name in tree_attention.candidates(policy.device, policy.model.dtype):
        try:
            tree, layout = _score_trees(policy, branches, name)
        except MODEL_ERRORS as error:
            reason = _first_line(error)
            continue
        _check_calls(config, layout)
        if policy.model.dtype == torch.float32:
            if _is_close(tree, plain):
                return name
        # SDPA has been compared in fp32; experts that rounding selects would only add noise here.
        elif (exact is not None and name == SDPA) or _rms(
            tree - (plain if exact is None else exact)
        ) <= _limit(noise):
            return name
        worst = (tree - plain).abs().max().item()
        reason = f"a token tree and its paths differ by up to {worst:.2g} nats per token"
    raise UnsupportedAttentionError(reason)


def _check_in_fp32(policy: Policy, branches: list[Branch], config: Any) -> Tensor | None:
    """The log-probabilities of the model itself in fp32, if it is in half precision.

    None if the model is in fp32 already, or cannot compute in it.
    Raises UnsupportedAttentionError if trees differ from them.
    """
    if not _can_compute_in_fp32(policy):
        return None
    with in_fp32(policy):
        policy.model.set_attn_implementation(policy.plain_attention)
        try:
            exact = policy.alone_logps(branches)
        except MODEL_ERRORS:
            return None
        try:
            tree, layout = _score_trees(policy, branches, SDPA)
        except MODEL_ERRORS as error:
            raise UnsupportedAttentionError(_first_line(error)) from error
        finally:
            policy.model.set_attn_implementation(policy.plain_attention)
    _check_calls(config, layout)
    if not _is_close(tree, exact):
        worst = (tree - exact).abs().max().item()
        raise UnsupportedAttentionError(
            f"a token tree and its paths differ by up to {worst:.2g} nats per token"
        )
    return exact


def _score_trees(policy: Policy, branches: list[Branch], name: str) -> tuple[Tensor, TreeLayout]:
    """The log-probabilities of a forest's targets with a tree attention, and its layout."""
    layout = policy.build_layout(branches)
    policy.model.set_attn_implementation(name)
    return policy.forest_logps(layout), layout.plan


def _can_compute_in_fp32(policy: Policy) -> bool:
    """Whether the weights are in half precision, whole and not quantized."""
    if policy.ranks is not None or policy.model.dtype not in (torch.bfloat16, torch.float16):
        return False
    return all(p.is_floating_point() and p.element_size() > 1 for p in policy.model.parameters())


@contextmanager
def in_fp32(policy: Policy) -> Iterator[None]:
    """Computes in fp32 inside the context, with weights in half precision.

    Each block's weights are copied to fp32 while the block computes, so that no more than one block
    and the head are in memory twice.
    """
    blocks = list(policy.scorer.blocks)
    of_blocks = {id(module) for block in blocks for module in block.modules()}
    others = [m for m in policy.scorer.modules() if id(m) not in of_blocks and m._parameters]
    handles = []
    for unit in [*blocks, *others]:
        handles.extend(_cast_while_computing(unit, recurse=id(unit) in of_blocks))
    # The head is multiplied row by row, without a call of its module (lm_head.py).
    restore_head = _cast(policy.scorer.core.get_output_embeddings(), recurse=True)
    try:
        yield
    finally:
        restore_head()
        for handle in handles:
            handle.remove()


def _cast_while_computing(unit: nn.Module, *, recurse: bool) -> list[Any]:
    """The handles of hooks that cast a module's weights and inputs to fp32 for each call."""
    restores: list[Callable[[], None]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        restores.append(_cast(module, recurse=recurse))
        return tuple(_to_fp32(a) for a in args), {k: _to_fp32(v) for k, v in kwargs.items()}

    def after(*_: Any) -> None:
        restores.pop()()

    return [
        unit.register_forward_pre_hook(before, with_kwargs=True),
        unit.register_forward_hook(after, always_call=True),
    ]


def _cast(module: nn.Module, *, recurse: bool) -> Callable[[], None]:
    """Casts a module's weights to fp32, and returns the function that restores them."""
    originals = [(p, p.data) for p in module.parameters(recurse=recurse) if p.element_size() == 2]
    for parameter, data in originals:
        parameter.data = data.float()

    def restore() -> None:
        for parameter, data in originals:
            parameter.data = data

    return restore


def _to_fp32(value: Any) -> Any:
    """A tensor in half precision as fp32, and tuples of them; other values as they are."""
    if isinstance(value, tuple):
        return tuple(_to_fp32(v) for v in value)
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def _padding_noise(policy: Policy, branches: list[Branch], plain: Tensor) -> float:
    """The difference that padding makes to the model itself, in nats; 0 if it is unknown."""
    if policy.model.dtype == torch.float32:
        return 0.0
    policy.model.set_attn_implementation(policy.plain_attention)
    try:
        noise = _rms(policy.batched_logps(branches, "padded") - plain)
    except MODEL_ERRORS:
        return 0.0
    return min(noise, NOISE_FLOOR)


def _limit(noise: float) -> float:
    """The largest difference that noise explains, in nats."""
    return max(MAX_NOISE_RATIO * noise, NOISE_FLOOR)


def _is_close_in_half(logps: Tensor, expected: Tensor) -> bool:
    """Whether the difference of log-probabilities may be rounding.  both: (targets,)"""
    return _rms(logps - expected) <= _limit(NOISE_FLOOR)


def _is_close(logps: Tensor, expected: Tensor) -> bool:
    """Whether log-probabilities agree within the tolerance of fp32.  both: (targets,)"""
    return bool(((logps - expected).abs() <= FP32_TOLERANCE * (1 + expected.abs())).all())


def _rms(difference: Tensor) -> float:
    """The root mean square."""
    return difference.float().square().mean().sqrt().item()


def _first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _random_ids(vocabulary: int, n: int) -> list[int]:
    random = np.random.default_rng(0)
    return [int(i) % vocabulary for i in random.integers(0, 2**31, n)]


def _probe_branches(vocabulary: int) -> list[Branch]:
    """Four branches of random tokens that share prefixes of 5 and 8 tokens."""
    ids = _random_ids(vocabulary, 48)
    return [
        trees.continuation(ids[:8], ids[8:14]),
        trees.continuation(ids[:8], ids[14:20]),
        trees.continuation([*ids[:5], *ids[20:36]], ids[36:48]),
        trees.verdict([*ids[:5], *ids[20:24]], 1 % vocabulary),
    ]


def _batching_branches(vocabulary: int) -> list[Branch]:
    """Paths of 4 to 40 tokens, some of them equal, some the start of another one."""
    ids = _random_ids(vocabulary, 120)
    start = ids[:6]
    return [
        trees.continuation(start, ids[6:40]),
        trees.verdict(ids[:12], ids[50]),
        trees.verdict(ids[:12], ids[51]),
        trees.continuation(ids[60:70], ids[70:90]),
        trees.continuation(ids[90:100], ids[100:120]),
        trees.verdict(ids[116:], ids[52]),
    ]


def _check_config(config: Any) -> None:
    """Raises UnsupportedAttentionError for a config whose layers trees do not reproduce.

    The probe is too short for rotary frequencies that depend on the longest sequence of a batch,
    and for attention in chunks.
    """
    unknown = set(getattr(config, "layer_types", None) or ()) - set(TREE_LAYER_TYPES)
    if unknown:
        raise UnsupportedAttentionError(f"it has layers of type {', '.join(sorted(unknown))}")
    if _depends_on_length(config):
        raise UnsupportedAttentionError("its rotary frequencies depend on the longest sequence")
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedAttentionError("it attends within chunks")


def _check_blocks(blocks: nn.ModuleList) -> None:
    """Raises UnsupportedAttentionError for layers that mix tokens outside attention."""
    if any(isinstance(module, nn.Conv1d) for module in blocks.modules()):
        raise UnsupportedAttentionError("it has layers that convolve over tokens")


def _depends_on_length(config: Any) -> bool:
    """Whether rotary frequencies depend on the longest sequence of a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [r for r in [rope, *rope.values()] if isinstance(r, dict)]
    return any(r.get("rope_type") in ("dynamic", "longrope") for r in ropes)


def _check_calls(config: Any, layout: TreeLayout) -> None:
    """Raises UnsupportedAttentionError if not every layer calls attention, with its window."""
    n_layers = getattr(config, "num_hidden_layers", 0)
    if layout.n_calls < n_layers:
        raise UnsupportedAttentionError(
            f"only {layout.n_calls} of its {n_layers} layers use transformers' attention interface"
        )
    window = getattr(config, "sliding_window", None)
    if window and window not in layout.windows:
        raise UnsupportedAttentionError("it does not pass its sliding window on to attention")
