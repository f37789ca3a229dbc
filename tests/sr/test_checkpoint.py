"""Files are complete or absent, damage is named, and nothing on disk can run code."""

import errno
import os
import random

import numpy as np
import pytest
import torch

from issp import models
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
    with pytest.raises(ValueError, match="could run code"):
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
