"""Pairs of low- and high-resolution images: from folders, or from arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import numpy as np

from issp.sr.data.cache import LRCache
from issp.sr.data.checks import check_whole
from issp.sr.data.images import (
    decode_image,
    image_size,
    mod_crop,
    read_bytes,
    read_image,
)
from issp.sr.data.layouts import find_pair, find_pairs
from issp.sr.data.resize import check_uint8_image, imresize
from issp.utils.files import user_path


class PairedArrays:
    """Pairs made from HR images in memory; the LR images are bicubic.

    Args:
        images: name to [H, W, 3] uint8 RGB.
        scale: whole factor >= 2; the images are cropped to a multiple of it.

    Raises:
        TypeError, ValueError: an image or the scale is not usable; no images.
    """

    lr_source = "made"

    def __init__(self, images: Mapping[str, np.ndarray], scale: int):
        self.scale = check_whole("scale", scale, 2)
        if not images:
            raise ValueError("images is empty: pass at least one")
        for name, img in images.items():
            check_uint8_image(img, f"image {name}")
            if img.ndim != 3 or img.shape[2] != 3:
                raise ValueError(f"image {name} must be [H, W, 3], got {list(img.shape)}")
            _check_holds_scale(img.shape[:2], scale, name)
        self.names = list(images)
        self._hr = [mod_crop(img, scale) for img in images.values()]

    def __len__(self) -> int:
        return len(self.names)

    def paths(self, i: int) -> tuple[str, str]:
        """Name of image ``i``, in the place of its LR and its HR path."""
        return self.names[i], self.names[i]

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every HR image, cropped to a multiple of the scale."""
        return [img.shape[:2] for img in self._hr]

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """LR [h, w, 3] and HR [h * scale, w * scale, 3] uint8 of image ``i``."""
        return imresize(self._hr[i], 1 / self.scale), self._hr[i]


class PairedFolder:
    """Pairs from folders; where LR files are absent they are made from HR and cached.

    ``root`` may hold the HR images itself, or be laid out as ``HR`` with ``LR_bicubic/X4``, as
    ``hr`` with ``lr``, as ``GT`` with ``LRbicx4``, or as DIV2K's ``DIV2K_train_HR`` with
    ``DIV2K_train_LR_bicubic/X4``. With ``lq_root``, ``root`` is the HR folder; ``lq_root`` may hold
    the LR files itself or in ``X4``. Both kinds may lie in one folder, as ``a_HR`` with ``a_LR``
    (Urban100; results of methods such as ``a_SRCNN`` are left out) or as ``a`` with ``ax4``.

    The HR image is cropped to the LR size times the scale (a multiple of the scale) at its right
    and bottom. LR files without an HR file are ignored; an HR file without its LR file is an error.

    Args:
        root: folder of HR images, or of the two folders; or a template of the HR files, such as
            ``"DIR/{}_GT"``, whose ``{}`` is the image's name.
        scale: whole factor >= 2.
        lq_root: folder of LR images; or a template of the LR files, such as ``"DIR/X{s}/{}x{s}"``
            or, beside the HR files, ``"{}_in"``.
        filename_tmpl: LR name without suffix, ``{}`` for the HR name, such as ``"{}x4"``. Without
            it ``{}x4``, ``{}_LRBI_x4``, ``{}_LR`` and ``{}`` are tried and one must fit all files.
        cache_dir: folder for LR images made from HR; None for the user's cache folder, False to
            make them each time.
        meta_info_file: text file that lists the HR images to use, as BasicSR's: one a line, as
            "0001.png (1404,2040,3)" or the name alone. None: all of the folder.
        only: file in ``root`` that is the one image; its LR image lies beside it or in ``lq_root``.

    Raises:
        FileNotFoundError: a folder, an LR file or a listed image is missing.
        ValueError: a folder without images or of LR images, an unreadable image or an unusable
            argument.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        scale: int,
        lq_root: str | os.PathLike | None = None,
        filename_tmpl: str | None = None,
        cache_dir: str | os.PathLike | Literal[False] | None = None,
        meta_info_file: str | os.PathLike | None = None,
        only: str | None = None,
    ):
        self.scale = check_whole("scale", scale, 2)
        if only is None:
            files = find_pairs(root, scale, lq_root, filename_tmpl, meta_info_file)
        else:
            files = find_pair(user_path(root) / only, scale, lq_root)
        self.names, self.hr_files, self.lr_files = files.names, files.hr, files.lr
        self._cache = None if cache_dir is False else LRCache(cache_dir)
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.hr_files)

    @property
    def lr_source(self) -> str:
        """Where the LR images come from: they are "read", or "made" from the HR images."""
        return "read" if self.lr_files else "made"

    def paths(self, i: int) -> tuple[str, str]:
        """Paths of the LR and the HR file of image ``i``; the HR path twice if LR is made."""
        hr = str(self.hr_files[i])
        return (str(self.lr_files[i]) if self.lr_files else hr), hr

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every HR image, cropped to a multiple of the scale.

        Reads the headers of the files and checks the size of each LR file.
        """
        if self._sizes is None:
            sizes = []
            for i, file in enumerate(self.hr_files):
                size = image_size(file)
                self._check_sizes(i, image_size(self.lr_files[i]) if self.lr_files else None, size)
                sizes.append(tuple(side // self.scale * self.scale for side in size))
            self._sizes = sizes
        return self._sizes

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """LR [h, w, 3] and HR [h * scale, w * scale, 3] uint8 RGB of image ``i``.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged or of the wrong size.
        """
        file = self.hr_files[i]
        if self.lr_files:
            lr, hr = read_image(self.lr_files[i]), read_image(file)
            self._check_sizes(i, lr.shape[:2], hr.shape[:2])
            return lr, mod_crop(hr, self.scale)
        data = read_bytes(file)
        hr = decode_image(data, file)
        self._check_sizes(i, None, hr.shape[:2])
        hr = mod_crop(hr, self.scale)
        if self._cache is None:
            return imresize(hr, 1 / self.scale), hr
        return self._cache.get(data, hr, self.scale), hr

    def _check_sizes(self, i: int, lr: tuple[int, int] | None, hr: tuple[int, int]) -> None:
        _check_holds_scale(hr, self.scale, self.hr_files[i])
        expected = tuple(side // self.scale for side in hr)
        if lr is not None and tuple(lr) != expected:
            raise ValueError(
                f"low-resolution image {self.lr_files[i]} is {lr[1]} x {lr[0]} pixels but "
                f"{expected[1]} x {expected[0]} belong to {self.hr_files[i]} ({hr[1]} x {hr[0]}) "
                f"at scale {self.scale}; name the files of that scale, or make them with "
                "`issp prepare-data`"
            )


def _check_holds_scale(size: tuple[int, int], scale: int, name: object) -> None:
    if min(size) < scale:
        raise ValueError(
            f"image {name} is {size[1]} x {size[0]} pixels, too small for scale {scale}; "
            "leave it out"
        )
