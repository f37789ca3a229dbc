"""The N:M pattern: how many weights of a group are kept, and how groups lie in a weight."""

from __future__ import annotations

from dataclasses import dataclass


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

    Raises:
        ValueError: when the numbers do not make a pattern.
    """

    n: int
    of: int
    v: int = 1
    layout: str = "channels"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.of:
            raise ValueError(f"Keep({self.n}, of={self.of}): n must lie in 1..of")
        if self.v < 1:
            raise ValueError(f"Keep(v={self.v}): v must be at least 1")
        if self.layout not in ("channels", "flat"):
            raise ValueError(f'Keep(layout="{self.layout}"): use "channels" or "flat"')
        if self.layout == "flat" and self.v != 1:
            raise ValueError('Keep(layout="flat") has no rows to share a pattern: use v=1')

    @property
    def sparsity(self) -> float:
        """Share of weights that the pattern prunes, 1 - n / of."""
        return 1.0 - self.n / self.of
