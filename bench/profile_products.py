"""Sparse products of the layers that must show, between profiler marks: what ncu runs."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from profile_step import profiled  # noqa: E402

from bench.products import calls, forms  # noqa: E402  (found through the line above)
from bench.products.targets import LAYERS, STEP_AT  # noqa: E402


def main() -> int:
    """Exit status 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=STEP_AT)
    parser.add_argument("--passes", nargs="+", default=["forward", "step"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: profiling needs one", file=sys.stderr)
        return 3
    for layer in LAYERS:
        data = calls.Data.of(layer, "cuda")
        for form in forms.forms("cuda"):
            if forms.unfit(form, layer.weight, args.sparsity):
                continue
            calls.set_precision(form.precision)
            weight = data.weight.to(calls.DTYPES[form.precision])
            sparse = forms.make(weight, form, args.sparsity)
            for name in args.passes:
                call = calls.sparse_call(data, sparse, name)
                call()
                print(f"{layer.name}, {form.name}, {sparse.label}, {name}", flush=True)
                profiled(call)
    return 0


if __name__ == "__main__":
    sys.exit(main())
