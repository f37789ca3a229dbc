"""`issp pack`: what is printed and written, what reads it, and what is refused."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

import issp
from issp import cli, data
from issp.sr import checkpoint
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import prune_
from tests.sr.networks import small_edsr

pytest.importorskip("PIL", reason="images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = pytest.mark.usefixtures("one_thread", "timed")


@pytest.fixture(name="place", autouse=True)
def place_fixture(tmp_path, monkeypatch):
    """A working folder with a pruned model m.safetensors and images in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    training = {"method": "iss-p", "ratio": 0.9, "seed": 3}
    issp.save(prune_(small_edsr()), "m.safetensors", iteration=9, training=training)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 28, 3), dtype=np.uint8)
        data.write_image(f"in/{i}.png", pixels)
    return tmp_path


def run(*words, model="m.safetensors", out="p.safetensors"):
    return cli.main(["pack", model, "-o", out, "--device", "cpu", *map(str, words)])


def test_the_file_is_that_of_the_library_with_the_facts_of_the_training(capsys, place):
    assert run("--size", "9x12") == 0
    text = capsys.readouterr().out
    assert "| conv_first | 8x3x3x3 on 1x3x9x12 |" in text and "layers are sparse" in text
    size = (place / "p.safetensors").stat().st_size
    model = issp.load("m.safetensors")
    dense = sum(p.nbytes for p in model.parameters())
    assert f"p.safetensors: {size:,} bytes, {100 * size / dense:.1f} % of {dense:,}" in text
    tensors, metadata = checkpoint.read_tensors("p.safetensors")
    for name, value in model.state_dict().items():
        assert_bitwise_equal(tensors[name], value, name)
    assert metadata["training"]["seed"] == 3 and metadata["iteration"] == 9
    assert metadata["sparsity"]["ratio"] == pytest.approx(0.9, abs=0.01)


def test_test_upscale_and_cost_read_it_as_the_checkpoint(capsys):
    assert run() == 0
    scores, upscaled, costs = [], [], []
    for name in ("m", "p"):
        model, out = f"{name}.safetensors", f"out_{name}"
        capsys.readouterr()
        assert cli.main(["upscale", "in", "--model", model, "-o", out, "--device", "cpu"]) == 0
        upscaled.append([data.read_image(f"{out}/{i}_x2.png") for i in range(2)])
        words = ["test", "--model", model, "--data", "in", "--csv", f"{name}.csv", "--dense"]
        assert cli.main([*words, "--device", "cpu"]) == 0
        with open(f"{name}.csv") as file:
            rows = list(csv.DictReader(file))
        scores.append([{k: v for k, v in row.items() if k != "model"} for row in rows])
        capsys.readouterr()
        assert cli.main(["cost", model, "--device", "cpu", "--size", "8x8"]) == 0
        costs.append(capsys.readouterr().out.partition("\n")[2])
    assert all(np.array_equal(a, b) for a, b in zip(*upscaled, strict=True))
    assert scores[0] == scores[1] and scores[0][0]["method"] == "iss-p"
    assert costs[0] == costs[1]


def test_weights_in_16_bits(place, capsys):
    assert run() == run("--dtype", "bfloat16", out="half") == 0
    kept = sum(
        int(x.count_nonzero()) for x in issp.load("half").state_dict().values() if x.dim() > 1
    )
    whole, half = ((place / name).stat().st_size for name in ("p.safetensors", "half"))
    assert abs(whole - half - 2 * kept) < 128  # bytes of the index, which is compressed
    assert checkpoint.read_tensors("half")[0]["conv_last.weight"].dtype == torch.bfloat16
    whole, half = issp.load("p.safetensors"), issp.load("half")
    for name, value in whole.state_dict().items():
        rounded = value.bfloat16().float() if value.dim() > 1 else value
        assert_bitwise_equal(half.state_dict()[name], rounded, name)


def test_a_pattern_goes_into_the_file(timed, capsys):
    keep = issp.Keep(1, of=4, v=2)
    timed[keep.name] = 0.1
    model = small_edsr()
    issp.attach(model, pattern=issp.Keep(1, of=4, v=2, tail="dense")).finalize()
    issp.save(model, "nm.safetensors")
    assert run("--keep", "body.*=1:4:2", model="nm.safetensors") == 0
    patterns = checkpoint.read_tensors("p.safetensors")[1]["packed"]
    assert patterns == dict.fromkeys(["body.0.conv1.weight", "body.0.conv2.weight"], keep)


def test_a_pth_with_its_architecture(capsys):
    model = prune_(issp.models.build("edsr-tiny", 2))
    torch.save({"params": model.state_dict()}, "net_g.pth")
    assert run("--arch", "edsr-tiny", "--scale", 2, "--size", "8x8", model="net_g.pth") == 0
    assert_bitwise_equal(
        issp.load("p.safetensors").conv_last.weight, model.conv_last.weight, "conv_last"
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--size", "8"], "--size is '8': write height and width of the input, such as 64x64"),
        (["--keep", "2"], 'pattern "2": write n:of, such as 2:4'),
        (["--keep", "2:4", "*=1:4"], "--keep: * has two patterns"),
        (["--keep", "head=2:4"], "head"),
        (["--dtype", "int8"], "unknown --dtype 'int8'"),
        (["--threads", "0"], "--threads is 0"),
        (["-o", "m.safetensors"], "--out m.safetensors would overwrite the model"),
        (["-o", "in"], "cannot write in: it is a folder"),
        (["--tile", "8"], "unknown argument --tile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_nothing_is_written(words, said, place, capsys):
    before = sorted(place.rglob("*.*"))
    assert run(*words) == 2
    error = capsys.readouterr().err.replace("measuring which layers are faster sparse ...\n", "")
    assert said in error and error.count("\n") == 1
    assert sorted(place.rglob("*.*")) == before


def test_a_model_without_zeros_is_refused(place, capsys):
    issp.save(small_edsr(), "full.safetensors")
    assert run(model="full.safetensors") == 2
    assert "no weight of full.safetensors is zero: give a model of" in capsys.readouterr().err
    assert not (place / "p.safetensors").exists()
