"""A flipped bit or a missing end of a state or a model is noticed, wherever it is."""

import json
import random
import zipfile

import pytest
import torch

import issp
from issp import models
from issp.sr import checkpoint
from tests.sr.runs import assert_equal
from tests.tiers import quick_or_full
from tests.utils.disk import full_disk

safetensors = pytest.importorskip("safetensors.torch", reason="models are kept as safetensors")

STATE = {
    "model": {"a": torch.arange(24.0).view(2, 3, 4), "empty": torch.zeros(0)},
    "optimizer": [{"step": 3, "moment": torch.arange(7, dtype=torch.int64)}],
    "random": b"\0\1\2",
}
DAMAGED = "is damaged or cut short: copy it again"


def write(kind, path):
    """A whole file; returns what reads it."""
    if kind == "state":
        checkpoint.write_state(STATE, path)
        return checkpoint.read_state
    issp.save(models.EDSR(num_feat=2, num_block=1, upscale=2), path, iteration=5)
    return checkpoint.read_tensors


@pytest.mark.parametrize("kind", ["state", "model"])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, kind):
    path = tmp_path / "file"
    read = write(kind, path)
    content = path.read_bytes()
    every = quick_or_full(7, 1)
    for place in range(0, len(content), every):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            read(path)
    path.write_bytes(content)
    read(path)


@pytest.mark.parametrize("kind", ["state", "model"])
def test_a_missing_end_or_an_added_one_is_noticed(tmp_path, kind):
    path = tmp_path / "file"
    read = write(kind, path)
    content = path.read_bytes()
    rng = random.Random(kind)
    lengths = {*range(len(content) - 40, len(content)), 0, 1}  # the end of an archive is its list
    lengths |= {rng.randrange(len(content)) for _ in range(quick_or_full(60, 600))}
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=DAMAGED if length > 16 else str(path)):
            read(path)
    for more in (b"\0", b"x" * 30):
        path.write_bytes(content + more)
        with pytest.raises(ValueError, match=DAMAGED):
            read(path)


def test_tensors_that_changed_places_are_noticed(tmp_path):
    """Each part of the archive still has its right check sum."""
    path = tmp_path / "1.state"
    checkpoint.write_state({"a": torch.zeros(9), "b": torch.ones(9)}, path)
    content = path.read_bytes()
    first, second = (b"data/%d" % i for i in (0, 1))
    assert content.count(first) == content.count(second) == 2
    path.write_bytes(
        content.replace(first, b"data/?").replace(second, first).replace(b"data/?", second)
    )
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert torch.equal(torch.load(path)["a"], torch.ones(9)), "torch does not notice"
    with pytest.raises(ValueError, match=DAMAGED):
        checkpoint.read_state(path)


def test_a_sealed_state_is_an_archive_that_torch_reads(tmp_path):
    path = tmp_path / "1.state"
    checkpoint.write_state(STATE, path)
    assert_equal(torch.load(path, weights_only=True), STATE)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"crc32:")


def test_files_of_earlier_versions_have_no_check_sum_and_load(tmp_path):
    torch.save(STATE, tmp_path / "1.state")
    assert_equal(checkpoint.read_state(tmp_path / "1.state"), STATE)
    model = models.EDSR(num_feat=2, num_block=1, upscale=2)
    issp.save(model, tmp_path / "new")
    header, _ = json.JSONDecoder().raw_decode((tmp_path / "new").read_bytes()[8:].decode("latin-1"))
    metadata = header["__metadata__"]
    assert set(metadata) == {"format", "issp", "checksum"}
    del metadata["checksum"]
    safetensors.save_file(model.state_dict(), tmp_path / "old", metadata)
    assert_equal(dict(issp.load(tmp_path / "old").state_dict()), dict(model.state_dict()))


def test_an_error_while_a_whole_state_is_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    path = tmp_path / "1.state"

    def too_large(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    checkpoint.write_state(STATE, path)
    monkeypatch.setattr(torch, "load", too_large)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.read_state(path)
    torch.save(STATE, path)  # nothing says that it is whole
    with pytest.raises(ValueError, match=DAMAGED):
        checkpoint.read_state(path)


@pytest.mark.parametrize("after", [0, 700, 10_000])
def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch, after):
    path = tmp_path / "1.state"
    checkpoint.write_state(STATE, path)
    before = path.read_bytes()
    full_disk(monkeypatch, after)
    larger = {**STATE, "more": torch.zeros(10_000)}
    with pytest.raises(OSError, match=r"cannot write .*1\.state: No space left .*the disk is full"):
        checkpoint.write_state(larger, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
