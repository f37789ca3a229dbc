"""Small cases of every op, compared with the reference bit for bit, products with float64.

    compute-sanitizer --tool racecheck python bench/sanitize.py --device cuda

This is what compute-sanitizer runs. Few kernels and small tensors, since the sanitizer slows each
of them down by orders of magnitude. The sizes end in every way a tile or a mask word can end.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import issp  # noqa: E402  (found through the line above, also before installation)
from bench.harness.registry import ParityError  # noqa: E402
from bench.harness.training import FAMILIES, Family, tail  # noqa: E402
from bench.products.calls import DTYPES as PRECISIONS  # noqa: E402
from bench.products.calls import Data  # noqa: E402
from bench.products.forms import Form, make  # noqa: E402
from bench.products.layers import Layer  # noqa: E402
from bench.products.parity import check  # noqa: E402
from issp import ops  # noqa: E402
from issp.ops import backends, reference  # noqa: E402
from tests.ops.sparse.cases import ConvCase, MatmulCase, Weight  # noqa: E402

SIZES = (1, 2, 31, 33, 1000, 4096, 4097, 70_001)
DTYPES = (torch.float32, torch.bfloat16)
REFERENCE = backends.implementations("reference")


def equal(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bitwise, wherever the tensors live."""
    mine, theirs = mine.cpu().contiguous(), theirs.contiguous()
    return torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def step_cases(device: str, dtype: torch.dtype):
    """Three steps with and without ties and brackets, then masks: (name, equal) pairs."""
    for ties in (False, True):
        random = torch.Generator().manual_seed(7)
        start = [torch.randn(n, generator=random) for n in SIZES]
        if ties:
            start = [(w * 2).round() for w in start]
        theirs = [w.to(dtype) for w in start]
        mine = [w.to(device, copy=True) for w in theirs]
        k = [issp.num_pruned(n, 0.9) for n in SIZES]
        state, oracle = ops.ShrinkState(mine, k), ops.ShrinkState(theirs, k)
        for i, bracket in enumerate((False, True, True)):
            ops.soft_shrink_(mine, state, 0.95, bracket=bracket)
            reference.soft_shrink_(
                theirs, oracle.k, 0.95, oracle.thresholds, oracle.packed, oracle.flips,
                oracle.scratch,
            )  # fmt: skip
            pairs = list(zip(mine, theirs, strict=True))
            pairs += [(getattr(state, x), getattr(oracle, x)) for x in ("thresholds", "packed")]
            pairs += [(state.flips, oracle.flips)]
            yield f"soft_shrink_ {dtype} ties {ties} step {i}", all(equal(*p) for p in pairs)
        found = ops.magnitude_threshold(mine, k)
        yield (
            f"magnitude_threshold {dtype} ties {ties}",
            equal(found, reference.magnitude_threshold(theirs, k)),
        )
        ops.apply_masks_(mine, state)
        reference.apply_masks_(theirs, oracle.packed)
        yield f"apply_masks_ {dtype} ties {ties}", all(map(equal, mine, theirs))


class Updated:
    """Weights that a fused optimizer updates; all but the last two tensors are pruned."""

    def __init__(self, start: list[torch.Tensor], device: str, family: Family, op: Callable):
        self.weights = [w.to(device, copy=True) for w in start]
        self.moments = [[torch.zeros_like(w) for w in self.weights] for _ in family.moments]
        self.steps = [torch.zeros((), device=device) for _ in start]
        pruned = self.weights[:-2]
        self.state = ops.ShrinkState(pruned, [issp.num_pruned(w.numel(), 0.9) for w in pruned])
        self.device, self.family, self.op = device, family, op

    def step(self, grads: list[torch.Tensor], frozen: bool) -> None:
        """One update, and pruning or masking."""
        there = [g.to(self.device) for g in grads]
        head = self.family.head(self.weights, there, self.moments, self.steps)
        self.op(*head, *tail(self.state, 0.95, frozen, True))

    def tensors(self) -> list[torch.Tensor]:
        """All that a step writes."""
        state = self.state
        moments = [x for tensors in self.moments for x in tensors]
        return [*self.weights, *moments, state.thresholds, state.packed, state.flips]


