"""Small cases of every op, compared with the reference bit for bit, sparse ops with float64.

    compute-sanitizer --tool racecheck python -m bench.sanitize --device cuda

This is what compute-sanitizer runs. Few kernels and small tensors, since the sanitizer slows each
of them down by orders of magnitude. The sizes cover every kind of end of a tile and of a mask word.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator

import torch

import issp
from bench.harness import options
from bench.harness.errors import ParityError
from bench.harness.training import OPTIMIZERS, FusedUpdate
from bench.sparse.calls import DTYPES as PRECISIONS
from bench.sparse.calls import LayerTensors
from bench.sparse.forms import Form, make
from bench.sparse.layers import Layer
from bench.sparse.parity import check
from issp import ops
from issp.ops import backends, reference
from tests.ops.sparse.cases import ConvCase, MatmulCase, Weight

Results = Iterator[tuple[str, bool]]  # name of a case, whether it is right

SIZES = (1, 33, 4096, 70_001)  # a weight, a word and one, a whole chunk, several and an end
DTYPES = (torch.float32, torch.bfloat16)
REFERENCE = backends.implementations("reference")


def equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bitwise, wherever the tensors live."""
    actual, expected = actual.cpu().reshape(-1), expected.reshape(-1)
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


class Steps:
    """The same weights stepped by the op on a device and by the reference on the CPU."""

    def __init__(self, start: list[torch.Tensor], device: str, k: list[int], patterns=None):
        self.expected = start
        self.actual = [w.to(device, copy=True) for w in start]
        self.state = ops.ShrinkState(self.actual, k, patterns)
        self.reference = ops.ShrinkState(self.expected, k, patterns)

    def step(self, bracket: bool = True) -> bool:
        """One step; whether weights, thresholds, masks and flips are equal afterwards."""
        ops.soft_shrink_(self.actual, self.state, 0.95, bracket=bracket)
        state = self.reference
        reference.soft_shrink_(
            *(self.expected, state.k, 0.95, state.thresholds, state.packed, state.flips),
            state.scratch,
            patterns=state.patterns,
        )
        names = ("thresholds", "packed", "flips")
        return all(map(equal, self.actual, self.expected)) and all(
            equal(getattr(self.state, name), getattr(state, name)) for name in names
        )


def step_cases(device: str, dtype: torch.dtype) -> Results:
    """Three steps with and without ties and brackets, then masks."""
    for ties in (False, True):
        random = torch.Generator().manual_seed(7)
        start = [torch.randn(n, generator=random) for n in SIZES]
        if ties:
            start = [(w * 2).round() for w in start]
        k = [issp.num_pruned(n, 0.9) for n in SIZES]
        steps = Steps([w.to(dtype) for w in start], device, k)
        for i, bracket in enumerate((False, True, True)):
            yield f"soft_shrink_ {dtype} ties {ties} step {i}", steps.step(bracket)
        thresholds = ops.magnitude_threshold(steps.actual, k)
        yield (
            f"magnitude_threshold {dtype} ties {ties}",
            equal(thresholds, reference.magnitude_threshold(steps.expected, k)),
        )
        ops.apply_masks_(steps.actual, steps.state)
        reference.apply_masks_(steps.expected, steps.reference.packed)
        right = all(map(equal, steps.actual, steps.expected))
        yield f"apply_masks_ {dtype} ties {ties}", right


def update_cases(device: str, dtype: torch.dtype) -> Results:
    """Two pruning and two frozen steps of the fused optimizers; the last two tensors are dense."""
    for name in ("adam", "sgd"):
        plain = OPTIMIZERS[name]
        spec = dataclasses.replace(plain, options={**plain.options, "weight_decay": 0.05})
        random = torch.Generator().manual_seed(11)
        start = [torch.randn(n, generator=random) for n in SIZES]
        actual, expected = (
            FusedUpdate.create(spec, start, len(start) - 2, 0.9, 0.95, where)
            for where in (device, "cpu")
        )
        for i, frozen in enumerate((False, False, True, True)):
            grads = [torch.randn(n, generator=random).to(dtype) for n in SIZES]
            actual.step(spec.op, grads, frozen)
            expected.step(REFERENCE[spec.op.__name__], grads, frozen)
            results = expected.results()
            right = all(equal(x, results[key]) for key, x in actual.results().items())
            yield f"{name} {dtype} frozen {frozen} step {i}", right


def auxiliary_cases(device: str, dtype: torch.dtype) -> Results:
    """Regularisation and counting."""
    random = torch.Generator().manual_seed(5)
    weights = [(torch.randn(n, generator=random) * 2).round().to(dtype) for n in SIZES]
    grads = [torch.randn(n, generator=random).to(dtype) for n in SIZES]
    state = ops.ShrinkState(weights, [0] * len(SIZES))
    state.set_masks([torch.arange(n) % 3 == 0 for n in SIZES])
    factors = torch.rand(len(SIZES), generator=random)
    actual = [g.to(device, copy=True) for g in grads]
    there = [w.to(device) for w in weights]
    torch.ops.issp.regularize_(actual, there, factors.to(device), state.packed.to(device))
    REFERENCE["regularize_"](grads, weights, factors, state.packed)
    yield f"regularize_ {dtype}", all(map(equal, actual, grads))
    yield f"count_zeros {dtype}", equal(ops.count_zeros(there), REFERENCE["count_zeros"](weights))


