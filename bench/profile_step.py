"""A few steady-state steps between profiler marks: what ncu runs, with --profile-from-start off."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from issp import shapes  # noqa: E402  (found through the line above, also before installation)
from issp.bench.workload import Workload  # noqa: E402


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
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            work.step(bracket)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
