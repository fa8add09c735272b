"""Tiny random models of the architectures that the installed transformers has, and what each does.

Each model is scored by the engine and by the model itself, one sequence at a time; trained for one
step by `scir train`, with all weights and with adapters; saved and loaded again.
"""

from __future__ import annotations

import json
import random
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from models import base_vocabulary
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from scir_cli import config, stages
from scir_cli.engine import loading, trees
from scir_cli.engine.policy import Policy
from scir_cli.engine.trees import Branch
from scir_cli.errors import ScirError
from scir_cli.settings import ModelSettings, TrainSettings

MARKER = "# Architectures"
WAYS = {
    "trees": "trees",
    "padded": "padded batches",
    "equal": "batches of equal length",
    "alone": "one sequence at a time",
}
VOCABULARY = 400

ENDS = {"bos_token_id": 300, "eos_token_id": 301, "pad_token_id": 302}
ENDS_OF_TEXT = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

#: Small values of the settings by which architectures name their sizes; set where there is one.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "shared_intermediate_size": 16,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "initializer_range": 0.25,
    "sliding_window": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_expand": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "mamba_n_groups": 1,
}

_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_WINDOWS = ["sliding_attention", "full_attention"] * 2

#: Model type -> further settings of the tiny model.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral3": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gemma2": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma3_text": {"layer_types": _WINDOWS},
    "gemma3n_text": {
        "layer_types": _WINDOWS,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"layer_types": _WINDOWS},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "deepseek_v3": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "deepseek_v32": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "deepseek_v4": {},
    "phi3": {},
    "phimoe": {},
    "olmo2": {},
    "olmo3": {"layer_types": _WINDOWS},
    "olmo_hybrid": {"layer_types": _HYBRID},
    "granite": {"logits_scaling": 2.5, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "mamba", "attention"]},
    "granite_swa": {},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "nemotron": {},
    "nemotron_h": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "layer_types": _WINDOWS},
    "smollm3": {"sliding_window": None},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {},
    "mamba2": {"num_heads": 4, "expand": 1, "n_groups": 1},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "full_attention"]},
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "full_attention"],
        "num_dense_layers": 1,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "minimax": {},
    "minimax_m2": {},
    "kimi_linear": {
        "layer_types": _HYBRID,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "llama4_text": {},
    "mimo_v2_flash": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "exaone4": {"layer_types": _WINDOWS},
    "apertus": {},
    "arcee": {},
    "starcoder2": {},
    "recurrent_gemma": {},
}

#: Settings of the vision tower of a tiny multimodal checkpoint
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "depth": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
}

#: Further settings of the vision tower
_VISION_OF: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"deepstack_visual_indexes": [0, 1]},
    "llama4": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
}

#: Model type of a multimodal checkpoint -> further settings of its text model
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": _WINDOWS},
    "mistral3": {},
    "qwen2_5_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        }
    },
    "qwen3_vl": {},
    "qwen3_5": {"layer_types": _HYBRID},
    "llama4": {},
}


