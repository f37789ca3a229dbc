"""Low-resolution images made from high-resolution files, kept on disk between runs."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np

from issp.sr.data.images import decode_image, encode_image
from issp.sr.data.resize import imresize
from issp.utils.files import atomic_write, cache_folder, user_path

# Part of every key: to be raised when imresize or the decoding rules change.
_VERSION = b"issp-lr-2"
_DIGEST_BYTES = 20


class LRCache:
    """Folder of bicubic low-resolution images, keyed by the content of their HR files.

    The key is a hash of the HR file's bytes and the scale: a moved or touched file keeps its entry,
    and a replaced file (even one of equal size and date) gets another. An entry is a PNG file with
    a hash of its content and name behind it: a damaged or renamed one is made again.
    Entries are written atomically, so any number of processes may share the folder; at worst two
    of them make the same image. If the folder cannot be written, there is one warning and the
    images are made each time.

    Args:
        folder: where to keep the entries; made when the first is written.
    """

    _warned: ClassVar[set[Path]] = set()  # of the process: one warning for all data sets

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = user_path(folder) if folder is not None else cache_folder()

    def entry(self, hr_bytes: bytes, scale: int) -> Path:
        """Path at which the low-resolution image of an HR file with this content is kept."""
        key = hashlib.blake2b(hr_bytes, digest_size=20, key=_VERSION).hexdigest()
        return self.folder / key[:2] / f"{key}x{scale}.png"

    def get(self, hr_bytes: bytes, hr: np.ndarray, scale: int) -> np.ndarray:
        """Low-resolution image of ``hr``, from the folder or made now.

        Args:
            hr_bytes: content of the HR file.
            hr: [H, W, 3] uint8, the decoded file, H and W multiples of ``scale``.
            scale: whole factor.

        Returns:
            [H / scale, W / scale, 3] uint8.
        """
        path = self.entry(hr_bytes, scale)
        try:
            entry = path.read_bytes()
        except OSError:
            entry = b""  # absent: made below
        png, digest = entry[:-_DIGEST_BYTES], entry[-_DIGEST_BYTES:]
        if digest == _digest(png, path):
            return decode_image(png, path)
        lr = imresize(hr, 1 / scale)
        png = encode_image(lr, ".png", compress_level=1)
        try:
            atomic_write(path, png + _digest(png, path), durable=False)
        except OSError as error:
            if self.folder not in self._warned:
                self._warned.add(self.folder)
                warnings.warn(
                    f"low-resolution images are not cached: {error}; use another cache folder "
                    "(cache_dir or ISSP_CACHE)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return lr


def _digest(png: bytes, path: Path) -> bytes:
    """Hash of an entry; Pillow would decode damaged pixels, and PNG's checksums are 4 bytes."""
    key = path.name.encode()
    return hashlib.blake2b(png, digest_size=_DIGEST_BYTES, key=key).digest()
