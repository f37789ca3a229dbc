"""The tensors of a packed file: of weights with zeros the units that are not zero, and where.

A unit is v consecutive rows by c consecutive input channels at one kernel position. Values and
positions are those of `issp.ops.SparseRows`; nothing depends on a machine, so that each makes its
own plans of them. docs/formats.md, "Packed files", is the text of the format.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from issp.deploy import rice_code
from issp.ops.keep import Keep

VERSION = 1
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Tensors of the file; the values of all tensors of one dtype lie in one, such as values.float32.
_INDEX, _POSITIONS, _VALUES = "index", "positions", "values."
# Sizes of units that are tried.
_ROWS, _CHANNELS = (1, 2, 4, 8, 16, 32), (1, 2, 4)
_FEWEST_DIMS, _MOST_DIMS = 2, 5  # of a packed weight [O, I, ...]
# What a damaged file may make this module allocate: bytes of the index, and numbers of all tensors
# together, for the file and for each byte of it. `issp.num_pruned` leaves 1 weight of 200.
_MOST_INDEX, _MOST_NUMBERS, _MOST_PER_BYTE = 2**21, 2**22, 1024
_DENSE = {"name", "dtype", "shape"}
_PACKED = _DENSE | {"unit", "count", "rice", "bytes"}


@dataclass(frozen=True)
class _Entry:
    """A tensor in the index; without `unit` it is dense.

    Attributes:
        name, dtype, shape: of the tensor; dtype as torch calls it, such as "float32".
        unit: v and c.
        count: how many units are stored.
        rice, bytes: parameter and length of the code of their positions.
        keep: the numbers of the N:M pattern, by their names in `Keep`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: tuple[int, int] | None = None
    count: int = 0
    rice: int = 0
    bytes: int = 0
    keep: Mapping[str, Any] | None = None

    @property
    def stored(self) -> int:
        """Numbers among the values."""
        return math.prod(self.shape) if self.unit is None else self.count * math.prod(self.unit)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Row blocks, channel groups and kernel positions of a packed weight."""
        v, c = self.unit or (1, 1)
        return self.shape[0] // v, self.shape[1] // c, math.prod(self.shape[2:])

    def for_json(self) -> dict[str, Any]:
        names = _DENSE if self.unit is None else _PACKED | ({"keep"} if self.keep else set())
        return {name: value for name, value in asdict(self).items() if name in names}


def encode(
    tensors: Mapping[str, Tensor], keep: Mapping[str, Keep]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Packs every weight that becomes smaller by it.

    Args:
        tensors: name -> tensor on the CPU; weights are floating-point tensors [O, I, ...].
        keep: name of a weight -> its N:M pattern, which is recorded.

    Returns:
        The tensors of the file, and the header for its metadata.

    Raises:
        ValueError: there are more tensors than an index may name.
    """
    index: list[dict[str, Any]] = []
    values: dict[str, list[Tensor]] = {}
    codes = [np.zeros(0, np.uint8)]
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        dense = _Entry(name, dtype, tuple(tensor.shape)), tensor, codes[0]
        entry, stored, code = _packed(name, tensor, keep.get(name)) or dense
        index.append(entry.for_json())
        values.setdefault(f"{_VALUES}{dtype}", []).append(stored.reshape(-1))
        codes.append(code)
    stored_tensors = {name: torch.cat(parts) for name, parts in values.items()}
    text = json.dumps(index, separators=(",", ":")).encode()
    if len(text) > _MOST_INDEX:
        raise ValueError(f"{len(index)} tensors are too many for a packed file: save a dense one")
    compressed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    stored_tensors[_INDEX] = torch.from_numpy(compressed.copy())
    stored_tensors[_POSITIONS] = torch.from_numpy(np.concatenate(codes))
    return stored_tensors, {"version": VERSION}


