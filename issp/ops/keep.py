"""What weights are pruned in: N:M patterns, and units of several weights that share their fate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_WRITTEN = re.compile(r"(\d+):(\d+)(?::(\d+)(?:x(\d+))?|:(flat))?")


@dataclass(frozen=True, repr=False)
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
        c: consecutive input channels that are kept or pruned together; it divides n and of. A unit
            of v rows x c channels at one kernel position is ranked by its L1 norm.

    Raises:
        ValueError: when the numbers do not make a pattern.
    """

    n: int
    of: int
    v: int = 1
    layout: str = "channels"
    # Not part of the pattern: a saved state's targets are compared by repr.
    tail: str = "error"
    c: int = field(default=1, kw_only=True)

    def __repr__(self) -> str:
        c = f", c={self.c}" if self.c != 1 else ""
        return f"Keep(n={self.n}, of={self.of}, v={self.v}{c}, layout={self.layout!r})"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.of:
            raise ValueError(f"Keep({self.n}, of={self.of}): n must lie in 1..of")
        if self.v < 1:
            raise ValueError(f"Keep(v={self.v}): v must be at least 1")
        if self.c < 1:
            raise ValueError(f"Keep(c={self.c}): c must be at least 1")
        if self.n % self.c or self.of % self.c:
            raise ValueError(f"Keep({self.n}, of={self.of}, c={self.c}): c must divide n and of")
        if self.layout not in ("channels", "flat"):
            raise ValueError(f'Keep(layout="{self.layout}"): use "channels" or "flat"')
        if self.layout == "flat" and (self.v, self.c) != (1, 1):
            raise ValueError(
                'Keep(layout="flat") has no rows or channels to share a pattern: use v=1 and c=1'
            )
        if self.tail not in ("error", "dense"):
            raise ValueError(f'Keep(tail="{self.tail}"): use "error" or "dense"')

    @classmethod
    def parse(cls, text: str, tail: str = "error") -> Keep:
        """The pattern that a command line writes as "n:of", "n:of:v", "n:of:vxc" or "n:of:flat".

        Args:
            text: such as "2:4", "1:10:4" for v = 4, "2:32:16x2" for v = 16 and c = 2, "1:20:flat"
                for layout "flat".
            tail: of the pattern; it has no notation.

        Raises:
            ValueError: text of another form, or numbers that do not make a pattern.
        """
        match = _WRITTEN.fullmatch(text)
        if not match:
            raise ValueError(
                f'pattern "{text}": write n:of, such as 2:4, with v as 1:10:4, with v and c as '
                "2:32:16x2, or as 1:20:flat"
            )
        n, of, v, c, flat = match.groups()
        layout = "flat" if flat else "channels"
        return cls(int(n), int(of), int(v or 1), layout, tail, c=int(c or 1))

    @property
    def name(self) -> str:
        """As tables print it: "1:10 v=4", "2:32 v=16 c=2", "1:20 flat"."""
        if self.layout == "flat":
            return f"{self.n}:{self.of} flat"
        return f"{self.n}:{self.of} v={self.v}" + (f" c={self.c}" if self.c > 1 else "")

    @property
    def written(self) -> str:
        """As `parse` reads it."""
        if self.layout == "flat":
            return f"{self.n}:{self.of}:flat"
        last = f":{self.v}x{self.c}" if self.c > 1 else f":{self.v}" if self.v > 1 else ""
        return f"{self.n}:{self.of}{last}"

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

    def numbers(self) -> tuple[int, int, int, int]:
        """(n, of, v, c) as the ops take it; v is 0 for layout "flat"."""
        return self.n, self.of, self.v if self.layout == "channels" else 0, self.c


@dataclass(frozen=True)
class Unit:
    """v consecutive output rows x c consecutive input channels at one kernel position.

    The weights of a unit are pruned together: of a layer's units those of the smallest L1 norm.

    Args:
        v: output rows.
        c: input channels.
        tail: what `issp.attach` does with a layer that the unit does not divide: "error", or
            "dense", which leaves it dense and says so in the summary.

    Raises:
        ValueError: a number below 1, or an unknown tail.
    """

    v: int
    c: int = 1
    # Not part of the unit: a saved state's targets are compared by repr.
    tail: str = field(default="error", repr=False)

    def __post_init__(self) -> None:
        if self.v < 1 or self.c < 1:
            raise ValueError(f"Unit({self.v}, {self.c}): v and c must be at least 1")
        if self.tail not in ("error", "dense"):
            raise ValueError(f'Unit(tail="{self.tail}"): use "error" or "dense"')

    @classmethod
    def parse(cls, text: str, tail: str = "error") -> Unit:
        """The unit that a command line writes as "vxc".

        Args:
            text: such as "16x2".
            tail: of the unit; it has no notation.

        Raises:
            ValueError: text of another form, or numbers that do not make a unit.
        """
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if not match:
            raise ValueError(f'unit "{text}": write vxc, such as 16x2')
        return cls(int(match[1]), int(match[2]), tail)

    @property
    def size(self) -> int:
        """Weights of a unit."""
        return self.v * self.c

    @property
    def name(self) -> str:
        """As tables print it: "16x2"."""
        return f"{self.v}x{self.c}"

    def divides(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape divides into units."""
        return len(shape) >= 2 and not (shape[0] % self.v or shape[1] % self.c)

    def check_divides(self, shape: Sequence[int], name: str = "the weight") -> None:
        """Refuses a weight that does not divide into units.

        Args:
            shape: of the weight, [O, I, ...].
            name: of the weight in the message.

        Raises:
            ValueError: the weight does not divide.
        """
        shape = tuple(shape)
        if not self.divides(shape):
            raise ValueError(
                f"{name} {shape} does not divide into units of v = {self.v} output rows x c = "
                f"{self.c} input channels: choose other numbers or leave the layer dense"
            )

    def numbers(self) -> tuple[int, int, int, int]:
        """(0, 0, v, c) as the ops take it."""
        return 0, 0, self.v, self.c
