"""Pictures as files: every format keeps what it can, and what it cannot is named."""

import struct
import zlib

import numpy as np
import pytest

from issp import data
from issp.sr.data import pictures

Image = pytest.importorskip("PIL.Image", reason="pictures are read and written by Pillow")

DATE = 0x0132
PROFILE = bytes(16) + b"RGB " + bytes(16) + b"acsp" + bytes(90)


def exif_block():
    exif = Image.Exif()
    exif[DATE] = "2020:01:02 03:04:05"
    return exif.tobytes()


def picture(**changes):
    rng = np.random.default_rng(0)
    about = {
        "rgb": rng.integers(0, 256, (9, 11, 3), dtype=np.uint8),
        "alpha": None,
        "is_grey": False,
        "bits": 8,
        "frames": 1,
        "icc_profile": PROFILE,
        "exif": exif_block(),
    }
    return data.Picture(**{**about, **changes})


@pytest.mark.parametrize("suffix", pictures.WRITABLE)
def test_a_format_keeps_what_it_can(tmp_path, suffix):
    alpha = np.random.default_rng(1).integers(0, 256, (9, 11), dtype=np.uint8)
    path, given = tmp_path / f"a{suffix}", picture(alpha=alpha)
    lost = pictures.write_picture(path, given)
    got = data.read_picture(path)
    about = {"transparency": got.alpha, "colour profile": got.icc_profile, "EXIF": got.exif}
    for part, value in about.items():
        named = any(line.startswith(part) for line in lost)
        assert named is (value is None), f"{part}: {lost}"
    assert got.rgb.shape == (9, 11, 3) and not got.is_grey
    if suffix in (".png", ".tif", ".tiff"):
        assert not lost and np.array_equal(got.rgb, given.rgb)
        assert np.array_equal(got.alpha, alpha)
    if got.exif:
        exif = Image.Exif()
        exif.load(got.exif)
        assert exif[DATE] == "2020:01:02 03:04:05"
    assert got.icc_profile in (None, PROFILE)


@pytest.mark.parametrize("suffix", pictures.WRITABLE)
def test_grey_of_8_and_16_bits(tmp_path, suffix):
    deep = np.random.default_rng(1).integers(0, 65536, (9, 11), dtype=np.uint16)
    rgb = np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    path = tmp_path / f"a{suffix}"
    plain = {"icc_profile": None, "exif": None, "is_grey": True}
    assert pictures.write_picture(path, picture(rgb=rgb, **plain)) == []
    got = data.read_picture(path)
    assert got.is_grey or suffix == ".webp", "WebP stores grey as colours"
    if suffix not in (".webp", ".jpg", ".jpeg"):
        assert np.array_equal(got.rgb, rgb)
    lost = pictures.write_picture(path, picture(rgb=rgb, deep=deep, bits=16, **plain))
    got = data.read_picture(path)
    if suffix in (".png", ".tif", ".tiff"):
        assert not lost and np.array_equal(got.deep, deep) and np.array_equal(got.rgb, rgb)
    else:
        assert got.deep is None and lost[0].startswith("16 bits (")


def test_opaque_transparency_is_not_missed(tmp_path):
    opaque = np.full((9, 11), 255, np.uint8)
    assert pictures.write_picture(tmp_path / "a.jpg", picture(alpha=opaque)) == []


@pytest.mark.parametrize("exif", [b"Exif\0\0not a header", b"Exif\0\0II*", b"Exif\0\0" + bytes(9)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_a_damaged_exif_block_is_left_out(tmp_path, suffix, exif):
    path = tmp_path / f"a{suffix}"
    assert pictures.write_picture(path, picture(exif=exif)) == ["EXIF (it is damaged or too long)"]
    assert data.read_picture(path).rgb.shape == (9, 11, 3)


def test_exif_too_long_for_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "d" * 70_000
    long = picture(exif=exif.tobytes())
    assert pictures.write_picture(tmp_path / "a.jpg", long)[0].startswith("EXIF")
    assert pictures.write_picture(tmp_path / "a.png", long) == []


@pytest.mark.parametrize("name, size", [("a.jpg", 65_501), ("a.webp", 16_384)])
def test_more_pixels_than_a_format_holds(name, size):
    pictures.check_writable(name, 5, size - 1)
    with pytest.raises(ValueError, match=f"at most {size - 1} pixels a side"):
        pictures.check_writable(name, size, 5)
    with pytest.raises(ValueError, match="use one of the suffixes"):
        pictures.check_writable("a.gif", 5, 5)


def png(samples, bits, clear):
    """A PNG file of [H, W, 1] or [H, W, 3] samples, of which those of one colour are transparent.

    The chunks are written by hand: Pillow writes no such files of other depths than 8 bits.
    """
    height, width, colours = samples.shape
    ones = (samples.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
    lines = [b"\0" + np.packbits(line.ravel()).tobytes() for line in ones.astype(np.uint8)]
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if colours == 3 else 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": struct.pack(f">{colours}H", *clear)}
    chunks |= {b"IDAT": zlib.compress(b"".join(lines)), b"IEND": b""}
    parts = [
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("bits", "colours"), [(b, 1) for b in (1, 2, 4, 8, 16)] + [(8, 3), (16, 3)]
)
def test_one_transparent_colour_of_any_depth(tmp_path, bits, colours):
    samples = np.random.default_rng(bits).integers(0, 2**bits, (9, 11, colours))
    samples[3:5, 2:7] = samples[0, 0]
    (tmp_path / "a.png").write_bytes(png(samples, bits, samples[0, 0]))
    clear = (samples == samples[0, 0]).all(axis=2)
    got = data.read_picture(tmp_path / "a.png")
    assert np.array_equal(got.alpha, np.where(clear, 0, 255))
    levels = samples >> 8 if bits == 16 else samples * 255 // (2**bits - 1)
    assert np.array_equal(got.rgb, np.broadcast_to(levels, (9, 11, 3)))
    lost = pictures.write_picture(tmp_path / "b.png", got)
    assert ("16 bits (beside transparency 8 are written)" in lost) is (bits == 16 and colours == 1)
    again = data.read_picture(tmp_path / "b.png")
    assert np.array_equal(again.alpha, got.alpha) and np.array_equal(again.rgb, got.rgb)


def test_a_format_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.gif: use one of the suffixes .png, .tif"):
        pictures.write_picture(tmp_path / "a.gif", picture())
    assert not list(tmp_path.iterdir())
