"""One line that names CPU, GPU, threads and versions; it is printed above every table."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from issp.ops import backends
from issp.utils.environment import cpu_name, git_revision


def machine_line(device: str) -> str:
    """Processor, threads, versions, git revision and back end, in one line.

    Args:
        device: "cpu" or "cuda".
    """
    parts = [_gpu()] if device == "cuda" else []
    parts += [
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
        f"issp {revision()}",
        f"back end {backends.active(device)}",
    ]
    return "; ".join(parts)


def revision() -> str:
    """Git revision of the checkout; ISSP_REVISION where git cannot tell."""
    return git_revision(Path(__file__).parent) or os.environ.get("ISSP_REVISION", "unknown")


def free_bytes(device: str) -> int:
    """Bytes of free memory: of the GPU, or of the machine or container of this process."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(x.split(":") for x in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass  # other systems, and containers that show less: the number of free pages is used
    return free


def _gpu() -> str:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    properties = torch.cuda.get_device_properties()
    return (
        f"{properties.name}, {properties.multi_processor_count} SMs, "
        f"driver {(driver or 'unknown').splitlines()[0]}, CUDA {torch.version.cuda}"
    )


def _output(*command: str) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
