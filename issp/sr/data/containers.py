"""Image files taken apart: what the pixels need, and what is said about them.

Pillow parses texts, EXIF blocks, colour profiles and indices of further frames when it opens a
file, and refuses the file where one of them is broken or large. The pixels of a PNG, JPEG or WebP
file need few of its parts, so the others are left out before it is decoded.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_JPEG = b"\xff\xd8"
_JPEG_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)  # all APPn but JFIF's and Adobe's, and comments
_JPEG_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
_XMP_IN_JPEG, _ICC_IN_JPEG = b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0x2C  # colour profile, EXIF, XMP; Google's WebP container specification
_MOST_INFLATED = 16 << 20  # bytes of one compressed piece of metadata
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Parts:
    """An image file taken apart.

    Attributes:
        pixels: a file of the same format that decodes to the same pixels, without metadata.
        exif, xmp: EXIF block (with or without "Exif\\0\\0") and XMP packet.
        icc_profile: the embedded colour profile.
        bits: per sample; 0: the format's parts are not known here.
        frames: of an animation.
    """

    pixels: bytes
    exif: bytes | None = None
    xmp: bytes | None = None
    icc_profile: bytes | None = None
    bits: int = 0
    frames: int = 1


def take_apart(file: BinaryIO, whole: bool = True) -> Parts | None:
    """Separates the pixels of a PNG, JPEG or WebP file from its metadata.

    Args:
        file: at its beginning.
        whole: False: of a PNG or JPEG file `pixels` holds what comes before the image data, enough
            for the size.

    Returns:
        The parts, or None: another format, or one whose parts do not follow one another.

    Raises:
        ValueError: the checksum of a part that the pixels need is wrong.
    """
    start = file.read(len(_PNG))
    if start == _PNG:
        return _png(file, whole)
    if start.startswith(_JPEG):
        file.seek(len(_JPEG))
        return _jpeg(file, whole)
    if start.startswith(b"RIFF"):
        return _webp(file)
    return None


def _png(file: BinaryIO, whole: bool) -> Parts:
    kept, about = [_PNG], dict[bytes, bytes]()
    for kind, length in _png_chunks(file):
        if kind == b"IDAT" and not whole:
            file.seek(length + 4, 1)
        elif kind in _PNG_PIXELS:
            content, checksum = file.read(length), file.read(4)
            if len(checksum) == 4 and _number(checksum) != _png_checksum(kind, content):
                raise ValueError(f"the checksum of its {kind.decode()} part is wrong")
            kept.append(_png_chunk(kind, content))
        elif kind in (b"eXIf", b"iCCP", b"acTL", b"tEXt", b"zTXt", b"iTXt"):
            about.update(_png_metadata(kind, file.read(length)))
            file.seek(4, 1)
        else:
            file.seek(length + 4, 1)
    if not whole:
        kept.append(_png_chunk(b"IDAT", b""))
    return Parts(
        b"".join((*kept, _png_chunk(b"IEND", b""))),
        exif=about.get(b"exif"),
        xmp=about.get(b"xmp"),
        icc_profile=about.get(b"icc"),
        bits=kept[1][16] if len(kept) > 1 and len(kept[1]) > 16 else 0,
        frames=max(1, _number(about.get(b"frames", b""))),
    )


def _number(content: bytes) -> int:
    return int.from_bytes(content, "big")


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of every chunk before IEND; the caller moves past the content."""
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        yield kind, length


def _png_checksum(kind: bytes, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(kind))


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = _png_checksum(kind, content)
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", checksum)


def _png_metadata(kind: bytes, content: bytes) -> dict[bytes, bytes]:
    """What a chunk says about the image; nothing if it is broken or about something else."""
    if kind == b"eXIf":
        return {b"exif": content}
    if kind == b"acTL":
        return {b"frames": content[:4]}
    name, _, text = content.partition(b"\0")
    if kind == b"iCCP":
        profile = _inflate(text[1:])
        return {b"icc": profile} if profile else {}
    # ImageMagick writes EXIF in hexadecimal digits into a text.
    names = {b"XML:com.adobe.xmp": b"xmp", b"Raw profile type exif": b"exif"}
    if name not in names:
        return {}
    if kind == b"iTXt":
        compressed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
        text = _inflate(text) if compressed else text
    elif kind == b"zTXt":
        text = _inflate(text[1:])
    if names[name] == b"exif":
        with contextlib.suppress(ValueError):
            return {b"exif": bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))}
        return {}
    return {b"xmp": text}


