"""Golden vectors: what the authors' public code and the published networks compute on random data.

The files beside this module are in the repository, so that a plain clone can prove parity. The
larger files that they were taken from are used as well where `../shared/golden` exists. README.md
describes the content and make.py writes the files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

_OWN = Path(__file__).resolve().parent
_SHARED = _OWN.parents[2] / "shared" / "golden"


def load(name: str) -> np.lib.npyio.NpzFile:
    """The arrays of one golden file; skips the test where the file is on neither place.

    Args:
        name: of the file, without ".npz".
    """
    for folder in (_OWN, _SHARED):
        path = folder / f"{name}.npz"
        if path.is_file():
            return np.load(path, allow_pickle=False)
    pytest.skip(f"golden file {name}.npz is in neither tests/golden nor {_SHARED}")
