"""Tiny models and tokenizers on disk: random seeded weights, real transformers classes, no network.

Weights are large enough (`initializer_range`, and noise on every bias and norm) for windows,
soft-capping and positions to change log-probabilities by far more than rounding does: a test that
ignores one of them fails.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, START, END, BOS = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"
VOCABULARY = 400

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SENTENCES = [
    "Which answer to the question is better? Reply with A or B.",
    "Answer A: the cat sat on the mat.\n\nAnswer B: a dog ran after the ball.\n\nVerdict: A",
    "Question: what is the capital of France? Response: Paris is the capital of France. Verdict: B",
    "system\nYou are a helpful assistant.\nuser\nSort the numbers.\nassistant\nHere they are.",
    "Reply with the score, a single digit from 0 to 5: 0 1 2 3 4 5.",
]


@cache
def _bytes_and_merges() -> str:
    """A byte-level BPE of VOCABULARY tokens, as tokenizer.json text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, BOS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer.to_str()


def make_tokenizer(folder: Path, *, bos: bool = False, template: str | None = CHATML) -> Path:
    """Writes a tokenizer with a ChatML-like template.

    With `bos`, the template writes BOS and plain encoding adds one of its own, as Llama's does.
    """
    backend = Tokenizer.from_str(_bytes_and_merges())
    names: dict[str, Any] = {"eos_token": END, "pad_token": PAD, "extra_special_tokens": [START]}
    if bos:
        names["bos_token"] = BOS
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if template is not None:
        tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + template
    tokenizer.save_pretrained(folder)
    return folder


ENDS: dict[str, Any] = {
    "bos_token_id": 3,
    "eos_token_id": 2,
    "pad_token_id": 0,
}  # as in the tokenizer
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    **ENDS,
}
GQA: dict[str, Any] = {"num_key_value_heads": 2}
ALTERNATING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
}
#: An architecture's name here -> transformers' model type and settings, in the architecture's own
#: names.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**COMMON, **GQA}),
    "mistral": ("mistral", {**COMMON, **GQA, "sliding_window": 16}),
    "qwen3": ("qwen3", {**COMMON, **GQA, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            **COMMON,
            **GQA,
            **ALTERNATING,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("gemma3_text", {**COMMON, **GQA, **ALTERNATING}),
    "phi": ("phi", {**COMMON, "partial_rotary_factor": 0.5}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.25,
            **ENDS,
        },
    ),
    "cohere": ("cohere", {**COMMON, **GQA, "logit_scale": 0.3}),
    "granite": (
        "granite",
        {
            **COMMON,
            **GQA,
            "logits_scaling": 2.5,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.7,
        },
    ),
    # says its window in the mask alone: attention is not told
    "qwen2_moe": (
        "qwen2_moe",
        {
            **COMMON,
            **GQA,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    # turns all its positions differently once a sequence is longer than 32
    "longrope": (
        "phi3",
        {
            **COMMON,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "factor": 16.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
            },
        },
    ),
    # attention sinks, in every layer
    "gpt_oss": (
        "gpt_oss",
        {
            **COMMON,
            **GQA,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # hybrids of attention and a recurrence or a convolution, and a head with a factor
    "qwen3_next": (
        "qwen3_next",
        {
            **COMMON,
            **GQA,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": ("lfm2", {**COMMON, **GQA, "layer_types": ["conv", "full_attention"]}),
    "falcon_h1": (
        "falcon_h1",
        {
            **COMMON,
            **GQA,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "lm_head_multiplier": 0.5,
        },
    ),
    # its sparse attention selects keys by what follows as well
    "deepseek_v32": (
        "deepseek_v32",
        {
            **COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
        },
    ),
    # cannot take trees: positions come from the distance between keys, and from a recurrent state
    "bloom": (
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.25,
            **ENDS,
        },
    ),
    "mamba": (
        "mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "initializer_range": 0.25,
            **ENDS,
        },
    ),
}


def make_model(
    folder: Path, arch: str = "llama", *, seed: int = 0, bos: bool = False, **overrides: Any
) -> Path:
    """Writes a tiny model of an architecture as a safetensors folder, with its tokenizer
    beside it.
    """
    kind, settings = ARCHITECTURES[arch]
    config = AutoConfig.for_model(kind, **(settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if (
                    parameter.ndim == 1
                ):  # biases start at 0 and norms at 1, where leaving them out would go unnoticed
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return make_tokenizer(folder, bos=bos)


def make_adapter(folder: Path, base: Path, rank: int = 4) -> Path:
    """Writes a LoRA adapter of random weights for the queries and values of a Llama, as peft
    does.
    """
    weights = {
        name: w
        for name, w in load_file(base / "model.safetensors").items()
        if "q_proj" in name or "v_proj" in name
    }
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = (
            torch.randn(rank, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5
        )
        tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(
            weight.shape[0], rank, generator=draw
        )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(base)}), encoding="utf-8"
    )
    return folder
