"""The device and the precision of a setting, and what the hardware can do with them."""

from __future__ import annotations

from functools import cache

import torch

from scir_cli.errors import ConfigError, warn

#: Device types that are accepted, in the order in which `auto` selects them.
DEVICE_TYPES = ("cuda", "cpu", "mps", "xpu")


def resolve_device(name: str) -> str:
    """The device of a setting: `auto` is CUDA if it is available, and the CPU if not.

    Raises ConfigError for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEVICE_TYPES:
        raise ConfigError(f"--device {name} is not auto, cpu, cuda, cuda:1, mps or xpu")
    available = _n_devices(device.type)
    if (device.index or 0) >= available:
        found = ", ".join(kind for kind in DEVICE_TYPES if _n_devices(kind))
        raise ConfigError(
            f"--device {name} is not available: torch {torch.__version__} finds "
            f"{available} such devices here, and supports {found}"
        )
    return name


def _n_devices(kind: str) -> int:
    """The number of devices of a type on this machine."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count())


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of a setting: `bf16`, `fp32`, or `auto`.

    `auto` is bf16 if the hardware computes in it, and fp32 if not.
    """
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    return torch.bfloat16 if computes_in_bf16(device) else torch.float32


def computes_in_bf16(device: str) -> bool:
    """Whether the hardware multiplies matrices in bf16, and does not emulate it.

    CUDA devices do from Ampere on (a T4 does not), CPUs with AVX512-BF16 or AMX.
    """
    kind = resolve_device(device).partition(":")[0]
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "xpu":
        return torch.xpu.is_bf16_supported()
    if kind == "mps":
        return False
    return cpu_computes_in_bf16()


def cpu_computes_in_bf16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def warn_of_emulation(dtype: torch.dtype, device: str) -> None:
    """Prints one line per process if bf16 is requested where the hardware emulates it."""
    if dtype == torch.bfloat16 and not computes_in_bf16(device):
        warn(
            f"--dtype bf16 is emulated on {resolve_device(device)} here, many times slower than "
            "fp32; leave --dtype out, or pass --dtype fp32"
        )
