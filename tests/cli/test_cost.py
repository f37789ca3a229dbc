"""`issp cost`: what is printed and written, and what is refused."""

import csv

import pytest
import torch

import issp
from issp import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("safetensors", reason="models are kept as safetensors")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    network = issp.models.build("edsr-tiny", scale=3, num_feat=8, num_block=1)
    issp.save(issp.attach(network, sparsity=0.75).finalize(), path)
    return str(path)


def run(capsys, *arguments):
    assert cli.main(["cost", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_file_is_counted_as_it_is(model, tmp_path, capsys):
    out = tmp_path / "layers.csv"
    text = run(capsys, model, "--size", "6x7", "--layers", "--csv", out, "--device", "cpu")
    assert text.startswith(f"{model}: edsr-tiny x3 on 6 x 7 low-resolution pixels\n")
    network = issp.load(model)
    total = sum(p.numel() for p in network.parameters())
    kept = total - sum(int((p == 0).sum()) for n, p in network.named_parameters() if "weight" in n)
    rows = {row[0]: row[1:] for row in cells(text)}
    assert rows["parameters"] == [f"{total:,}", f"{kept:,}"]
    assert rows["conv_last"][:4] == ["conv", "3x8x3x3", "219", "54"]
    assert rows["conv_last"][4:6] == [f"{216 * 378 / 1e6:.3f}", f"{54 * 378 / 1e6:.3f}"]
    assert "attention" not in rows and "ms" not in rows
    *layers, everything = csv.DictReader(out.read_text().splitlines())
    assert [row["layer"] for row in layers][-1] == "conv_last"
    for column in ("kept", "macs", "macs_kept"):
        assert int(everything[column]) == sum(int(row[column]) for row in layers)
    assert (everything["layer"], everything["parameters"]) == ("(all)", str(total))


def test_an_architecture_can_be_pruned(capsys):
    text = run(capsys, "swinir-light", "--scale", 4, "--sparsity", 0.95, "--device", "cpu")
    assert text.startswith("swinir-light x4 on 184 x 320 low-resolution pixels, 180 x 320 padded\n")
    rows = {row[0]: row[1:] for row in cells(text)}
    assert rows["weights"] == ["880,740", f"{880_740 - 836_703:,}"]
    assert rows["GMACs, attention"] == ["10.8528", "10.8528"]
    assert rows["GMACs, all"][0] == "62.7107"


@pytest.mark.full
def test_latency_dense_and_packed(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path))
    out = tmp_path / "layers.csv"
    text = run(capsys, model, "--size", "48x48", "--latency", "--layers", "--csv", out)
    rows = {row[0]: row[1:] for row in cells(text)}
    assert all(float(time) > 0 for time in rows["ms"])
    assert rows["body.0.conv1"][-1] in ("dense", "dense channels_last", "rows", "rows v=4")
    assert "layers are sparse" in text or "dense throughout" in text
    *layers, everything = csv.DictReader(out.read_text().splitlines())
    assert all(float(row["us_dense"]) > 0 and row["form"] for row in layers)
    assert float(everything["us_dense"]) > 0


def test_wrong_input_is_one_sentence(model, tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["cost", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert not printed.out, "nothing is counted that cannot be written"
        lines = printed.err.splitlines()
        (message,) = [line for line in lines if not line.startswith("note: ")]  # of a busy machine
        assert message.startswith("issp cost: error: ")
        return message

    assert "edsrl is neither a file nor an architecture: did you mean 'edsr-l'?" in refused("edsrl")
    assert "neither a file nor an architecture: known: edsr-tiny" in refused(tmp_path)
    assert "there is no file" in refused(tmp_path / "absent.pth")
    for size in ("64", "0x4", "4x", "4.5x4", "-4x4", "999999x9"):
        assert "write height and width of the input" in refused(model, f"--size={size}")
    for ratio in (95, -0.1, 1, "nan"):
        assert "it must be from 0 to 0.995" in refused("edsr-tiny", f"--sparsity={ratio}")
    assert "has its zeros: drop --sparsity" in refused(model, "--sparsity", 0.9)
    assert "unknown scale 5" in refused("edsr-tiny", "--scale", 5)
    assert "is a x3 model: drop --scale 2" in refused(model, "--scale", 2)
    assert "is an architecture: drop --arch" in refused("edsr-tiny", "--arch", "edsr-l")
    assert "--threads is 0" in refused(model, "--threads", 0)
    assert "device 'tpu' is unknown" in refused("edsr-tiny", "--device", "tpu")
    assert "it is a folder; name a file" in refused(model, "--csv", tmp_path)
    (tmp_path / "file").touch()
    assert "file is a file; choose a folder" in refused(model, "--csv", tmp_path / "file" / "x.csv")
    assert "would overwrite the model" in refused(model, "--csv", model)