def small(model_type: str, further: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tiny model: those of SMALL that the architecture has, and some more."""
    known = AutoConfig.for_model(model_type)
    values = {name: value for name, value in SMALL.items() if name in known.to_dict()}
    return {**values, **ENDS, **further}


def make(folder: Path, name: str, seed: int = 0) -> Path:
    """Writes a tiny random model of an architecture, with a tokenizer."""
    torch.manual_seed(seed)
    if name in WRAPPERS:
        model = AutoModelForImageTextToText.from_config(_wrapper_config(name), dtype=torch.float32)
    else:
        config_ = AutoConfig.for_model(name, **small(name, ARCHITECTURES[name]))
        model = AutoModelForCausalLM.from_config(config_, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at 0 and norms at 1, where leaving them out would go unnoticed.
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base_vocabulary()), **ENDS_OF_TEXT
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _wrapper_config(name: str) -> Any:
    """The config of a tiny multimodal checkpoint."""
    known = AutoConfig.for_model(name)
    text = small(known.text_config.model_type, WRAPPERS[name])
    vision = {k: v for k, v in _VISION.items() if k in known.vision_config.to_dict()}
    return AutoConfig.for_model(
        name,
        text_config={"model_type": known.text_config.model_type, **text},
        vision_config={
            "model_type": known.vision_config.model_type,
            **vision,
            **_VISION_OF.get(name, {}),
        },
        **ENDS,
    )


@dataclass(frozen=True)
class Row:
    """What `scir` does with an architecture.

    scored: trees, padded, equal or alone; refused: the reason why there is nothing else here.
    reason: why not in trees. logps: largest difference to the model alone, nats per token.
    gradients: the largest difference of a tensor, as a share of its norm.
    trained: tensors that one step changed, of those in the folder; lost: tensors not saved.
    reloaded: as logps, of the folder that was trained, loaded again.
    adapters: modules with LoRA adapters; skipped: what the command says of other weights.
    """

    architecture: str
    multimodal: bool
    refused: str = ""
    scored: str = ""
    reason: str = ""
    logps: float = 0.0
    gradients: float = 0.0
    trained: str = ""
    lost: int = 0
    reloaded: float = 0.0
    adapters: int = 0
    skipped: str = ""


def measure(name: str) -> Row:
    """Makes a tiny model of an architecture and does everything with it."""
    multimodal = name in WRAPPERS
    with tempfile.TemporaryDirectory() as root:
        folder = make(Path(root) / "model", name)
        try:
            return _measure(name, folder, Path(root))
        except ScirError as error:
            return Row(name, multimodal, refused=str(error).replace(root, ""))


def _measure(name: str, folder: Path, root: Path) -> Row:
    with redirect_stderr(StringIO()):
        policy = load(folder)
        logps, gradients = differences(policy, folder, with_gradients=True)
        _train(folder, root, root / "trained", rank=0)
        reloaded, _ = differences(load(root / "trained"), root / "trained")
    said = StringIO()
    with redirect_stderr(said):
        _train(folder, root, root / "lora", rank=2)
    before, after = tensors(folder), tensors(root / "trained")
    changed = [key for key in before if key in after and not before[key].equal(after[key])]
    adapter = root / "lora" / "adapter" / "adapter_model.safetensors"
    with safe_open(adapter, "pt") as weights:
        modules = {key.partition(".lora_")[0] for key in weights.keys()}  # noqa: SIM118
    skipped = [line for line in said.getvalue().splitlines() if "LoRA" in line]
    return Row(
        name,
        name in WRAPPERS,
        scored="trees" if policy.takes_trees else policy.batching,
        reason=policy.tree_refusal,
        logps=logps,
        gradients=gradients,
        trained=f"{len(changed)} of {len(before)}",
        lost=len(before.keys() - after.keys()),
        reloaded=reloaded,
        adapters=len(modules),
        skipped=skipped[0] if skipped else "",
    )


def load(folder: Path) -> Policy:
    """The model in a folder, in fp32 on the CPU, as every stage loads it."""
    values = {"model": str(folder), "output_dir": "-", "dtype": "fp32", "device": "cpu"}
    return loading.load(config.build(ModelSettings, values, where="benchmark"))


def branches_of(seed: int = 0) -> list[Branch]:
    """Two questions with two answers each, and both verdicts of judge prompts in both orders."""
    draw = random.Random(seed)

    def text(n: int) -> list[int]:
        return [draw.randrange(4, VOCABULARY) for _ in range(n)]

    branches = []
    start = text(5)
    for length in (9, 40):
        question = [*start, *text(length)]
        answers = [text(11), text(6)]
        branches += [trees.continuation(question, answer) for answer in answers]
        for first, second in (answers, reversed(answers)):
            asked = [*start, *question, *first, *second]
            branches += [trees.verdict(asked, token) for token in (4, 5)]
    return branches


def differences(
    policy: Policy, folder: Path, *, with_gradients: bool = False
) -> tuple[float, float]:
    """The largest difference of a log-probability per token, and of a gradient's tensor.

    To a second copy of the model with its own attention and full logits, one path at a time.
    """
    branches = branches_of()
    plain = _plain_model(folder)
    weights = torch.randn(len(branches), generator=torch.Generator().manual_seed(7))
    with torch.set_grad_enabled(with_gradients):
        ours = policy.branch_logps(branches)
        theirs = torch.stack([_plain_logp(plain, branch) for branch in branches])
    n_tokens = torch.tensor([len(branch.target_tokens) for branch in branches])
    worst = ((ours - theirs).abs() / n_tokens).max().item()
    if not with_gradients:
        return worst, 0.0
    (weights * ours).sum().backward()
    (weights * theirs).sum().backward()
    of_plain = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    whole = torch.stack([g.norm() for g in of_plain.values()]).norm().item()
    largest = 0.0
    for key, parameter in policy.model.named_parameters():
        if parameter.requires_grad and key in of_plain:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # A gradient that is zero but for rounding has no norm of its own.
            norm = max(of_plain[key].norm().item(), 1e-3 * whole)
            largest = max(largest, (mine - of_plain[key]).norm().item() / norm)
    policy.model.zero_grad()
    return worst, largest


def _plain_model(folder: Path) -> Any:
    """A second copy of the model, with the attention that its authors wrote."""
    kind = AutoModelForCausalLM
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    if "ForConditionalGeneration" in names[0]:
        kind = AutoModelForImageTextToText
    try:
        options = {"attn_implementation": "eager"}
        return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
    except ValueError:
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


def _plain_logp(model: Any, branch: Branch) -> Tensor:
    """The summed log-probability of a branch's targets, in nats, from full logits."""
    logits = model(input_ids=torch.tensor([branch.ids]), use_cache=False).logits[0]
    rows = logits[list(branch.target_positions)].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(branch.target_tokens)[:, None]).sum()


