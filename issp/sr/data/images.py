"""Reading, writing and listing image files; conversion between uint8 images and tensors."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from issp.sr.data import containers
from issp.sr.data.resize import check_uint8_image
from issp.utils.errors import import_optional
from issp.utils.files import atomic_write, user_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif")
# Also pictures, so that a folder which holds one is not read as if it were not there.
_OTHER_PICTURES = (
    ".jpe",
    ".jfif",
    ".dib",
    ".pbm",
    ".pnm",
    ".jp2",
    ".tga",
    ".avif",
    ".heic",
    ".heif",
)
# Pillow would read the small preview in them.
_CAMERA_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
PICTURE_SUFFIXES = (*SUFFIXES, *_OTHER_PICTURES, *_CAMERA_RAW)
_TRANSPOSED = (5, 6, 7, 8)  # orientations that swap height and width
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_ORIENTATION = 256, 257, 258, 274
# Description, maker, model, program, date, artist, copyright; directories of camera and place.
_TIFF_ORIGIN = (270, 271, 272, 305, 306, 315, 33432)
_EXIF_DIRECTORIES = (0x8769, 0x8825)
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError)
_DECODE_ERRORS += (struct.error, zlib.error)
# What Pillow's own code makes of damaged headers besides.
_PILLOW_ERRORS = (TypeError, KeyError, AttributeError, OverflowError, ArithmeticError)


@dataclass(frozen=True)
class Picture:
    """A decoded image file, and what a file made from it may keep.

    Attributes:
        rgb: [H, W, 3] uint8 by the rules of `read_image`, upright.
        alpha: [H, W] uint8, upright; None where the file has no transparency.
        is_grey: stored without colour.
        bits: per sample in the file: 16, or 8 for 8 and less.
        frames: of an animation or pages; 1 for a plain image.
        icc_profile, exif: as the file holds them; the orientation in `exif` is that of `rgb`.
        deep: [H, W] uint16, the samples of a grey image of 16 bits; None: of any other.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    is_grey: bool
    bits: int
    frames: int
    icc_profile: bytes | None
    exif: bytes | None
    deep: np.ndarray | None = None

    @property
    def samples(self) -> np.ndarray:
        """[H, W, 1] or [H, W, 3], uint8 or uint16: all that is stored of the colours."""
        if self.deep is not None:
            return self.deep[:, :, None]
        return self.rgb[:, :, :1] if self.is_grey else self.rgb


def read_image(path: str | os.PathLike, min_side: int = 1) -> np.ndarray:
    """Read an image file as 8-bit RGB.

    Rules: grey is replicated to three channels; a palette is expanded; alpha is dropped and the
    colour below it kept as stored (no blending); 16-bit samples keep their upper 8 bits (in PPM
    files they are scaled); CMYK and the like are converted without a colour profile; EXIF (or XMP)
    orientation is applied; of several frames the first is taken. Broken or large metadata and
    whatever follows the pixels are no obstacle; pixels that are cut short or whose checksum is
    wrong are, and so is a JPEG file without its end marker.

    Args:
        path: file to read.
        min_side: smallest height and width allowed, in pixels.

    Returns:
        [H, W, 3] uint8, C-contiguous and writable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, not an image, of an unsupported kind or smaller
            than ``min_side``.
        ImportError: Pillow is missing.
    """
    path = user_path(path)
    img = decode_image(read_bytes(path), path)
    if min(img.shape[:2]) < min_side:
        height, width = img.shape[:2]
        raise ValueError(
            f"image {path} is {width} x {height} pixels but at least {min_side} x {min_side} "
            "are needed; leave it out or use a smaller size"
        )
    return img


def decode_image(data: bytes, name: str | os.PathLike) -> np.ndarray:
    """Decode an image file's bytes to [H, W, 3] uint8; rules and errors as in :func:`read_image`.

    Args:
        data: content of the file.
        name: of the image in error messages.
    """
    with _opened(io.BytesIO(data), name) as (image, parts):
        return _to_rgb(_upright(image, parts), name)


