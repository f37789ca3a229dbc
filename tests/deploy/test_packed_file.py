"""The tensors of a packed file: exact, in the smallest units, and refused where they are wrong."""

from __future__ import annotations

import json
import random
import re
import resource
import zlib

import numpy as np
import pytest
import torch

from issp import Keep
from issp.deploy import packed_file, rice_code
from issp.ops import SparseRows, nm_prune
from tests.asserts import assert_bitwise_equal
from tests.sr import damage
from tests.tiers import quick_or_full


def in_units(shape, v, c, share=0.1, dtype=torch.float32):
    """A weight of which this share of units of v rows x c input channels is not zero."""
    weight = torch.randn(shape)
    kept = torch.rand(shape[0] // v, shape[1] // c, *shape[2:]) < share
    return weight.where(kept.repeat_interleave(v, 0).repeat_interleave(c, 1), 0.0).to(dtype)


def index_of(tensors):
    return json.loads(zlib.decompress(tensors["index"].numpy().tobytes()))


def with_index(tensors, index):
    text = zlib.compress(json.dumps(index).encode())
    return {**tensors, "index": torch.from_numpy(np.frombuffer(text, np.uint8).copy())}


def assert_comes_back(tensors, keep=None):
    stored, header = packed_file.encode(tensors, keep or {})
    dense, patterns = packed_file.decode(stored, json.loads(json.dumps(header)))
    assert list(dense) == list(tensors) and patterns == (keep or {})
    for name, value in tensors.items():
        assert_bitwise_equal(dense[name], value, name)
    return stored


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", packed_file.WEIGHT_DTYPES)
@pytest.mark.parametrize("v, c", [(1, 1), (4, 1), (16, 1), (1, 2), (16, 2), (32, 4)])
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (128, 64), (64, 16, 5), (64, 16, 1, 2, 3)])
def test_a_weight_comes_back_from_the_units_that_it_is_made_of(shape, v, c, dtype):
    weight = in_units(shape, v, c, share=0.25, dtype=dtype)
    stored = assert_comes_back({"weight": weight})
    (entry,) = index_of(stored)
    units = int(weight.ne(0).sum()) // (v * c)
    assert entry["unit"] == [v, c] and entry["count"] == units
    assert stored[f"values.{entry['dtype']}"].numel() == units * v * c


def test_values_and_positions_are_those_of_sparse_rows():
    """With c = 1; the position counts through the rows of the matrix of blocks."""
    weight = in_units((8, 6, 3, 3), 4, 1)
    stored = assert_comes_back({"weight": weight})
    (entry,) = index_of(stored)
    rows = SparseRows.from_dense(weight, 4)
    units = rice_code.decode(stored["positions"].numpy(), entry["rice"], entry["count"], 2 * 54)
    assert units.tolist() == [
        block * 54 + column
        for block in range(2)
        for column in rows.col_indices[rows.crow_indices[block] : rows.crow_indices[block + 1]]
    ]
    assert torch.equal(stored["values.float32"].view(-1, 4), rows.values)


def test_what_is_no_weight_with_zeros_stays_as_it_is():
    tensors = {
        "full": torch.randn(8, 8),
        "bias": torch.zeros(64),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3),
        "mask": torch.zeros(16, 16, dtype=torch.bool),
        "index": torch.zeros(32, 32, dtype=torch.int64),
        "values.float32": torch.randn(3),  # names of the file's own tensors are free
        "": torch.randn(2).bfloat16(),
    }
    assert all("unit" not in entry for entry in index_of(assert_comes_back(tensors)))


def test_every_kind_of_number_comes_back():
    """But -0, which is no weight: it becomes 0."""
    weight = torch.zeros(32, 16, 3, 3)
    weight[3, 5, 1, 2], weight[4, 0, 0, 0], weight[31, 15, 2, 2] = (
        1e-45,
        float("nan"),
        -float("inf"),
    )
    assert_comes_back({"weight": weight, "zeros": torch.zeros(64, 64)})
    stored, header = packed_file.encode({"weight": -torch.zeros(64, 64)}, {})
    assert_bitwise_equal(
        packed_file.decode(stored, header)[0]["weight"], torch.zeros(64, 64), "minus zero"
    )


