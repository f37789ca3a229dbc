"""Writes the golden files of this folder from the full set: `python tests/golden/make.py FOLDER`.

Whole layers are copied: every array of a chosen layer keeps its values, so each file holds exactly
what the authors' code computed. Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Result -> (source, layers of the source that are kept; None: all of it).
FILES: dict[str, tuple[str, Sequence[int] | None]] = {
    "ist_pr95_small": ("ist_pr95", (0, 3)),
    "iht_pr95": ("iht_pr95", None),
    "ist_pr99_tiny": ("ist_pr99_tiny", None),
    "nm_prune19of20_small": ("nm_prune19of20", (1,)),
    "arch_edsr_x4": ("arch_edsr_x4", None),
    "arch_swinir_x2_24x40": ("arch_swinir_x2_24x40", None),
}


def selected(arrays: dict[str, Any], layers: Sequence[int] | None) -> dict[str, Any]:
    """The arrays of the chosen layers, renumbered from 0, and what belongs to no layer."""
    if layers is None:
        return arrays
    fields = ("w0", "pr", "updates", "kept", "w")
    chosen = {
        f"l{new}_{field}": arrays[f"l{old}_{field}"]
        for new, old in enumerate(layers)
        for field in fields
    }
    return chosen | {name: arrays[name] for name in ("ratio", "nm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the full golden set")
    source_folder = parser.parse_args().folder
    for name, (source, layers) in FILES.items():
        with np.load(source_folder / f"{source}.npz", allow_pickle=False) as arrays:
            kept = selected(dict(arrays), layers)
        path = Path(__file__).resolve().parent / f"{name}.npz"
        np.savez_compressed(path, **kept)
        print(f"{path.name}: {len(kept)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
