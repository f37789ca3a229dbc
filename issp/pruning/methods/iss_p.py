"""ISS-P: soft shrinkage in proportion to the magnitude.

S(w) = w where |w| >= tau, alpha * w elsewhere; tau is the k-th smallest magnitude of the layer.

Source: docs/method.md, section 1 (the paper's figure 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from issp.pruning.methods.base import Method
from issp.pruning.methods.options import check_number


@dataclass
class ISSP(Method):
    """Multiplies the unimportant weights by alpha after every step.

    Args:
        shrink: alpha, 0..1; 0 is hard thresholding.

    Raises:
        ValueError: no number in 0..1.
    """

    name: ClassVar[str] = "iss-p"
    takes_shards: ClassVar[bool] = True
    shrink: float = 0.95

    def __post_init__(self) -> None:
        check_number("shrink", self.shrink, 0, most=1)

    @property
    def factor(self) -> float:
        return self.shrink
