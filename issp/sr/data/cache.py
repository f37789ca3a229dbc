"""Low-resolution images made from high-resolution files, kept on disk between runs."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np

from issp.sr.data.images import decode_image, write_image
from issp.sr.data.resize import imresize
from issp.utils.files import cache_folder

# Part of every key: to be raised when imresize or the decoding rules change.
_VERSION = b"issp-lr-1"


class LRCache:
    """Folder of bicubic low-resolution images, keyed by the content of their HR files.

    The key is a hash of the HR file's bytes and the scale: a moved or touched file keeps its entry,
    and a replaced file (even one of equal size and date) gets another. Entries are PNG, whose
    checksums expose damage: an entry that does not decode or has the wrong size is made again.
    Entries are written atomically, so any number of processes may share the folder; at worst two
    of them make the same image. If the folder cannot be written, there is one warning and the
    images are made each time.

    Args:
        folder: where to keep the entries; made when the first is written.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder).expanduser() if folder is not None else cache_folder()
        self._writable = True

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
            entry = decode_image(path.read_bytes(), path)
            if entry.shape == (hr.shape[0] // scale, hr.shape[1] // scale, 3):
                return entry
        except (OSError, ValueError):
            pass  # absent or damaged: made below
        lr = imresize(hr, 1 / scale)
        try:
            if self._writable:
                write_image(path, lr, compress_level=1)
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"low-resolution images are not cached: {error}; use another cache folder "
                "(cache_dir or ISSP_CACHE)",
                RuntimeWarning,
                stacklevel=2,
            )
        return lr
