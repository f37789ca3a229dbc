"""Real photographs for the demo, without a download: those in the wheel of scikit-image."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from issp.sr.data.images import read_image
from issp.utils.errors import MissingPackageError

# Drawings, masks, scans of text and the second view of the stereo pair are left out; so are retina
# and moon, nearly all of whose crops are too smooth to learn from.
TRAIN = (
    "astronaut.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "brick.png",
    "coins.png",
    "grass.png",
    "gravel.png",
)
TEST = ("chelsea.png", "coffee.png", "camera.png")


def sample_photographs(split: str = "all") -> dict[str, np.ndarray]:
    """Photographs that scikit-image ships, in a fixed split.

    ``"train"`` has 9: astronaut, motorcycle_left, rocket, hubble_deep_field and ihc in colour;
    brick, coins, grass and gravel grey, replicated to RGB. ``"test"`` has 3 others: chelsea (a cat)
    and coffee in colour, camera in grey. Nothing is downloaded, and scikit-image itself is not
    imported.

    Args:
        split: "train", "test" or "all".

    Returns:
        Name to [H, W, 3] uint8 RGB, in a fixed order.

    Raises:
        ValueError: an unknown split.
        MissingPackageError: scikit-image (or Pillow) is not installed.
        FileNotFoundError: the installed scikit-image has none of the photographs.
    """
    splits = {"train": TRAIN, "test": TEST, "all": TRAIN + TEST}
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("sample photographs", "scikit-image")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    # A release that no longer ships one of the photographs leaves the others usable.
    files = [folder / name for name in splits[split] if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"scikit-image in {folder.parent} holds none of the {split} photographs; "
            'reinstall it: pip install "scikit-image>=0.22"'
        )
    return {file.stem: read_image(file) for file in files}
