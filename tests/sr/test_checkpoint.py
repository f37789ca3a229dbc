"""Files are complete or absent, damage is named, and nothing on disk can run code."""

import errno
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.utils.prune

from issp import models
from issp.nn import names
from issp.sr import checkpoint

safetensors = pytest.importorskip("safetensors", reason="models are kept as safetensors")


@pytest.fixture
def model():
    net = models.EDSR(num_feat=8, num_block=1, upscale=2)
    net.arch = "small"
    with torch.no_grad():
        net.conv_last.weight[0] = 0
    return net


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_model_comes_back_with_its_architecture(model, tmp_path):
    file = tmp_path / "deep" / "m.safetensors"
    checkpoint.save(model, file, iteration=7)
    again = checkpoint.load(file)
    assert_same(model, again)
    assert (again.config, again.scale, again.arch) == (model.config, 2, "small")
    assert not again.training
    _, metadata = checkpoint.read_tensors(file)
    zeros = 8 * 9  # one of three output channels of conv_last
    total = 8 * 27 + 3 * 8 * 72 + 32 * 72 + 3 * 72
    assert metadata["sparsity"] == {"weights": total, "zeros": zeros, "ratio": zeros / total}
    assert metadata["iteration"] == 7
    assert os.listdir(tmp_path / "deep") == ["m.safetensors"]


def test_channels_last_and_tied_weights_are_saved(model, tmp_path):
    model.body[0].conv2.weight = model.body[0].conv1.weight
    model.to(memory_format=torch.channels_last)
    checkpoint.save(model, tmp_path / "m.safetensors")
    assert_same(model, checkpoint.load(tmp_path / "m.safetensors"))


def test_transformers_too(tmp_path):
    arguments = {"img_size": 16, "depths": [2], "embed_dim": 12, "num_heads": [2], "window_size": 4}
    net = models.SwinIR(**arguments, upscale=2, upsampler="pixelshuffledirect")
    checkpoint.save(net, tmp_path / "m.safetensors")
    assert_same(net, checkpoint.load(tmp_path / "m.safetensors"))


def test_basicsr_pth_is_read(tmp_path):
    model = models.build("edsr-tiny", 2)
    other = models.build("edsr-tiny", 2)
    file = tmp_path / "net_g.pth"
    wrapped = {f"module.{k}": v for k, v in other.state_dict().items()}
    torch.save({"params": wrapped, "params_ema": model.state_dict()}, file)
    assert_same(checkpoint.load(file, "edsr-tiny", 2), model)
    tensors, _ = checkpoint.read_tensors(file, key="params")
    assert torch.equal(tensors["conv_first.weight"], other.conv_first.weight)
    with pytest.raises(ValueError, match="architecture"):
        checkpoint.load(file)
    with pytest.raises(ValueError, match="conv.* is .* in the file and .* in the model"):
        checkpoint.load(file, "edsr-baseline", 2)


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_cut_file_is_one_clear_sentence(model, tmp_path, suffix, kept):
    file = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save({"params": model.state_dict()}, file)
    else:
        checkpoint.save(model, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"cut{suffix} is damaged or cut short") as error:
        checkpoint.read_tensors(file)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none"):
        checkpoint.read_tensors(tmp_path / f"none{suffix}")


