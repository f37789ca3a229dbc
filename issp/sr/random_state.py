"""The random generators of the process, for a training state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

_MT19937_WORDS = 624


def random_state() -> dict[str, Any]:
    """The state of every random generator of the process."""
    kind, keys, *rest = np.random.get_state()
    return {
        **torch_random_state(),
        "python": list(random.getstate()[1]),
        "gauss": random.getstate()[2],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def torch_random_state() -> dict[str, Any]:
    """The part of `random_state` that a forward pass changes; it is cheap to take."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` gave; generators of absent devices are skipped.

    What is wrong with a state surfaces inside torch, random or numpy, in errors of many kinds.

    Raises:
        ValueError: it is something else.
    """
    try:
        kind, keys, position, *rest = state["numpy"]
        if not 0 <= position <= _MT19937_WORDS:  # numpy would read beyond its words
            raise ValueError(f"numpy's position is {position}")
        torch.set_rng_state(state["torch"])
        random.setstate((3, tuple(state["python"]), state["gauss"]))
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
        if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ValueError(f"the states of the random generators are damaged: {error}") from None