def test_patterns_are_recorded_and_their_rows_tried():
    keep = Keep(2, of=32, v=3)
    weight = nm_prune(torch.randn(12, 64, 3, 3), keep) + 0.0  # no -0
    stored = assert_comes_back({"a.weight": weight}, {"a.weight": keep})
    (entry,) = index_of(stored)
    assert entry["unit"] == [3, 1] and entry["keep"]["n"] == 2


@pytest.fixture(name="whole")
def whole_fixture():
    keep = Keep(2, of=8)
    weights = {
        "a.weight": in_units((16, 8, 3, 3), 1, 1),
        "a.bias": torch.randn(16),
        "b.weight": in_units((32, 16), 4, 2, dtype=torch.bfloat16),
        "c.weight": nm_prune(torch.randn(8, 16), keep) + 0.0,
        "steps": torch.tensor(5),
    }
    return packed_file.encode(weights, {"c.weight": keep})


def refusal(tensors, header=None):
    with pytest.raises(ValueError) as error:
        packed_file.decode(tensors, {"version": 1} if header is None else header)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(
    "header, said",
    [
        ({"version": 2}, "has packed weights of version 2, and this issp reads version 1: update"),
        ({"version": [1] * 99}, "has packed weights of version [1, 1,"),
        ({}, "does not say the version"),
        (None, "does not say the version"),
        ({"version": 1, "more": 2}, "does not say the version"),
    ],
)
def test_another_version_is_refused(whole, header, said):
    with pytest.raises(ValueError) as error:
        packed_file.decode(whole[0], header)
    assert said in str(error.value)


FIELDS = [
    (0, "shape", [16, 8, 3], "has .* in positions|position .* is beyond the 384 of the weight"),
    (0, "shape", [16, -8, 3, 3], r"describes 'a.weight' wrongly: its shape is \[16, -8, 3, 3\]"),
    (0, "shape", "16", "describes 'a.weight' wrongly: its shape is '16'"),
    (0, "shape", [16], r"it is packed, and its shape is \[16\]"),
    (0, "shape", [0, 8], r"it is packed, and its shape is \[0, 8\]"),
    (0, "shape", [2**31 - 1] * 4, "describes tensors that are larger than it can fill"),
    (0, "shape", [16, 8, 1, 1], "position .* is beyond the 128 of the weight"),
    (0, "shape", [True, 8], r"its shape is \[True, 8\]"),
    (0, "unit", [3, 1], r"units of \[3, 1\] do not divide its shape \[16, 8, 3, 3\]"),
    (0, "unit", [0, 1], r"units of \[0, 1\] do not divide"),
    (0, "unit", [1], r"units of \[1\] do not divide"),
    (0, "unit", None, "units of None do not divide"),
    (0, "count", 5, "numbers in values.float32, and"),
    (0, "count", 1.5, "count, rice and bytes are"),
    (0, "rice", 33, "count, rice and bytes are"),
    (0, "rice", 9, "are not the code of|are too few for"),
    (0, "bytes", 5, "numbers in positions, and"),
    (0, "bytes", -1, "count, rice and bytes are"),
    (0, "dtype", "bfloat16", "numbers in values.bfloat16, and"),
    (0, "dtype", "int64", "it is packed, and of dtype 'int64'"),
    (0, "dtype", 5, "in its index"),
    (0, "name", "a.bias", "has two tensors of one name in its index"),
    (0, "name", None, "in its index"),
    (0, "colour", "red", "its entry has"),
    (1, "shape", [17], "numbers in values.float32, and"),
    (1, "shape", [1] * 9, "describes 'a.bias' wrongly: its shape is"),
    (1, "dtype", "float9", "numbers in values.float32, and|has 0 numbers in values.float9, and 16"),
    (3, "keep", {"n": 9, "of": 8, "v": 1}, "its pattern is {'n': 9"),
    (3, "keep", {"n": 1, "of": 7, "v": 1}, "its pattern is {'n': 1, 'of': 7"),
    (3, "keep", {"n": 1, "to": 7}, "its pattern is"),
    (3, "keep", {"n": "1", "of": 8}, "its pattern is"),
    (3, "keep", [1, 2], "its pattern is"),
]


