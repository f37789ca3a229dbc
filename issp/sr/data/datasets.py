"""Data sets of tensors: random crops for training, whole images for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from issp.sr.data.checks import check_small
from issp.sr.data.images import list_images, luma, read_image, to_tensor
from issp.sr.data.pairs import PairedArrays, PairedFolder
from issp.sr.data.sampler import Draw, hash64
from issp.utils.files import user_path

Pairs = PairedFolder | PairedArrays
AUTO_MEMORY = 2 << 30  # bytes of decoded images that are held in memory by default
_CROP_STREAM = 0  # the sampler's shuffles use the streams from 1 on


class TrainDataset:
    """Random crops with flips, as float tensors in [0, 1].

    The corner of the crop is uniform over LR pixels. Then follow, each with probability one half, a
    horizontal flip (``hflip``), a vertical flip and a transposition (both ``rot``): BasicSR's
    use_hflip and use_rot. Crop and flips are functions of (seed, draw counter), not of the state of
    a worker or a global generator, so batches are the same with any number of workers and after a
    resume.

    Args:
        pairs: the images.
        gt_size: side of the HR crop in pixels, a multiple of the scale.
        hflip, rot: augmentations, see above.
        seed: fixes crops and flips.
        small: "error" or "skip": what to do with images smaller than the crop.
        in_memory: hold decoded images; None: hold them if all fit in ``AUTO_MEMORY``.
        channels: 3 (RGB), or 1: the luma, as networks of one channel get it (C below).

    Raises:
        ValueError: an unusable argument, an image smaller than the crop, or none large enough.
    """

    def __init__(
        self,
        pairs: Pairs,
        gt_size: int,
        hflip: bool = True,
        rot: bool = True,
        seed: int = 0,
        small: str = "error",
        in_memory: bool | None = None,
        channels: int = 3,
    ):
        self.pairs, self.scale, self.seed = pairs, pairs.scale, int(seed)
        if channels not in (1, 3):
            raise ValueError(
                f"a network of {channels} channels cannot be trained on image files: they give 3 "
                "(RGB) or 1 (luma)"
            )
        self.channels = channels
        if not isinstance(gt_size, int) or gt_size < self.scale or gt_size % self.scale:
            raise ValueError(f"gt_size must be a multiple of scale {self.scale}, got {gt_size!r}")
        check_small(small)
        self.gt_size, self.lq_size = gt_size, gt_size // self.scale
        self.hflip, self.rot = hflip, rot
        sizes = pairs.sizes()
        self.images = [i for i, size in enumerate(sizes) if min(size) >= gt_size]
        self.skipped = [pairs.paths(i)[1] for i, size in enumerate(sizes) if min(size) < gt_size]
        if self.skipped and (small == "error" or not self.images):
            height, width = next(size for size in sizes if min(size) < gt_size)
            raise ValueError(
                f"image {self.skipped[0]} is {width} x {height} pixels, smaller than the crop of "
                f"{gt_size} ({len(self.skipped)} of {len(sizes)} are); use a smaller gt_size or "
                "leave it out"
            )
        if in_memory is None:
            pixels = sum(sizes[i][0] * sizes[i][1] for i in self.images)
            in_memory = channels * pixels * (1 + 1 / self.scale**2) <= AUTO_MEMORY
        self.in_memory = in_memory
        self._held: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Decodes all images now if they are held in memory; ``progress(done, total)``."""
        if self.in_memory:
            for i in range(len(self)):
                self._planes(i)
                if progress:
                    progress(i + 1, len(self))

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """One sample: lq [C, h, w], gt [C, H, W] float32, lq_path, gt_path.

        A plain index gives the same crop each time; the sampler's draws give new ones.
        """
        if not isinstance(draw, tuple):
            if not -len(self) <= draw < len(self):
                raise IndexError(f"image {draw} of a data set of {len(self)}")
            draw = Draw(draw % len(self), draw % len(self))
        batch = self.batch([Draw(*draw)])
        return {key: value[0] for key, value in batch.items()}

    def batch(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Batch of samples: lq [B, C, h, w], gt [B, C, H, W] float32, lists lq_path, gt_path."""
        lq = np.empty((len(draws), self.channels, self.lq_size, self.lq_size), np.uint8)
        gt = np.empty((len(draws), self.channels, self.gt_size, self.gt_size), np.uint8)
        lq_paths, gt_paths = [], []
        numbers = self.random_numbers([draw.counter for draw in draws])
        for b, (draw, (top, left, *flips)) in enumerate(zip(draws, numbers, strict=True)):
            lr, hr = self._planes(draw.image)
            # Multiply and shift: uniform integers below the number of positions.
            top = (top * (lr.shape[1] - self.lq_size + 1)) >> 32
            left = (left * (lr.shape[2] - self.lq_size + 1)) >> 32
            flips = [number >> 31 for number in flips]
            lq[b] = self._patch(lr, top, left, self.lq_size, flips)
            gt[b] = self._patch(hr, top * self.scale, left * self.scale, self.gt_size, flips)
            lq_path, gt_path = self.pairs.paths(self.images[draw.image])
            lq_paths.append(lq_path)
            gt_paths.append(gt_path)
        tensors = {"lq": _to_floats(lq), "gt": _to_floats(gt)}
        return {**tensors, "lq_path": lq_paths, "gt_path": gt_paths}

    def random_numbers(self, counters: list[int]) -> list[list[int]]:
        """[B][5] numbers below 2^32: top, left, horizontal flip, vertical flip, transposition."""
        keys = np.array(counters, np.uint64)[:, None] * np.uint64(5) + np.arange(5, dtype=np.uint64)
        return (hash64(self.seed, keys, _CROP_STREAM) >> np.uint64(32)).tolist()

    def _patch(
        self, planes: np.ndarray, top: int, left: int, size: int, flips: list[int]
    ) -> np.ndarray:
        patch = planes[:, top : top + size, left : left + size]
        horizontal, vertical, transposed = flips
        if self.hflip and horizontal:
            patch = patch[:, :, ::-1]
        if self.rot and vertical:
            patch = patch[:, ::-1]
        if self.rot and transposed:
            patch = patch.transpose(0, 2, 1)
        return patch

    def _planes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """LR and HR as [C, H, W] uint8: the rows of a plane are contiguous, so crops copy fast."""
        if i in self._held:
            return self._held[i]
        lr, hr = map(self._as_planes, self.pairs.load(self.images[i]))
        if self.in_memory:
            lr, hr = np.ascontiguousarray(lr), np.ascontiguousarray(hr)
            self._held[i] = lr, hr
        return lr, hr

    def _as_planes(self, img: np.ndarray) -> np.ndarray:
        if self.channels == 1:
            return np.rint(luma(img)).astype(np.uint8)[None]
        return img.transpose(2, 0, 1)


def _to_floats(levels: np.ndarray) -> torch.Tensor:
    """Levels / 255 as float32, by numpy: one thread, which waits for no other."""
    return torch.from_numpy(np.divide(levels, np.float32(255), dtype=np.float32))


class EvalDataset:
    """Whole images with originals: lq [3, h, w], gt [3, H, W] float32, name, lq_path, gt_path.

    Args:
        pairs: the images.
        in_memory: hold the decoded uint8 images, for repeated validation.
    """

    def __init__(self, pairs: Pairs, in_memory: bool = False):
        self.pairs, self.scale, self.in_memory = pairs, pairs.scale, in_memory
        self._held: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """LR and HR of image ``i`` as [H, W, 3] uint8, as the metrics take them."""
        if i not in self._held:
            images = self.pairs.load(i)
            if not self.in_memory:
                return images
            self._held[i] = images
        return self._held[i]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of a data set of {len(self)}")
        i %= len(self)
        lr, hr = self.load(i)
        lq_path, gt_path = self.pairs.paths(i)
        name = self.pairs.names[i]
        tensors = {"lq": to_tensor(lr), "gt": to_tensor(hr)}
        return {**tensors, "name": name, "lq_path": lq_path, "gt_path": gt_path}


class ImageFolder:
    """Images without originals, to be upscaled: lq [3, h, w] float32, name, lq_path.

    Args:
        root: folder of images, or one image file of any name.
    """

    def __init__(self, root: str | os.PathLike):
        path = user_path(root)
        self.files = [path] if path.is_file() else list_images(path)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        file = self.files[i]
        return {"lq": to_tensor(read_image(file)), "name": file.stem, "lq_path": str(file)}
