"""The weights that the step is timed on: those of a training run, without its network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from bench.harness.progress import counted
from issp import ops
from issp.ops.keep import Keep

LEARNING_RATE = 2e-4
_POOL_SLACK = 1 << 16
_SEGMENT = 1 << 22


def divides(keep: Keep, shape: tuple[int, ...]) -> bool:
    """Whether a weight of that shape can have the pattern."""
    return keep.divides(shape)


class Workload:
    """Weights in the steady state of ISS-P, perturbed as under Adam, and a copy for the baselines.

    Args:
        shapes: one per weight.
        sparsity: share of each weight that is selected, see `issp.num_pruned`.
        dtype: of the weights.
        device: where they live.
        seed: of the initial values and the perturbations.
        keep: the N:M pattern of all weights, which it divides; `sparsity` is then ignored.

    Attributes:
        weights: initialised as `kaiming_uniform_(a=sqrt(5))` does, PyTorch's default.
        state: their `issp.ops.ShrinkState`.
        k: its counts, as ints.
        flat: a buffer of the size of all weights.
        copies: the weights' shapes over `flat`, for baselines that write.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        sparsity: float,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        shrink: float = 0.95,
        seed: int = 0,
        keep: Keep | None = None,
    ) -> None:
        self.shrink = shrink
        self._random = torch.Generator(device).manual_seed(seed)
        numels = [math.prod(shape) for shape in shapes]
        self.k = [keep.pruned(n) if keep else ops.num_pruned(n, sparsity) for n in numels]
        self.weights = [self._kaiming(shape, dtype, device) for shape in shapes]
        self.state = ops.ShrinkState(self.weights, self.k, [keep] * len(numels) if keep else None)
        # Drawing 43 M normal numbers takes longer than the step: every tensor of every step gets
        # a segment of one pool, from a random offset; a huge tensor gets several.
        self._segments = [x for w in self.weights for x in w.view(-1).split(_SEGMENT)]
        largest = max(x.numel() for x in self._segments)
        self._pool = torch.empty(largest + _POOL_SLACK, dtype=dtype, device=device)
        self._pool.normal_(generator=self._random)
        self._offsets = torch.Generator().manual_seed(seed)
        self.flat = torch.empty(sum(numels), dtype=dtype, device=device)
        parts = self.flat.split(numels)
        self.copies = [x.view(shape) for x, shape in zip(parts, shapes, strict=True)]

    def _kaiming(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        weight = torch.empty(shape, dtype=dtype, device=device)
        return weight.uniform_(-bound, bound, generator=self._random)

    @property
    def numel(self) -> int:
        """Weights in all."""
        return self.flat.numel()

    @functools.cached_property
    def source(self) -> torch.Tensor:
        """A second buffer of the size of all weights; made when it is first copied from."""
        return torch.ones_like(self.flat)

    @torch.no_grad()
    def perturb(self, rate: float = LEARNING_RATE) -> None:
        """Moves each weight by about the learning rate, as an optimizer step does."""
        starts = torch.randint(
            _POOL_SLACK, (len(self._segments),), generator=self._offsets
        ).tolist()
        noise = [
            self._pool[start : start + x.numel()]
            for x, start in zip(self._segments, starts, strict=True)
        ]
        torch._foreach_add_(self._segments, noise, alpha=rate)

    def warm_cache(self) -> None:
        """Leaves the weights as they are and the caches as `perturb` does."""
        self.perturb(0.0)

    def step(self, bracket: bool = True) -> None:
        """The fused step, on the weights."""
        ops.soft_shrink_(self.weights, self.state, self.shrink, bracket=bracket)

    def warm_up(self, steps: int) -> None:
        """Perturbs and steps, so that magnitudes are distributed as they are late in training."""
        for _ in counted(range(steps), "warm-up step"):
            self.perturb()
            self.step()

    def restore(self) -> None:
        """Gives the copies the weights' present values."""
        torch._foreach_copy_(self.copies, self.weights)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.flat.is_cuda:
            torch.cuda.synchronize()

    def bracket_misses(self, steps: int) -> int:
        """How many searches of `steps` further steps missed the bracket, as the op counts them."""
        before = int(self.state.scratch[0])
        self.warm_up(steps)
        return int(self.state.scratch[0]) - before
