"""Files given as a model that are none: a sentence says what they are, not to delete them."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import issp
from issp import cli, models
from issp.sr import checkpoint, file_kinds

LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 132\n"
)


def image(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return buffer.getvalue()


def torch_script():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)), buffer)
    return buffer.getvalue()


def numpy_arrays():
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    return buffer.getvalue()


def onnx_model():
    """ModelProto of torch's exporter: ir_version 8, producer_name "pytorch"."""
    return b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(range(200))


KINDS = {
    "text": (b"name: run\nscale: 2\n", "is a text file, not a model file"),
    "umlauts": ("Größe: 3 µm\n".encode() * 300, "is a text file, not a model file"),
    "lfs": (LFS.encode(), "is a git-LFS pointer, not the file itself: run `git lfs pull`"),
    "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page: .*download"),
    "html_bom": ("\ufeff  <html lang='de'>Größe".encode(), "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "png": (image("PNG"), "is a PNG image, not a model file"),
    "jpeg": (image("JPEG"), "is a JPEG image, not a model file"),
    "webp": (image("WEBP"), "is a WebP image"),
    "zip": (
        archive(README_dot_md="hi", weights__a_dot_pth="x"),
        "unpack it and give weights/a.pth",
    ),
    "other_zip": (archive(README_dot_md="hi"), "is a zip archive: unpack it$"),
    "npz": (numpy_arrays(), "is an archive of numpy arrays"),
    "script": (torch_script(), "is a TorchScript archive, whose code is not run: save its weights"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(60), "is a gzip archive: unpack it"),
    "tar": (bytes(257).replace(b"\0", b"a") + b"ustar\0" + bytes(250), "is a tar archive"),
    "onnx": (onnx_model(), "is an ONNX model, which cannot be read"),
    "empty": (b"", "cut short, it is empty"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".PT", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_named(tmp_path, kind, suffix):
    content, sentence = KINDS[kind]
    file = tmp_path / f"model{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        issp.load(file, "edsr-tiny", 2)
    text = str(error.value)
    assert text.startswith(f"{file} is ") and "\n" not in text
    assert "remove" not in text and "delete" not in text
    assert file.read_bytes() == content


def test_a_folder_is_named_with_the_model_in_it(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="is a folder: name a file in it$"):
        issp.load(tmp_path)
    model = tmp_path / "models" / "net_g_latest.safetensors"
    issp.save(models.EDSR(num_feat=8, num_block=1, upscale=2), model)
    with pytest.raises(ValueError, match=f"is a folder: name a file in it, such as {model}$"):
        issp.load(tmp_path)


def test_content_decides_not_the_name(tmp_path):
    model = models.EDSR(num_feat=8, num_block=1, upscale=2)
    issp.save(model, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert torch.equal(issp.load(tmp_path / "a.pth").conv_last.weight, model.conv_last.weight)
    torch.save({"params": model.state_dict()}, tmp_path / "b.safetensors")
    tensors, _ = checkpoint.read_tensors(tmp_path / "b.safetensors")
    assert torch.equal(tensors["conv_last.weight"], model.conv_last.weight)


def test_the_format_of_old_releases_of_torch_is_read(tmp_path):
    model = models.EDSR(num_feat=8, num_block=1, upscale=2)
    file = tmp_path / "old.pth"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    tensors, _ = checkpoint.read_tensors(file)
    assert torch.equal(tensors["conv_last.weight"], model.conv_last.weight)


def test_a_training_state_names_the_folder_of_its_models(tmp_path):
    ours = {"iteration": 1, "model": {"a": torch.rand(1)}, "random": {}}
    basicsr = {"epoch": 0, "iter": 5, "optimizers": [], "schedulers": []}
    for state in (ours, basicsr):
        torch.save(state, tmp_path / "5.state")
        with pytest.raises(ValueError, match="is a training state: give a model"):
            issp.load(tmp_path / "5.state", "edsr-tiny", 2)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    file = tmp_path / "m.pth"
    torch.save({}, file)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("issp.sr.file_kinds.open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        issp.load(file)


@pytest.mark.parametrize("command", ["upscale", "test"])
def test_the_commands_print_the_sentence(tmp_path, capsys, command):
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]
    if command == "test":
        arguments = ["--data", str(tmp_path)]
    file = tmp_path / "model.pth"
    file.write_text(LFS)
    assert cli.main([command, *arguments, "--model", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"issp {command}: error: {file} is a git-LFS pointer, not the file itself: run `git lfs "
        "pull`\n"
    )
    assert sorted(os.listdir(tmp_path)) == ["a.png", "model.pth"]


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file({"__metadata__": {"issp": "[1]"}}),
        safetensors_file({"__metadata__": {"issp": "{"}}),
        safetensors_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**30]}}),
        safetensors_file(
            {"a": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4]}}, b"1234"
        ),
        safetensors_file(b'{"a"' + b"[" * 100_000),
    ],
    ids=["list", "json", "offsets", "shape", "nested"],
)
def test_a_damaged_safetensors_header_is_one_sentence(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="m.safetensors is damaged or cut short"):
        issp.load(tmp_path / "m.safetensors")


def test_every_first_bytes_are_named(tmp_path):
    for signature, kind in file_kinds._SIGNATURES.items():
        (tmp_path / "m.pth").write_bytes(signature + bytes(range(16)) * 4)
        with pytest.raises(ValueError, match=f"m.pth is {kind}"):
            issp.load(tmp_path / "m.pth")


@pytest.mark.parametrize("name", ["archive_format", "serialized_exported_program_dot_json"])
def test_an_exported_program_is_named(tmp_path, name):
    (tmp_path / "m.pt2").write_bytes(archive(**{f"a__{name}": "pt2"}))
    with pytest.raises(ValueError, match="is an exported program: save the weights of the model"):
        issp.load(tmp_path / "m.pt2")
