"""`issp test`: what is scored against what, and how the table says it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import issp
from issp import cli, data
from issp.sr import evaluate, results

pytest.importorskip("safetensors", reason="models are kept as safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)  # a fixture of a module comes before the seed of a test
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    issp.save(issp.models.build("edsr-tiny", scale=4, num_feat=8, num_block=1), path)
    return str(path)


def picture(seed, height=48, width=52):
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / (3 + c + seed)) * 60 + np.cos(y * x / 99) * 50 + 128 for c in range(3)]
    return np.stack(planes, 2).astype(np.uint8)


@pytest.fixture
def urban(tmp_path):
    """Two images as Urban100 is published; its LR images are not those that we would make."""
    folder = tmp_path / "Urban100" / "image_SRF_4"
    for i in range(2):
        data.write_image(folder / f"img_00{i}_SRF_4_HR.png", picture(i))
        low = 255 - data.imresize(picture(i), 1 / 4)
        data.write_image(folder / f"img_00{i}_SRF_4_LR.png", low)
    return folder


def rows(text):
    """Cells of the table below its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def score(capsys, *arguments):
    assert cli.main(["test", "--device", "cpu", *map(str, arguments)]) == 0
    return rows(capsys.readouterr().out)


def test_urban100_as_published(model, urban, tmp_path, capsys):
    network = issp.load(model)
    values = []
    for i in range(2):
        low = data.read_image(urban / f"img_00{i}_SRF_4_LR.png")
        sr = evaluate.super_resolve(network, low)
        values.append(issp.metrics.psnr(sr, picture(i), crop_border=4))
    wanted = ["Urban100", "2", "read", f"{np.mean(values):.2f}"]
    for folder in (urban, urban.parent):
        assert score(capsys, "--model", model, "--data", folder)[0][:4] == wanted
    saved = ["--save", tmp_path / "saved", "--per-image", "--no-bicubic"]
    (first, _, total) = score(capsys, "--model", model, "--data", urban, *saved)
    assert first[0] == "Urban100/img_000_SRF_4" and len(total) == 5
    assert (tmp_path / "saved" / "Urban100" / "img_000_SRF_4.png").is_file()


def test_lr_images_are_read_or_made(model, urban, tmp_path, capsys):
    for i in range(2):
        data.write_image(tmp_path / "Set2" / "HR" / f"{i}.png", picture(i))
        low = data.read_image(urban / f"img_00{i}_SRF_4_LR.png")
        data.write_image(tmp_path / "low" / f"{i}x4.png", low)
        data.write_image(tmp_path / "pairs" / f"{i}_GT.png", picture(i))
        data.write_image(tmp_path / "pairs" / f"{i}_in.png", low)
    base, folder = ["--model", model, "--data"], tmp_path / "Set2" / "HR"
    ((name, _, source, *made),) = score(capsys, *base, folder)
    assert (name, source) == ("Set2", "made")
    ((_, _, source, *read),) = score(capsys, *base, folder, "--lr-images", tmp_path / "low")
    assert source == "read" and float(read[2]) < float(made[2]) - 5  # bicubic: of a negative
    assert score(capsys, *base, urban) == [["Urban100", "2", "read", *read]]
    template = tmp_path / "low" / "{}x{s}.png"
    assert score(capsys, *base, folder, "--lr-images", template)[0][2:] == ["read", *read]
    pairs = [*base, f"mine={tmp_path}/pairs/{{}}_GT", "--lr-images", "{}_in"]
    assert score(capsys, *pairs) == [["mine", "2", "read", *read]]
    both = [*base, folder, urban, "--lr-images", tmp_path / "low", urban / "{}_LR"]
    assert [row[2:] for row in score(capsys, *both)] == [["read", *read]] * 2


def test_rows_for_tables(model, urban, tmp_path, capsys):
    csv = tmp_path / "made" / "scores.csv"
    base = ["--model", model, "--data", urban, "--csv", csv]
    ((_, count, _, psnr, similarity, cubic, _),) = score(capsys, *base, "--seed", 7)
    own, bicubic = results.read(csv)
    assert (f"{own.psnr:.2f}", f"{own.ssim:.4f}", f"{bicubic.psnr:.2f}") == (
        psnr,
        similarity,
        cubic,
    )
    assert own.psnr != float(psnr)  # all digits
    expected = results.Result(
        "dense", "edsr-tiny", 4, 0, 7, "Urban100", "y", own.psnr, own.ssim, int(count), "read",
        zeros=0, model=model,
    )  # fmt: skip
    assert own == expected
    expected = replace(expected, method="bicubic", arch="", sparsity=None, seed=None, model="")
    assert replace(bicubic, psnr=own.psnr, ssim=own.ssim) == replace(expected, zeros=None)
    score(capsys, *base, "--seed", 7)  # the same again
    assert results.read(csv) == [own, bicubic]
    score(capsys, *base, "--channels", "rgb", "--crop-border", 0, "--no-bicubic", "--method", "x")
    assert [row.psnr for row in results.read(csv)[:2]] == [own.psnr, bicubic.psnr]
    (other,) = results.read(csv)[2:]
    assert (other.method, other.channel, other.crop_border) == ("x", "rgb", 0)