def read_picture(path: str | os.PathLike) -> Picture:
    """Read an image file with what a copy of it may keep; rules and errors as in `read_image`."""
    path = user_path(path)
    content = read_bytes(path)
    with _opened(io.BytesIO(content), path) as (image, parts):
        frames = parts.frames if parts.pixels else _count_frames(content)
        bits = parts.bits or _bits(image)
        exif = parts.exif or image.info.get("exif") or _tiff_exif(image)
        icc_profile = parts.icc_profile or image.info.get("icc_profile")
        image = _upright(image, parts)
        alpha = _alpha(image, bits)
        rgb = _to_rgb(image, path)
        return Picture(
            rgb=rgb,
            alpha=alpha,
            is_grey=image.mode.startswith(("1", "L", "I")) and image.mode != "LAB",
            bits=16 if bits > 8 else 8,
            frames=frames,
            icc_profile=icc_profile,
            exif=containers.upright(exif) if exif else None,
            deep=np.asarray(image).astype(np.uint16) if image.mode.startswith("I") else None,
        )


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width (upright) from the file's header; rules and errors as in `read_image`."""
    path = user_path(path)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise _unreadable(path, error) from None
        image, parts = stack.enter_context(_opened(file, path, whole=False))
        width, height = image.size
        if hasattr(image, "tag_v2"):  # releases of Pillow differ in what they call a TIFF's size
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        turned = _orientation(image, parts) in _TRANSPOSED
    return (width, height) if turned else (height, width)


def write_image(path: str | os.PathLike, img: np.ndarray, compress_level: int = 6) -> None:
    """Write an image so that the file appears complete or not at all.

    Args:
        path: file to write; its suffix chooses the format; missing folders are made.
        img: [H, W], [H, W, 1] or [H, W, 3] uint8.
        compress_level: zlib level 0 to 9 of PNG files; the pixels do not depend on it.

    Raises:
        TypeError, ValueError: the array or the suffix is not supported.
        OSError: the file cannot be written (no permission, full disk).
        ImportError: Pillow is missing.
    """
    check_uint8_image(img, f"write_image: the image for {path}")
    path = user_path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use one of the suffixes {', '.join(SUFFIXES)}")
    if img.ndim == 3 and img.shape[2] not in (1, 3):
        raise ValueError(f"cannot write {path}: 1 or 3 channels are needed, got {img.shape[2]}")
    atomic_write(path, encode_image(img, path.suffix, compress_level), durable=False)


def encode_image(img: np.ndarray, suffix: str, compress_level: int = 6, **metadata: Any) -> bytes:
    """Content of the file that `write_image` writes, which checks the arguments.

    Args:
        img: also [H, W] uint16 where the format has such images.
        suffix: of the format; JPEG and WebP files are of quality 95.
        compress_level: see `write_image`.
        metadata: further arguments of Pillow's writer, such as icc_profile.
    """
    buffer = io.BytesIO()
    encode_into(buffer, img, suffix, compress_level, **metadata)
    return buffer.getvalue()


def encode_into(
    file: BinaryIO,
    img: np.ndarray,
    suffix: str,
    compress_level: int = 6,
    alpha: np.ndarray | None = None,
    **metadata: Any,
) -> None:
    """Writes what `encode_image` returns, which is then nowhere in memory as a whole.

    Args:
        alpha: [H, W] uint8, the transparency of an 8-bit image.
    """
    if img.ndim == 3 and img.shape[2] == 1:
        img = img[:, :, 0]
    pillow = import_optional("PIL.Image", "Pillow", "image files")
    kind = pillow.registered_extensions()[suffix.lower()]
    if kind == "PNG":
        metadata["compress_level"] = compress_level
    elif kind in ("JPEG", "WEBP"):
        metadata["quality"] = 95
    image = pillow.fromarray(np.ascontiguousarray(img))
    if alpha is not None:
        image.putalpha(pillow.fromarray(np.ascontiguousarray(alpha)))
    image.save(_PythonFile(file), kind, **metadata)


class _PythonFile:
    """A file without a descriptor: through one, Pillow's own code hides why it cannot write."""

    def __init__(self, file: BinaryIO) -> None:
        self.write, self.read, self.flush = file.write, file.read, file.flush
        self.seek, self.tell = file.seek, file.tell