class _Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    evil = _Evil()
    evil.path = str(tmp_path / "ran")
    torch.save({"params": evil}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"plain values \(posix.mkdir\), which could run code"):
        checkpoint.read_state(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_file(model, tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    checkpoint.save(model, file)
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with torch.no_grad():
        model.conv_first.weight.add_(1)
    with pytest.raises(OSError, match="cannot write .*m.safetensors: No space left"):
        checkpoint.save(model, file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_state_is_plain_and_restores_every_generator(tmp_path):
    def draw():
        return torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)

    draw()
    checkpoint.write_state({"random": checkpoint.random_state()}, tmp_path / "1.state")
    first = draw()
    checkpoint.set_random_state(checkpoint.read_state(tmp_path / "1.state")["random"])
    second = draw()
    assert torch.equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert first[2:] == second[2:]


def test_a_model_without_configuration_is_refused(tmp_path):
    with pytest.raises(TypeError, match="config"):
        checkpoint.save(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")


def stored(tmp_path, model, key="params"):
    file = tmp_path / "stored.pth"
    torch.save({key: model.state_dict()}, file)
    return file


@pytest.mark.parametrize("there, asked", [("params", "params_ema"), ("params_ema", "params")])
def test_the_two_entries_of_basicsr_stand_for_each_other(model, tmp_path, there, asked):
    file = stored(tmp_path, model, there)
    with pytest.warns(UserWarning, match=f"stored.pth has no {asked}: its {there} are loaded"):
        tensors, _ = checkpoint.read_tensors(file, asked)
    assert torch.equal(tensors["conv_first.weight"], model.conv_first.weight)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("key", [None, "params", "params_ema", "mine"])
def test_an_entry_that_is_there_is_taken_without_a_word(model, tmp_path, key):
    other = models.EDSR(num_feat=8, num_block=1, upscale=2)
    content = {name: other.state_dict() for name in ("params", "params_ema", "mine")}
    content[key or "params_ema"] = model.state_dict()
    torch.save({"iter": 5, **content}, tmp_path / "all.pth")
    tensors, _ = checkpoint.read_tensors(tmp_path / "all.pth", key)
    assert torch.equal(tensors["conv_first.weight"], model.conv_first.weight)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_entries_of_other_frameworks_are_found(model, tmp_path, key):
    tensors, _ = checkpoint.read_tensors(stored(tmp_path, model, key))
    assert torch.equal(tensors["conv_first.weight"], model.conv_first.weight)


def test_what_a_file_has_instead_of_weights_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="no weights in the entry mine: it has params$"):
        checkpoint.read_tensors(stored(tmp_path, model), "mine")
    torch.save({"epoch": 3, "loss": torch.rand(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights: it has epoch, loss; looked for params"):
        checkpoint.read_tensors(tmp_path / "other.pth")
    torch.save({}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no weights: it has no entries"):
        checkpoint.read_tensors(tmp_path / "none.pth")


def test_without_strict_what_fits_is_loaded_and_the_rest_is_named(model, tmp_path):
    larger = models.EDSR(num_feat=8, num_block=2, upscale=3)
    before = {k: v.clone() for k, v in larger.state_dict().items()}
    tensors, _ = checkpoint.read_tensors(stored(tmp_path, model))
    tensors["extra.weight"] = torch.rand(2)
    with pytest.warns(UserWarning, match="10 tensors are loaded, 7 are not: ") as caught:
        checkpoint.load_weights(larger, tensors, "x2.pth", strict=False)
    text = str(caught[0].message)
    for part in (
        "upsample.0.weight is (32, 8, 3, 3) in the file and (72, 8, 3, 3) in the model",
        "upsample.0.bias is (32,) in the file and (72,) in the model",
        "body.1.conv2.bias is missing in the file",
        "extra.weight is not in the model",
    ):
        assert part in text
    for name, value in larger.state_dict().items():
        fits = name in tensors and not name.startswith("upsample")
        assert torch.equal(value, tensors[name] if fits else before[name]), name


def test_without_strict_something_has_to_fit(model):
    net = models.SwinIR(img_size=16, depths=[2], embed_dim=12, num_heads=[2], window_size=8)
    with pytest.raises(ValueError, match=r"a\.pth does not fit SwinIR: .* missing"):
        checkpoint.load_weights(net, {"a.weight": torch.rand(2)}, "a.pth", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_written_when_something_does_not_fit(model, strict):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = {k: v + 1 for k, v in before.items()}
    name = list(tensors)[-1]
    tensors[name] = torch.rand(7)
    if strict:
        with pytest.raises(ValueError, match=f"{name} is"):
            checkpoint.load_weights(model, tensors, "a.pth")
    else:
        with pytest.warns(UserWarning, match=f"{name} is"):
            checkpoint.load_weights(model, tensors, "a.pth", strict=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] + (0 if strict or key == name else 1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_numbers_of_another_kind_do_not_become_weights(model, dtype):
    tensors = dict(model.state_dict())
    tensors["conv_last.bias"] = torch.ones(3).to(dtype)
    with pytest.raises(ValueError, match=f"conv_last.bias is {dtype} in the file"):
        checkpoint.load_weights(model, tensors, "a.pth")
    tensors["conv_last.bias"] = torch.ones(3, dtype=torch.float16)
    checkpoint.load_weights(model, tensors, "a.pth")
    assert torch.equal(model.conv_last.bias, torch.ones(3))


@pytest.mark.parametrize(
    "name, value",
    [
        (3, torch.rand(1)),
        (("a", 1), torch.rand(1)),
        ("sparse", torch.eye(2).to_sparse()),
    ],
    ids=["number", "tuple", "sparse"],
)
def test_what_is_no_named_weight_is_one_sentence(model, tmp_path, name, value):
    torch.save({"params": {**model.state_dict(), name: value}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth (is damaged|does not hold plain)"):
        checkpoint.load(tmp_path / "a.pth", "edsr-tiny", 2)


def test_a_flipped_bit_in_a_weight_is_found(model, tmp_path):
    file = stored(tmp_path, model)
    content = bytearray(file.read_bytes())
    content[content.find(model.conv_last.weight.detach().numpy().tobytes()[-64:])] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="stored.pth is damaged"):
        checkpoint.read_tensors(file)


def test_a_file_without_check_sums_is_read(model, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        file = stored(tmp_path, model)
    finally:
        torch.serialization.set_crc32_options(True)
    tensors, _ = checkpoint.read_tensors(file)
    assert torch.equal(tensors["conv_first.weight"], model.conv_first.weight)


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_block", 10**9),
        ("num_feat", 10**5),
        ("num_feat", 10**30),
        ("img_range", float("nan")),
        ("upscale", -2),
        ("rgb_mean", None),
        ("type", 5),
        ("type", "EDSR2"),
        ("colour", "red"),
    ],
)
def test_metadata_that_describe_no_network_are_one_sentence(model, tmp_path, key, value):
    model.config = {**model.config, key: value}
    checkpoint.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="m.safetensors describes no network: ") as error:
        checkpoint.load(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value)


def test_masks_beyond_the_size_of_the_file_are_not_made(tmp_path):
    net = models.SwinIR(img_size=16, depths=[2], embed_dim=12, num_heads=[2], window_size=8)
    net.config["img_size"] = 80_000
    checkpoint.save(net, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="describes no network: its layers are larger than"):
        checkpoint.load(tmp_path / "m.safetensors")


def wrapped(model, kinds):
    """The network inside of wrappers, the first one innermost."""
    for kind in kinds:
        if kind == "compile":
            model = torch.compile(model)
        elif kind == "average":
            model = torch.optim.swa_utils.AveragedModel(model)
        elif kind == "parallel":
            model = torch.nn.DataParallel(model)
        else:
            outer = torch.nn.Module()
            outer._forward_module = model
            model = outer
    return model


WRAPPINGS = [
    ("parallel",),
    ("compile",),
    ("fabric",),
    ("average",),
    ("compile", "average"),
    ("parallel", "compile", "fabric", "average"),
    ("average", "fabric", "compile", "parallel"),
]


@pytest.mark.parametrize("kinds", WRAPPINGS, ids="-".join)
def test_names_are_read_and_written_through_wrappers(model, tmp_path, kinds):
    outer = wrapped(model, kinds)
    assert "conv_first.weight" not in outer.state_dict()
    torch.save({"params": outer.state_dict()}, tmp_path / "wrapped.pth")
    tensors, _ = checkpoint.read_tensors(tmp_path / "wrapped.pth")
    assert tensors.keys() == model.state_dict().keys()
    checkpoint.save(outer, tmp_path / "wrapped.safetensors")
    assert_same(checkpoint.load(tmp_path / "wrapped.safetensors"), model)
    # A plain file into the wrapped network.
    other = models.EDSR(num_feat=8, num_block=1, upscale=2)
    outer = wrapped(other, kinds)
    checkpoint.load_weights(outer, tensors, "wrapped.pth")
    assert_same(names.unwrap(outer), model)  # an average is a copy


def test_what_could_not_be_loaded_is_not_saved(model, tmp_path):
    file = tmp_path / "m.safetensors"
    checkpoint.save(model, file)
    written = file.read_bytes()
    refusals = [
        ({"config": "mine"}, ValueError, "the file says config itself: give the extra value anoth"),
        ({"psnr": torch.ones(1)}, TypeError, "cannot save psnr, a Tensor, in the metadata: give"),
    ]
    for extra, kind, sentence in refusals:
        with pytest.raises(kind, match=sentence):
            checkpoint.save(model, file, **extra)
    with pytest.raises(TypeError, match="cannot save dict with its architecture: it has no .conf"):
        checkpoint.save(dict(model.state_dict()), file)
    prune = torch.nn.utils.prune
    prune.l1_unstructured(model.conv_last, "weight", 0.5)
    with pytest.raises(ValueError, match="cannot save conv_last: its weight is parametrized; call"):
        checkpoint.save(model, file)
    assert file.read_bytes() == written
    prune.remove(model.conv_last, "weight")
    checkpoint.save(model, file)
    assert_same(checkpoint.load(file), model)
    torch.nn.utils.parametrizations.weight_norm(model.conv_first)
    with pytest.raises(ValueError, match="cannot save conv_first: its weight is parametrized"):
        checkpoint.save(model, file)


class Own(torch.nn.Module):
    """A network of the user's own with a layer called `module`, and one of its name without it."""

    arch, scale = "Own", 1

    def __init__(self):
        super().__init__()
        self.config = {"type": "Own"}
        self.module = torch.nn.Linear(2, 3)
        self.block = torch.nn.Sequential()
        self.block.add_module("module", torch.nn.Linear(3, 3))
        self.block.register_parameter("weight", torch.nn.Parameter(torch.zeros(3, 3)))


@pytest.mark.parametrize("kinds", [(), *WRAPPINGS], ids=lambda kinds: "-".join(kinds) or "plain")
def test_a_layer_called_module_keeps_its_name(tmp_path, kinds):
    own = Own()
    own.block.module = torch.compile(own.block.module)
    plain = {k.replace("_orig_mod.", ""): v for k, v in own.state_dict().items()}
    assert {"module.weight", "block.module.weight", "block.weight"} <= plain.keys()
    checkpoint.save(wrapped(own, kinds), tmp_path / "own.safetensors")
    tensors, _ = checkpoint.read_tensors(tmp_path / "own.safetensors")
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())
    torch.save(plain, tmp_path / "own.pth")
    for file in ("own.safetensors", "own.pth"):
        other = Own()
        checkpoint.load_weights(other, checkpoint.read_tensors(tmp_path / file)[0], file)
        assert all(torch.equal(value, plain[k]) for k, value in other.state_dict().items())


def test_a_compiled_block_keeps_the_names(model, tmp_path):
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    model.body = torch.compile(model.body)
    assert "body._orig_mod.0.conv1.weight" in model.state_dict()
    checkpoint.save(model, tmp_path / "m.safetensors")
    again = checkpoint.load(tmp_path / "m.safetensors")
    assert again.state_dict().keys() == plain.keys()
    changed = {k: v + 1 for k, v in plain.items()}
    checkpoint.load_weights(model, changed, "m.safetensors")
    weight = model.body._orig_mod[0].conv1.weight
    assert torch.equal(weight, changed["body.0.conv1.weight"])


def test_the_state_dict_of_a_compiled_transformer_of_another_size_loads(tmp_path):
    arguments = {"depths": [2], "embed_dim": 12, "num_heads": [2], "window_size": 8}
    saved = models.SwinIR(img_size=16, **arguments)
    state = torch.optim.swa_utils.AveragedModel(torch.compile(saved)).state_dict()
    assert "module._orig_mod.layers.0.residual_group.blocks.1.attn_mask" in state
    torch.save(state, tmp_path / "a.pth")
    tensors, _ = checkpoint.read_tensors(tmp_path / "a.pth")
    net = models.SwinIR(img_size=32, **arguments)
    checkpoint.load_weights(net, tensors, "a.pth")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(net.eval()(x), saved.eval()(x))


@pytest.mark.parametrize("described", ["config", "arch"])
def test_a_pth_that_names_its_architecture_needs_no_more(tmp_path, described):
    net = models.build("edsr-tiny", 3)
    content = {"params": net.state_dict(), "config": net.config}
    if described == "arch":
        content = {"params": net.state_dict(), "arch": "edsr-tiny", "scale": 3}
    torch.save(content, tmp_path / "a.pth")
    again = checkpoint.load(tmp_path / "a.pth")
    assert_same(again, net)
    assert again.scale == 3


@pytest.mark.sampled(most=3)
@pytest.mark.parametrize("arch", ["edsr-tiny", "swinir-light"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_shapes_tell_the_scale(tmp_path, arch, scale):
    net = models.build(arch, scale)
    torch.save({"params": net.state_dict()}, tmp_path / "a.pth")
    again = checkpoint.load(tmp_path / "a.pth", arch)
    assert again.scale == scale
    assert_same(again, net)
    with pytest.raises(ValueError, match=f"a.pth does not fit {arch}"):
        checkpoint.load(tmp_path / "a.pth", arch, 2 if scale == 4 else scale + 1)


def original_edsr(model, rgb_range=255.0):
    """The state_dict of sanghyun-son/EDSR-PyTorch for a network of two blocks."""
    own = model.state_dict()
    layers = {"head.0": "conv_first", "body.2": "conv_after_body", "tail.1": "conv_last"}
    layers |= {f"body.{i}.body.{j}": f"body.{i}.conv{1 + j // 2}" for i in (0, 1) for j in (0, 2)}
    layers |= {"tail.0.0": "upsample.0", "tail.0.2": "upsample.2"}
    state = {}
    for name, layer in layers.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            own[f"{layer}.weight"],
            own[f"{layer}.bias"],
        )
    for name, sign in (("sub_mean", -1), ("add_mean", 1)):
        state[f"{name}.weight"] = torch.eye(3).reshape(3, 3, 1, 1)
        state[f"{name}.bias"] = sign * rgb_range * torch.tensor([0.4488, 0.4371, 0.4040])
    return state


def test_the_names_of_the_authors_edsr_are_read(tmp_path):
    model = models.EDSR(num_feat=8, num_block=2, upscale=4)
    torch.save(original_edsr(model), tmp_path / "edsr_x4.pt")
    tensors, _ = checkpoint.read_tensors(tmp_path / "edsr_x4.pt")
    net = models.EDSR(num_feat=8, num_block=2, upscale=4)
    checkpoint.load_weights(net, tensors, "edsr_x4.pt")
    assert_same(net, model)
    # Trained for another range of the images: it would compute something else.
    with pytest.raises(ValueError, match="sub_mean.bias is not in the model"):
        checkpoint.load_weights(net, original_edsr(model, rgb_range=1.0), "edsr_x4.pt")


@pytest.mark.parametrize("prefix", ["model.", "net_g.", "model._orig_mod.", "trainer.generator."])
def test_a_network_that_was_saved_as_an_attribute_is_found(model, tmp_path, prefix):
    """As Lightning saves it, with a loss network beside it."""
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    state["perceptual.conv1.weight"] = torch.rand(2)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "last.ckpt")
    net = models.EDSR(num_feat=8, num_block=1, upscale=2)
    tensors, _ = checkpoint.read_tensors(tmp_path / "last.ckpt")
    checkpoint.load_weights(net, tensors, "last.ckpt")
    assert_same(net, model)


def test_of_two_networks_in_one_file_none_is_guessed(model):
    state = {f"{p}.{k}": v for p in ("net", "ema") for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="conv_first.weight is missing in the file"):
        checkpoint.load_weights(model, state, "both.pth")


def test_a_whole_pickled_network_is_refused_by_its_class(model, tmp_path):
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"\(issp.sr.models.edsr.EDSR\), which could run code"):
        checkpoint.load(tmp_path / "whole.pth", "edsr-tiny", 2)
