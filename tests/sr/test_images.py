"""What is around the pixels: metadata, orientation, stray files, kinds of pictures."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from issp import data
from tests.tiers import quick_or_full

TURNS = {  # what the values of the orientation tag mean, by TIFF 6.0
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.fixture(scope="module")
def picture():
    """[24, 40, 3]: blocks of 8 pixels with another colour in every corner."""
    blocks = np.full((3, 5, 3), 128, np.uint8)
    blocks[0, 0], blocks[0, 4], blocks[2, 0] = (250, 0, 0), (0, 240, 10), (20, 0, 230)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))


def encoded(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_chunk(png, *chunks):
    """The file with chunks behind its header, which ends at byte 33."""
    return png[:33] + b"".join(chunks) + png[33:]


def with_segment(jpeg, marker, content):
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + jpeg[2:]


EXIF_BLOCKS = {
    "text": b"Exif\0\0certainly not TIFF",
    "cut header": b"Exif\0\0MM\0*",
    "zeros": b"Exif\0\0" + bytes(20),
    "offset beyond the end": b"Exif\0\0MM\0*\0\0\xff\xff",
    "offset into itself": b"Exif\0\0II*\0\0\0\0\0",
    "endless directory": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40,
    "orientation 99": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0",
    "orientation as text": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0six\0\0\0\0\0",
    "nothing": b"Exif\0\0",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", EXIF_BLOCKS)
def test_broken_exif_is_no_obstacle(tmp_path, picture, kind, block):
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(encoded(picture, kind, **options))
    plain = data.read_image(path)
    path.write_bytes(encoded(picture, kind, exif=EXIF_BLOCKS[block], **options))
    assert np.array_equal(data.read_image(path), plain)
    assert data.image_size(path) == (24, 40)


def large_text():
    text = PngImagePlugin.PngInfo()
    for i in range(70):  # more than Pillow takes, of one text and of all together
        text.add_text(f"workflow {i}", "node " * 300_000, zip=True)
    return text


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: with_chunk(png, png_chunk(b"tEXt", b"author\0me", checksum=1)),
        lambda png: with_chunk(png, png_chunk(b"iCCP", b"profile\0\0no zlib stream")),
        lambda png: with_chunk(png, png_chunk(b"iCCP", b"")),
        lambda png: with_chunk(png, png_chunk(b"zTXt", b"Raw profile type exif\0\0rubbish")),
        lambda png: with_chunk(png, png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\nno digits")),
        lambda png: with_chunk(png, png_chunk(b"pHYs", b"\0")),
        lambda png: with_chunk(png, png_chunk(b"gAMA", b"")),
        lambda png: with_chunk(png, png_chunk(b"acTL", b"\0\0\0\2\0\0\0\0")),
        lambda png: with_chunk(png, png_chunk(b"prVt", b"private", checksum=7)),
        lambda png: png[:-12],  # no IEND
        lambda png: png[:-12] + b"\0\0\xff\xfftEXtcut in a text behind the pixels",
        lambda png: png + b"trailing bytes" * 99,
    ],
    ids=lambda value: "case",
)
def test_what_is_around_the_pixels_of_a_png_is_no_obstacle(tmp_path, picture, damage):
    (tmp_path / "a.png").write_bytes(damage(encoded(picture, "PNG")))
    assert np.array_equal(data.read_image(tmp_path / "a.png"), picture)
    assert data.image_size(tmp_path / "a.png") == (24, 40)


def test_large_text_is_no_obstacle(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(encoded(picture, "PNG", pnginfo=large_text()))
    assert np.array_equal(data.read_image(tmp_path / "a.png"), picture)
    assert data.image_size(tmp_path / "a.png") == (24, 40)


@pytest.mark.parametrize(
    "damage",
    [
        lambda jpeg: with_segment(jpeg, 0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\xff\xff\xff\xff"),
        lambda jpeg: with_segment(jpeg, 0xE2, b"ICC_PROFILE\0\1\2half of a profile"),
        lambda jpeg: with_segment(jpeg, 0xE2, b"ICC_PROFILE\0"),
        lambda jpeg: with_segment(jpeg, 0xE2, b"MPF\0II*\0\xff\0\0\0broken index"),
        lambda jpeg: with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
        lambda jpeg: with_segment(jpeg, 0xFE, bytes(range(256)) * 200),
        lambda jpeg: jpeg + b"the video of a motion photo" * 99,
    ],
    ids=lambda value: "case",
)
def test_what_is_around_the_pixels_of_a_jpeg_is_no_obstacle(tmp_path, picture, damage):
    plain = encoded(picture, "JPEG", progressive=True)
    (tmp_path / "plain.jpg").write_bytes(plain)
    (tmp_path / "a.jpg").write_bytes(damage(plain))
    read = data.read_image(tmp_path / "a.jpg")
    assert np.array_equal(read, data.read_image(tmp_path / "plain.jpg"))
    assert data.image_size(tmp_path / "a.jpg") == (24, 40)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_around_the_pixels_of_a_webp_is_no_obstacle(tmp_path, picture, lossless, count):
    frames = [Image.fromarray(np.roll(picture, i, axis=0)) for i in range(count)]
    options = {"lossless": lossless, "save_all": count > 1, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x010F] = "camera " * 50
    plain, full = io.BytesIO(), io.BytesIO()
    frames[0].save(plain, "WEBP", **options)
    frames[0].save(full, "WEBP", exif=exif, icc_profile=b"no profile" * 30, **options)
    (tmp_path / "plain.webp").write_bytes(plain.getvalue())
    wanted = data.read_image(tmp_path / "plain.webp")
    assert not lossless or np.array_equal(wanted, picture)
    cut = full.getvalue()[:-100]  # within the EXIF block, which is the last part
    for content in (full.getvalue(), cut, full.getvalue() + b"trailing"):
        (tmp_path / "a.webp").write_bytes(content)
        read = data.read_picture(tmp_path / "a.webp")
        assert np.array_equal(read.rgb, wanted) and read.frames == count
        assert read.icc_profile == b"no profile" * 30
        assert data.image_size(tmp_path / "a.webp") == (24, 40)


def test_a_flipped_bit_in_the_pixels_of_a_png_is_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    png = encoded(noise, "PNG", compress_level=0)
    for position in range(100, len(png) - 20, 97):
        damaged = bytearray(png)
        damaged[position] ^= 4
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(ValueError, match="a.png is damaged .*checksum"):
            data.read_image(tmp_path / "a.png")


FORMATS = [
    ("PNG", "png", {}),
    ("JPEG", "jpg", {"quality": 100, "subsampling": 0}),
    ("WEBP", "webp", {"lossless": True}),
    ("TIFF", "tif", {}),
    ("TIFF", "tif", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize("kind,suffix,options", FORMATS)
@pytest.mark.parametrize("value", TURNS)
def test_orientation(tmp_path, picture, kind, suffix, options, value):
    exif = Image.Exif()
    exif[0x0112] = value
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(picture, kind, exif=exif, **options))
    wanted = TURNS[value](picture)
    assert data.image_size(path) == wanted.shape[:2]
    read = data.read_picture(path)
    assert read.rgb.shape == wanted.shape
    assert np.abs(read.rgb.astype(int) - wanted).max() <= 3  # JPEG's rounding
    assert np.array_equal(read.rgb, data.read_image(path))
    if read.exif:  # a copy with this block is not turned a second time
        copied = Image.Exif()
        copied.load(read.exif)
        assert copied[0x0112] == 1


def test_orientation_that_other_programs_write(tmp_path, picture):
    block = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    png = encoded(picture, "PNG")
    jpeg = encoded(picture, "JPEG", quality=100, subsampling=0)
    raw = b"\nexif\n      38\n" + block.hex().encode()
    files = {
        "behind_the_pixels.png": png[:-12] + png_chunk(b"eXIf", block[6:]) + png[-12:],
        "written_twice.jpg": with_segment(jpeg, 0xE1, b"Exif\0\0" + block),
        "imagemagick.png": with_chunk(png, png_chunk(b"tEXt", b"Raw profile type exif\0" + raw)),
        "imagemagick_packed.png": with_chunk(
            png, png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))
        ),
        "xmp.png": with_chunk(png, png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        "xmp.jpg": with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert data.image_size(tmp_path / name) == (40, 24), name
        read = data.read_image(tmp_path / name).astype(int)
        assert np.abs(read - TURNS[6](picture)).max() <= 3, name


def test_a_pair_is_measured_as_it_is_read(tmp_path, picture):
    """The check of sizes by header and the loaded images agree for a turned TIFF."""
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "a.tif").write_bytes(encoded(picture, "TIFF", exif=exif))
    pairs = data.PairedFolder(tmp_path, 2, cache_dir=False)
    assert pairs.sizes() == [pairs.load(0)[1].shape[:2]] == [(40, 24)]


def test_stray_files_are_ignored(tmp_path, picture):
    for name in (".DS_Store", "Thumbs.db", "readme.txt", "._a.png", "desktop.ini", "list.json"):
        (tmp_path / name).write_bytes(b"no picture")
    for folder in ("x.png", "@eaDir", "__MACOSX"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.png").write_bytes(encoded(picture, "PNG"))
    assert [file.name for file in data.list_images(tmp_path)] == ["a.png"]


@pytest.mark.parametrize(
    "name,sentence",
    [
        ("photo.heic", "photo.heic is not an image that can be read"),
        ("photo.DNG", "photo.DNG is a camera's raw file; convert it"),
        ("gone.png", "there is no image file .*gone.png"),
        ("html.jpg", "html.jpg is not an image that can be read"),
    ],
)
def test_pictures_that_cannot_be_read_are_named(tmp_path, picture, name, sentence):
    (tmp_path / "a.png").write_bytes(encoded(picture, "PNG"))
    if name == "gone.png":
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    elif name == "photo.DNG":  # TIFF with a small preview in the place of the picture
        (tmp_path / name).write_bytes(encoded(picture, "TIFF"))
    else:
        (tmp_path / name).write_bytes(b"<html> no picture")
    pairs = data.PairedFolder(tmp_path, 2, cache_dir=False)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        pairs.sizes()


def test_kinds_of_pictures(tmp_path, picture):
    grey = picture[:, :, 0]
    as_rgb = np.repeat(grey[:, :, None], 3, axis=2)
    bits = (grey > 100).astype(np.uint8) * 255
    Image.fromarray(grey.astype(np.uint16) * 256 + 99).save(tmp_path / "grey16.tif")
    Image.fromarray(grey.astype(np.uint16) * 256 + 99).save(tmp_path / "grey16.png")
    Image.fromarray(bits).convert("1").save(tmp_path / "bit.png")
    Image.fromarray(bits).convert("1").save(tmp_path / "bit.tif", compression="group4")
    Image.fromarray(255 - picture).convert("CMYK").save(tmp_path / "cmyk.tif")
    frames = [Image.fromarray(frame) for frame in (picture, 255 - picture)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    for name, wanted, is_grey, depth, count in (
        ("grey16.tif", as_rgb, True, 16, 1),
        ("grey16.png", as_rgb, True, 16, 1),
        ("bit.png", np.repeat(bits[:, :, None], 3, axis=2), True, 8, 1),
        ("bit.tif", np.repeat(bits[:, :, None], 3, axis=2), True, 8, 1),
        ("cmyk.tif", 255 - picture, False, 8, 1),
        ("moving.png", picture, False, 8, 2),
        ("pages.tif", picture, False, 8, 2),
    ):
        read = data.read_picture(tmp_path / name)
        assert np.array_equal(read.rgb, wanted), name
        assert (read.is_grey, read.bits, read.frames) == (is_grey, depth, count), name
        assert read.alpha is None
    (tmp_path / "none.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none.png is empty \(0 bytes\); replace or remove it"):
        data.read_image(tmp_path / "none.png")
    Image.fromarray(picture).convert("LAB").save(tmp_path / "lab.tif")
    with pytest.raises(ValueError, match=r"lab.tif has LAB colours; save it as 8-bit RGB"):
        data.read_image(tmp_path / "lab.tif")


def test_what_a_copy_may_keep(tmp_path, picture):
    alpha = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40).astype(np.uint8)
    profile = bytes(range(256)) * 300  # too long for one segment of a JPEG
    Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / "a.png", icc_profile=profile)
    read = data.read_picture(tmp_path / "a.png")
    assert np.array_equal(read.alpha, alpha) and np.array_equal(read.rgb, picture)
    assert read.icc_profile == profile and read.exif is None
    Image.fromarray(picture).quantize(4).save(tmp_path / "p.png", transparency=0)
    assert sorted(np.unique(data.read_picture(tmp_path / "p.png").alpha)) == [0, 255]
    exif = Image.Exif()
    exif[0x9003] = exif[0x0132] = "2026:11:30 05:00:00"
    Image.fromarray(picture).save(tmp_path / "a.jpg", icc_profile=profile, exif=exif)
    read = data.read_picture(tmp_path / "a.jpg")
    assert read.icc_profile == profile and b"2026:11:30 05:00:00" in read.exif


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_are_read_or_refused(tmp_path):
    """Bytes that are changed, cut off or replaced anywhere; nothing but ValueError comes of it."""
    rng = random.Random(0)
    noise = np.random.default_rng(0).integers(0, 256, (24, 28, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    files = {
        "a.png": encoded(noise, "PNG", exif=exif),
        "p.png": encoded(noise[:, :, 0], "PNG", bits=4),
        "a.jpg": encoded(noise, "JPEG", exif=exif),
        "p.jpg": encoded(noise, "JPEG", progressive=True, comment=b"text"),
        "a.webp": encoded(noise, "WEBP", exif=exif),
        "a.tif": encoded(noise, "TIFF", exif=exif),
        "a.bmp": encoded(noise, "BMP"),
        "a.gif": encoded(noise[:, :, 0], "GIF"),
        "a.ppm": encoded(noise, "PPM"),
    }
    read = refused = 0
    for _ in range(quick_or_full(250, 3000)):
        name = rng.choice(list(files))
        content = bytearray(files[name])
        start = rng.randrange(min(len(content), rng.choice([64, 200, len(content)])))
        match rng.randrange(3):
            case 0:
                del content[start:]
            case 1:
                content[start] = rng.randrange(256)
            case 2:
                content[start : start + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        (tmp_path / name).write_bytes(content)
        for function in (data.read_image, data.image_size, data.read_picture):
            try:
                function(tmp_path / name)
                read += 1
            except ValueError as error:
                assert name in str(error) and "\n" not in str(error)
                refused += 1
    assert read > 50 and refused > 50


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 5)])
def test_to_image_takes_one_image(shape):
    with pytest.raises(ValueError, match=r"\[C, H, W\] or \[1, C, H, W\] needed, got "):
        data.to_image(torch.zeros(shape))


def test_pairs_of_arrays_need_colour_images():
    with pytest.raises(ValueError, match="images is empty: pass at least one"):
        data.PairedArrays({}, 2)
    with pytest.raises(ValueError, match=r"image a must be \[H, W, 3\], got \[8, 9\]"):
        data.PairedArrays({"a": np.zeros((8, 9), np.uint8)}, 2)


def test_imresize_knows_two_borders():
    with pytest.raises(ValueError, match="must be one of symmetric, replicate, got 'zeros'"):
        data.imresize(np.zeros((8, 9), np.uint8), 2, border="zeros")