def _train(folder: Path, root: Path, out: Path, *, rank: int) -> None:
    """One step of DPO on four pairs, by the stage itself."""
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(f"w{draw.randrange(30, VOCABULARY)}" for _ in range(n))

    pairs = [{"prompt": text(9), "chosen": text(7), "rejected": text(5)} for _ in range(4)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (root / "pairs.jsonl").write_text(lines, encoding="utf-8")
    values = {
        "model": str(folder),
        "input": str(root / "pairs.jsonl"),
        "output_dir": str(out),
        "objective": "dpo",
        "max_steps": 1,
        "batch_size": 4,
        "warmup_ratio": 0.0,
        "learning_rate": 1e-3,
        "dtype": "fp32",
        "device": "cpu",
        "lora": {"rank": rank},
    }
    stages.load("train")(config.build(TrainSettings, values, where="benchmark"))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor that a model folder holds."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            found.update({key: weights.get_tensor(key) for key in weights.keys()})  # noqa: SIM118
    return found


def table(rows: list[Row]) -> list[str]:
    """A Markdown row per architecture."""
    lines = [
        "| architecture | scored in | log-probabilities | gradients | trained tensors | reloaded "
        "| modules with adapters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row.architecture} (multimodal)" if row.multimodal else row.architecture
        if row.refused:
            refused = row.refused.replace("|", "\\|")
            lines.append(f"| {name} | refused: {refused} | | | | | |")
            continue
        scored = f"{row.scored}: {row.reason}" if row.reason else row.scored
        lost = f", {row.lost} lost" if row.lost else ""
        adapters = f"{row.adapters}, none on experts" if row.skipped else str(row.adapters)
        figures = [f"{x:.0e}" for x in (row.logps, row.gradients, row.reloaded)]
        cells = [name, scored, *figures[:2], row.trained + lost, figures[2], adapters]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def document(rows: list[Row]) -> list[str]:
    """The section of docs/models.md."""
    scored = [row for row in rows if not row.refused]
    counts = {way: sum(row.scored == way for row in scored) for way in WAYS}
    summary = ", ".join(f"{n} in {WAYS[way]}" for way, n in counts.items() if n)
    return [
        MARKER,
        "",
        "Made by `python benchmarks/models.py --architectures --write docs/models.md` with "
        f"transformers {transformers.__version__} and torch {torch.__version__}: {len(rows)} "
        "architectures as tiny models of random weights, in fp32 on a CPU.",
        "",
        f"- Scored: {summary}; refused: {len(rows) - len(scored)}.",
        f"- Largest difference to the model itself: {max(r.logps for r in scored):.0e} nats per "
        f"token; of a gradient {max(r.gradients for r in scored):.0e} of its norm; after one step "
        f"of training, saving and loading {max(r.reloaded for r in scored):.0e} nats per token.",
        f"- Tensors that are not saved: {sum(row.lost for row in scored)}.",
        "",
        "*Scored in* trees, padded batches, batches of equal length, or alone, and why not in "
        "trees.",
        "*Log-probabilities* and *gradients* are the largest differences to a second copy of the "
        "model with its own attention and full logits, one sequence at a time.",
        "*Trained tensors* changed in one step; those of a vision tower, of an index that selects "
        "keys, and of experts without tokens do not.",
        "*Modules with adapters* are those of `--lora-rank` with its default targets.",
        "",
        *table(rows),
    ]
