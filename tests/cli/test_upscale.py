"""`issp upscale`: folders, names, what a picture keeps, bad files, tiles, packing, Ctrl-C."""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

import issp
from issp import cli, data
from issp.cli import common
from issp.sr import upscale
from issp.sr.models import tiling
from issp.utils import process
from tests.sr.networks import small_edsr

Image = pytest.importorskip("PIL.Image", reason="the command reads and writes images")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")

DATE = 0x0132  # EXIF's date


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a x2 model m.safetensors, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    issp.save(small_edsr(), "m.safetensors")
    return tmp_path


def picture(path, height=12, width=14, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def run(*words, out="out", model="m.safetensors"):
    return cli.main(["upscale", *map(str, words), "--model", model, "-o", out, "--device", "cpu"])


def written(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_a_bad_image_does_not_stop_the_others(place, capsys):
    for i, name in enumerate("abc"):
        picture(place / "in" / f"{name}.png", seed=i)
    whole = (place / "in" / "b.png").read_bytes()
    (place / "in" / "b.png").write_bytes(whole[: len(whole) // 2])
    (place / "in" / "d.jpg").write_bytes(b"")
    assert run("in") == 1
    assert written(place / "out") == ["a_x2.png", "c_x2.png"]
    error = capsys.readouterr().err
    assert "2 of 4 images failed:\nin/d.jpg\nin/b.png\n" in error and "Traceback" not in error
    assert "b.png is damaged or cut short" in error and "d.jpg is empty" in error
    assert run("in/b.png") == 2, "one image alone is an error of the command"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_ends_the_command(place, capsys, monkeypatch):
    from issp.sr.data import pictures

    for name in "ab":
        picture(place / "in" / f"{name}.png")

    def full(path, *args, **options):
        raise OSError(28, f"cannot write {path}: the disk is full")

    monkeypatch.setattr(pictures, "atomic_write", full)
    assert run("in") == 2
    error = capsys.readouterr().err
    assert "disk is full" in error and error.count("a_x2.png") == 1 and "b_x2" not in error


def test_a_folder_that_cannot_be_written_ends_the_command(place, capsys):
    for name in "ab":
        picture(place / "in" / f"{name}.png")
    (place / "file").write_text("")
    assert run("in", out="file/out") == 2
    error = capsys.readouterr().err
    assert "file/out" in error and "Traceback" not in error and "b_x2" not in error


def test_folders_are_mirrored_and_results_are_no_images(place, capsys):
    picture(place / "in" / "a.png")
    picture(place / "in" / "deep" / "er" / "b.jpg")
    picture(place / "in" / ".hidden" / "c.png")
    (place / "in" / "deep" / "readme.txt").write_text("no picture")
    os.symlink("..", place / "in" / "deep" / "loop")
    for _ in range(2):
        assert run("in", out="in/results") == 0
        expected = ["a_x2.png", "deep/er/b_x2.png"]
        assert written(place / "in" / "results") == expected, "the second time as well"
    (place / "in" / "deep" / "loop").unlink()
    assert run("in/deep", "in/a.png", out="both") == 0
    assert written(place / "both") == ["a_x2.png", "er/b_x2.png"]


def test_skip_existing(place, capsys):
    for i, name in enumerate("ab"):
        picture(place / f"{name}.png", seed=i)
    made = picture(place / "a_x2.png", 3, 3)
    assert run(".", out=".") == 2, "a_x2.png is an image too, which would be overwritten"
    assert "a_x2.png would be overwritten" in capsys.readouterr().err
    assert run(".", "--skip-existing", out=".") == 0
    assert "1 of 2 results are there already" in capsys.readouterr().err
    assert np.array_equal(data.read_image("a_x2.png"), made)
    assert data.read_image("b_x2.png").shape == (24, 28, 3)
    assert run(".", "--skip-existing", out=".") == 0
    assert not list(place.glob("*_x2_x2*"))


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_skip_existing_makes_half_written_results_again(place, capsys, share):
    for i, name in enumerate("ab"):
        picture(place / "in" / f"{name}.png", seed=i)
    assert run("in") == 0
    result = place / "out" / "a_x2.png"
    whole = result.read_bytes()
    result.write_bytes(whole[: int(share * len(whole))])
    capsys.readouterr()
    assert run("in", "--skip-existing") == 0
    shown = capsys.readouterr()
    assert "1 of 2 results are there already, 1 damaged: made again" in shown.err
    assert "b_x2" not in shown.out
    assert result.read_bytes() == whole


@pytest.mark.parametrize("name", ["r.png", "r.JPG", "r.webp", "r.tiff", "r.bmp", "new/r.png"])
def test_out_may_name_a_file(place, name):
    picture(place / "photo.png")
    assert run("photo.png", out=name) == 0
    assert data.read_image(name).shape == (24, 28, 3)


def test_what_out_cannot_be(place, capsys):
    picture(place / "a.png")
    picture(place / "b.png")
    (place / "file").write_text("")
    for words, out, sentence in [
        (("a.png", "b.png"), "r.png", "one file for 2 images"),
        (("a.png",), "r.gif", "use one of the suffixes .png"),
        (("a.png",), "r.heic", "use one of the suffixes .png"),
        (("a.png", "--format", "jpg"), "r.png", "differ"),
        (("a.png",), "file", "is a file"),
        (("a.png", "nothing.png"), "out", "no file or folder nothing.png"),
        (("a.png", "--suffix", "/x"), "out", "holds a path"),
        (("a.png", "--suffix="), ".", "a.png would be overwritten"),
        (("a.png",), "a.png", "a.png would be overwritten"),
        (
            ("a.png", "--tile", "-3"),
            "out",
            "--tile: tile must be at least 1, got -3; 0 cuts nothing",
        ),
        (("a.png", "--threads", "0"), "out", "--threads is 0: it must be from 1 to"),
        (("a.png", "--threads", "100000"), "out", "--threads is 100000: it must be from 1 to"),
    ]:
        assert run(*words, out=out) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sentence in error, error
    assert written(place) == ["a.png", "b.png", "file", "m.safetensors"]
    (place / "r.png").mkdir()
    assert run("a.png", "b.png", out="r.png") == 0, "a folder that is there is one"


def test_results_that_cannot_be_are_refused_before_the_work(place, capsys):
    picture(place / "a.png")
    picture(place / "a.JPG")
    assert run("a.png", "a.JPG") == 2
    assert "a.png and a.JPG would both become out/a_x2.png" in capsys.readouterr().err
    assert run("a.png", "--scale", "3") == 2
    assert "m.safetensors is a x2 model: drop --scale 3" in capsys.readouterr().err
    (place / "out" / "a_x2.png").mkdir(parents=True)
    assert run("a.png") == 2
    assert "the result out/a_x2.png is a folder" in capsys.readouterr().err
    assert not written(place / "out")


def test_a_damaged_model_writes_no_picture(place, capsys):
    network = small_edsr()
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    issp.save(network, "nan.safetensors")
    picture(place / "a.png")
    assert run("a.png", model="nan.safetensors") == 2
    assert "holds NaN or infinite values: the model is damaged" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_an_image_is_not_overwritten_through_another_name(place, capsys):
    picture(place / "a.png")
    before = (place / "a.png").read_bytes()
    os.link(place / "a.png", place / "hard.png")
    os.symlink("a.png", place / "soft.png")
    for out in ("hard.png", "soft.png"):
        assert run("a.png", out=out) == 2
        assert "would be overwritten" in capsys.readouterr().err
    assert (place / "a.png").read_bytes() == before


def test_transparency_grey_16_bits_profile_and_date_are_kept(place, capsys):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[DATE], exif[0x0112] = "2020:01:02 03:04:05", 6  # to be turned
    profile = bytes(16) + b"RGB " + bytes(16) + b"acsp" + bytes(90)
    about = {"exif": exif.tobytes(), "icc_profile": profile}
    alpha = np.zeros((12, 14, 1), np.uint8)
    alpha[3:9, 4:10] = 255
    colour = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([colour, alpha], 2)).save("see.png", **about)
    Image.fromarray(colour).save("photo.jpg", **about)
    Image.fromarray(colour).save("scan.tif", exif=exif.tobytes())
    Image.fromarray(colour[:, :, 0]).save("grey.png")
    deep = rng.integers(0, 65536, (12, 14), dtype=np.uint16)
    Image.fromarray(deep).save("deep.png")
    assert run("see.png", "photo.jpg", "scan.tif", "grey.png", "deep.png") == 0
    assert "without" not in capsys.readouterr().err
    for name in ("see", "photo", "scan"):
        with Image.open(f"out/{name}_x2.png") as result:
            assert result.size == (24, 28), "turned"
            assert result.getexif()[DATE] == "2020:01:02 03:04:05"
            assert result.getexif().get(0x0112, 1) == 1
            assert name == "scan" or result.info["icc_profile"] == profile
    see = data.read_picture("out/see_x2.png")
    expected = data.imresize(np.rot90(alpha[:, :, 0], -1), 2)
    assert np.array_equal(see.alpha, expected)
    network = issp.load("m.safetensors")
    upright = np.ascontiguousarray(np.rot90(colour, -1))
    assert np.array_equal(see.rgb, upscale.upscale_samples(network, upright, tiling.Tiling()))
    with Image.open("out/grey_x2.png") as grey, Image.open("out/deep_x2.png") as wide:
        assert (grey.mode, wide.mode) == ("L", "I;16")
        result = np.asarray(wide)
    x = torch.from_numpy(deep.astype(np.float32) / 65535).expand(1, 3, -1, -1)
    y = issp.models.upscale(network, x)[0].clamp(-1, 2)
    luma = (y * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).clamp(0, 1) * 65535
    assert np.abs(result - luma.numpy()).max() <= 1
    assert len(np.unique(result)) > 256, "more than 8 bits"


def test_what_is_lost_is_said(place, capsys):
    rng = np.random.default_rng(0)
    profile = bytes(16) + b"CMYK" + bytes(16) + b"acsp" + bytes(90)
    colour = rng.integers(0, 256, (12, 14, 4), dtype=np.uint8)
    Image.fromarray(colour).save("a.png", icc_profile=profile)
    Image.fromarray(rng.integers(0, 65536, (12, 14), dtype=np.uint16)).save("d.png")
    frames = [Image.fromarray(colour[:, :, i]) for i in range(3)]
    frames[0].save("f.gif", save_all=True, append_images=frames[1:])
    assert run("a.png", "d.png", "f.gif", "--format", "jpg") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note.split(" is without ")[1] for note in notes] == [
        "transparency (JPEG has none), "
        "colour profile (it is one of another colour space than the pixels)",
        "16 bits (JPEG has none)",
        "all but the first of 3 frames",
    ]
    assert run("a.png", out="a.bmp") == 0
    assert "transparency (BMP has none), colour profile (BMP has none)" in capsys.readouterr().err


def test_a_format_that_cannot_hold_the_result_is_refused_before_the_work(place, capsys):
    picture(place / "wide.png", 2, 8200)
    assert run("wide.png", out="r.webp") == 2
    assert "WebP holds at most 16383 pixels a side, and the result has 16400" in (
        capsys.readouterr().err
    )
    assert run("wide.png", out="r.png") == 0


def test_networks_of_other_channels(place, capsys):
    issp.save(small_edsr(num_in_ch=1, num_out_ch=1, rgb_mean=[0.5]), "one.safetensors")
    issp.save(small_edsr(num_in_ch=4, num_out_ch=4, rgb_mean=[0.5] * 4), "four.safetensors")
    grey = picture(place / "c.png")[:, :, 0]
    Image.fromarray(grey).save("g.png")
    assert run("c.png", "g.png", model="one.safetensors") == 0
    with Image.open("out/g_x2.png") as result:
        pixels = np.asarray(result)
    x = torch.from_numpy(grey.copy())[None, None] / 255
    expected = issp.models.upscale(issp.load("one.safetensors"), x)
    assert np.array_equal(pixels[:, :, None], data.to_image(expected))
    assert data.read_picture("out/c_x2.png").is_grey is False
    assert run("c.png", model="four.safetensors") == 2
    assert "takes 4 channels" in capsys.readouterr().err


def test_tiles_by_default_and_what_is_said_of_their_seams(place, capsys, monkeypatch):
    monkeypatch.setattr(tiling, "_SIDE", 32)
    monkeypatch.setattr(tiling, "_RADII", 4)
    monkeypatch.setattr(tiling, "_LEAST_RADII", 3)
    pixels = picture(place / "a.png", 50, 61)
    sizes = []
    forward = issp.models.EDSR.forward
    monkeypatch.setattr(
        issp.models.EDSR, "forward", lambda self, x: (sizes.append(x.shape), forward(self, x))[1]
    )
    assert run("a.png") == 0
    assert "seams" not in capsys.readouterr().err
    assert len(set(sizes[1:])) == 1 and max(sizes[-1][2:]) <= 32, "the first counts memory"
    whole = upscale.upscale_samples(issp.load("m.safetensors"), pixels, tiling.Tiling())
    apart = np.abs(data.read_image("out/a_x2.png").astype(int) - whole)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, "rounding alone"
    assert run("a.png", "--tile", "20") == 0
    assert "tiles of 20 pixels overlap by 10, but the network sees further" in (
        capsys.readouterr().err
    )
    sizes.clear()
    assert run("a.png", "--tile", "0") == 0
    assert [tuple(size[2:]) for size in sizes] == [(50, 61)]


def test_packed_when_that_pays(place, capsys, monkeypatch):
    model = issp.attach(small_edsr(), sparsity=0.9).finalize()
    issp.save(model, "sparse.safetensors")
    picture(place / "a.png", 40, 40)
    packed = []

    def pack(model, example, dtype):
        assert dtype is None
        packed.append(tuple(example.shape))
        return issp.pack(model, example)

    monkeypatch.setattr(upscale, "pack", pack)
    assert run("a.png", model="sparse.safetensors") == 0 and not packed
    assert "dense: below 322,560 pixels packing takes longer" in capsys.readouterr().out
    monkeypatch.setattr(upscale, "_WORTH", 0.5)
    assert run("a.png", "--dense", model="sparse.safetensors") == 0 and not packed
    assert run("a.png", out="out2", model="m.safetensors") == 0 and not packed, "nothing is zero"
    assert "dense: " not in capsys.readouterr().out
    assert run("a.png", out="out3", model="sparse.safetensors") == 0
    assert packed == [(1, 3, 48, 48)]
    said, result = capsys.readouterr().out.splitlines()
    assert said.startswith(("packed: ", "dense: ")) and result.startswith("out3")
    apart = data.read_image("out/a_x2.png").astype(int) - data.read_image("out3/a_x2.png")
    assert np.abs(apart).max() <= 1


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_parts_compute_in_16_bits_when_asked(place, capsys, monkeypatch, name):
    issp.save(issp.attach(small_edsr(), sparsity=0.9).finalize(), "sparse.safetensors")
    picture(place / "a.png", 40, 40)
    asked = []
    monkeypatch.setattr(upscale, "_WORTH", 0.5)
    monkeypatch.setattr(
        upscale, "pack", lambda *args, **kw: (asked.append(kw["dtype"]), issp.pack(*args, **kw))[1]
    )
    assert run("a.png", "--dense", model="sparse.safetensors") == 0
    assert run("a.png", "--dtype", name, out="reduced", model="sparse.safetensors") == 0
    assert asked == [getattr(torch, name)]
    line = capsys.readouterr().out.splitlines()[1]
    engine = "this CPU has no matrix engine for bfloat16"
    assert f" layers compute in {name}." in line or (name == "bfloat16" and engine in line)
    apart = data.read_image("out/a_x2.png").astype(int) - data.read_image("reduced/a_x2.png")
    assert np.abs(apart).max() <= 2


def test_16_bits_that_nothing_can_use_are_named(place, capsys):
    picture(place / "a.png", 20, 20)
    assert run("a.png", "--dtype", "float16", model="m.safetensors") == 0
    said = "dense: hardly a weight is zero, and torch.float16 is for sparse networks"
    assert said in capsys.readouterr().out
    assert run("a.png", "--dtype", "float16", "--dense", out="no", model="m.safetensors") == 2
    assert "--dense computes in float32: drop it or --dtype float16" in capsys.readouterr().err
    assert not (place / "no").exists()


def test_the_test_command_packs_as_well(place, capsys, monkeypatch):
    model = issp.attach(small_edsr(), sparsity=0.9).finalize()
    issp.save(model, "sparse.safetensors")
    picture(place / "set" / "a.png", 48, 48)
    monkeypatch.setattr(upscale, "_WORTH", 0.1)
    monkeypatch.setattr(upscale, "_EXAMPLE_SIDES", (16,))
    tables = []
    for words in ((), ("--dense",)):
        command = ["test", "--model", "sparse.safetensors", "--data", "set", "--device", "cpu"]
        assert cli.main([*command, "--per-image", *words]) == 0
        out = capsys.readouterr().out
        assert out.startswith(("packed: ", "dense: ")) is not bool(words)
        tables.append(out[out.index("sparse.safetensors: ") :])
    assert tables[0] == tables[1]


def test_memory_bounds_the_tiles(place, capsys, monkeypatch):
    from issp.sr import memory_limit

    monkeypatch.setattr(process, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory_limit, "_LATER", 0)
    pixels = picture(place / "in" / "a.png", 90, 120)
    picture(place / "in" / "large.png", 2000, 2000)
    sizes = []
    forward = issp.models.EDSR.forward
    monkeypatch.setattr(
        issp.models.EDSR, "forward", lambda self, x: (sizes.append(x.shape), forward(self, x))[1]
    )
    assert run("in", "--memory", "5M") == 1
    error = capsys.readouterr().err
    assert "large.png: a picture of 2000 x 2000 pixels and its result need --memory 153M" in error
    assert written(place / "out") == ["a_x2.png"]
    side = max(sizes[-1][2:])
    network = issp.load("m.safetensors")
    assert 64 <= side < 120, "it is cut"
    assert 2 * tiling.peak_bytes(network, (1, 3, side, side)) <= 5 * 2**20
    whole = upscale.upscale_samples(network, pixels, tiling.Tiling())
    assert np.abs(data.read_image("out/a_x2.png").astype(int) - whole).max() <= 1


def test_what_memory_cannot_be(place, capsys):
    picture(place / "a.png")
    for words, sentence in [
        (("--memory", "lots"), "--memory: 'lots' is no size: write 800M or 4G"),
        (("--memory", "-1G"), "--memory"),
        (("--memory", "1M"), "a.png: a picture of 14 x 12 pixels and its result need --memory "),
        (("--memory", "2G", "--tile", "64"), "--tile sets it: drop one of them"),
    ]:
        status = run("a.png", *words) if words[1] != "-1G" else run("a.png", "--memory=-1G")
        assert status == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sentence in error, error
    assert not (place / "out").exists()


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_8k_picture_stays_within_2_gigabytes(place, mode):
    ramp = np.arange(7680, dtype=np.int64) // 4
    pixels = (ramp + np.arange(4320)[:, None] // 8).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(pixels))
    image.save("8k.png", compress_level=1)
    words = ["8k.png", "--model", "m.safetensors", "-o", "out", "--memory", "2G"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "issp", "upscale", *words]
    child = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert data.image_size("out/8k_x2.png") == (8640, 15360)
    assert usage.ru_maxrss <= 2 * 1024**2


def test_a_contact_sheet(place, capsys, monkeypatch):
    from issp.sr import contact_sheet

    pytest.importorskip("matplotlib", reason="it draws the sheet")
    issp.save(small_edsr(num_block=2), "other.safetensors")
    for i in range(3):
        picture(place / "in" / f"{i}.png", 40 + 30 * i, 60, seed=i)
    drawn = []
    comparison = contact_sheet.plots.comparison
    monkeypatch.setattr(
        contact_sheet.plots,
        "comparison",
        lambda rows, path: (drawn.append(rows), comparison(rows, path)),
    )
    monkeypatch.setattr(contact_sheet, "MOST_ROWS", 2)
    assert run("in", "--compare", "other.safetensors") == 0
    assert "out/compare.png  the first 2 of 3 images side by side" in capsys.readouterr().out
    assert data.read_image("out/compare.png").shape[2] == 3
    (first, second) = drawn.pop()
    titles = ["input", "bicubic", "other.safetensors", "m.safetensors"]
    assert [p.title for p in first] == ["0.png", *titles] and second[0].title == "1.png"
    rgb = data.read_image("in/1.png")
    side, (left, top) = 48, map(int, second[1].note.split()[-1].split(","))
    place_in = np.s_[2 * top : 2 * (top + side), 2 * left : 2 * (left + side)]
    assert np.array_equal(second[1].image, rgb[top : top + side, left : left + side])
    assert np.array_equal(second[2].image, data.imresize(rgb, 2)[place_in])
    other = upscale.upscale_samples(issp.load("other.safetensors"), rgb, tiling.Tiling())
    assert np.abs(second[3].image.astype(int) - other[place_in]).max() <= 1
    assert np.array_equal(second[4].image, data.read_image("out/1_x2.png")[place_in])
    assert run("in/0.png", "--compare", "bicubic", out="r.png") == 0
    assert (place / "r_compare.png").exists() and len(drawn[0][0]) == 4


def test_what_compare_cannot_be(place, capsys):
    pytest.importorskip("matplotlib", reason="it draws the sheet")
    picture(place / "a.png")
    picture(place / "out" / "compare.png")
    issp.save(small_edsr(upscale=4), "x4.safetensors")
    for words, sentence in [
        (("a.png", "--compare", "bicubik"), "bicubik"),
        (("a.png", "--compare", "x4.safetensors"), "is a x4 model and --model a x2 one"),
        (("out/compare.png", "--compare", "bicubic"), "would overwrite an image"),
    ]:
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and sentence in error, error
    assert written(place / "out") == ["compare.png"]


def test_colours_of_16_bits_are_named(place, capsys):
    deep = np.random.default_rng(0).integers(0, 65536, (12, 14, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 14, 12, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + check
    (place / "deep.png").write_bytes(content)
    assert run("deep.png") == 0
    note = "note: out/deep_x2.png is without 16 bits of colour (they are read as 8)\n"
    assert capsys.readouterr().err == note
    eight = (deep >> 8).astype(np.uint8)
    expected = upscale.upscale_samples(issp.load("m.safetensors"), eight, tiling.Tiling())
    assert np.array_equal(data.read_image("out/deep_x2.png"), expected)


def test_threads(place, capsys, monkeypatch):
    picture(place / "a.png")
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert run("a.png", "--threads", "3") == 0 and chosen == [3]


def test_progress_within_one_image(place, capsys, monkeypatch):
    picture(place / "photo.png", 40, 40)
    picture(place / "small.png", 4, 4)
    monkeypatch.setattr(common, "_LINE_SECONDS", -1.0)
    assert run("photo.png", "small.png", "--tile", "26") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "% of all" in line]
    assert lines[1].startswith("photo.png (1 of 2), 25 % of all, ETA 0:0")
    assert lines[-1].startswith("small.png (2 of 2), 100 % of all, ETA 0:00:00")


@pytest.mark.full
def test_ctrl_c_is_heard_and_leaves_nothing_half_written(place):
    issp.save(issp.models.build("edsr-tiny", 2), "tiny.safetensors")
    picture(place / "in" / "big.png", 1500, 1500)
    words = ["upscale", "in", "--model", "tiny.safetensors", "-o", "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    code = "import sys, issp.cli.common as c; c._LINE_SECONDS = 0; import issp.cli; "
    code += "sys.exit(issp.cli.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    shown = ""
    while "% of all" not in shown:
        shown = process.stderr.readline()
    asked = time.perf_counter()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    waited = time.perf_counter() - asked
    assert process.returncode == 130 and "0 of 1 images are done" in rest, rest
    assert "Traceback" not in rest
    assert not (place / "out").exists() or written(place / "out") == []
    assert waited < 20, "it does not wait for the end of the image"


INTERRUPTED_PRODUCT = """
import os, signal, sys, threading, torch
from issp import cli, models

a = torch.ones(8000, 8000)  # a product takes seconds, without a moment for Python

def forward(self, x):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    torch.mm(a, a)
    raise AssertionError("it was not interrupted")

models.EDSR.forward = forward
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.full
def test_ctrl_c_does_not_wait_for_a_long_layer(place):
    picture(place / "a.png")
    words = ["upscale", "a.png", "--model", "m.safetensors", "-o", "out", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERRUPTED_PRODUCT, *words, "--tile", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 130 and done.stderr == "interrupted\n", done.stderr
    assert not (place / "out").exists()
