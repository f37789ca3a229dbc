"""Reading, writing and listing image files; conversion between uint8 images and tensors."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from issp.sr.data.resize import check_uint8_image
from issp.utils.errors import import_optional
from issp.utils.files import atomic_write

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image(path: str | os.PathLike, min_side: int = 1) -> np.ndarray:
    """Read an image file as 8-bit RGB.

    Rules: grey is replicated to three channels; a palette is expanded; alpha is dropped and the
    colour below it kept as stored (no blending); 16-bit samples keep their upper 8 bits; CMYK and
    the like are converted; EXIF orientation is applied; of several frames the first is taken.

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
    with _opened(data, name) as image:
        from PIL import ImageOps

        return _to_rgb(ImageOps.exif_transpose(image), name)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width in pixels from the file's header; rules and errors as in `read_image`."""
    # Opened by name, not read into memory: the header needs one small read.
    with _opened(None, path) as image:
        width, height = image.size
        transposed = image.getexif().get(0x0112) in _TRANSPOSED
    return (width, height) if transposed else (height, width)


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
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use one of the suffixes {', '.join(SUFFIXES)}")
    if img.ndim == 3 and img.shape[2] not in (1, 3):
        raise ValueError(f"cannot write {path}: 1 or 3 channels are needed, got {img.shape[2]}")
    if img.ndim == 3 and img.shape[2] == 1:
        img = img[:, :, 0]
    pillow = import_optional("PIL.Image", "Pillow", "image files")
    kind = pillow.registered_extensions()[suffix]
    options = {"PNG": {"compress_level": compress_level}, "JPEG": {"quality": 95}}.get(kind, {})
    buffer = io.BytesIO()
    pillow.fromarray(np.ascontiguousarray(img)).save(buffer, kind, **options)
    atomic_write(path, buffer.getvalue(), durable=False)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Image files directly in ``folder``, sorted by name.

    Hidden files and files of other kinds (a README, a thumbnail database) are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or holds no image.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"there is no file or folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder of images is needed")
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not images:
        content = f"it holds {files[0].name}" if files else "it holds no files"
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"folder {folder} has no images ({content}; suffixes: {suffixes})")
    return images


def mod_crop(img: np.ndarray, scale: int) -> np.ndarray:
    """View of ``img`` [H, W, ...] without the last rows and columns beyond a multiple of scale."""
    height, width = (side // scale * scale for side in img.shape[:2])
    return img[:height, :width]


def to_tensor(img: np.ndarray) -> torch.Tensor:
    """[H, W, C] uint8 image to [C, H, W] float32 tensor in [0, 1] (value / 255)."""
    check_uint8_image(img, "to_tensor: img")
    planes = img[None] if img.ndim == 2 else img.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C")).div(255)


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
    except FileNotFoundError:
        raise _absent(path) from None
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror}") from None


@contextlib.contextmanager
def _opened(data: bytes | None, name: str | os.PathLike) -> Iterator:
    """Pillow image of ``data``, or of the file ``name``; every error becomes one sentence."""
    pillow = import_optional("PIL.Image", "Pillow", "image files")
    try:
        size = len(data) if data is not None else os.stat(name).st_size
    except FileNotFoundError:
        raise _absent(name) from None
    if size == 0:
        raise ValueError(f"image {name} is empty (0 bytes); replace or remove it")
    try:
        with pillow.open(io.BytesIO(data) if data is not None else name) as image:
            yield image
    except pillow.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read; replace or remove it") from None
    except pillow.DecompressionBombError:
        raise ValueError(f"image {name} has too many pixels; cut it into parts first") from None
    except _Unsupported as error:
        raise ValueError(str(error)) from None
    except _DECODE_ERRORS as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"image {name} is damaged or cut short ({reason}); replace it") from None


def _absent(path: str | os.PathLike) -> FileNotFoundError:
    return FileNotFoundError(f"there is no image file {path}")


class _Unsupported(Exception):
    """A readable image of a kind which has no 8-bit RGB form."""


def _to_rgb(image, name: str | os.PathLike) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image)
        if image.mode == "F" or wide.min() < 0 or wide.max() > 65_535:
            raise _Unsupported(
                f"image {name} has {image.mode} samples beyond 16 bits; save it as 8-bit RGB"
            )
        grey = (wide >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns about the transparency
    if image.mode in ("RGBA", "LA"):
        return np.array(image.convert("RGBA"))[:, :, :3].copy()
    return np.array(image.convert("RGB"))
