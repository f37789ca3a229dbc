"""ISS-P: soft shrinkage in proportion to the magnitude.

S(w) = w where |w| >= tau, alpha * w elsewhere; tau is the k-th smallest magnitude of the layer.

Source: docs/method.md, section 1 (the paper's figure 1).
"""

from __future__ import annotations

from issp.pruning.methods.shrinkage import Shrinkage

NAME = "iss-p"


def create(shrink: float) -> Shrinkage:
    """ISS-P with the factor alpha = `shrink`."""
    return Shrinkage(NAME, shrink)
