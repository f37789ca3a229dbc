"""The machine and the software on it: processor, installed packages, git revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def package_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_features(names: Sequence[str]) -> list[str] | None:
    """Those of the named features that the processor has; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    flags = next((line.split() for line in _cpu_lines() if line.startswith("flags")), [])
    return [name for name in names if name in flags]


def _cpu_lines() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []


def git_revision(folder: str | Path) -> str | None:
    """`git describe` of the checkout around a folder, "-dirty" when files differ; None without."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
