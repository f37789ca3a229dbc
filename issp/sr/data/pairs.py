"""Pairs of low- and high-resolution images: from folders, or from arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from issp.sr.data.cache import LRCache
from issp.sr.data.checks import check_whole
from issp.sr.data.images import (
    decode_image,
    image_size,
    list_images,
    mod_crop,
    read_bytes,
    read_image,
)
from issp.sr.data.resize import check_uint8_image, imresize
from issp.utils.files import user_path

_HR_NAMES = ("HR", "hr", "GT", "gt", "GTmod12")
_LR_NAMES = ("LR_bicubic", "LR", "lr", "LRbicx{s}", "lq", "LQ")
_TEMPLATES = ("{}x{s}", "{}_LRBI_x{s}", "{}")


class PairedArrays:
    """Pairs made from HR images in memory; the LR images are bicubic.

    Args:
        images: name to [H, W, 3] uint8 RGB.
        scale: whole factor >= 2; the images are cropped to a multiple of it.

    Raises:
        TypeError, ValueError: an image or the scale is not usable; no images.
    """

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
    the LR files itself or in ``X4``.

    The HR image is cropped to the LR size times the scale (a multiple of the scale) at its right
    and bottom. LR files without an HR file are ignored; an HR file without its LR file is an error.

    Args:
        root: folder of HR images, or of the two folders.
        scale: whole factor >= 2.
        lq_root: folder of LR images.
        filename_tmpl: LR name without suffix, ``{}`` for the HR name, such as ``"{}x4"``. Without
            it ``{}x4``, ``{}_LRBI_x4`` and ``{}`` are tried and one must fit all files.
        cache_dir: folder for LR images made from HR; None for the user's cache folder, False to
            make them each time.
        meta_info_file: text file that lists the HR images to use, as BasicSR's: one a line, as
            "0001.png (1404,2040,3)" or the name alone. None: all of the folder.

    Raises:
        FileNotFoundError: a folder, an LR file or a listed image is missing.
        ValueError: a folder without images, an unreadable image or an unusable argument.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        scale: int,
        lq_root: str | os.PathLike | None = None,
        filename_tmpl: str | None = None,
        cache_dir: str | os.PathLike | Literal[False] | None = None,
        meta_info_file: str | os.PathLike | None = None,
    ):
        self.scale = check_whole("scale", scale, 2)
        hr_dir, lr_dir = find_folders(root, scale, lq_root)
        self.hr_files = (
            listed_images(hr_dir, meta_info_file) if meta_info_file else list_images(hr_dir)
        )
        check_names(self.hr_files)
        self.lr_files = match_lr(self.hr_files, lr_dir, scale, filename_tmpl) if lr_dir else None
        self.names = [f.stem for f in self.hr_files]
        self._cache = None if cache_dir is False else LRCache(cache_dir)
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.hr_files)

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
                f"at scale {self.scale}; make it again with `issp prepare-data`"
            )


def check_names(files: list[Path]) -> None:
    """Raises ValueError if two files differ in their suffix alone."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise ValueError(f"{seen[file.stem]} and {file.name} have the same name; rename one")
        seen[file.stem] = file


def listed_images(folder: Path, meta_info_file: str | os.PathLike) -> list[Path]:
    """The images of a folder that a list names, in its order; see `PairedFolder`."""
    path = user_path(meta_info_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read meta_info_file {path}: {reason}") from None
    # The size at the end of the line is for readers.
    names = [re.sub(r"\s*\([\d,\s]*\)\s*$", "", line).strip() for line in lines]
    files = [folder / name for name in names if name]
    missing = [file for file in files if not file.is_file()]
    if not files:
        raise ValueError(f"meta_info_file {path} names no image")
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {missing[0].relative_to(folder)}, which meta_info_file {path} lists "
            f"({len(missing)} of {len(files)} are missing)"
        )
    return files


def find_folders(
    root: str | os.PathLike, scale: int, lq_root: str | os.PathLike | None = None
) -> tuple[Path, Path | None]:
    """HR folder and LR folder (None: to be made from HR) for the layouts of PairedFolder."""
    root = user_path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if lq_root is not None:
        lq_root = user_path(lq_root)
        if not lq_root.is_dir():
            raise FileNotFoundError(f"there is no folder {lq_root} for low-resolution images")
        return _inner(root, _HR_NAMES) or root, _scale_folder(lq_root, scale)
    hr_dir = _inner(root, _HR_NAMES) or _only(root, "*_HR")
    if hr_dir is None:
        return root, None
    names = [name.format(s=scale) for name in _LR_NAMES]
    lr_dir = _inner(root, names) or _only(root, "*_LR_bicubic")
    if lr_dir is None:
        return hr_dir, None
    lr_dir = _scale_folder(lr_dir, scale)
    # LR_bicubic may hold other scales only (X2 but not X4): then LR images are made from HR.
    return hr_dir, lr_dir if any(f.is_file() for f in lr_dir.iterdir()) else None


def match_lr(
    hr_files: list[Path], lr_dir: Path, scale: int, filename_tmpl: str | None = None
) -> list[Path]:
    """LR file of every HR file; ``filename_tmpl`` and errors as for PairedFolder."""
    if filename_tmpl is not None and "{}" not in filename_tmpl:
        raise ValueError(f"filename_tmpl needs {{}} for the HR name, got {filename_tmpl!r}")
    files = {f.stem: f for f in list_images(lr_dir)}
    templates = [filename_tmpl] if filename_tmpl else list(_TEMPLATES)
    fewest: list[str] = []
    for template in templates:
        template = template.replace("{s}", str(scale))
        wanted = [template.replace("{}", f.stem) for f in hr_files]
        missing = [name for name in wanted if name not in files]
        if not missing:
            return [files[name] for name in wanted]
        if not fewest or len(missing) < len(fewest):
            fewest = missing
    raise FileNotFoundError(
        f"{lr_dir} has no file {fewest[0]} ({len(fewest)} of {len(hr_files)} pairs are incomplete);"
        " set filename_tmpl if the names follow another rule"
    )


def _inner(root: Path, names: tuple[str, ...] | list[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _only(root: Path, glob: str) -> Path | None:
    """The one folder in ``root`` that matches; two of them (train and valid) are ambiguous."""
    folders = sorted(f for f in root.glob(glob) if f.is_dir())
    if len(folders) > 1:
        first, second = folders[0].name, folders[1].name
        raise ValueError(f"{root} holds {first} and {second}; name the one to use")
    return folders[0] if folders else None


def _scale_folder(folder: Path, scale: int) -> Path:
    return _inner(folder, (f"X{scale}", f"x{scale}")) or folder


def _check_holds_scale(size: tuple[int, int], scale: int, name: object) -> None:
    if min(size) < scale:
        raise ValueError(
            f"image {name} is {size[1]} x {size[0]} pixels, too small for scale {scale}; "
            "leave it out"
        )
