"""Steps or sparse ops between profiler marks, for ncu: `python -m bench.profile step|sparse`."""

import argparse
import sys
from collections.abc import Callable

import torch

from bench.harness.training import OPTIMIZERS, steady_replica
from bench.harness.workload import Workload
from bench.sparse import calls, forms
from bench.sparse.targets import LAYERS, STEP_AT
from issp.sr import models, shapes


def profiled(call: Callable[[], object]) -> None:
    """One call between the profiler's marks."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile_step(model: str, steps: int, warm_up_steps: int) -> None:
    """Steps in the steady state, warm and cold start, then those that are fused with Adam."""
    workload = Workload(shapes.prunable_shapes(model), 0.95, device="cuda")
    workload.warm_up(warm_up_steps)
    for bracket in (True, False):
        for _ in range(steps):
            workload.perturb()
            profiled(lambda bracket=bracket: workload.step(bracket))
    network = models.build(model, 4).cuda()
    replica, gradients = steady_replica(network, OPTIMIZERS["adam"], 0.95, 0.95, warm_up_steps)
    call = replica.fused_call(True)
    for _ in range(steps):
        gradients.renew()
        profiled(call)


def profile_sparse(pass_names: list[str]) -> None:
    """Every form of the layers that have speed targets."""
    for layer in LAYERS:
        data = calls.LayerTensors.of(layer, "cuda")
        for form in forms.forms("cuda"):
            if forms.unsupported_reason(form, layer.weight, STEP_AT):
                continue
            calls.set_precision(form.precision)
            sparse = forms.make(data.weight.to(calls.DTYPES[form.precision]), form, STEP_AT)
            for name in pass_names:
                call = calls.sparse_call(data, sparse, name)
                call()
                print(f"{layer.name}, {form.name}, {sparse.label}, {name}", flush=True)
                profiled(call)


def main() -> int:
    """Exit status 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    step = commands.add_parser("step")
    step.add_argument("--model", default="edsr-l", choices=shapes.MODELS)
    step.add_argument("--steps", type=int, default=2)
    step.add_argument("--settle", type=int, default=200)
    sparse = commands.add_parser("sparse")
    sparse.add_argument("--passes", nargs="+", default=list(calls.PASSES), choices=calls.PASSES)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: profiling needs one", file=sys.stderr)
        return 3
    if args.what == "step":
        profile_step(args.model, args.steps, args.settle)
    else:
        profile_sparse(args.passes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