def _inflate(content: bytes) -> bytes:
    """Content of a zlib stream, none if it is broken or too long."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(content, _MOST_INFLATED)
    except zlib.error:
        return b""
    return text if stream.eof else b""


def _jpeg(file: BinaryIO, whole: bool) -> Parts | None:
    kept, exif, xmp = [_JPEG], None, None
    profile: dict[int, bytes] = {}
    for marker, content in _jpeg_segments(file):
        if marker not in _JPEG_METADATA:
            kept.append(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content)
        elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif = exif or content
        elif marker == 0xE1 and content.startswith(_XMP_IN_JPEG):
            xmp = xmp or content.removeprefix(_XMP_IN_JPEG)
        elif marker == 0xE2 and content.startswith(_ICC_IN_JPEG) and len(content) > 14:
            profile[content[12]] = content[14:]
        if marker == _JPEG_SCAN:
            kept.append(file.read() if whole else b"")
            icc = b"".join(profile[i] for i in sorted(profile))
            return Parts(b"".join(kept), exif, xmp, icc or None, bits=8)
    return None


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Marker and content of the segments; ends at a broken one."""
    while byte := file.read(1):
        if byte != b"\xff":
            continue  # junk between segments
        while byte == b"\xff":  # any number of them before a marker
            byte = file.read(1)
        marker = byte[0] if byte else 0
        if marker == 0 or marker in _JPEG_STANDALONE:
            continue
        length = _number(file.read(2))
        content = file.read(max(0, length - 2))
        if marker == _JPEG_END or length < 2 or len(content) < length - 2:
            return
        yield marker, content


def _webp(file: BinaryIO) -> Parts | None:
    if file.read(4) != b"WEBP":
        return None
    kept, about, frames = [], dict[bytes, bytes](), 0
    while len(head := file.read(8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        content = file.read(length)
        file.read(length % 2)
        if kind not in _WEBP_PIXELS:
            about.setdefault(kind, content)
            continue
        if len(content) < length:
            return None
        if kind == b"VP8X":
            content = bytes((content[0] & ~_WEBP_METADATA_FLAGS,)) + content[1:]
        frames += kind == b"ANMF"
        kept.append(struct.pack("<4sI", kind, length) + content + bytes(length % 2))
    body = b"".join((b"WEBP", *kept))
    return Parts(
        struct.pack("<4sI", b"RIFF", len(body)) + body,
        exif=about.get(b"EXIF"),
        xmp=about.get(b"XMP "),
        icc_profile=about.get(b"ICCP"),
        bits=8,
        frames=max(1, frames),
    )


def orientation(exif: bytes | None, xmp: bytes | None = None) -> int:
    """Orientation 1 to 8 that EXIF, or else XMP, gives; 1 where they do not or are broken."""
    if exif:
        place = _find_orientation(exif)
        if place is not None:
            start, order = place
            return int.from_bytes(exif[start : start + 2], order)
    found = _XMP_ORIENTATION.search(xmp) if xmp else None
    return int(found[1]) if found else 1


def upright(exif: bytes) -> bytes:
    """The EXIF block of pixels that have been turned: its orientation, where it has one, is 1."""
    place = _find_orientation(exif)
    if place is None:
        return exif
    start, order = place
    return exif[:start] + (1).to_bytes(2, order) + exif[start + 2 :]


def _find_orientation(exif: bytes) -> tuple[int, Literal["little", "big"]] | None:
    """Where the orientation's two bytes stand in an EXIF block, and their order.

    Source: TIFF 6.0, section 2: header, directory of 12-byte entries.
    """
    base = 0
    while exif.startswith(b"Exif\0\0", base):  # some programs write it twice
        base += 6
    if exif[base : base + 2] not in (b"II", b"MM"):
        return None
    order: Literal["little", "big"] = "little" if exif[base] == ord("I") else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], order)

    directory = base + number(base + 4, 4)
    for i in range(number(directory, 2)):
        entry = directory + 2 + 12 * i
        if entry + 12 > len(exif):
            return None
        if number(entry, 2) == _ORIENTATION and number(entry + 2, 2) == 3:  # a short
            return (entry + 8, order) if 1 <= number(entry + 8, 2) <= 8 else None
    return None