def update_cases(device: str, dtype: torch.dtype):
    """Two pruning and two frozen steps of the fused optimizers: (name, equal) pairs."""
    for name in ("adam", "sgd"):
        plain = FAMILIES[name]
        family = dataclasses.replace(plain, options={**plain.options, "weight_decay": 0.05})
        random = torch.Generator().manual_seed(11)
        start = [torch.randn(n, generator=random) for n in SIZES]
        mine = Updated(start, device, family, family.op)
        theirs = Updated(start, "cpu", family, REFERENCE[family.op.__name__])
        for i, frozen in enumerate((False, False, True, True)):
            grads = [torch.randn(n, generator=random).to(dtype) for n in SIZES]
            for side in (mine, theirs):
                side.step(grads, frozen)
            right = all(map(equal, mine.tensors(), theirs.tensors()))
            yield f"{name} {dtype} frozen {frozen} step {i}", right


def pass_cases(device: str, dtype: torch.dtype):
    """Regularisation and counting."""
    random = torch.Generator().manual_seed(5)
    weights = [(torch.randn(n, generator=random) * 2).round().to(dtype) for n in SIZES]
    grads = [torch.randn(n, generator=random).to(dtype) for n in SIZES]
    state = ops.ShrinkState(weights, [0] * len(SIZES))
    state.set_masks([torch.arange(n) % 3 == 0 for n in SIZES])
    factors = torch.rand(len(SIZES), generator=random)
    mine = [g.to(device, copy=True) for g in grads]
    there = [w.to(device) for w in weights]
    torch.ops.issp.regularize_(mine, there, factors.to(device), state.packed.to(device))
    REFERENCE["regularize_"](grads, weights, factors, state.packed)
    yield f"regularize_ {dtype}", all(map(equal, mine, grads))
    yield f"count_zeros {dtype}", equal(ops.count_zeros(there), REFERENCE["count_zeros"](weights))


def nm_cases(device: str, dtype: torch.dtype):
    """N:M patterns in both layouts: (name, equal) pairs."""
    weight = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
    for n, m, v, layout in ((2, 4, 1, "channels"), (2, 32, 4, "channels"), (1, 36, 1, "flat")):
        keep = issp.Keep(n, of=m, v=v, layout=layout)
        mine = ops.nm_prune(weight.to(device), keep)
        theirs, _ = reference.nm_prune(weight, n, m, v, layout)
        yield f"nm_prune {dtype} {n}:{m}:{v} {layout}", equal(mine, theirs)


# Groups that are compared, cut by a warp, shared by rows, and too large for a block; an
# unstructured tensor among them.
GROUPED = (
    ((8, 64, 3, 3), issp.Keep(2, of=4)),
    ((70, 90), issp.Keep(1, of=90)),
    ((4097,), None),
    ((32, 60), issp.Keep(2, of=10, v=4)),
    ((2, 2048, 3, 3), issp.Keep(100, of=2048, v=2)),
)


def nm_step_cases(device: str, dtype: torch.dtype):
    """Two steps of N:M and unstructured tensors in one call: (name, equal) pairs."""
    random = torch.Generator().manual_seed(9)
    theirs = [torch.randn(shape, generator=random).to(dtype) for shape, _ in GROUPED]
    mine = [w.to(device, copy=True) for w in theirs]
    keeps = [keep for _, keep in GROUPED]
    k = [
        w.numel() // 2 if x is None else x.pruned(w.numel())
        for w, x in zip(mine, keeps, strict=True)
    ]
    state, oracle = ops.ShrinkState(mine, k, keeps), ops.ShrinkState(theirs, k, keeps)
    for i in range(2):
        ops.soft_shrink_(mine, state, 0.95)
        reference.soft_shrink_(
            theirs, oracle.k, 0.95, oracle.thresholds, oracle.packed, oracle.flips, oracle.scratch,
            patterns=oracle.patterns,
        )  # fmt: skip
        pairs = list(zip(mine, theirs, strict=True))
        pairs += [
            (getattr(state, x), getattr(oracle, x)) for x in ("thresholds", "packed", "flips")
        ]
        yield f"N:M soft_shrink_ {dtype} step {i}", all(equal(*p) for p in pairs)