def test_rows_for_tables_are_refused_before_anything_is_computed(model, urban, tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["test", "--data", str(urban), "--model", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    half = issp.load(model)
    with torch.no_grad():
        half.body[0].conv1.weight[:5] = 0
    issp.save(half, tmp_path / "half.safetensors")
    csv = ["--csv", tmp_path / "new.csv"]
    assert "does not say how it was pruned" in refused(tmp_path / "half.safetensors", *csv)
    assert "sparsity is 95.0: it must be a share" in refused(model, *csv, "--sparsity", 95)
    assert "--seed goes into a results file: give --csv FILE" in refused(model, "--seed", 1)
    bicubic = "method is bicubic, but edsr-tiny is a network: name its method"
    assert bicubic in refused(model, *csv, "--method", "bicubic")
    sparse = [tmp_path / "half.safetensors", *csv, "--method", "dense"]
    assert "method is dense, but sparsity is " in refused(*sparse)
    assert "there is no folder" in refused(model, *csv, "--data", tmp_path / "absent")
    assert not (tmp_path / "new.csv").exists()
    (tmp_path / "notes.csv").write_text("a,b\n")
    assert "is not a results file" in refused(model, "--csv", tmp_path / "notes.csv")
    assert "cannot write" in refused(model, "--csv", "/proc/x/y.csv")


def test_training_says_where_lr_images_come_from(urban, tmp_path, capsys):
    data.write_image(tmp_path / "photos" / "a.png", picture(3))
    command = ["train", "--model", "edsr-tiny", "--scale", "4", "--iters", "1", "--batch", "1"]
    command += ["--patch", "32", "--hr", str(tmp_path / "photos"), "--val", str(urban)]
    command += ["--val-freq", "1", "--root", str(tmp_path), "--name", "run", "--no-tensorboard"]
    small = ["--set", "network_g.num_feat=8", "network_g.num_block=1"]
    assert cli.main([*command, "--device", "cpu", *small]) == 0
    assert "images: training 1 (LR made), Urban100 2 (LR read)\n" in capsys.readouterr().out


def test_wrong_lr_images_are_refused(model, urban, tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["test", "--model", model, "--data", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    data.write_image(tmp_path / "x2" / "ax2.png", picture(0, 24, 26))
    data.write_image(tmp_path / "hr" / "a.png", picture(0))
    wrong = refused(tmp_path / "hr", "--lr-images", tmp_path / "x2" / "{}x2")
    assert "ax2.png is 26 x 24 pixels but 13 x 12 belong to" in wrong
    assert "no file ax4" in refused(tmp_path / "hr", "--lr-images", tmp_path / "x2")
    assert "--lr-images names 1 for 2" in refused(tmp_path / "hr", urban, "--lr-images", "low")
    assert "a.png is a file; a folder" in refused(tmp_path / "hr" / "a.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no images (it holds no files" in refused(empty)
    data.write_image(tmp_path / "LR_bicubic" / "X4" / "a.png", picture(0))
    lr_folder = refused(tmp_path / "LR_bicubic" / "X4")
    assert "is a folder of low-resolution images by its name" in lr_folder


def test_exact_and_doubled_images_are_named(model, tmp_path, capsys, monkeypatch):
    for name, seed in (("flat", None), ("photo", 1), ("photo (1)", 1)):
        image = np.full((48, 52, 3), 90, np.uint8) if seed is None else picture(seed)
        data.write_image(tmp_path / "Set3" / f"{name}.png", image)
    monkeypatch.setattr(evaluate, "of_model", lambda model, tile: evaluate.bicubic(4))
    assert cli.main(["test", "--model", model, "--data", str(tmp_path / "Set3")]) == 0
    text = capsys.readouterr().out
    assert "Set3: 1 of 3 images are reproduced exactly; their PSNR is infinite and not in" in text
    assert "Set3: photo.png is the same file as photo (1).png; both count" in text
    sr = data.imresize(data.imresize(picture(1), 1 / 4), 4)
    wanted = f"{issp.metrics.psnr(sr, picture(1), 4):.2f}"
    assert rows(text)[0][3] == rows(text)[0][5] == wanted


def test_a_set_with_a_small_image_is_refused_before_anything_is_scored(model, tmp_path, capsys):
    data.write_image(tmp_path / "a" / "photo.png", picture(1))
    data.write_image(tmp_path / "b" / "tiny.png", picture(1)[:16])
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    command = ["test", "--model", model, "--save", str(tmp_path / "out"), "--data", *folders]
    assert cli.main(command) == 2
    assert "tiny.png is 52 x 16 pixels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--crop-border", "2"]) == 0


NUMBERS = [
    ("--tile", "-8", "--tile: tile must be at least 1, got -8; 0 cuts nothing"),
    ("--threads", "0", "--threads is 0: it must be from 1 to "),
    ("--scale", "-4", "is a x4 model: drop --scale -4"),
]


@pytest.mark.parametrize(
    "command, flag, value, sentence",
    [
        ("test", "--crop-border", "-1", "the crop border is -1: it must be at least 0"),
        *(("test", *case) for case in NUMBERS),
        *(("upscale", *case) for case in NUMBERS),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_computed(
    model, tmp_path, capsys, monkeypatch, command, flag, value, sentence
):
    def compute(*_, **__):
        raise AssertionError("an image was computed")

    monkeypatch.setattr(evaluate, "evaluate", compute)
    monkeypatch.setattr(evaluate, "check_sizes", compute)
    monkeypatch.setattr(issp.models.SuperResolver, "forward", compute)
    data.write_image(tmp_path / "a" / "photo.png", picture(1))
    arguments = ["--data", str(tmp_path / "a"), "--save", str(tmp_path / "out")]
    if command == "upscale":
        arguments = [str(tmp_path / "a"), "-o", str(tmp_path / "out")]
    assert cli.main([command, "--model", model, *arguments, flag, value]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_save_does_not_overwrite_what_is_scored(model, tmp_path, capsys, linked):
    original = tmp_path / "sets" / "Set5" / "baby.png"
    data.write_image(original, picture(0))
    before, out = original.read_bytes(), tmp_path / "sets"
    if linked:
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "sets")
    command = ["test", "--model", model, "--data", str(original.parent), "--save", str(out)]
    assert cli.main(command) == 2
    assert "baby.png, which is an image of --data" in capsys.readouterr().err
    assert original.read_bytes() == before
    assert cli.main([*command[:-1], str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "Set5" / "baby.png").is_file()


def test_sets_that_were_scored_are_shown_when_a_later_one_fails(model, tmp_path, capsys):
    data.write_image(tmp_path / "a" / "photo.png", picture(1))
    data.write_image(tmp_path / "b" / "photo.png", picture(2))
    good = score(capsys, "--model", model, "--data", tmp_path / "a")
    damaged = tmp_path / "b" / "photo.png"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    command = ["test", "--model", model, "--data", str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(command) == 2
    shown = capsys.readouterr()
    assert rows(shown.out) == good
    assert "b/photo.png is damaged or cut short" in shown.err


def test_folders_and_files_of_any_name(model, tmp_path, capsys):
    data.write_image(tmp_path / "set" / "b{}c" / "new\nline\tand [b].png", picture(1))
    table = score(capsys, "--model", model, "--per-image", "--data", tmp_path / "set" / "b{}c")
    assert [row[0] for row in table] == [r"set/new\nline\tand [b]", "set"]


def test_a_network_of_one_channel_is_trained_scored_and_used(tmp_path, capsys):
    grey = np.add.outer(np.arange(48), np.arange(52)).astype(np.uint8)
    data.write_image(tmp_path / "grey" / "g.png", grey)
    data.write_image(tmp_path / "colour" / "c.png", picture(0))
    folders = [str(tmp_path / "grey"), str(tmp_path / "colour")]
    command = ["train", "--model", "EDSR", "--scale", "2", "--iters", "2", "--batch", "1"]
    command += ["--patch", "16", "--hr", folders[0], "--val", *folders, "--root", str(tmp_path)]
    command += ["--name", "run", "--no-tensorboard", "--quiet", "--device", "cpu", "--set"]
    command += ["network_g.num_in_ch=1", "network_g.num_out_ch=1", "network_g.num_feat=8"]
    assert cli.main([*command, "network_g.num_block=1", "network_g.rgb_mean=[0.5]"]) == 0
    model = ["--model", str(tmp_path / "run" / "models" / "net_g_latest.safetensors")]
    assert len(score(capsys, *model, "--data", *folders)) == 2
    assert cli.main(["upscale", *folders, *model, "-o", str(tmp_path / "up")]) == 0
    assert np.ptp(data.read_image(tmp_path / "up" / "g_x2.png"), axis=2).max() == 0
    assert np.ptp(data.read_image(tmp_path / "up" / "c_x2.png"), axis=2).max() > 0
