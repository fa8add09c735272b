"""Multimodal and quantized checkpoints, devices and precisions: used right, or one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, load_fp32, run_command
from safetensors.torch import load_file, save_file
from toy import make_model
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import architectures

from scir_cli import config, stages
from scir_cli.engine import checkpoints, hardware, loading
from scir_cli.errors import ConfigError, ModelError
from scir_cli.settings import ModelSettings, TrainSettings

PAIRS = [
    {"prompt": f"Say {word}.", "chosen": f"The {word}.", "rejected": "No."}
    for word in ("cat", "dog", "sun")
]
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def wrapper(folder: Path, name: str = "mistral3") -> Path:
    """A tiny multimodal checkpoint, with a processor's file and a byte-level tokenizer."""
    architectures.make(folder, name)
    (folder / "preprocessor_config.json").write_text('{"size": 28}', encoding="utf-8")
    return folder


def train(folder: Path, out: Path, **values: Any) -> dict[str, Any]:
    data = out.parent / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    common = {"model": str(folder), "input": str(data), "output_dir": out, "objective": "dpo"}
    settings = config.build(TrainSettings, common, FP32, {"max_steps": 1}, values, where="test")
    return stages.load("train")(settings)


# ------------------------------ multimodal checkpoints


@pytest.mark.parametrize("rank", [0, 2])
def test_a_multimodal_checkpoint_is_trained_in_its_text_model_alone_and_saved_whole(
    rank: int, tmp_path: Path
):
    folder = wrapper(tmp_path / "model")
    train(folder, tmp_path / "out", lora={"rank": rank}, learning_rate=1e-2, warmup_ratio=0)
    before, after = architectures.tensors(folder), architectures.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert not [name for name in changed if "vision" in name or "projector" in name]
    names = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert names == ["Mistral3ForConditionalGeneration"]
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}'


def test_tensors_that_the_models_class_ignores_are_named_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = wrapper(tmp_path / "model", "qwen3_5")
    weights = load_file(folder / "model.safetensors")
    weights["mtp.layers.0.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    train(folder, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if "not have" in line]
    assert lines == [
        "warning: 1 tensors of the checkpoint (mtp.layers.0.weight …) are not used by "
        "Qwen3_5ForConditionalGeneration, and the trained model will not have them"
    ]


def test_a_model_that_does_not_write_text_is_refused_by_its_type(tmp_path: Path):
    make_model(tmp_path)
    bert = AutoConfig.for_model("vit", architectures=["ViTModel"])
    bert.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type vit \(ViTModel\) does not write text"):
        load_fp32(tmp_path)


# ------------------------------ quantized checkpoints


def declare(folder: Path, **quantization: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["quantization_config"] = quantization
    path.write_text(json.dumps(values), encoding="utf-8")


def test_a_checkpoint_in_fp8_is_dequantized_and_saved_as_a_plain_model(tmp_path: Path):
    folder = make_model(tmp_path / "model")
    stored, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if "proj" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            expected[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    declare(
        folder,
        quant_method="fp8",
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
        modules_to_not_convert=["lm_head"],
    )
    policy = load_fp32(folder)
    weights = policy.model.state_dict()
    assert expected
    assert all(weights[name].equal(value) for name, value in expected.items())
    assert policy.takes_trees

    train(folder, tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert {value.dtype for value in architectures.tensors(tmp_path / "out").values()} == {
        torch.float32
    }


def test_a_checkpoint_in_mxfp4_is_dequantized(tmp_path: Path):
    folder = make_model(tmp_path / "model", "gpt_oss", intermediate_size=64)
    draw = torch.Generator().manual_seed(0)
    stored, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            stored[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        shape = (experts, outputs, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        scales = torch.randint(124, 127, shape[:3], generator=draw, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        # Four bits: a sign and a magnitude; the lower half of a byte comes first.
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        values = torch.tensor(MAGNITUDES)[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
        values = values * 2.0 ** (scales[..., None].float() - 127)
        expected[name] = values.reshape(experts, outputs, inputs).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    weights = load_fp32(folder).model.state_dict()
    assert len(expected) == 4
    assert all(weights[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_another_quantization_is_refused_by_name(method: str, tmp_path: Path):
    declare(make_model(tmp_path), quant_method=method, bits=4)
    with pytest.raises(ModelError, match=rf"quantized \({method}\).*pass the checkpoint in bf16"):
        load_fp32(tmp_path)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path):
    declare(make_model(tmp_path), quant_method="fp8")
    with pytest.raises(ConfigError, match="--quantization 4bit does not support a checkpoint"):
        load_fp32(tmp_path, quantization="4bit")


# ------------------------------ adapters on experts


def test_lora_tells_in_one_line_that_experts_get_no_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(make_model(tmp_path / "model", "qwen2_moe"), tmp_path / "out", lora={"rank": 2})
    lines = [line for line in capsys.readouterr().err.splitlines() if "experts" in line]
    assert len(lines) == 1
    assert "(down_proj, gate_up_proj, " in lines[0]
    assert "they get no adapters and are not stored in 4 bits" in lines[0]


def test_a_dense_model_has_no_weights_of_experts(tmp_path: Path):
    assert checkpoints.expert_weights(load_fp32(make_model(tmp_path)).model) == {}


# ------------------------------ devices and precisions


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "--device gpu is not auto, cpu, cuda, cuda:1, mps or xpu"),
        ("meta", "--device meta is not auto, cpu"),
        ("cuda:99", "--device cuda:99 is not available"),
        ("xpu:99", "--device xpu:99 is not available"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    device: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(PAIRS[0]) + "\n", encoding="utf-8")
    folder = make_model(tmp_path / "model")
    words = ["train", "-m", folder, "-i", data, "-o", tmp_path / "out", "--device", device]
    assert run_command([str(word) for word in words], monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("supported", "expected"), [(False, "fp32"), (True, "bf16")])
def test_auto_is_bf16_on_a_cpu_that_multiplies_in_bf16_and_fp32_on_others(
    supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hardware, "cpu_computes_in_bf16", lambda: supported)
    assert hardware.resolve_dtype("auto", "cpu") == hardware.resolve_dtype(expected, "cpu")


def test_auto_is_fp32_on_a_gpu_that_emulates_bf16(monkeypatch: pytest.MonkeyPatch):
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert hardware.resolve_dtype("auto", "auto") == torch.float32


@pytest.mark.parametrize("emulated", [True, False])
def test_bf16_that_the_cpu_emulates_is_one_line_per_process(
    emulated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(hardware, "cpu_computes_in_bf16", lambda: not emulated)
    hardware.warn_of_emulation.cache_clear()
    folder = make_model(tmp_path)
    for _ in range(2):
        load_fp32(folder, dtype="bf16")
    load_fp32(folder)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: --dtype bf16 is emulated on cpu here, many times slower than fp32; "
        "leave --dtype out, or pass --dtype fp32"
    ] * int(emulated)


@pytest.mark.parametrize("error", [ImportError("needs timm"), TypeError("odd"), AttributeError])
def test_an_error_of_model_code_is_one_line_with_the_models_folder(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_model(tmp_path / "my_model")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoints.AutoModelForCausalLM, "from_pretrained", fail)
    values = {"model": str(folder), "output_dir": "-"}
    settings = config.build(ModelSettings, values, FP32, where="test")
    with pytest.raises(ModelError, match="my_model cannot be loaded: (Import|Type|Attribute)Error"):
        loading.load_model(folder, settings, "cpu")
