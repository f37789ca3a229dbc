"""Packed models on disk: small, complete, of one sentence where they are damaged."""

from __future__ import annotations

import copy
import math
import random
import resource

import pytest
import torch
from torch import nn

import issp
from issp import models
from issp.deploy import pack
from issp.sr import checkpoint, tensor_files
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import prune_
from tests.sr import damage
from tests.sr.networks import SMALL, every_small, small_edsr, small_swinir
from tests.tiers import quick_or_full

pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")


class Own(nn.Module):
    """Anybody's network."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        return self.tail(self.norm(self.head(x)).relu())


def assert_same(actual, expected):
    own = expected.state_dict()
    assert list(actual.state_dict()) == list(own)
    for name, value in actual.state_dict().items():
        assert_bitwise_equal(value, own[name], name)


def assert_same_content(one, other):
    """The order of the header's entries is the library's."""
    (own, facts), (expected, others) = map(tensor_files.read_safetensors, (one, other))
    assert facts == others and own.keys() == expected.keys()
    for name, value in own.items():
        assert_bitwise_equal(value, expected[name], name)


@pytest.fixture(name="model")
def model_fixture():
    return prune_(small_edsr()).eval()


@every_small
def test_networks_come_back_bit_for_bit(make, tmp_path):
    """What follows from their sizes is not stored."""
    model = prune_(make()).eval()
    issp.save(model, tmp_path / "m.safetensors", packed=True, iteration=7)
    loaded = issp.load(tmp_path / "m.safetensors")
    assert_same(loaded, model)
    assert (loaded.config, loaded.scale, loaded.training) == (model.config, model.scale, False)
    _, metadata = checkpoint.read_tensors(tmp_path / "m.safetensors")
    assert metadata["iteration"] == 7
    assert metadata["sparsity"] == checkpoint.sparsity(model)
    issp.save(model, tmp_path / "dense.safetensors")
    assert "packed" not in checkpoint.read_tensors(tmp_path / "dense.safetensors")[1]


@pytest.mark.parametrize("name", ["edsr-baseline", "swinir-light"])
@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
def test_a_file_takes_5_percent_more_than_values_and_index_bits(name, share, tmp_path):
    """Of random positions: their entropy; of what has no zeros: its bytes."""
    model = prune_(models.build(name, 4), share)
    issp.save(model, tmp_path / "m.safetensors", packed=True)
    derived = checkpoint.derived_names(model)
    needed = 0.0
    for key, value in model.state_dict().items():
        if key in derived:
            continue
        kept = int(value.count_nonzero()) if value.dim() > 1 else value.numel()
        p = kept / value.numel()
        needed += kept * value.itemsize
        if 0 < p < 1:
            bits = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
            needed += value.numel() * bits / 8
    assert needed < (tmp_path / "m.safetensors").stat().st_size < 1.05 * needed


def test_what_pack_returned_becomes_a_packed_file(model, cache, timed, tmp_path):
    packed = issp.pack(model, torch.rand(1, 3, 16, 16), cache=cache)
    timed["packed"] = 99.0
    slower = issp.pack(model, torch.rand(1, 3, 16, 16), cache=cache)
    assert not any(line.is_sparse for line in slower.report.lines)
    issp.save(model, tmp_path / "dense")
    for number, one in enumerate((packed, slower)):
        issp.save(one, tmp_path / f"{number}")
        assert (tmp_path / f"{number}").stat().st_size < (tmp_path / "dense").stat().st_size / 3
        assert_same(issp.load(tmp_path / f"{number}"), model)
        issp.save(one, tmp_path / "again", packed=False)
        assert_same_content(tmp_path / "again", tmp_path / "dense")
    assert_same_content(tmp_path / "0", tmp_path / "1")


def test_with_an_example_it_is_packed(model, timed, tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    issp.save(model, tmp_path / "m", packed=True)
    x = torch.rand(1, 3, 16, 12)
    for example in (x, (x,)):
        packed = issp.load(tmp_path / "m", example=example)
        assert any(line.is_sparse for line in packed.report.lines)
        torch.testing.assert_close(packed(x), model(x))


def test_an_example_may_compute_in_16_bits(model, timed, tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    issp.save(model, tmp_path / "m", packed=True)
    x = torch.rand(1, 3, 16, 12)
    asked = []
    own = pack.pack
    monkeypatch.setattr(pack, "pack", lambda *a, **k: (asked.append(k["dtype"]), own(*a, **k))[1])
    packed = issp.load(tmp_path / "m", example=x, dtype=torch.float16)
    assert asked == [torch.float16]
    torch.testing.assert_close(packed(x), model(x), rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match="dtype torch.float16 is for packing: give an example"):
        issp.load(tmp_path / "m", dtype=torch.float16)


def test_patterns_come_back_with_the_layers(timed, tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    keep = issp.Keep(1, of=4, v=2)
    timed[keep.name] = 0.1
    model = small_edsr().eval()
    issp.attach(model, pattern=issp.Keep(1, of=4, v=2, tail="dense")).finalize()
    x = torch.rand(1, 3, 8, 8)
    packed = issp.pack(model, x, keep={"body.*": keep})
    issp.save(packed, tmp_path / "m")
    again = issp.load(tmp_path / "m", example=x)
    assert isinstance(again.body[0].conv1, issp.nn.NMConv2d)
    assert again.body[0].conv1.keep == keep
    assert_bitwise_equal(again(x), packed(x), "the result")


def test_a_module_of_ones_own_is_filled(timed, cache, tmp_path):
    model = prune_(Own()).eval()
    with pytest.raises(TypeError, match="it has no .config; .* or issp.pack it first"):
        issp.save(model, tmp_path / "m")
    packed = issp.pack(model, torch.rand(1, 3, 8, 8), cache=cache)
    issp.save(packed, tmp_path / "m", note="mine")
    mine = Own()
    assert issp.load(tmp_path / "m", model=mine) is mine and not mine.training
    assert_same(mine, model)
    half = issp.load(tmp_path / "m", model=Own().bfloat16())
    assert_same(half, copy.deepcopy(model).bfloat16())
    with pytest.raises(ValueError, match="does not say its architecture"):
        issp.load(tmp_path / "m")
    with pytest.raises(ValueError, match="the model is packed: give issp.unpack"):
        issp.load(tmp_path / "m", model=packed)
    with pytest.raises(ValueError, match="the model is given: leave arch and scale out"):
        issp.load(tmp_path / "m", "edsr-l", model=Own())
    with pytest.raises(ValueError, match="does not fit Sequential: .* missing"):
        issp.load(tmp_path / "m", model=nn.Sequential(nn.Linear(2, 2)))


def test_a_module_keeps_the_buffers_that_follow_from_its_sizes(tmp_path):
    """Others have them in their state_dict too, as BasicSR's SwinIR has."""
    model = prune_(small_swinir()).eval()
    issp.save(model, tmp_path / "m", packed=True)
    twin = issp.load(tmp_path / "m", model=small_swinir())
    assert_same(twin, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_dtype(model, tmp_path, dtype):
    issp.save(model, tmp_path / "m", packed=True, dtype=dtype)
    tensors, _ = checkpoint.read_tensors(tmp_path / "m")
    assert tensors["conv_first.weight"].dtype == dtype
    assert tensors["conv_first.bias"].dtype == torch.float32
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.to(dtype).float()
    assert_same(issp.load(tmp_path / "m"), rounded)


def test_dtypes_that_cannot_hold_the_weights_are_refused(model, tmp_path):
    with torch.no_grad():
        model.conv_last.weight[0, 0, 0, 0] = 1e5
    for dtype, said in ((torch.float16, "conv_last is too large"), (torch.int8, "as torch.int8")):
        with pytest.raises(ValueError, match=said):
            issp.save(model, tmp_path / "m", packed=True, dtype=dtype)
    assert not (tmp_path / "m").exists()


def test_a_name_of_the_files_own_facts_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="the file says derived itself"):
        checkpoint.save(model, tmp_path / "m", derived=[1])


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.99])
def test_a_cut_file_is_one_sentence(model, tmp_path, kept):
    file = tmp_path / "m.safetensors"
    issp.save(model, file, packed=True)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="m.safetensors is damaged or cut short"):
        issp.load(file)


