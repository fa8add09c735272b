"""env: the versions, hardware and variables that a report of a bug needs; it writes nothing."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

from scir_cli.data.files import Json
from scir_cli.errors import redact

#: Packages that can determine a result or an error; those not installed are reported too.
PACKAGES: tuple[str, ...] = (
    "scir-cli",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "pyarrow",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "vllm",
    "ray",
    "numpy",
    "typer",
    "rich",
)

#: Variables that change what a command does.
VARIABLES: tuple[str, ...] = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
)
VARIABLES += ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "SCIR_CACHE")
VARIABLES += ("COLUMNS", "LANG", "LC_ALL", "NO_COLOR", "PYTORCH_CUDA_ALLOC_CONF")

#: Variables of which only their presence is reported.
SECRETS = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")


def describe() -> Json:
    """What `scir env` prints: name -> text, in groups.

    {"system": …, "packages": …, "devices": …, "variables": …}; a broken torch is reported in
    "devices" and raises nothing.
    """
    return {
        "system": _system(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "variables": _variables(),
    }


def _system() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()} ({_processor()})",
        "encoding": f"stdout {sys.stdout.encoding}, files {sys.getfilesystemencoding()}",
    }


def _processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    """Device -> what torch knows of it, and the precision that `--dtype auto` chooses."""
    try:
        import torch

        from scir_cli.engine import hardware
    except Exception as error:  # a broken installation is what this command is for
        return {"torch": f"cannot be imported: {type(error).__name__}: {error}"}
    devices = {"torch threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
                f"compute capability {properties.major}.{properties.minor}"
            )
        devices["cuda"] = str(torch.version.cuda or torch.version.hip)
    else:
        devices["cuda"] = "not available"
    dtype = str(hardware.resolve_dtype("auto", "auto")).removeprefix("torch.")
    devices["auto"] = f"{hardware.resolve_device('auto')}, {dtype}"
    return devices


def _variables() -> dict[str, str]:
    """The variables that are set; of a secret only that it is, as three stars."""
    values = {name: redact(os.environ[name]) for name in VARIABLES if name in os.environ}
    return values | {name: "***" for name in SECRETS if name in os.environ}
