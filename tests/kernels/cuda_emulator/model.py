"""A model's weights and state, twice: the reference and the emulated kernels must agree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from issp.ops import reference
from issp.ops.schemas import SCRATCH_HEADER, mask_layout, scratch_region, scratch_words
from tests.asserts import assert_bitwise_equal
from tests.kernels import cuda_emulator

HEADER = 16  # words of scratch per tensor, see csrc/cuda/tensor_view.cuh
NAN = float("nan")


@dataclass
class Model:
    """Weights with their state, twice: for the reference and for the kernels."""

    weights: list[Tensor]
    k: list[int]
    previous: float = NAN
    shrink: float = 0.95
    patterns: list[int] = field(default_factory=list)  # as soft_shrink_ takes them
    sides: list[dict] = field(init=False)

    def __post_init__(self):
        self.sides = [self._side() for _ in range(2)]

    def _side(self) -> dict:
        numels, count = [w.numel() for w in self.weights], len(self.weights)
        source = torch.Generator().manual_seed(1)
        return {
            "weights": [w.clone() for w in self.weights],
            "k": torch.tensor(self.k),
            "thresholds": torch.full((count,), self.previous, dtype=self.weights[0].dtype),
            "masks": torch.randint(  # garbage in the padding as well
                -(2**31), 2**31, (mask_layout(numels)[1],), generator=source
            ).to(torch.int32),
            "flips": torch.full((count,), -7),
            "scratch": torch.zeros(scratch_words(numels), dtype=torch.int32),
        }

    def step(self, found_inf: float | None = None, bracket: bool = True) -> None:
        """One call on both sides, which must then agree; scratch is left clean."""
        finite = None if found_inf is None else torch.tensor([found_inf])
        calls = (_reference, cuda_emulator.unchecked_soft_shrink_)
        for call, side in zip(calls, self.sides, strict=True):
            arguments = [side[name] for name in ("thresholds", "masks", "flips", "scratch")]
            arguments += [finite, bracket, self.patterns]
            call(side["weights"], side["k"], self.shrink, *arguments)
        expected, actual = self.sides
        for i, pair in enumerate(zip(actual["weights"], expected["weights"], strict=True)):
            assert_bitwise_equal(*pair, f"weights[{i}] of {pair[0].numel()}")
        for name in ("thresholds", "masks", "flips"):
            assert_bitwise_equal(actual[name], expected[name], name)
        assert self._leftovers() == [], "the scratch buffer is not clean for the next call"

    def _leftovers(self) -> list[str]:
        scratch, start = self.sides[1]["scratch"], SCRATCH_HEADER
        dirty = [f"word {i}" for i in range(1, SCRATCH_HEADER) if scratch[i]]
        for i, w in enumerate(self.weights):
            if scratch[start : start + 3].any() or scratch[start + 13]:  # sums, arrived; flips
                dirty.append(f"counters of tensor {i}")
            start += scratch_region(w.numel())
        return dirty

    def perturb(self, scale: float, seed: int) -> None:
        """The same update on both sides."""
        for side in self.sides:
            source = torch.Generator().manual_seed(seed)
            for w in side["weights"]:
                w += (torch.randn(w.shape, generator=source) * scale).to(w.dtype)

    @property
    def misses(self) -> int:
        return int(self.sides[1]["scratch"][0])


def _reference(weights, k, shrink, thresholds, masks, flips, scratch, found_inf, bracket, patterns):
    """The reference checks k as on a CPU; a GPU leaves the tensor of a bad k unmodified."""
    if found_inf is not None and found_inf.item() != 0:
        return
    starts, total = mask_layout([w.numel() for w in weights])
    for t, (w, start, end) in enumerate(zip(weights, starts, [*starts[1:], total], strict=True)):
        n, m, *_ = reference.pattern_of(patterns, t)
        possible = (0, w.numel() // m * (m - n)) if m else range(w.numel() + 1)
        if int(k[t]) in possible:
            own = scratch_words([w.numel()])
            reference.soft_shrink_(
                *([w], k[t : t + 1], shrink, thresholds[t : t + 1], masks[start:end]),
                *(flips[t : t + 1], torch.zeros(own, dtype=torch.int32)),
                patterns=patterns[4 * t : 4 * t + 4],
            )


def normal(*numels: int, dtype=torch.float32, seed=0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=source).to(dtype) for n in numels]


def share(weights: list[Tensor], ratio: float) -> list[int]:
    return [int(ratio * w.numel()) for w in weights]


def capacity(numel: int, chunk: int) -> int:
    """Candidates of a tensor for which there is room, see TensorView in csrc/cuda."""
    return scratch_region(numel) - HEADER - 2 * -(-numel // 32) - -(-numel // chunk)


def with_candidates(numel: int, inside: int) -> tuple[list[Tensor], int]:
    """`inside` distinct weights around 1, a third of the rest below, the others above."""
    weights = torch.full((numel,), 2.0)
    weights[: (numel - inside) // 3] = 0.1
    weights[-inside:] = torch.linspace(0.93, 1.02, inside)
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(inside))
    return [weights[order]], (numel - inside) // 3 + inside // 2