# Ends of tiles in every way: a lone pixel, odd images, more outputs than inputs and the reverse.
LAYERS = (
    Layer((16, 12, 3, 3), (2, 12, 7, 9)),
    Layer((32, 60, 3, 3), (1, 60, 1, 1)),
    Layer((16, 20, 1, 1), (1, 20, 5, 33)),
    Layer((64, 4), (3, 43, 4)),
)


def product_cases(device: str, dtype: torch.dtype):
    """Sparse products, forward and both gradients, against float64: (name, right) pairs."""
    plain = next(name for name, kind in PRECISIONS.items() if kind == dtype)
    tensor_cores = "tf32" if dtype == torch.float32 and device == "cuda" else plain
    for layer in LAYERS:
        data = Data.of(layer, device)
        for form in (Form(1, False, plain), Form(4, True, plain), Form(16, True, tensor_cores)):
            sparse = make(data.weight.to(dtype), form, 0.5)
            try:
                check(data, sparse, form)
                right = True
            except ParityError as error:
                print(error)
                right = False
            yield f"products {layer.name} {form.name}", right


# Kernels that no layer above reaches: eight rows that share positions, rows that neither eight nor
# four divides, strides that sort the inputs or leave no room for a plane of them, both epilogues.
GEOMETRIES = (
    ConvCase("v=8, stride 2", Weight(24, 9, (3, 3), 0.3, 8), image=(20, 37), stride=(2, 2)),
    ConvCase("v=3", Weight(9, 5, (3, 3), 0.3, 3), padding=(1, 1), residual=True),
    ConvCase("patches", Weight(4, 2, (16, 16), 0.05), image=(35, 50), stride=(16, 16)),
    MatmulCase("v=8", Weight(24, 70, pattern=0.2, v=8), lead=(300,), residual=True),
    MatmulCase("gelu", Weight(9, 33, pattern=0.2), lead=(5,), activation="gelu"),
)


def geometry_cases(device: str, dtype: torch.dtype):
    """The products' ops themselves, against the oracle in float64: (name, right) pairs."""
    for case in GEOMETRIES:
        mine, exact = case.build(dtype, device), case.build(dtype)
        op = "sparse_conv2d" if isinstance(case, ConvCase) else "sparse_matmul"
        lists, tail_ = (exact.columns, exact.starts), (case.weight.v, *case.grad_tail())
        x, values, bias = exact.x.double(), exact.values.double(), exact.bias.double()
        residual = None if exact.residual is None else exact.residual.double()
        expected = REFERENCE[op](
            x, values, *lists, [], bias, residual, *exact.tail, case.activation
        )
        found = getattr(torch.ops.issp, op)(*mine.args(), case.activation)
        yield f"{op} {dtype} {case.name}", near(found, expected)
        expected = REFERENCE[f"{op}_values_grad"](x, exact.grad.double(), *lists, *tail_)
        found = getattr(torch.ops.issp, f"{op}_values_grad")(
            *(mine.x, mine.grad, mine.columns, mine.starts, *tail_)
        )
        yield f"{op}_values_grad {dtype} {case.name}", near(found, expected)


def near(mine: torch.Tensor, exact: torch.Tensor) -> bool:
    """Sums of a few hundred numbers in another order, rounded once."""
    allowed = 16 * torch.finfo(mine.dtype).eps * exact.abs().max()
    return bool(((mine.cpu().double() - exact).abs() <= allowed).all())


CASES = (
    *(step_cases, update_cases, pass_cases, nm_cases, nm_step_cases),
    *(product_cases, geometry_cases),
)


def main() -> int:
    """Exit status 1 when any result differs from the reference, 3 without the device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: use --device cpu", file=sys.stderr)
        return 3
    results = [result for dtype in DTYPES for cases in CASES for result in cases(device, dtype)]
    wrong = [name for name, right in results if not right]
    for name in wrong:
        print(f"differs from the reference: {name}")
    print(f"{len(results) - len(wrong)} of {len(results)} cases equal, {backends.active(device)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
