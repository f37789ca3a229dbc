"""Steady-state steps, and Adam's fused ones, between profiler marks: what ncu runs."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness.training import FAMILIES, settled  # noqa: E402
from bench.harness.workload import Workload  # noqa: E402
from issp.sr import models, shapes  # noqa: E402  (found through the line above)


def profiled(call: Callable[[], object]) -> None:
    """One call between the profiler's marks."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    """Exit status 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="edsr-l", choices=shapes.MODELS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--settle", type=int, default=200)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: profiling needs one", file=sys.stderr)
        return 3
    work = Workload(shapes.prunable_shapes(args.model), 0.95, device="cuda")
    work.settle(args.settle)
    for bracket in (True, False):
        for _ in range(args.steps):
            work.drift()
            profiled(lambda bracket=bracket: work.step(bracket))
    network = models.build(args.model, 4).cuda()
    trainee, gradients = settled(network, FAMILIES["adam"], 0.95, 0.95, args.settle)
    call = trainee.op(True)
    for _ in range(args.steps):
        gradients.renew()
        profiled(call)
    return 0


if __name__ == "__main__":
    sys.exit(main())
