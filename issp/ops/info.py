"""What is installed and in use here: versions, back ends, processor, GPU, float mode."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from issp.ops import backends
from issp.utils import denormals

_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "amx_bf16", "amx_tile")
_PACKAGES = ("numpy", "triton", "Pillow", "PyYAML", "safetensors", "rich", "matplotlib")


def info() -> dict[str, Any]:
    """Versions, back ends built and active (and why others are not), processor, GPU.

    Returns:
        A dict of plain values, the same as `issp info --json` prints.
    """
    gpu = _gpu()
    return {
        "issp": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in (*_PACKAGES, "tensorboard", "scikit-image")},
        "system": f"{platform.system()} {platform.machine()}",
        "backends": {
            "active": {
                device: backends.active(device) for device in ("cpu", "cuda")[: 1 + bool(gpu)]
            },
            "unused": backends.problems(),
            "forced": os.environ.get("ISSP_BACKEND"),
        },
        "cpu": {
            "name": _cpu_name(),
            "features": _cpu_features(),
            "torch": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "denormals": denormals.mode(),
        },
        "gpu": gpu,
    }


def version() -> str:
    """Version of the installed package."""
    return _version("issp") or "unknown (not installed)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_lines() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_features() -> list[str] | None:
    """Those of interest to the kernels; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    flags = next((line.split() for line in _cpu_lines() if line.startswith("flags")), [])
    return [name for name in _CPU_FEATURES if name in flags]


def _gpu() -> dict[str, Any] | None:
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