def list_images(folder: str | os.PathLike, subfolders: bool = False) -> list[Path]:
    """Image files in ``folder``, sorted by name.

    Hidden files, hidden folders and files of other kinds (a README, a thumbnail database) are
    skipped. A picture that cannot be read is listed: reading it says why.

    Args:
        folder: to look into.
        subfolders: look into the folders in it too, behind links as well.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or holds no image.
    """
    folder = user_path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"there is no file or folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder of images is needed")
    images = images_in(folder, subfolders)
    if not images:
        files = sorted(f for f in folder.iterdir() if _is_listed(f))
        content = f"it holds {files[0].name}" if files else "it holds no files"
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"folder {folder} has no images ({content}; suffixes: {suffixes})")
    return images


def images_in(folder: Path, subfolders: bool = False) -> list[Path]:
    """As `list_images`, of a folder that exists and may hold none."""
    files = _files_below(folder, set()) if subfolders else folder.iterdir()
    return sorted(f for f in files if f.suffix.lower() in PICTURE_SUFFIXES and _is_listed(f))


def _files_below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Files in a folder and its folders; one that links lead to again is looked into once."""
    about = folder.stat()
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _files_below(entry, seen)
        else:
            yield entry


def _is_listed(file: Path) -> bool:
    # A link to nothing is no file either: reading it names it.
    return not file.name.startswith(".") and (
        file.is_file() or (file.is_symlink() and not file.exists())
    )


def mod_crop(img: np.ndarray, scale: int) -> np.ndarray:
    """View of ``img`` [H, W, ...] without the last rows and columns beyond a multiple of scale."""
    height, width = (side // scale * scale for side in img.shape[:2])
    return img[:height, :width]


def luma(img: np.ndarray) -> np.ndarray:
    """[H, W] grey levels, float64 in 0..255, of an [H, W, 3] uint8 RGB image.

    A grey pixel keeps its level: this is JPEG's full range, not that of `issp.metrics.rgb_to_y`.

    Source: ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B.
    """
    check_uint8_image(img, "luma: img")
    return img @ np.array([0.299, 0.587, 0.114])


def to_tensor(img: np.ndarray) -> torch.Tensor:
    """[H, W, C] uint8 image to [C, H, W] float32 tensor in [0, 1] (value / 255)."""
    check_uint8_image(img, "to_tensor: img")
    planes = img[None] if img.ndim == 2 else img.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C")).float().div_(255)


def to_image(tensor: torch.Tensor) -> np.ndarray:
    """[C, H, W] or [1, C, H, W] float tensor in [0, 1] to [H, W, C] uint8.

    Clamped to [0, 1], times 255, rounded half to even (docs/method.md, section 6).

    Raises:
        ValueError: another shape, or values which are not finite.
    """
    image = tensor.detach()
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3:
        raise ValueError(f"to_image: [C, H, W] or [1, C, H, W] needed, got {list(tensor.shape)}")
    image = image.float()
    if not torch.isfinite(image).all():
        raise ValueError("to_image: the image holds NaN or infinite values")
    levels = image.clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of an image file; errors as in :func:`read_image`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str | os.PathLike, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"there is no image file {path}")
    return ValueError(f"cannot read image {path}: {error.strerror}")


@contextlib.contextmanager
def _opened(
    file: BinaryIO, name: str | os.PathLike, whole: bool = True
) -> Iterator[tuple[Any, containers.Parts]]:
    """Pillow image of a file, and the file's other parts; every error becomes one sentence."""
    pillow = import_optional("PIL.Image", "Pillow", "image files")
    suffix = Path(name).suffix.lower()
    if suffix in _CAMERA_RAW:
        raise ValueError(f"image {name} is a camera's raw file; convert it to PNG or TIFF")
    if not file.read(1):
        raise ValueError(f"image {name} is empty (0 bytes); replace or remove it")
    file.seek(0)
    with contextlib.ExitStack() as stack:
        with _explained(name, _DECODE_ERRORS):
            parts = containers.take_apart(file, whole)
        file.seek(0)
        with _explained(name, (*_DECODE_ERRORS, *_PILLOW_ERRORS)):
            source = io.BytesIO(parts.pixels) if parts else file
            image = stack.enter_context(pillow.open(source))
            if whole:
                image.load()
        with _explained(name, _DECODE_ERRORS):
            yield image, parts or containers.Parts(b"")


