"""A growing L2 penalty on the unimportant weights: g += lambda * w, with lambda rising in steps.

Source: docs/method.md, sections 2.4 and 2.5 (the authors' GReg family).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from issp.pruning.methods.base import Method, Setting
from issp.pruning.methods.options import check_number, whole_number

_DELTA = 1e-4  # the authors', where it is not known when the masks will be fixed


@dataclass
class PenaltyMethod(Method):
    """A method with a growing penalty.

    Args:
        limit: largest lambda.
        interval: optimizer steps between two increments.
        delta: the increment. None: the limit is reached after a share of the pruning stage that the
            method fixes (which gives the authors' 1e-4 for their stage of 100 000 steps of ISS-R),
            or 1e-4 where `freeze_at` is not given.

    Raises:
        ValueError: no number, or one outside its range.
    """

    penalizes: ClassVar[bool] = True
    # When lambda reaches its limit; the rest of the pruning stage lets the weights settle.
    growth: ClassVar[float] = 1.0

    limit: float = 0.5
    interval: int = 20
    delta: float | None = None

    def __post_init__(self) -> None:
        check_number("limit", self.limit, 0, above=True)
        self.interval = whole_number("interval", self.interval, 1)
        if self.delta is not None:
            check_number("delta", self.delta, 0, above=True)
        self._delta = _DELTA if self.delta is None else self.delta

    def start(self, setting: Setting) -> None:
        super().start(setting)
        if self.delta is None and setting.freeze_at is not None:
            increments = int(self.growth * setting.freeze_at) // self.interval
            self._delta = self.limit / max(1, increments)

    def lambda_after(self, steps: int) -> float:
        """Lambda when so many steps have been taken since the penalty began."""
        return min(self.limit, self._delta * (max(0, steps) // self.interval))
