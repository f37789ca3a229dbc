"""The N:M pattern: how many weights of a group are kept, and how groups lie in a weight."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Keep:
    """Keep the `n` largest weights of every `of` consecutive ones.

    Args:
        n: weights kept per group, 1 <= n <= of. (The authors' "min_19:20" prunes 19 of 20: that is
            `Keep(1, of=20, layout="flat")`.)
        of: size of a group.
        v: consecutive output rows that share one pattern.
        layout: "channels" groups consecutive input channels at a fixed kernel position; "flat"
            groups consecutive elements in memory order, the order of the authors' code.
        tail: what `issp.attach` does with a layer that the pattern does not divide: "error", or
            "dense", which leaves it dense and says so in the summary.

    Raises:
        ValueError: when the numbers do not make a pattern.
    """

    n: int
    of: int
    v: int = 1
    layout: str = "channels"
    # Not part of the pattern: a saved state's targets are compared by repr.
    tail: str = field(default="error", repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.of:
            raise ValueError(f"Keep({self.n}, of={self.of}): n must lie in 1..of")
        if self.v < 1:
            raise ValueError(f"Keep(v={self.v}): v must be at least 1")
        if self.layout not in ("channels", "flat"):
            raise ValueError(f'Keep(layout="{self.layout}"): use "channels" or "flat"')
        if self.layout == "flat" and self.v != 1:
            raise ValueError('Keep(layout="flat") has no rows to share a pattern: use v=1')
        if self.tail not in ("error", "dense"):
            raise ValueError(f'Keep(tail="{self.tail}"): use "error" or "dense"')

    @property
    def sparsity(self) -> float:
        """Share of weights that the pattern prunes, 1 - n / of."""
        return 1.0 - self.n / self.of

    def pruned(self, numel: int) -> int:
        """How many of a divisible weight's `numel` elements the pattern prunes."""
        return numel // self.of * (self.of - self.n)

    def numbers(self) -> tuple[int, int, int]:
        """(n, of, v) as the ops take it; v is 0 for layout "flat"."""
        return self.n, self.of, self.v if self.layout == "channels" else 0