def _packed(
    name: str, weight: Tensor, keep: Keep | None
) -> tuple[_Entry, Tensor, np.ndarray] | None:
    """A weight in the units that take the fewest bytes: entry, values [E, v, c] and code.

    None where dense takes no more.
    """
    is_weight = weight.dtype in WEIGHT_DTYPES and _FEWEST_DIMS <= weight.dim() <= _MOST_DIMS
    if not is_weight or not weight.numel():
        return None
    least, best = weight.nbytes, None
    dtype, shape = str(weight.dtype).removeprefix("torch."), tuple(weight.shape)
    numbers = _numbers(keep) if keep else None
    for v, c in _units(shape, keep):
        blocks = weight.reshape(shape[0] // v, v, shape[1] // c, c, -1)
        kept = blocks.ne(0).any(3).any(1)
        count = int(kept.sum())
        if count * v * c * weight.itemsize >= least:
            continue
        rice, code = rice_code.encode(np.flatnonzero(kept.numpy()))
        size = count * v * c * weight.itemsize + len(code)
        if size < least:
            block, group, tap = kept.nonzero(as_tuple=True)
            entry = _Entry(name, dtype, shape, (v, c), count, rice, len(code), numbers)
            least, best = size, (entry, blocks[block, :, group, :, tap], code)
    return best


def _units(shape: Sequence[int], keep: Keep | None) -> Iterator[tuple[int, int]]:
    """Rows and channels of the units that divide a weight, small ones first."""
    own = {(keep.v, keep.c)} if keep else set()
    for v, c in sorted(own | {(v, c) for v in _ROWS for c in _CHANNELS}):
        if shape[0] % v == 0 and shape[1] % c == 0:
            yield v, c


def _numbers(keep: Keep) -> dict[str, int]:
    """The numbers of a pattern of layout "channels", by their names in `Keep`."""
    return {name: value for name, value in asdict(keep).items() if isinstance(value, int)}


def decode(
    tensors: Mapping[str, Tensor], header: object
) -> tuple[dict[str, Tensor], dict[str, Keep]]:
    """The tensors that `encode` was given, dense, and the patterns that it recorded.

    Args:
        tensors: those of the file.
        header: of its metadata.

    Raises:
        ValueError: what is wrong, as the rest of a sentence that begins with the file; before
            memory for the dense tensors is asked for.
    """
    _check_version(header)
    entries = _read_index(tensors)
    values = _split(tensors, entries)
    code = tensors[_POSITIONS].numpy()
    dense, begin = {}, 0
    for entry, stored in zip(entries, values, strict=True):
        if entry.unit is None:
            dense[entry.name] = stored.view(entry.shape)
            continue
        part = code[begin : begin + entry.bytes]
        begin += entry.bytes
        try:
            units = rice_code.decode(part, entry.rice, entry.count, math.prod(entry.grid))
        except ValueError as error:
            raise _wrong(entry.name, str(error)) from None
        dense[entry.name] = _scatter(entry, stored, torch.from_numpy(units))
    return dense, {entry.name: Keep(**entry.keep) for entry in entries if entry.keep}


def _check_version(header: object) -> None:
    if not isinstance(header, dict) or header.keys() != {"version"}:
        raise ValueError("does not say the version of its packed weights")
    if header["version"] != VERSION:
        raise ValueError(
            f"has packed weights of version {_short(header['version'])}, and this issp reads "
            f"version {VERSION}: update issp, or save the file anew"
        )


def _read_index(tensors: Mapping[str, Tensor]) -> list[_Entry]:
    for name in (_INDEX, _POSITIONS):
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError(f"has no tensor {name} of bytes, as a packed file does")
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(tensors[_INDEX].numpy().tobytes(), _MOST_INDEX)
        index = json.loads(text) if reader.eof and not reader.unused_data else None
    except (zlib.error, ValueError, RecursionError):
        index = None
    if not isinstance(index, list):
        raise ValueError("has an index that cannot be read")
    entries = [_entry(fields) for fields in index]
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError("has two tensors of one name in its index")
    size = sum(tensor.nbytes for tensor in tensors.values())
    if sum(math.prod(entry.shape) for entry in entries) > _MOST_NUMBERS + _MOST_PER_BYTE * size:
        raise ValueError("describes tensors that are larger than it can fill")
    return entries


def _entry(fields: object) -> _Entry:
    """An entry of the index, checked as far as it speaks of itself."""
    if not isinstance(fields, dict) or not fields.keys() >= _DENSE:
        raise ValueError(f"has {_short(fields)} in its index")
    name, dtype, shape = fields["name"], fields["dtype"], fields["shape"]
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise ValueError(f"has {_short(fields)} in its index")
    if not _are_whole(shape, 0) or len(shape) > 8:
        raise _wrong(name, f"its shape is {_short(shape)}")
    if fields.keys() == _DENSE:
        return _Entry(name, dtype, tuple(shape))
    if not _PACKED <= fields.keys() <= _PACKED | {"keep"}:
        raise _wrong(name, f"its entry has {_short(sorted(fields))}")
    if dtype not in (str(kind).removeprefix("torch.") for kind in WEIGHT_DTYPES):
        raise _wrong(name, f"it is packed, and of dtype {_short(dtype)}")
    unit = fields["unit"]
    if not _FEWEST_DIMS <= len(shape) <= _MOST_DIMS or min(shape) < 1:
        raise _wrong(name, f"it is packed, and its shape is {shape}")
    if not _are_whole(unit, 1) or len(unit) != 2 or shape[0] % unit[0] or shape[1] % unit[1]:
        raise _wrong(name, f"units of {_short(unit)} do not divide its shape {shape}")
    count, rice, num_bytes = numbers = fields["count"], fields["rice"], fields["bytes"]
    if not _are_whole(list(numbers), 0) or rice > rice_code.MOST_LOW_BITS:
        raise _wrong(name, f"count, rice and bytes are {_short(numbers)}")
    keep = _checked_keep(name, fields["keep"], shape) if "keep" in fields else None
    return _Entry(name, dtype, tuple(shape), (unit[0], unit[1]), count, rice, num_bytes, keep)


def _checked_keep(name: str, numbers: object, shape: list[int]) -> dict[str, int]:
    try:
        if isinstance(numbers, dict) and _are_whole(list(numbers.values()), 1):
            Keep(**numbers).check_divides(shape)
            return numbers
    except (TypeError, ValueError):  # a number that a pattern does not have, or one too large
        pass
    raise _wrong(name, f"its pattern is {_short(numbers)}")


def _split(tensors: Mapping[str, Tensor], entries: Sequence[_Entry]) -> list[Tensor]:
    """The values of each entry; all of the file must be used up."""
    needed = {_INDEX: tensors[_INDEX].numel(), _POSITIONS: sum(entry.bytes for entry in entries)}
    begins = []
    for entry in entries:
        place = f"{_VALUES}{entry.dtype}"
        begins.append(needed.setdefault(place, 0))
        needed[place] += entry.stored
    for name in [*needed, *tensors]:
        have = tensors[name].numel() if name in tensors else 0
        if have != needed.get(name, -1) or (name in tensors and tensors[name].dim() != 1):
            wanted = f"{needed[name]} are described" if name in needed else "none is described"
            raise ValueError(f"has {have} numbers in {name}, and {wanted}")
    for entry in entries:
        dtype = tensors[f"{_VALUES}{entry.dtype}"].dtype
        if str(dtype) != f"torch.{entry.dtype}":
            raise _wrong(entry.name, f"its values are {dtype}")
    return [
        tensors[f"{_VALUES}{entry.dtype}"][begin : begin + entry.stored]
        for entry, begin in zip(entries, begins, strict=True)
    ]


def _scatter(entry: _Entry, values: Tensor, units: Tensor) -> Tensor:
    blocks, groups, taps = entry.grid
    v, c = entry.unit or (1, 1)
    dense = values.new_zeros(blocks, v, groups, c, taps)
    block, group, tap = units // (groups * taps), units // taps % groups, units % taps
    dense[block, :, group, :, tap] = values.view(entry.count, v, c)
    return dense.view(entry.shape)


def _are_whole(values: object, least: int) -> bool:
    """Whether it is a list of whole numbers from `least` to what a size may be."""
    return isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and least <= n < 2**31 for n in values
    )


def _short(value: object) -> str:
    """A value of a file, as much of it as fits into a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _wrong(name: str, what: str) -> ValueError:
    return ValueError(f"describes {_short(name)} wrongly: {what}")
