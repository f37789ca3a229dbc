"""Benchmarks of this machine: measured times beside those of baselines from the same run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from bench.harness import progress
from bench.harness.errors import BenchmarkFailed

# One module each, with `add_arguments`, `run` and `EXAMPLE`; only the module asked for is imported.
BENCHMARKS = {
    "step": "the fused step (select, shrink, mask, flips)",
    "optim": "optimizer update and pruning in one pass",
    "train": "whole training iterations, dense and pruned",
    "finetune": "fine-tuning iterations that train the kept weights alone",
    "whole-run": "whole trainings of two stages beside dense ones: seconds and PSNR",
    "record": "what recording gradients and masks costs an iteration",
    "conv": "sparse convolutions, forward and training step",
    "matmul": "sparse linear layers, forward and training step",
    "tiles": "sparse convolutions in the tile layout (AMX bfloat16)",
    "network": "whole sparse networks, packed by issp.pack",
    "deploy": "latency, memory and files of networks beside onnxruntime, OpenVINO, DeepSparse",
    "upscale": "the command on a photograph: seconds and memory of the whole process",
    "accuracy": "PSNR by N:M pattern: trainings, no times",
    "revisions": "another checkout beside this one: ops, optimizers and the hook, in turn",
    "overhead": "Python per step beyond the ops: the hook, issp.optim, torch's optimizers",
    "long": "100 000 steps: memory, counts, CPU time per step",
    "busy": "the same calls beside processes that never sleep",
    "sass": "machine instructions of the CUDA kernels per 32 weights; needs nvcc, no GPU",
    "all": "most of them, each in a process of its own",
}


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of the benchmark that a command line names, and its arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    module = None
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv[:1]:
            module = importlib.import_module(f"bench.{name.replace('-', '_')}")
            command.description, command.epilog = module.__doc__, module.EXAMPLE
            module.add_arguments(command)
    return module, parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark.

    Returns:
        0; 1 when parity is red (nothing was timed) or a benchmark of `all` failed; 2 for bad
        input.
    """
    module, args = parse(argv)
    progress.restart()
    try:
        module.run(args)
    except BenchmarkFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0
