"""Facts about the installation and the machine: versions, back ends, processor, GPU."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from issp.ops import backends
from issp.utils import denormals, environment, process
from issp.utils.environment import package_version

_CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_fp16", "amx_bf16", "amx_tile"),
)
_LOAD_SECONDS = 0.2  # the system counts in hundredths of a second
_PACKAGES = (
    *("numpy", "triton", "Pillow", "PyYAML", "pydantic", "safetensors", "rich", "matplotlib"),
    *("tensorboard", "scikit-image"),
)


def info() -> dict[str, Any]:
    """Versions, back ends built and active (and why others are not), processor, GPU.

    Returns:
        A dict of plain values, the same as `issp info --json` prints.
    """
    load = process.LoadMeter()
    gpu_facts = gpu()
    devices = ("cpu", "cuda") if gpu_facts else ("cpu",)
    facts: dict[str, Any] = {
        "issp": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: package_version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "backends": {
            "active": {device: backends.active(device) for device in devices},
            "unused": backends.problems(),
            "forced": os.environ.get("ISSP_BACKEND"),
            "cuda": backends.cuda_versions(),
        },
        "cpu": cpu(),
        "gpu": gpu_facts,
    }
    time.sleep(_LOAD_SECONDS)
    facts["cpu"]["busy_cores"] = load.busy_cores()
    return facts


def version() -> str:
    """Version of the installed package."""
    return package_version("issp") or "unknown (not installed)"


def cpu() -> dict[str, Any]:
    """The processor, and how torch and OpenMP use it."""
    return {
        "name": environment.cpu_name(),
        "features": environment.cpu_features(_CPU_FEATURES),
        "torch": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels(),
        "tiles": tile_kernels(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "denormals": denormals.mode(),
        "waiting": process.waiting(),
    }


def kernels() -> str | None:
    """The instruction set of the compiled CPU ops; None where they are not in use."""
    return torch.ops.issp._cpu_capability() if backends.active("cpu") == "cpp" else None


def tile_kernels() -> str:
    """What computes in the tile layout: amx, avx512, scalar, or the slow reference."""
    return torch.ops.issp._tile_capability() if backends.active("cpu") == "cpp" else "reference"


def gpu() -> dict[str, Any] | None:
    """The first GPU; None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
