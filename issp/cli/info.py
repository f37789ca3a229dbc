"""`issp info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from issp.utils import process

HELP = "versions, back ends built and active (and why others are not), processor, GPU"
EXAMPLE = "issp info --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Prints what `issp.info()` returns."""
    from issp.ops.info import info

    facts = info()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    cpu, gpu, backends = facts["cpu"], facts["gpu"], facts["backends"]
    packages = [f"{n} {v or '(absent)'}" for n, v in facts["packages"].items()]
    active = ", ".join(f"{device}: {name}" for device, name in backends["active"].items())
    forced = f" (ISSP_BACKEND={backends['forced']})" if backends["forced"] else ""
    gpu_line = "none that torch sees"
    if gpu is not None:
        gpu_line = (
            f"{gpu['count']} x {gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB, CUDA {gpu['cuda']}"
        )
    lines = [
        ("issp", facts["issp"]),
        ("python", f"{facts['python']} on {facts['system']}"),
        ("torch", facts["torch"]),
        ("packages", ", ".join(packages)),
        ("active", active + forced),
        *(("not in use", f"{name}: {reason}") for name, reason in backends["unused"].items()),
        ("processor", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads in use"),
        ("features", " ".join(cpu["features"] or ["unknown"])),
        ("kernels", f"issp uses {cpu['kernels'] or 'none'}, torch {cpu['torch']}"),
        ("load", f"{_load(cpu)}; waiting threads: {cpu['waiting']}"),
        ("tiles", f"{cpu['tiles']} kernels (sparse bfloat16 convolution is fast on amx)"),
        ("denormals", f"{cpu['denormals']} (`issp train` flushes them to zero)"),
        ("gpu", gpu_line),
        ("cuda", backends["cuda"]),
    ]
    for key, text in lines:
        print(f"{key:11s} {text}")
    return 0


def _load(cpu: dict[str, Any]) -> str:
    if cpu["busy_cores"] is None:
        return "unknown"
    text = f"other processes keep {cpu['busy_cores']:.1f} of {cpu['cores']} cores busy"
    return process.crowded(cpu["busy_cores"], cpu["threads"]) or text
