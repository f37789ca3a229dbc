"""What a file is, by its first bytes: a sentence for what was given as a model and is none."""

from __future__ import annotations

import codecs
import os
import zipfile
from pathlib import Path

# First bytes -> what such a file is. ONNX and TorchScript have no first bytes of their own.
_SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"RIFF": "a WebP image, or another RIFF file",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
    b"SQLite": "a database",
    b"MATLAB": "a MATLAB file",
    b"\xff\xfe": "a text file",
}
_LFS = b"version https://git-lfs"
_ONNX_VERSIONS = [bytes([version]) for version in range(3, 32)]
_ONNX_FIELDS = (b"\x12", b"\x1a", b"\x3a")  # producer, its version, graph


def is_safetensors(path: str | os.PathLike) -> bool:
    """The file begins as safetensors do: the length of a JSON object in 8 bytes, and its brace."""
    return _head(path)[7:9] == b"\0{"


def is_zip(path: str | os.PathLike) -> bool:
    """The file begins as an archive, which files of `torch.save` are."""
    return _head(path).startswith(b"PK")


def why_no_model(path: str | os.PathLike) -> str | None:
    """What the file is, as the rest of a sentence, if it is surely no model file; else None.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        return f"is a folder: name a file in it{_model_inside(path)}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    head = _head(path)
    if not head:
        return "is damaged or cut short, it is empty: copy it again, or use another file"
    if head.startswith(b"PK"):
        return _why_no_torch_archive(path)
    if is_safetensors(path):
        return None
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return f"is {kind}, not a model file" if ":" not in kind else f"is {kind}"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    if _is_onnx(head, path):
        return "is an ONNX model, which cannot be read: give the weights it was exported from"
    return _why_text(head)


def _head(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024)


def _model_inside(folder: Path) -> str:
    """The model that was most likely meant, of a run or of any folder."""
    files = sorted([*folder.glob("models/net_g_latest.*"), *folder.glob("*.safetensors")])
    return f", such as {files[0]}" if files else ""


def _why_no_torch_archive(path: Path) -> str | None:
    """As `why_no_model` for an archive; None too if its list of contents is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            paths = archive.namelist()
    except Exception:  # damaged bytes surface as any kind of error in zipfile
        return None
    names = {name.rpartition("/")[2] for name in paths}
    inner = [name for name in paths if name.endswith((".pth", ".pt", ".safetensors"))]
    if "constants.pkl" in names:
        return (
            "is a TorchScript archive, whose code is not run: save its weights with "
            "torch.save(torch.jit.load(file).state_dict(), new_file)"
        )
    if names & {"archive_format", "serialized_exported_program.json", "archive_version"}:
        return "is an exported program: save the weights of the model it was exported from"
    if "data.pkl" in names:
        return None
    if any(name.endswith(".npy") for name in names):
        return "is an archive of numpy arrays, not a model file"
    return f"is a zip archive: unpack it{f' and give {inner[0]}' if inner else ''}"


def _is_onnx(head: bytes, path: Path) -> bool:
    """Protocol buffers begin with the number and type of a field: here the version, then a text."""
    begins = head[:1] == b"\x08" and head[1:2] in _ONNX_VERSIONS and head[2:3] in _ONNX_FIELDS
    return begins or path.suffix.lower() == ".onnx"


def _why_text(head: bytes) -> str | None:
    if head.startswith(_LFS):
        return "is a git-LFS pointer, not the file itself: run `git lfs pull`"
    text = _text(head).lstrip().lower()
    if text.startswith(("<!doctype html", "<html", "<head", "<?xml", "<svg")):
        return "is a web page: open the link in a browser and download the file itself"
    return "is a text file, not a model file" if len(text) > 1 else None


def _text(head: bytes) -> str:
    """The beginning of a file as text, "" if it is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # its end may be cut
    except UnicodeDecodeError:
        return ""
    return text if all(c.isprintable() or c.isspace() for c in text) else ""