def test_a_flipped_bit_anywhere_is_noticed(model, tmp_path):
    file = tmp_path / "m.safetensors"
    issp.save(model, file, packed=True)
    whole = file.read_bytes()
    for place in range(0, len(whole), quick_or_full(41, 3)):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << random.Random(place).randrange(8)
        file.write_bytes(spoilt)
        with pytest.raises(ValueError, match="m.safetensors"):
            issp.load(file)


def test_another_version_or_network_is_named(model, tmp_path):
    file = tmp_path / "m.safetensors"
    issp.save(model, file, packed=True)
    content, metadata = tensor_files.read_safetensors(file)
    for changes, said in (
        (
            {"packed": {"version": 2}},
            "has packed weights of version 2, and this issp reads",
        ),
        ({"config": {"type": "ESDR"}}, "describes no network: unknown model type 'ESDR'"),
        ({"config": {**model.config, "num_block": 2}}, "does not fit small: .* missing"),
        ({"config": {**model.config, "num_feat": 16}}, "in the file and .* in the model"),
    ):
        changed = {**metadata, "arch": "small", **changes}
        file.write_bytes(tensor_files.safetensors_bytes(content, changed))
        with pytest.raises(ValueError, match=said) as error:
            issp.load(file)
        assert "\n" not in str(error.value)


def fuzzed(content, metadata, whole, rng):
    """A file that is spoilt in its bytes, its header or its tensors; check sums fit the latter."""
    kind = rng.randrange(3)
    if kind == 0:
        return damage.damage_bytes(whole, rng)
    if kind == 1:
        return damage.damage_safetensors(whole, rng)
    name = rng.choice(sorted(content))
    tensor = content[name]
    spoilt = damage.damage_bytes(tensor.view(torch.uint8).numpy().tobytes(), rng)
    spoilt = spoilt[: len(spoilt) // tensor.itemsize * tensor.itemsize]
    changed = torch.frombuffer(bytearray(spoilt or b"\0" * 8), dtype=torch.uint8)
    return tensor_files.safetensors_bytes({**content, name: changed.view(tensor.dtype)}, metadata)


def test_fuzzed_files_load_or_end_in_one_sentence_and_in_bounded_memory(tmp_path):
    file = tmp_path / "m.safetensors"
    wholes = []
    for make in SMALL[:2]:
        issp.save(prune_(make()), file, packed=True)
        wholes.append((*tensor_files.read_safetensors(file), file.read_bytes()))
    loaded, peak = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(quick_or_full(150, 10_000)):
        rng = random.Random(number)
        file.write_bytes(fuzzed(*wholes[number % 20 == 0], rng))
        try:
            issp.load(file)
            loaded += 1
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, str(error)
    assert loaded
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 1_500_000, f"{grown} KB"