@contextlib.contextmanager
def _explained(name: str | os.PathLike, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns errors of reading an image, and those of the given classes, into one sentence."""
    from PIL import Image

    try:
        yield
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read; replace or remove it") from None
    except Image.DecompressionBombError:
        raise ValueError(f"image {name} has too many pixels; cut it into parts first") from None
    except _Unsupported as error:
        raise ValueError(str(error)) from None
    except errors as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"image {name} is damaged or cut short ({reason}); replace it") from None


class _Unsupported(Exception):
    """A readable image of a kind which has no 8-bit RGB form."""


def _orientation(image: Any, parts: containers.Parts) -> int:
    if hasattr(image, "tag_v2"):
        return image.tag_v2.get(_TIFF_ORIENTATION, 1)
    info = image.info
    return containers.orientation(parts.exif or info.get("exif"), parts.xmp or info.get("xmp"))


def _upright(image: Any, parts: containers.Parts) -> Any:
    """The image turned as its orientation says; Pillow itself turns TIFF images."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = None if hasattr(image, "tag_v2") else turns.get(_orientation(image, parts))
    return image if turn is None else image.transpose(turn)


def _count_frames(content: bytes) -> int:
    """Number of frames or pages; 1 where those behind the first are damaged."""
    from PIL import Image

    # Counting moves through the file: the image that is read must not be the one that is counted.
    with (
        contextlib.suppress(*_DECODE_ERRORS, *_PILLOW_ERRORS),
        Image.open(io.BytesIO(content)) as image,
    ):
        return getattr(image, "n_frames", 1)
    return 1


def _bits(image: Any) -> int:
    """Bits per sample, of a format that Pillow alone knows."""
    if hasattr(image, "tag_v2"):
        return max(image.tag_v2.get(_TIFF_BITS, (8,)))
    return 16 if image.mode.startswith("I") else 8


def _tiff_exif(image: Any) -> bytes | None:
    """An EXIF block of the tags of a TIFF file that say where an image comes from."""
    if not hasattr(image, "tag_v2"):
        return None
    from PIL.Image import Exif

    kept = Exif()
    with contextlib.suppress(*_DECODE_ERRORS):
        exif = image.getexif()
        kept.update({tag: exif[tag] for tag in _TIFF_ORIGIN if tag in exif})
        for directory in _EXIF_DIRECTORIES:
            kept.get_ifd(directory).update(exif.get_ifd(directory))
        return kept.tobytes() if any((kept, *map(kept.get_ifd, _EXIF_DIRECTORIES))) else None
    return None


def _alpha(image: Any, bits: int) -> np.ndarray | None:
    """[H, W] uint8 transparency of an image whose file has so many bits per sample, if it has one.

    A file may name one colour that is transparent, as its samples are: Pillow compares it with the
    samples of the decoded image, which are those of the file only where they have 8 bits.
    """
    clear = image.info.get("transparency")
    if clear is not None and image.mode in ("L", "I", "I;16", "I;16B") and bits != 8:
        level = clear * 255 // (2**bits - 1) if image.mode == "L" else clear
        return np.where(np.asarray(image) == level, 0, 255).astype(np.uint8)
    if isinstance(clear, tuple) and bits > 8:
        image.info["transparency"] = tuple(sample >> 8 for sample in clear)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or clear is not None:
        return np.array(image.convert("RGBA"))[:, :, 3].copy()
    return None


def _to_rgb(image: Any, name: str | os.PathLike) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image)
        if image.mode == "F" or wide.min() < 0 or wide.max() > 65_535:
            raise _Unsupported(
                f"image {name} has {image.mode} samples beyond 16 bits; save it as 8-bit RGB"
            )
        grey = (wide >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "LAB":
        raise _Unsupported(f"image {name} has {image.mode} colours; save it as 8-bit RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns about the transparency
    if image.mode in ("RGBA", "LA", "PA"):
        return np.array(image.convert("RGBA"))[:, :, :3].copy()
    return np.array(image.convert("RGB"))
