"""The N:M pattern: how many weights of a group are kept, and how groups lie in a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_WRITTEN = re.compile(r"(\d+):(\d+)(?::(\d+)|:(flat))?")


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

    @classmethod
    def parse(cls, text: str, tail: str = "error") -> Keep:
        """The pattern that a command line writes as "n:of", "n:of:v" or "n:of:flat".

        Args:
            text: such as "2:4", "1:10:4" for v = 4, "1:20:flat" for layout "flat".
            tail: of the pattern; it has no notation.

        Raises:
            ValueError: text of another form, or numbers that do not make a pattern.
        """
        match = _WRITTEN.fullmatch(text)
        if not match:
            raise ValueError(
                f'pattern "{text}": write n:of, such as 2:4, with v as 1:10:4, or as 1:20:flat'
            )
        n, of, v, flat = match.groups()
        return cls(int(n), int(of), int(v or 1), "flat" if flat else "channels", tail)

    @property
    def name(self) -> str:
        """As tables print it: "1:10 v=4", "1:20 flat"."""
        return f"{self.n}:{self.of} " + ("flat" if self.layout == "flat" else f"v={self.v}")

    @property
    def sparsity(self) -> float:
        """Share of weights that the pattern prunes, 1 - n / of."""
        return 1.0 - self.n / self.of

    def divides(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape divides into the pattern's groups."""
        try:
            self.check_divides(shape)
        except ValueError:
            return False
        return True

    def check_divides(self, shape: Sequence[int], name: str = "the weight") -> None:
        """Refuses a weight that does not divide into the pattern's groups.

        Args:
            shape: of the weight, [O, I, ...]; any shape for layout "flat".
            name: of the weight in the message.

        Raises:
            ValueError: the weight does not divide.
        """
        shape = tuple(shape)
        if self.layout == "flat":
            numel = math.prod(shape)
            if numel % self.of:
                raise ValueError(
                    f"m = {self.of} does not divide the {numel} elements of {name} {shape}: choose "
                    "another"
                )
        elif len(shape) < 2:
            raise ValueError(
                f'layout "channels" needs a weight [O, I, ...], not {name} {shape}: use "flat"'
            )
        elif shape[1] % self.of or shape[0] % self.v:
            raise ValueError(
                f"{name} {shape} does not divide into groups of m = {self.of} input channels and "
                f"v = {self.v} output rows: choose other numbers or leave the layer dense"
            )

    def pruned(self, numel: int) -> int:
        """How many of a divisible weight's `numel` elements the pattern prunes."""
        return numel // self.of * (self.of - self.n)

    def numbers(self) -> tuple[int, int, int]:
        """(n, of, v) as the ops take it; v is 0 for layout "flat"."""
        return self.n, self.of, self.v if self.layout == "channels" else 0
