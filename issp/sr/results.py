"""Scores of models on test sets as rows of a CSV file (docs/formats.md, section "Results")."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from issp.sr import checkpoint
from issp.utils.files import atomic_write, check_file, exclusive, user_path
from issp.utils.text import suggest

if TYPE_CHECKING:
    from issp.sr.config import Config
    from issp.sr.models import SuperResolver

FILE_NAME = "results.csv"  # in the folder of a study
CHANNELS = ("y", "rgb")
LR_SOURCES = ("", "read", "made")
_FACTS = {"method": str, "ratio": (int, float), "seed": int}  # what a file says of its training
_FEW_ZEROS = 0.01  # a share of zeros that no method has made


@dataclass(frozen=True)
class Result:
    """Mean score of one model on one test set; one row of a results file.

    Attributes:
        method: "iss-p", "iht", ...; "dense" for a network without pruning, "bicubic" for none.
        arch: name for `issp.models.build`; "" for "bicubic".
        scale: 2, 3 or 4.
        sparsity: the ratio that was asked for, in 0..1; 0 for "dense"; None for "bicubic".
        seed: of the training; None where it is not known.
        set: name of the test set.
        channel: "y" or "rgb".
        psnr: dB; infinite where every image is reproduced exactly.
        ssim: None where it was not taken.
        images: their number; None where it is not known.
        lr: whether the low-resolution images were "read" or "made"; "" where it is not known.
        crop_border: pixels cut from each side; None: as many as the scale.
        zeros: share of the weights of convolutions and linear layers that are 0; None: not known.
        model: file of the model.
        source: who says so, such as "paper, table 1"; "" for what was measured with this package.
        note: what the reader of a table must know of this score.

    Raises:
        ValueError: a value is not possible.
    """

    method: str
    arch: str
    scale: int
    sparsity: float | None
    seed: int | None
    set: str
    channel: str
    psnr: float
    ssim: float | None
    images: int | None = None
    lr: str = ""
    crop_border: int | None = None
    zeros: float | None = None
    model: str = ""
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("method", "set"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name it")
        for name, known in (("channel", CHANNELS), ("lr", LR_SOURCES)):
            if getattr(self, name) not in known:
                hint = suggest(getattr(self, name), filter(None, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}: {hint}")
        if self.scale < 1:
            raise ValueError(f"scale is {self.scale}: it must be 1 or more")
        _check_share("sparsity", self.sparsity)
        _check_share("zeros", self.zeros)
        self._check_reference()
        if not self.psnr >= 0:  # NaN is refused as well
            raise ValueError(f"psnr is {self.psnr}: it must be a number from 0, or inf")
        for name, least in (("images", 1), ("crop_border", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be {least} or more")
        if self.ssim is not None and not -1 <= self.ssim <= 1:
            raise ValueError(f"ssim is {self.ssim}: it must be from -1 to 1")

    def _check_reference(self) -> None:
        """Refuses what would pass for bicubic interpolation or a dense network, and is none."""
        if self.method == "bicubic" and self.arch:
            raise ValueError(f"method is bicubic, but {self.arch} is a network: name its method")
        if self.method == "dense" and self.sparsity:
            raise ValueError(f"method is dense, but sparsity is {self.sparsity:g}: name another")

    @property
    def identity(self) -> tuple[Any, ...]:
        """Everything but the scores: what one file holds once."""
        scores = ("psnr", "ssim", "images", "lr", "zeros", "note")
        return tuple(value for name, value in asdict(self).items() if name not in scores)


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be a share from 0 to 1")


COLUMNS = tuple(field.name for field in fields(Result))
_REQUIRED = COLUMNS[: COLUMNS.index("images")]
_WHOLE, _REAL = ("scale", "seed", "images", "crop_border"), ("sparsity", "psnr", "ssim", "zeros")
_NEVER_EMPTY = ("scale", "psnr")


def results_file(path: str | os.PathLike) -> Path:
    """The file itself, or `results.csv` in a folder."""
    path = user_path(path)
    return path / FILE_NAME if path.is_dir() else path


def read(path: str | os.PathLike) -> list[Result]:
    """The rows of a results file, or of `results.csv` in a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results file, or a row is damaged; the line is named.
    """
    path = results_file(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no results file {path}: `issp test --csv` writes one")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty: its first line must name {', '.join(_REQUIRED)}")
    header = lines[0]
    _check_header(path, header)
    return [
        _result(f"{path}, line {number}", header, line)
        for number, line in enumerate(lines[1:], start=2)
        if line
    ]


def write(path: str | os.PathLike, results: Iterable[Result]) -> None:
    """Writes a results file, whole or not at all.

    Raises:
        OSError: the file cannot be written; an older file is left as it was.
    """
    buffer = io.StringIO()
    rows = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(asdict(result) for result in results)
    atomic_write(path, buffer.getvalue().encode(errors="backslashreplace"))


def check(path: str | os.PathLike) -> None:
    """Refuses a file that `add` could not go on with; writes nothing.

    Raises:
        OSError, ValueError: as `read`, and `check_file`.
    """
    path = results_file(path)
    check_file(path)
    if path.exists():
        read(path)


def add(path: str | os.PathLike, results: Iterable[Result]) -> None:
    """Adds rows to a results file, which is made when absent; a row of the same model is replaced.

    Several processes may add rows at once.

    Raises:
        OSError, ValueError: as `read` and `write`; an older file is left as it was.
    """
    path = results_file(path)
    with exclusive(path):
        rows = {result.identity: result for result in (read(path) if path.exists() else [])}
        write(path, (rows | {result.identity: result for result in results}).values())


def _check_header(path: Path, header: list[str]) -> None:
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise ValueError(
            f"{path} is not a results file: its first line lacks {', '.join(missing)}; "
            "`issp test --csv` writes such files"
        )
    for position, name in enumerate(header):
        if name not in COLUMNS:
            raise ValueError(f"{path} has an unknown column {name!r}: {suggest(name, COLUMNS)}")
        if name in header[:position]:
            raise ValueError(f"{path} has the column {name} twice: remove one")


def _result(place: str, header: list[str], line: list[str]) -> Result:
    if len(line) != len(header):
        raise ValueError(f"{place} has {len(line)} values for {len(header)} columns")
    try:
        cells = zip(header, line, strict=True)
        return Result(**{name: _value(name, text.strip()) for name, text in cells})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _value(name: str, text: str) -> Any:
    kind: Callable[[str], Any] = int if name in _WHOLE else float if name in _REAL else str
    if kind is str:
        return text
    if not text and name not in _NEVER_EMPTY:
        return None
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {text!r}: it must be {wanted}") from None


def facts_of_model(
    model: SuperResolver,
    file: str,
    method: str | None = None,
    sparsity: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Arguments of `Result` that a model file, and a user who knows it better, give.

    Args:
        model: as `checkpoint.load` rebuilds it.
        file: where it is.
        method, sparsity, seed: in place of what the file says. Without either, a model with
            hardly a zero is "dense", and the ratio is that of its zeros in whole percents.

    Raises:
        ValueError: the file does not say by which method the model was pruned, or a value is
            not possible.
    """
    saved = checkpoint.read_tensors(file)[1].get("training")
    saved = saved if isinstance(saved, dict) else {}
    said = {name: saved[name] for name, kind in _FACTS.items() if isinstance(saved.get(name), kind)}
    zeros = checkpoint.sparsity(model)["ratio"]
    found = 0.0 if zeros < _FEW_ZEROS else round(zeros, 2)
    facts = {
        "method": method or said.get("method") or ("" if found else "dense"),
        "arch": model.arch,
        "scale": model.scale,
        "sparsity": said.get("ratio", found) if sparsity is None else sparsity,
        "seed": said.get("seed") if seed is None else seed,
        "zeros": zeros,
        "model": file,
    }
    if not facts["method"]:
        raise ValueError(f"{file} does not say how it was pruned: give --method, such as iss-p")
    Result(**facts, set="any", channel="y", psnr=0.0, ssim=None)  # refuses what is not possible
    return facts


def training_facts(config: Config) -> dict[str, Any]:
    """What the file of a trained model says for its results: method, ratio and seed."""
    facts: dict[str, Any] = {"seed": config.manual_seed}
    section = config.sparsity
    if section is None:
        return facts | {"method": "dense", "ratio": 0.0}
    if section.from_zeros:  # the model has its zeros from somewhere else
        return facts
    ratio = 1 - section.keep.n / section.keep.of if section.keep else section.ratio
    return facts | {"method": section.method, "ratio": ratio or 0.0}
