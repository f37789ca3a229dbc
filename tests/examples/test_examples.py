"""Every program of examples/ runs, and what it returns is what it promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import issp

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TESTED = {"train_loop", "fused_optimizer", "nm_layer", "pack_and_upscale"}

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name, *argv):
    """Calls `main` of an example in this process, as its command line would."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(argv))


def weights(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.fixture
def photographs():
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    pytest.importorskip("PIL", reason="photographs are read by Pillow")


def test_every_example_has_a_test_and_fits_a_page():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 62, path.name


def test_train_loop(photographs, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="the model is written as safetensors")
    out = tmp_path / "model.safetensors"
    model, losses = run("train_loop", "--steps", "60", "--sparsity", "0.5", "--out", str(out))
    assert sum(losses[-5:]) / 5 < 0.4 * losses[0]
    for name, weight in weights(model).items():
        assert int((weight == 0).sum()) == issp.num_pruned(weight.numel(), 0.5), name
    loaded, expected = issp.load(out).state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, saved in loaded.items():
        assert torch.equal(saved, expected[name]), name
    assert "iss-p, step 60, final" in capsys.readouterr().out


def test_fused_optimizer(capsys):
    in_hook, fused = run("fused_optimizer", "--steps", "10")
    assert fused.keys() == in_hook.keys() == {"0", "2"}
    for name, mask in fused.items():
        assert int((~mask).sum()) == issp.num_pruned(mask.numel(), 0.9), name
        assert float((mask != in_hook[name]).float().mean()) < 0.01, name
    if issp.backends.active("cpu") == "cpp":
        assert "group 0: fused, 2 pruned and 2 other" in capsys.readouterr().out


def test_nm_layer():
    layer, losses = run("nm_layer", "--steps", "60")
    assert losses[-1] < 0.05 * losses[0]
    assert layer.sparsity == 0.75
    weight = layer.to_dense().weight.detach().view(4, 4, 2, 8, 3, 3)  # blocks, v, groups, of
    kept = (weight != 0).any(1)
    assert (kept.sum(2) == 2).all()


def test_pack_and_upscale(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "upscaled.png"
    packed, upscaled = run("pack_and_upscale", "--size", "16", "--out", str(out))
    assert upscaled.shape == (32, 32, 3)
    assert np.array_equal(issp.data.read_image(out), upscaled)
    rows = [line for line in packed.report().splitlines() if "x3x3 on " in line]
    assert len(rows) == 36  # one per convolution
    assert packed.report() in capsys.readouterr().out


def test_pack_and_upscale_takes_a_saved_model(photographs, tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="the model is read from safetensors")
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    model = issp.attach(issp.models.build("edsr-tiny", 2, num_block=1), sparsity=0.9).finalize()
    issp.save(model, tmp_path / "model.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    issp.data.write_image(tmp_path / "lq.png", image)
    options = {"model": "model.safetensors", "image": "lq.png", "out": "sr.png"}
    argv = [word for key, name in options.items() for word in (f"--{key}", str(tmp_path / name))]
    _, upscaled = run("pack_and_upscale", *argv)
    expected = issp.data.to_image(issp.models.upscale(model, issp.data.to_tensor(image)[None]))
    assert int(np.abs(upscaled.astype(int) - expected.astype(int)).max()) <= 1