def nm_cases(device: str, dtype: torch.dtype) -> Results:
    """N:M patterns in both layouts."""
    weight = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
    for n, m, v, layout in ((2, 4, 1, "channels"), (2, 32, 4, "channels"), (1, 36, 1, "flat")):
        keep = issp.Keep(n, of=m, v=v, layout=layout)
        actual = ops.nm_prune(weight.to(device), keep)
        expected, _ = reference.nm_prune(weight, n, m, v, layout)
        yield f"nm_prune {dtype} {n}:{m}:{v} {layout}", equal(actual, expected)


# Groups that are compared, cut by a warp, shared by rows, and too large for a block; an
# unstructured tensor among them.
GROUPED = (
    ((8, 64, 3, 3), issp.Keep(2, of=4)),
    ((70, 90), issp.Keep(1, of=90)),
    ((4097,), None),
    ((32, 60), issp.Keep(2, of=10, v=4)),
    ((32, 64, 3, 3), issp.Keep(4, of=32, v=16, c=2)),
    ((2, 2048, 3, 3), issp.Keep(100, of=2048, v=2)),
)


def nm_step_cases(device: str, dtype: torch.dtype) -> Results:
    """Two steps of N:M and unstructured tensors in one call."""
    random = torch.Generator().manual_seed(9)
    start = [torch.randn(shape, generator=random).to(dtype) for shape, _ in GROUPED]
    keeps = [keep for _, keep in GROUPED]
    k = [
        w.numel() // 2 if keep is None else keep.pruned(w.numel())
        for w, keep in zip(start, keeps, strict=True)
    ]
    steps = Steps(start, device, k, keeps)
    for i in range(2):
        yield f"N:M soft_shrink_ {dtype} step {i}", steps.step()


# Every kind of end of a tile: a single pixel, odd images, more outputs than inputs and the reverse.
LAYERS = (
    Layer((16, 12, 3, 3), (2, 12, 7, 9)),
    Layer((32, 60, 3, 3), (1, 60, 1, 1)),
    Layer((16, 20, 1, 1), (1, 20, 5, 33)),
    Layer((64, 4), (3, 43, 4)),
)


def sparse_cases(device: str, dtype: torch.dtype) -> Results:
    """Sparse layers, forward and both gradients, against float64."""
    plain = next(name for name, kind in PRECISIONS.items() if kind == dtype)
    tensor_cores = "tf32" if dtype == torch.float32 and device == "cuda" else plain
    for layer in LAYERS:
        data = LayerTensors.of(layer, device)
        for form in (Form(1, False, plain), Form(4, True, plain), Form(16, True, tensor_cores)):
            sparse = make(data.weight.to(dtype), form, 0.5)
            try:
                check(data, sparse, form)
                right = True
            except ParityError as error:
                print(error)
                right = False
            yield f"sparse {layer.name} {form.name}", right


# Kernels that no layer above reaches: eight rows that share positions, rows that neither eight nor
# four divides, strides that sort the inputs or leave no room for a plane of them, both epilogues.
GEOMETRIES = (
    ConvCase("v=8, stride 2", Weight(24, 9, (3, 3), 0.3, 8), image=(20, 37), stride=(2, 2)),
    ConvCase("v=3", Weight(9, 5, (3, 3), 0.3, 3), padding=(1, 1), residual=True),
    ConvCase("patches", Weight(4, 2, (16, 16), 0.05), image=(35, 50), stride=(16, 16)),
    MatmulCase("v=8", Weight(24, 70, pattern=0.2, v=8), lead=(300,), residual=True),
    MatmulCase("gelu", Weight(9, 33, pattern=0.2), lead=(5,), activation="gelu"),
)


def geometry_cases(device: str, dtype: torch.dtype) -> Results:
    """The sparse ops themselves, against the reference in float64."""
    for case in GEOMETRIES:
        inputs, exact = case.build(dtype, device), case.build(dtype)
        op = "sparse_conv2d" if isinstance(case, ConvCase) else "sparse_matmul"
        rows, tail = (exact.columns, exact.starts), (case.weight.v, *case.grad_tail())
        x, values, bias = exact.x.double(), exact.values.double(), exact.bias.double()
        residual = None if exact.residual is None else exact.residual.double()
        expected = REFERENCE[op](x, values, *rows, [], bias, residual, *exact.tail, case.activation)
        actual = getattr(torch.ops.issp, op)(*inputs.args(), case.activation)
        yield f"{op} {dtype} {case.name}", near(actual, expected)
        expected = REFERENCE[f"{op}_values_grad"](x, exact.grad.double(), *rows, *tail)
        actual = getattr(torch.ops.issp, f"{op}_values_grad")(
            *(inputs.x, inputs.grad, inputs.columns, inputs.starts, *tail)
        )
        yield f"{op}_values_grad {dtype} {case.name}", near(actual, expected)


def near(actual: torch.Tensor, exact: torch.Tensor) -> bool:
    """Sums of a few hundred numbers in another order, rounded once."""
    allowed = 16 * torch.finfo(actual.dtype).eps * exact.abs().max()
    return bool(((actual.cpu().double() - exact).abs() <= allowed).all())


CASES = (
    *(step_cases, update_cases, auxiliary_cases, nm_cases, nm_step_cases),
    *(sparse_cases, geometry_cases),
)


def main(argv: list[str]) -> int:
    """Exit status 1 when any result differs from the reference, 3 without the device."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args(argv).device
    if device == "cuda" and not torch.cuda.is_available():
        print(options.NO_CUDA, file=sys.stderr)
        return 3
    results = [result for dtype in DTYPES for cases in CASES for result in cases(device, dtype)]
    wrong = [name for name, right in results if not right]
    for name in wrong:
        print(f"differs from the reference: {name}")
    print(f"{len(results) - len(wrong)} of {len(results)} cases equal, {backends.active(device)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
