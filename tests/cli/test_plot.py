"""`issp plot` and its sub-commands: examples, files, one-line errors."""

import shlex

import numpy as np
import pytest

import issp
from issp import cli, data
from issp.cli import plot
from issp.sr import evaluate
from issp.sr.plots import crops, drawing
from tests.sr.plots.conftest import GRADIENTS, MASKS, gradients, make_run, masks, write_log

pytest.importorskip("matplotlib", reason="plots are matplotlib's")
pytest.importorskip("yaml", reason="runs keep their configuration as YAML")
pytest.importorskip("safetensors", reason="models are kept as safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two recorded runs, images of four sizes and two models, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        folder = make_run(tmp_path / "runs" / name)
        layers = ("conv_first", "body.0.conv1")
        write_log(folder / "log" / "gradients.csv", GRADIENTS, gradients(layers, (5, 25)))
        write_log(folder / "log" / "masks.csv", MASKS, masks(layers, (5, 10), lambda *_: 2))
        (folder / "log" / "train.csv").write_text(
            "iteration,stage,lr,loss,psnr,flips,threshold,selected,zeros,seconds,update_share\n"
            "5,pruning,0.1,0.1,,4,0.1,0.5,0.0,0.1,0.1\n"
        )
    generator = np.random.default_rng(0)
    for name, shape in (("photo", (50, 70, 3)), ("other", (41, 33, 3))):
        image = generator.integers(0, 256, shape, dtype=np.uint8)
        data.write_image(tmp_path / "images" / f"{name}.png", image)
    for name, scale in (("x2", 2), ("x4", 4)):
        model = issp.models.build("edsr-tiny", scale=scale, num_feat=8, num_block=1)
        issp.save(model, f"{name}.safetensors")
    return tmp_path


def command(*words):
    return cli.main(["plot", *map(str, words)])


def refused(capsys, *words):
    """The one line of an error with status 2."""
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("issp plot"), error
    return error


@pytest.mark.parametrize("name", plot.COMMANDS)
def test_help_of_every_figure_has_an_example_that_parses(name, capsys):
    assert command(name, "--help") == 0
    text = capsys.readouterr().out
    module = cli.command_module("plot").subcommand(name)
    assert "example" in text and module.EXAMPLE.split("\n")[0] in text
    for line in module.EXAMPLE.splitlines():
        words = shlex.split(line)
        assert words[0] == "issp"
        args, unknown = cli.build_parser().parse_known_args(words[1:])
        assert args.command in ("plot", "train") and not unknown
    assert name in module.EXAMPLE or name == "curves"


@pytest.mark.full
def test_without_a_figure_it_draws_curves(here, capsys):
    for words in (["runs/a"], ["curves", "runs/a"], ["--debug", "runs/a"], ["-o", "out", "runs/a"]):
        assert command(*words) == 0
        folder = "out" if "out" in words else "runs/a/visualization"
        names = [f"{folder}/curves.png", f"{folder}/gradients.png"]
        assert capsys.readouterr().out.splitlines() == names
        assert all((here / name).is_file() for name in names)
    assert command("runs/a", "second=runs/b", "--out", "both") == 0
    assert (here / "both/a/curves.png").is_file() and (here / "both/second/curves.png").is_file()
    # A run of the name of a figure is a path like any other.
    (here / "runs/a").rename(here / "dynamics")
    assert command("./dynamics") == 0


@pytest.mark.parametrize("figure", ["curves", "trainability", "dynamics", "crops"])
def test_where_nothing_can_be_written_is_refused_before_anything_is_drawn(
    here, capsys, figure, monkeypatch
):
    monkeypatch.setattr(drawing, "new_figure", lambda *_: pytest.fail("drawn"))
    words = [figure, "runs/a", "runs/b", "-o", "x2.safetensors/made"]
    if figure == "crops":
        words[1:3] = ["--images", "images/photo.png", "--box", "10,4,40,24", "--scale", "2"]
    assert "x2.safetensors is a file; choose a folder" in refused(capsys, *words)


def test_a_run_that_cannot_be_read_stops_the_pictures_of_all(here, capsys):
    assert "is not a run of `issp train`" in refused(capsys, "runs/a", "runs/absent", "-o", "made")
    assert not (here / "made").exists()


def test_misspelt_figures_and_options(here, capsys):
    assert "unknown figure 'dynamcis': did you mean 'dynamics'?" in refused(capsys, "dynamcis", "a")
    assert "RUN" in refused(capsys)
    assert "did you mean '--layers'?" in refused(capsys, "dynamics", "runs/a", "--layer", "1")
    assert "--index-base 2: known: 0, 1" in refused(capsys, "dynamics", "a", "--index-base", "2")
    assert "no config.yml" in refused(capsys, "trainability", "nowhere")
    both = refused(capsys, "dynamics", "runs/a", "x/../runs/a")
    assert "are both called 'a': write NAME=DIR for one" in both


def test_trainability_and_dynamics(here, capsys):
    assert command("trainability", "A=runs/a", "runs/b", "--layers", "1") == 0
    assert capsys.readouterr().out == "trainability.png\n"
    assert data.read_image("trainability.png").std() > 5
    assert (
        command("dynamics", "A=runs/a", "runs/b", "--layers", "0", "--index-base=0", "-o", "d") == 0
    )
    table = capsys.readouterr().out
    assert table.startswith("d/dynamics.png\n") and (here / "d/dynamics.png").is_file()
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["run", "conv_first", "all recorded layers", "% of weights"]
    assert cells[2] == ["A", "2", "4", f"{400 / (216 + 576):.3g}"] and cells[3][0] == "b"
    assert command("trainability", "runs/a", "-o", "picture.svg") == 0
    assert (here / "picture.svg").read_bytes().startswith(b"<?xml")
    said = refused(capsys, "trainability", "runs/a", "-o", "picture.jpg")
    assert "write a .png, .pdf, .svg file, or name a folder" in said
    (here / "runs/b/log/gradients.csv").unlink()
    said = refused(capsys, "trainability", "runs/a", "runs/b")
    assert "b has no runs/b/log/gradients.csv: train it with --set logger.grad_stats_freq" in said


@pytest.fixture
def sheets(monkeypatch):
    """The figures of `issp plot crops`."""
    figures = []
    monkeypatch.setattr(drawing, "write", lambda figure, path: figures.append(figure))
    return figures


def test_crops_are_those_of_issp_upscale(here, sheets, capsys):
    box = ("--box", "10,4,40,24", "--images", "images/photo.png")
    assert command("crops", *box, "--models", "net=x2.safetensors", "-o", "out") == 0
    assert capsys.readouterr().out == "out/crops_photo.png\n"
    hr = data.read_image("images/photo.png")
    lr = data.imresize(hr, 1 / 2)
    sr = evaluate.super_resolve(issp.load("x2.safetensors"), lr)
    titles = {axis.get_title(): axis for axis in sheets[0].axes}
    assert list(titles) == ["photo", "original (HR)", "bicubic", "net"]
    for name, image in (("net", sr), ("bicubic", data.imresize(lr, 2)), ("original (HR)", hr)):
        assert np.array_equal(titles[name].images[0].get_array(), image[4:24, 10:40])
    inside = issp.metrics.psnr(sr[4:24, 10:40], hr[4:24, 10:40], 0)
    label = f"{inside:.2f} / {issp.metrics.psnr(sr, hr, 2):.2f} dB"
    assert titles["net"].get_xlabel() == label
    assert sheets[0].get_supxlabel().startswith("x2; PSNR on Y, in the box / in the image without")
    assert command("crops", *box, "--models", "x2.safetensors", "--channels", "rgb") == 0
    rgb = issp.metrics.psnr(sr, hr, 2, y_channel=False)
    assert sheets[1].axes[-1].get_xlabel().endswith(f" / {rgb:.2f} dB")


def test_low_resolution_images_are_read_as_test_reads_them(here, sheets):
    hr = data.read_image("images/photo.png")
    lr = data.imresize(hr, 1 / 2)
    lr[:] = 7
    data.write_image("pairs/photo_HR.png", hr)
    data.write_image("pairs/photo_LR.png", lr)
    data.write_image("set/HR/photo.png", hr)
    data.write_image("set/LR_bicubic/X2/photox2.png", lr)
    data.write_image("lr/photo.png", lr)
    cases = (
        ("pairs",), ("pairs/photo_HR.png",), ("set",), ("images/photo.png", "--lr-images", "lr"),
    )  # fmt: skip
    for images in cases:
        assert command("crops", "--scale", 2, "--box", "10,4,40,24", "--images", *images) == 0
        bicubic = {axis.get_title(): axis for axis in sheets[-1].axes}["bicubic"]
        assert (bicubic.images[0].get_array() == 7).all()
        assert sheets[-1].get_supxlabel().endswith("low-resolution image read")


def test_boxes_of_the_paper(here, sheets, monkeypatch, capsys):
    """Images of the sizes that the boxes need, under both names of Urban100."""
    monkeypatch.setattr(crops, "PAPER_BOXES", {"img_072": (8, 4, 24, 20), "img_012b": (0, 0, 9, 9)})
    picture = data.read_image("images/photo.png")[:48, :64]
    for name in ("img_072_SRF_4", "img_012_SRF_4"):
        data.write_image(f"urban/image_SRF_4/{name}_HR.png", picture)
        data.write_image(f"urban/image_SRF_4/{name}_LR.png", data.imresize(picture, 1 / 4))
    words = ("crops", "--images", "urban", "--models", "x4.safetensors")
    assert command(*words, "--figure", "all", "--out", "figures") == 0
    names = ["figures/crops_img_072.png", "figures/crops_img_012b.png"]
    assert capsys.readouterr().out.splitlines() == names
    assert [figure.axes[0].get_title() for figure in sheets] == ["img_072_SRF_4", "img_012_SRF_4"]
    assert np.array_equal(sheets[0].axes[1].images[0].get_array(), picture[4:20, 8:24])
    said = refused(capsys, *words, "--figure", "img_020")
    assert (
        "unknown figure 'img_020': did you mean" in said and "for another image use --box" in said
    )
    said = refused(capsys, *words, "--figure", "all", "--out", "one.png")
    assert "--out one.png is one file for 2 figures: name a folder" in said


def test_what_crops_refuses(here, capsys):
    photo, box = ("crops", "--images", "images/photo.png"), ("--box", "10,4,40,24")
    model = ("--models", "x2.safetensors")
    for words, said in (
        ((*photo, *model), "give --box X1,Y1,X2,Y2, or --figure"),
        ((*photo, *box, "--figure", "all"), "give --box X1,Y1,X2,Y2, or --figure"),
        ((*photo, "--box", "1,2,3", *model), "must be four whole numbers"),
        ((*photo, "--box", "10,4,80,24", *model), "does not lie in photo, which is 70 x 50 pixels"),
        ((*photo, *box), "without --models, bicubic needs --scale"),
        ((*photo, *box, "--scale", "2", "--tile", "9"), "--tile is about models: give --models"),
        ((*photo, *box, *model, "x4.safetensors"), "different scales (x2 x2, x4 x4)"),
        ((*photo, *box, *model, "--scale", "4"), "x2.safetensors is a x2 model: drop --scale 4"),
        ((*photo, *box, "--models", "nothing.safetensors"), "nothing.safetensors"),
        ((*photo, *box, *model, "./x2.safetensors"), "are both called 'x2': write NAME=FILE"),
        (
            (*photo, *box, *model, "-o", "images/photo.png"),
            "photo.png would overwrite an image or a model",
        ),
        ((*photo, *box, *model, "--threads", "0"), "--threads is 0"),
        (("crops", "--images", "images", *box, *model), "holds 2 images: name one file, such as"),
        (("crops", "--images", "no.png", *box, *model), "there is no image no.png"),
        (("crops", "--images", "images", "--figure", "img_072", *model), "needs one image img_072"),
        (("crops", *box, *model), "--images"),
    ):
        assert said in refused(capsys, *words)
    (here / "images" / "cut.png").write_bytes((here / "images" / "photo.png").read_bytes()[:300])
    assert "cut.png" in refused(capsys, "crops", "--images", "images/cut.png", *box, *model)
    data.write_image("pairs/a_LR.png", data.read_image("images/photo.png"))
    data.write_image("pairs/a_HR.png", data.read_image("images/photo.png"))
    said = refused(capsys, "crops", "--images", "pairs/a_LR.png", *box, *model)
    assert "a_LR.png is a low-resolution image by its name" in said
    said = refused(capsys, "crops", "--images", "pairs/a_HR.png", *box, *model)
    assert "a_LR.png is 70 x 50 pixels but 35 x 25 belong" in said
    assert not list(here.glob("crops*"))
