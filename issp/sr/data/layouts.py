"""Where the pairs of a data set lie: published folders, names of pairs, lists of files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from issp.sr.data.images import SUFFIXES, images_in, list_images
from issp.utils.files import user_path

_HR_FOLDERS = ("HR", "hr", "GT", "gt", "GTmod12", "image_SRF_{s}")
_LR_FOLDERS = ("LR_bicubic", "LR", "lr", "LRbicx{s}", "lq", "LQ")
_LR_FOLDER = re.compile(
    r"(.*_)?(LR|LQ)(_?(BI|bic|bicubic|unknown|mild|wild|difficult))?(_?x?\d)?", re.IGNORECASE
)
_HR_SUFFIX = re.compile(r"_HR(?:_?x\d)?$")
_TEMPLATES = ("{}x{s}", "{}_LRBI_x{s}", "{}_LRx{s}", "{}_LR{s}", "{}_bicLRx{s}", "{}_LR", "{}")
# Names of low-resolution images that may lie beside their originals, of any scale.
_LR_NAME = re.compile(r"(.+?)(?:_(?:bic)?LR(?:BI)?(?:_?x?\d)?|x\d)")


@dataclass(frozen=True)
class PairFiles:
    """The files of a data set: names of the images, originals, and LR files (None: to be made)."""

    names: list[str]
    hr: list[Path]
    lr: list[Path] | None


def find_pairs(
    root: str | os.PathLike,
    scale: int,
    lq_root: str | os.PathLike | None = None,
    filename_tmpl: str | None = None,
    meta_info_file: str | os.PathLike | None = None,
) -> PairFiles:
    """The files of a data set; arguments and errors as for `PairedFolder`."""
    root, hr_template = _split_template(root, scale)
    if lq_root is not None:
        folder, lr_template = _split_template(lq_root, scale)
        if lr_template == "{}" and folder == Path():
            raise ValueError("the template {} of low-resolution files names the originals")
        filename_tmpl = lr_template or filename_tmpl
        lq_root = None if lr_template and folder == Path() else folder
    hr_dir, lr_dir = _find_folders(root, scale, lq_root)
    if meta_info_file is None:
        files = present = list_images(hr_dir)
    else:
        files, present = _listed(hr_dir, meta_info_file), images_in(hr_dir)
    if filename_tmpl == "{}" and lr_dir is None:
        filename_tmpl = None  # BasicSR's default, which no file beside the originals can have
    if hr_template:
        names, files = _matching(files, hr_template, hr_dir)
    else:
        names, files, beside = _originals(files, present)
        if beside and lr_dir is None and filename_tmpl is None:
            check_names(files)
            return PairFiles(names, files, _beside(names, present, hr_dir, scale))
    check_names(files)
    if lr_dir is None and filename_tmpl is not None:
        lr_dir = hr_dir
    lr = _match_lr(names, files, lr_dir, scale, filename_tmpl) if lr_dir else None
    return PairFiles(names, files, lr)


def find_pair(
    file: str | os.PathLike, scale: int, lq_root: str | os.PathLike | None = None
) -> PairFiles:
    """The files of one original, as `find_pairs` finds them for the folder that it lies in.

    Args:
        file: the original.
        scale, lq_root: as for `PairedFolder`.

    Raises:
        FileNotFoundError: there is no such file, or no LR file where one should be.
        ValueError: it is the LR image of an original beside it.
    """
    file = user_path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no image {file}")
    present = images_in(file.parent)
    names, files, beside = _originals([file], present)
    if not files:
        raise ValueError(f"{file} is a low-resolution image by its name: name its original")
    if lq_root is None:
        lr = _beside(names, present, file.parent, scale) if beside else None
        return PairFiles(names, files, lr)
    folder, template = _split_template(lq_root, scale)
    lr_dir = file.parent if template and folder == Path() else _scale_folder(folder, scale)
    return PairFiles(names, files, _match_lr(names, files, lr_dir, scale, template))


def originals(folder: str | os.PathLike) -> list[Path]:
    """The HR images of a folder, without LR images that lie beside them; see `PairedFolder`."""
    files = list_images(folder)
    return _originals(files, files)[1]


def same_files(paths: Iterable[str | os.PathLike]) -> list[tuple[Path, Path]]:
    """Files of equal content: each with the first one of that content."""
    by_size: dict[int, list[Path]] = {}
    for path in map(Path, paths):
        by_size.setdefault(path.stat().st_size, []).append(path)
    twins, seen = [], dict[bytes, Path]()
    for path in (path for files in by_size.values() if len(files) > 1 for path in files):
        first = seen.setdefault(hashlib.blake2b(path.read_bytes()).digest(), path)
        if first is not path:
            twins.append((path, first))
    return twins


def check_names(files: Sequence[Path]) -> None:
    """Raises ValueError if two files differ in their suffix alone."""
    seen: dict[str, Path] = {}
    for file in files:
        if file.stem in seen:
            raise ValueError(f"{seen[file.stem]} and {file.name} have the same name; rename one")
        seen[file.stem] = file


def _split_template(path: str | os.PathLike, scale: int) -> tuple[Path, str | None]:
    """A folder, and the template of the names in it if the path ends in one ("DIR/{}_HR")."""
    text = os.fspath(path)
    if "{}" not in text or user_path(text).is_dir():
        return user_path(text), None
    whole = user_path(text.replace("{s}", str(scale)))
    return whole.parent, whole.stem if whole.suffix.lower() in SUFFIXES else whole.name


def _matching(files: list[Path], template: str, folder: Path) -> tuple[list[str], list[Path]]:
    """Names and files of the originals that a template describes."""
    form = re.compile("(.+)".join(map(re.escape, template.split("{}", 1))))
    found = {file: match[1] for file in files if (match := form.fullmatch(file.stem))}
    if not found:
        raise ValueError(f"{folder} has no image {template}; it holds {files[0].name}")
    return list(found.values()), list(found)


def _originals(files: list[Path], present: list[Path]) -> tuple[list[str], list[Path], bool]:
    """Names and files of the originals; whether low-resolution images are present beside them.

    Urban100 and others are published with NAME_HR and NAME_LR in one folder, and sometimes with the
    results of methods, NAME_SRCNN.
    """
    stems = {file.stem for file in present}
    bases, low = set(map(_base, stems)), {}
    for stem in stems:
        match = _LR_NAME.fullmatch(stem)
        if match and match[1] in bases:
            low[stem] = match[1]
    originals = [file for file in files if file.stem not in low]
    if not low:
        return [file.stem for file in originals], originals, False
    names = set(low.values())
    marked = {file for file in originals if _HR_SUFFIX.search(file.stem)}
    if marked:
        prefixes = tuple(f"{name}_" for name in names)
        originals = [f for f in originals if f in marked or not f.stem.startswith(prefixes)]
    alone = next((f for f in originals if _base(f.stem) not in names), None)
    if alone:
        raise ValueError(
            f"{alone.parent} holds low-resolution images ({min(low)}), but none for {alone.name}: "
            "add it, or move them to a folder of their own"
        )
    return [_base(file.stem) for file in originals], originals, True


def _base(stem: str) -> str:
    """The name of an image without the mark of an original."""
    return _HR_SUFFIX.sub("", stem)


def _beside(names: list[str], present: list[Path], folder: Path, scale: int) -> list[Path] | None:
    """LR files in the folder of the originals; None if those are of other scales."""
    files = {file.stem: file for file in present}
    candidates = [_filled(template, names, scale) for template in _TEMPLATES[:-1]]
    if not any(name in files for wanted in candidates for name in wanted):
        return None
    return _first_complete(candidates, files, folder)


def _listed(folder: Path, meta_info_file: str | os.PathLike) -> list[Path]:
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


def _find_folders(root: Path, scale: int, lq_root: Path | None) -> tuple[Path, Path | None]:
    """HR folder and LR folder (None: to be made from HR) for the layouts of PairedFolder."""
    if root.is_file():
        raise ValueError(f"{root} is a file; a folder of images is needed")
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    hr_names, lr_names = (
        [name.format(s=scale) for name in names] for names in (_HR_FOLDERS, _LR_FOLDERS)
    )
    hr_dir = _inner(root, hr_names) or _only(root, "*_HR")
    if lq_root is not None:
        if not lq_root.is_dir():
            raise FileNotFoundError(f"there is no folder {lq_root} for low-resolution images")
        return hr_dir or root, _scale_folder(lq_root, scale)
    if hr_dir is None:
        _refuse_lr_folder(root)
        return root, None
    lr_dir = _inner(root, lr_names) or _only(root, "*_LR_bicubic")
    if lr_dir is None:
        return hr_dir, None
    lr_dir = _scale_folder(lr_dir, scale)
    # LR_bicubic may hold other scales only (X2 but not X4): then LR images are made from HR.
    return hr_dir, lr_dir if images_in(lr_dir) else None


def _refuse_lr_folder(folder: Path) -> None:
    path = Path(os.path.abspath(folder))
    names = [path.name, path.parent.name] if re.fullmatch(r"[xX]\d", path.name) else [path.name]
    if any(map(_LR_FOLDER.fullmatch, names)):
        raise ValueError(
            f"{folder} is a folder of low-resolution images by its name, and originals are needed: "
            "name their folder, or rename this one"
        )


def _match_lr(
    names: list[str], hr_files: list[Path], lr_dir: Path, scale: int, filename_tmpl: str | None
) -> list[Path]:
    """LR file of every image; ``filename_tmpl`` and errors as for PairedFolder."""
    if filename_tmpl is not None and "{}" not in filename_tmpl:
        raise ValueError(f"filename_tmpl needs {{}} for the HR name, got {filename_tmpl!r}")
    stems = [file.stem for file in hr_files]
    bases = [names, stems, [_base(stem) for stem in stems]]
    templates = [filename_tmpl] if filename_tmpl else _TEMPLATES
    candidates = [_filled(template, base, scale) for template in templates for base in bases]
    return _first_complete(candidates, {f.stem: f for f in list_images(lr_dir)}, lr_dir)


def _filled(template: str, names: list[str], scale: int) -> list[str]:
    template = template.replace("{s}", str(scale))
    return [template.replace("{}", name) for name in names]


def _first_complete(
    candidates: list[list[str]], files: dict[str, Path], folder: Path
) -> list[Path]:
    """The files of the first list of names that are all there."""

    def missing(wanted: list[str]) -> list[str]:
        return [name for name in wanted if name not in files]

    wanted = min(candidates, key=lambda wanted: len(missing(wanted)))
    if missing(wanted):
        raise FileNotFoundError(
            f"{folder} has no file {missing(wanted)[0]} ({len(missing(wanted))} of {len(wanted)} "
            "pairs are incomplete); set filename_tmpl (--lr-images) if names follow another rule"
        )
    return [files[name] for name in wanted]


def _inner(root: Path, names: Sequence[str]) -> Path | None:
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
