"""Check sums of files of tensors: one flipped bit anywhere in a file is noticed.

torch writes a CRC-32 of each part of its archives and does not look at it. What lies around the
parts has none: a sealed archive ends with a comment that holds the CRC-32 of that. A sealed
safetensors file has the CRC-32 of all its bytes in its metadata. Files without are not refused.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from typing import BinaryIO

METADATA_KEY = "checksum"
_MARK = b"crc32:"
_ZEROS = b"0" * 8  # in the place of the digits while a sum is computed
UNSEALED = (_MARK + _ZEROS).decode()  # what the metadata holds before `seal_safetensors`
_COMMENT_LENGTH = len(UNSEALED)
_END = 22  # bytes of the record that ends an archive without a comment
_LOCAL = 30  # bytes of the record before the name of a part
_CHUNK = 1 << 20  # bytes


def seal_archive(file: BinaryIO) -> None:
    """Adds the check sum to an archive that torch has just written to an open file."""
    file.seek(-2, os.SEEK_END)  # the length of the comment
    file.write(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK + _ZEROS)
    with zipfile.ZipFile(file) as archive:
        digits = _around_parts(file, archive)
    file.seek(-len(_ZEROS), os.SEEK_END)
    file.write(digits)


def check_archive(path: str | os.PathLike) -> bool:
    """Reads an archive against the check sums of its parts, and against its own.

    Returns:
        The archive is sealed and whole. False: it is of another writer, and its parts are whole.

    Raises:
        Any error of zipfile: it differs from a check sum; 0 stands for none.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        file.seek(-_END, os.SEEK_END)
        end = file.read()
        if end[:4] == b"PK\5\6" and end[-2:] == b"\0\0":
            is_sealed = False
        elif archive.comment == _MARK + _around_parts(file, archive):
            is_sealed = True
        else:
            raise zipfile.BadZipFile("what lies around the parts differs from its check sum")
        for part in archive.infolist():
            if part.CRC:
                with archive.open(part) as content:
                    while content.read(_CHUNK):
                        pass
        return is_sealed


def _around_parts(file: BinaryIO, archive: zipfile.ZipFile) -> bytes:
    """The CRC-32, as digits, of a sealed archive without the parts and the comment."""
    total, place = 0, 0
    for part in sorted(archive.infolist(), key=lambda part: part.header_offset):
        file.seek(part.header_offset + _LOCAL - 4)
        lengths = file.read(4)  # of the name, and of what follows it
        begin = part.header_offset + _LOCAL
        begin += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        file.seek(place)
        total = zlib.crc32(file.read(max(0, begin - place)), total)
        place = begin + part.compress_size
    file.seek(place)
    return b"%08x" % zlib.crc32(file.read()[:-_COMMENT_LENGTH], total)


def seal_safetensors(content: bytes) -> bytes:
    """The content of a safetensors file whose metadata is `UNSEALED`, with the check sum in it."""
    begin = _place(content, UNSEALED)
    digits = _around_digits(content, begin)
    return b"".join((memoryview(content)[:begin], digits, memoryview(content)[begin + 8 :]))


def check_safetensors(content: bytes, metadata: dict[str, str]) -> None:
    """Compares the content of a safetensors file with the check sum in its metadata, if any.

    Raises:
        ValueError: they differ.
    """
    for key, value in metadata.items():
        if key == METADATA_KEY or value.startswith(_MARK.decode()):  # either may be damaged
            begin = _place(content, value)
            if _MARK + _around_digits(content, begin) != value.encode():
                raise ValueError("the content differs from its check sum")


def _place(content: bytes, value: str) -> int:
    """Where the digits stand. Quotes inside of other texts are escaped."""
    return content.index(b'":%s' % json.dumps(value).encode()) + 3 + len(_MARK)


def _around_digits(content: bytes, begin: int) -> bytes:
    view = memoryview(content)
    total = zlib.crc32(_ZEROS, zlib.crc32(view[:begin]))
    return b"%08x" % zlib.crc32(view[begin + len(_ZEROS) :], total)
