"""Prepares a data set on disk: HR images or crops of them, bicubic LR images for each scale."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from issp.sr.data.checks import check_small, check_whole
from issp.sr.data.images import image_size, mod_crop, read_image, write_image
from issp.sr.data.layouts import check_names, originals
from issp.sr.data.resize import imresize
from issp.utils.files import atomic_write, check_folder, user_path

_JOURNAL = "prepared.jsonl"  # in the result: what is finished


@dataclass(frozen=True)
class PrepareResult:
    """Result of :func:`prepare`: numbers of source images and of the files made from them."""

    sources: int
    resumed: int  # sources that an earlier call had finished
    skipped: tuple[str, ...]  # sources smaller than crop_size
    images: int  # HR images in the result, and LR images per scale


def prepare(
    hr_folder: str | os.PathLike,
    out: str | os.PathLike,
    scales: Sequence[int] = (2, 3, 4),
    crop_size: int | None = None,
    step: int | None = None,
    thresh_size: int = 0,
    small: str = "error",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareResult:
    """Writes ``out/HR/NAME.png`` and ``out/LR_bicubic/X4/NAMEx4.png`` for every image of a folder.

    Whole images keep all their pixels in HR; each LR image is made from HR cropped to a multiple of
    its scale. With ``crop_size`` the images are cut into overlapping crops ``NAME_s001`` and so on,
    as BasicSR's extract_subimages does: HR is cropped to a multiple of all scales, a last crop is
    added at the right and bottom if more than ``thresh_size`` pixels would be left, and the LR
    crops are cut from the LR image of the whole picture.

    Files are written atomically, and a journal in ``out`` lists finished sources: the same call
    continues after an interruption and redoes sources that changed.

    Args:
        hr_folder: folder of HR images (LR images beside them are left out); it may be ``out/HR``
            itself, which then stays as it is.
        out: folder to write to.
        scales: whole factors >= 2.
        crop_size: side of the HR crops in pixels, a multiple of every scale; None: whole images.
        step: distance between crops, a multiple of every scale; None: half of ``crop_size``.
        thresh_size: pixels that may be left over at the border, see above.
        small: "error" or "skip": what to do with images smaller than ``crop_size``.
        workers: threads.
        progress: called as ``progress(done, total)`` after each source.

    Raises:
        FileNotFoundError, ValueError: no such folder, no images, an unreadable or too small image,
            an unusable argument, ``out`` holds a data set with other settings, or
            files of the same names that were not made here.
        OSError: a file cannot be written.
    """
    check_small(small)
    check_whole("workers", workers, 1)
    cut = _Cut.checked(scales, crop_size, step, thresh_size)
    sources = originals(hr_folder)
    check_names(sources)
    sources, skipped = _large_enough(sources, cut, small)
    out = user_path(out)
    check_folder(out)
    in_place = (out / "HR").exists() and (out / "HR").samefile(user_path(hr_folder))
    if in_place and crop_size:
        raise ValueError(f"crops of {hr_folder} cannot go into the same folder; choose another out")

    if not (out / _JOURNAL).exists():
        _check_free(sources, out, cut, in_place)
    journal = _Journal(out, cut)
    journal.check_owners(sources)
    todo = [source for source in sources if not journal.is_finished(source)]
    resumed = len(sources) - len(todo)
    if progress and resumed:
        progress(resumed, len(sources))
    with ThreadPoolExecutor(workers) as pool:
        # When one source fails, map cancels the sources that have not begun.
        made = pool.map(lambda source: _make(source, out, cut, in_place), todo)
        for done, (source, names) in enumerate(zip(todo, made, strict=True), resumed + 1):
            journal.note(source, names)
            if progress:
                progress(done, len(sources))
    images = sum(len(journal.entries[_key(source)]["names"]) for source in sources)
    return PrepareResult(len(sources), resumed, tuple(map(str, skipped)), images)


@dataclass(frozen=True)
class _Cut:
    """How each image is cut; ``unit`` is what its sides are first cropped to a multiple of."""

    scales: tuple[int, ...]
    crop_size: int | None
    step: int | None
    thresh_size: int
    unit: int

    @classmethod
    def checked(
        cls, scales: Sequence[int], crop_size: int | None, step: int | None, thresh_size: int
    ) -> _Cut:
        scales = tuple(sorted({check_whole("scale", scale, 2) for scale in scales}))
        if not scales:
            raise ValueError("at least one scale is needed")
        if crop_size is None:
            for name, given in (("step", step is not None), ("thresh_size", thresh_size != 0)):
                if given:
                    raise ValueError(f"{name} has no meaning without crop_size")
            return cls(scales, None, None, 0, 1)
        unit = lcm(*scales)
        step = max(unit, crop_size // 2 // unit * unit) if step is None else step
        for name, value in (("crop_size", crop_size), ("step", step)):
            if not isinstance(value, int) or value < unit or value % unit:
                raise ValueError(
                    f"{name} must be a multiple of every scale, hence of {unit}, got {value!r}"
                )
        if thresh_size < 0:
            raise ValueError(f"thresh_size must be >= 0, got {thresh_size}")
        return cls(scales, crop_size, step, thresh_size, unit)

    def holds(self, size: tuple[int, int]) -> bool:
        """Whether an image of this height and width gives at least one output."""
        return min(size) >= (self.crop_size or max(self.scales))

    def corners(self, side: int) -> list[int]:
        """Where the crops begin along a side of this length."""
        assert self.crop_size and self.step
        starts = list(range(0, side - self.crop_size + 1, self.step))
        if side - (starts[-1] + self.crop_size) > self.thresh_size:
            starts.append(side - self.crop_size)
        return starts


def _make(source: Path, out: Path, cut: _Cut, in_place: bool) -> list[str]:
    """Writes all outputs of one source; returns the names of its HR outputs without suffix."""
    hr = mod_crop(read_image(source), cut.unit)
    lrs = {scale: imresize(mod_crop(hr, scale), 1 / scale) for scale in cut.scales}
    if cut.crop_size is None:
        if not in_place:
            write_image(out / "HR" / f"{source.stem}.png", hr)
        for scale, lr in lrs.items():
            write_image(_lr_path(out, source.stem, scale), lr)
        return [source.stem]
    names = []
    for top in cut.corners(hr.shape[0]):
        for left in cut.corners(hr.shape[1]):
            names.append(f"{source.stem}_s{len(names) + 1:03d}")
            bottom, right = top + cut.crop_size, left + cut.crop_size
            write_image(out / "HR" / f"{names[-1]}.png", hr[top:bottom, left:right])
            for scale, lr in lrs.items():
                crop = lr[top // scale : bottom // scale, left // scale : right // scale]
                write_image(_lr_path(out, names[-1], scale), crop)
    return names


def _check_free(sources: list[Path], out: Path, cut: _Cut, in_place: bool) -> None:
    """Refuses a folder without a journal in which other files would be overwritten."""
    for source in sources:
        name = f"{source.stem}_s001" if cut.crop_size else source.stem
        results = [_lr_path(out, name, scale) for scale in cut.scales]
        results += [] if in_place else [out / "HR" / f"{name}.png"]
        for result in filter(Path.exists, results):
            raise ValueError(
                f"{result} is there already, and not made by `issp prepare-data`: choose another "
                "out, or remove it"
            )


def _lr_path(out: Path, name: str, scale: int) -> Path:
    return out / "LR_bicubic" / f"X{scale}" / f"{name}x{scale}.png"


def _key(source: Path) -> str:
    return str(source.resolve())


class _Journal:
    """The finished sources: a line of settings, then a line of JSON for each source."""

    def __init__(self, out: Path, cut: _Cut):
        self.out, self.cut, self.path = out, cut, out / _JOURNAL
        settings = {k: getattr(cut, k) for k in ("crop_size", "step", "thresh_size", "unit")}
        lines = self._read()
        if lines and lines[0] != settings:
            raise ValueError(
                f"{out} was prepared with {lines[0]}, not with {settings}; "
                "choose another folder or remove it"
            )
        self.entries: dict[str, dict[str, Any]] = {e["source"]: e for e in lines[1:]}
        text = "".join(json.dumps(line) + "\n" for line in (settings, *self.entries.values()))
        atomic_write(self.path, text.encode())  # drops the half line of an interrupted call

    def check_owners(self, sources: list[Path]) -> None:
        """Raises if the outputs were made from a source of the same name in another folder."""
        keys = {_key(source) for source in sources}
        stems = {source.stem: source for source in sources}
        for key in list(self.entries):
            if key in keys or Path(key).stem not in stems:
                continue
            if Path(key).exists():
                raise ValueError(
                    f"{stems[Path(key).stem]} and {key} would have the same name in {self.out}; "
                    "rename one or choose another out"
                )
            del self.entries[key]  # the old source is gone: the new one replaces it

    def is_finished(self, source: Path) -> bool:
        """Whether the outputs were made from this very file and all exist."""
        entry = self.entries.get(_key(source))
        if entry is None or entry["stat"] != _stat(source):
            return False
        if not set(self.cut.scales) <= set(entry["scales"]):
            return False
        files = [self.out / "HR" / f"{name}.png" for name in entry["names"]]
        if files[0].parent.resolve() == source.parent.resolve():
            files = []  # the sources are the HR files, whatever their suffix
        files += [_lr_path(self.out, n, s) for n in entry["names"] for s in entry["scales"]]
        return all(file.is_file() for file in files)

    def note(self, source: Path, names: list[str]) -> None:
        """Adds a finished source and removes outputs of an earlier picture of that name."""
        old = self.entries.get(_key(source), {"names": [], "scales": []})
        for name in set(old["names"]) - set(names):
            (self.out / "HR" / f"{name}.png").unlink(missing_ok=True)
            for scale in old["scales"]:
                _lr_path(self.out, name, scale).unlink(missing_ok=True)
        same = "stat" in old and old["stat"] == _stat(source)
        scales = set(self.cut.scales) | (set(old["scales"]) if same else set())
        entry = {"source": _key(source), "stat": _stat(source), "scales": sorted(scales)}
        entry["names"] = names
        self.entries[_key(source)] = entry
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the half line of an interrupted call; the lines before it are whole
        forms = [("crop_size",), *[("source", "stat", "scales", "names")] * len(lines)]
        for line, keys in zip(lines, forms, strict=False):
            if not (isinstance(line, dict) and all(key in line for key in keys)):
                raise ValueError(f"{self.path} is damaged: remove it and what was made beside it")
        return lines


def _stat(source: Path) -> list[int]:
    stat = source.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _large_enough(sources: list[Path], cut: _Cut, small: str) -> tuple[list[Path], list[Path]]:
    """Sources that give an output, and those too small; the latter are an error unless skipped."""
    sizes = {source: image_size(source) for source in sources}
    skipped = [source for source in sources if not cut.holds(sizes[source])]
    if skipped and (small == "error" or len(skipped) == len(sources)):
        height, width = sizes[skipped[0]]
        raise ValueError(
            f"image {skipped[0]} is {width} x {height} pixels, smaller than "
            f"{cut.crop_size or max(cut.scales)} ({len(skipped)} of {len(sources)} are); "
            f"use a smaller {'crop_size' if cut.crop_size else 'scale'} or leave it out"
        )
    return [source for source in sources if source not in set(skipped)], skipped
