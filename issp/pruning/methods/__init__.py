"""The pruning methods, one file each: which weights are unimportant and what happens to them.

`attach(method=...)` takes a name, or one of the classes with its options:
`attach(model, opt, method=issp.methods.SRP(limit=0.5, seed=1))`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from issp.pruning.methods.assl import ASSL
from issp.pruning.methods.base import Method, Setting, check_shards
from issp.pruning.methods.dense import Dense
from issp.pruning.methods.iht import IHT
from issp.pruning.methods.iss_p import ISSP
from issp.pruning.methods.iss_r import ISSR, StaleISSR
from issp.pruning.methods.l1 import L1
from issp.pruning.methods.scratch import Scratch
from issp.pruning.methods.sls import SLS
from issp.pruning.methods.srp import SRP
from issp.utils.text import suggest

_CLASSES = (ISSP, IHT, ISSR, StaleISSR, L1, Scratch, SRP, ASSL, SLS, Dense)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _CLASSES}

__all__ = ["ASSL", "IHT", "ISSP", "ISSR", "L1", "METHODS", "SLS", "SRP", "Dense", "Method"]
__all__ += ["Scratch", "Setting", "StaleISSR", "check_shards", "create"]


def create(method: str | Method, **options: Any) -> Method:
    """A method of a new run.

    Args:
        method: a name of `METHODS`, or a method, whose options are copied.
        options: of the class of that name.

    Raises:
        ValueError: an unknown name or option, or an option outside its range.
        TypeError: neither a name nor a method.
    """
    if isinstance(method, Method):
        if options:
            raise ValueError(f"pass {', '.join(options)} to {type(method).__name__}()")
        return dataclasses.replace(method)  # without what it has learned elsewhere
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a method of issp.methods, not {method!r}")
    if method not in METHODS:
        raise ValueError(f'there is no method "{method}": {suggest(method, METHODS)}')
    known = [f.name for f in dataclasses.fields(METHODS[method]) if f.init]
    for name in options:
        if name not in known:
            hint = suggest(name, known) if known else "it has none"
            raise ValueError(f'method "{method}" has no option "{name}": {hint}')
    return METHODS[method](**options)
