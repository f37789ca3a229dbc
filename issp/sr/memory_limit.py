"""Upscaling within a number of bytes: what a picture takes, and what is left for its tiles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from issp.sr.models import tiling
from issp.utils import process
from issp.utils.errors import UserError
from issp.utils.text import byte_text

# Bytes for each pixel of the input and of the result that live beside the network's tensors while a
# picture is read (Pillow's own, converted, as bytes, as array), computed (its samples, padded) and
# written (samples, transparency twice, Pillow's own; WebP copies both). A network of one channel
# converts colours in float64.
_READING, _COMPUTING, _WRITING, _WRITING_WEBP = (20, 0), (8, 4), (4, 9), (4, 16)
_COMPUTING_LUMA = (44, 11)
_LIBRARIES = 512 * 2**20  # torch and others, where the system does not tell
_LATER = 96 * 2**20  # what libraries allocate at their first use


@dataclass(frozen=True)
class MemoryLimit:
    """How much memory this process may hold while it upscales.

    Attributes:
        total: bytes, those of Python, torch and the model included.
        held: of them, what is taken before the first picture.
        channels, scale: of the network.
        least_tile: bytes of the smallest tile.
    """

    total: int
    held: int
    channels: int
    scale: int
    least_tile: int

    @classmethod
    def of(cls, total: int, model: nn.Module) -> MemoryLimit:
        """The limit for a network, as much of which is loaded and packed as ever will be."""
        network = getattr(model, "module", model)
        weights = sum(p.nbytes for p in network.parameters())  # reordered for a layer's kernel
        resident = process.resident_bytes()
        held = (_LIBRARIES if resident is None else resident) + _LATER + weights
        channels = network.channels
        least = tiling.least_bytes(model, channels)
        return cls(total, held, channels, network.scale, least)

    def tile_bytes(self, height: int, width: int, suffix: str) -> int:
        """What a tile of a picture may take.

        Args:
            height, width: of the picture.
            suffix: of the file that its result is written to, such as ".png".

        Raises:
            UserError: the picture needs more than all; names how much.
        """
        pixels = height * width

        def bytes_of(rates: tuple[int, int]) -> int:
            return pixels * (rates[0] + rates[1] * self.scale**2)

        computing = bytes_of(_COMPUTING_LUMA if self.channels == 1 else _COMPUTING)
        writing = _WRITING_WEBP if suffix.lower() == ".webp" else _WRITING
        least = max(bytes_of(_READING), bytes_of(writing), computing + self.least_tile)
        if self.held + least > self.total:
            raise UserError(
                f"a picture of {width} x {height} pixels and its result need --memory "
                f"{byte_text(self.held + least)}, and it is {byte_text(self.total)}"
            )
        return self.total - self.held - computing