@pytest.mark.parametrize("place, field, value, said", FIELDS)
def test_a_wrong_entry_of_the_index_is_named(whole, place, field, value, said):
    index = index_of(whole[0])
    index[place][field] = value
    assert re.search(said, refusal(with_index(whole[0], index)))


def test_what_an_entry_lacks_is_named(whole):
    for place, entry in enumerate(index_of(whole[0])):
        for field in entry.keys() - {"keep"}:
            index = index_of(whole[0])
            del index[place][field]
            assert refusal(with_index(whole[0], index))


def test_missing_and_additional_tensors_are_named(whole):
    tensors = whole[0]
    for name in tensors:
        rest = {key: value for key, value in tensors.items() if key != name}
        assert f" {name}" in refusal(rest)
    assert refusal({**tensors, "more": torch.ones(2)}).endswith("in more, and none is described")
    flat = tensors["values.float32"]
    assert "values.float32" in refusal({**tensors, "values.float32": flat[None]})
    assert "its values are torch.float16" in refusal({**tensors, "values.float32": flat.half()})
    assert "has no tensor positions of bytes" in refusal(
        {**tensors, "positions": tensors["positions"].int()}
    )


def test_an_index_that_is_none_is_named(whole):
    texts = [b"", b"abc", zlib.compress(b"[1"), zlib.compress(b"[]")[:-1], zlib.compress(b"{}")]
    texts += [zlib.compress(b"[]") + b"x", zlib.compress(b"[" * 10**5), zlib.compress(b"\xff")]
    texts += [zlib.compress(b" " * 2**24 + b"[]")]  # 16 MB in 16 KB
    for text in texts:
        bytes_ = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
        assert refusal({**whole[0], "index": bytes_}) == "has an index that cannot be read"
    for index in ([1], [None], [{}], [[]]):
        assert "in its index" in refusal(with_index(whole[0], index))


def test_more_tensors_than_an_index_may_name_are_not_saved(monkeypatch):
    monkeypatch.setattr(packed_file, "_MOST_INDEX", 300)
    tensors = dict.fromkeys(map(str, range(9)), torch.zeros(1))
    with pytest.raises(ValueError, match="9 tensors are too many for a packed file"):
        packed_file.encode(tensors, {})


def fuzzed(tensors, header, rng):
    """One of the tensors, the index or the header is spoilt."""
    kind = rng.randrange(4)
    if kind == 0:
        spoilt = damage.damage_tree(tensors, rng)
        kept = {name: value for name, value in spoilt.items() if isinstance(value, torch.Tensor)}
        return {name: value for name, value in kept.items() if not value.is_sparse}, header
    if kind == 1:
        return tensors, damage.plain(damage.damage_tree(header, rng))
    if kind == 2:
        return with_index(tensors, damage.plain(damage.damage_tree(index_of(tensors), rng))), header
    name = rng.choice(("index", "positions"))
    spoilt = damage.damage_bytes(tensors[name].numpy().tobytes(), rng) or b"\0"
    return {**tensors, name: torch.from_numpy(np.frombuffer(spoilt, np.uint8).copy())}, header


def test_fuzzed_files_are_read_or_refused_in_bounded_memory(whole):
    whole_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = 0
    for number in range(quick_or_full(300, 10_000)):
        tensors, header = fuzzed(*whole, random.Random(number))
        try:
            dense, _ = packed_file.decode(tensors, header)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            continue
        read += 1
        assert all(isinstance(value, torch.Tensor) for value in dense.values())
    assert read
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - whole_peak
    assert grown < 300_000, f"{grown} KB"
