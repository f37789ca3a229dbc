"""Paths as users have them: `~`, spaces, names that are not UTF-8."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

import issp
from issp import cli, data
from issp.sr import config
from issp.utils import errors

pytest.importorskip("yaml", reason="runs keep their configuration as YAML")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with originals and a model, both in folders with a space."""
    folder = tmp_path / "home of me"
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("ISSP_CACHE", "~/cache")
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 36, 3), dtype=np.uint8)
    data.write_image(folder / "my photos" / "a.png", picture)
    model = issp.models.build("edsr-tiny", scale=2, num_feat=8, num_block=1)
    issp.save(model, "~/my models/m.safetensors")
    return folder


TRAIN = [
    *("train", "--model", "edsr-tiny", "--scale", "2", "--iters", "2", "--batch", "1"),
    *("--patch", "16", "--name", "run", "--no-tensorboard", "--device", "cpu", "--quiet"),
    *("--set", "network_g.num_feat=8", "network_g.num_block=1"),
]


def test_tilde_in_every_option(home, tmp_path, capsys):
    photos, model = "~/my photos", "~/my models/m.safetensors"
    command = [*TRAIN, f"--hr={photos}", f"--pretrained={model}", "--root=~/all runs"]
    assert cli.main([*command, "--val", f"mine={photos}"]) == 0
    run = home / "all runs" / "run"
    assert (run / "models" / "net_g_latest.safetensors").is_file()
    assert cli.main(["train", "~/all runs/run/config.yml", "--resume", "--quiet"]) == 0
    assert cli.main(["plot", "~/all runs/run", "--out=~/plots"]) == 0
    assert (home / "plots" / "curves.png").is_file()
    test = ["test", f"--model={model}", "--data", f"mine={photos}", photos, "--save=~/saved"]
    assert cli.main(test) == 0
    saved = home / "saved"
    assert (saved / "mine" / "a.png").is_file() and (saved / "my photos" / "a.png").is_file()
    assert cli.main(["upscale", photos, f"--model={model}", "--out=~/up"]) == 0
    assert (home / "up" / "a_x2.png").is_file()
    assert cli.main(["prepare-data", photos, "--out=~/set", "--scales", "2"]) == 0
    assert (home / "set" / "LR_bicubic" / "X2" / "ax2.png").is_file()
    assert not (tmp_path / "~").exists() and (home / "cache").is_dir()


def test_tilde_in_a_file_and_in_python(home):
    tree = {
        "name": "run",
        "scale": 2,
        "network_g": {"type": "edsr-tiny"},
        "datasets": {"train": {"dataroot_gt": "~/my photos"}},
        "path": {
            "experiments_root": "~/runs",
            "pretrain_network_g": "~/my models/m.safetensors",
            "resume_state": "~/1.state",
        },
        "train": {"total_iter": 1},
    }
    settings = config.parse(tree)
    assert settings.folder == home / "runs" / "run"
    assert settings.path.pretrain_network_g == str(home / "my models" / "m.safetensors")
    assert settings.path.resume_state == str(home / "1.state")
    assert issp.load("~/my models/m.safetensors").scale == 2
    picture = data.read_image("~/my photos/a.png")
    assert data.image_size("~/my photos/a.png") == picture.shape[:2] == (32, 36)
    assert len(data.ImageFolder("~/my photos/a.png")) == len(data.ImageFolder("~/my photos")) == 1
    data.write_image("~/new/b.png", picture)
    assert np.array_equal(data.read_image(home / "new" / "b.png"), picture)
    (home / "c.yml").write_text("name: x")
    assert config.load_yaml("~/c.yml") == {"name": "x"}


MODEL = "--model=~/my models/m.safetensors"
EMPTY = {
    "upscale -o": ["upscale", "~/my photos", MODEL, "-o", ""],
    "upscale IMAGE": ["upscale", "~/my photos", "", MODEL, "-o", "out"],
    "test --save": ["test", MODEL, "--data", "~/my photos", "--save", ""],
    "test --data": ["test", MODEL, "--data", "~/my photos", ""],
    "test --lr-images": ["test", MODEL, "--data", "~/my photos", "--lr-images", ""],
    "test --model": ["test", "--model", "", "--data", "~/my photos"],
    "train CONFIG.yml": ["train", ""],
    "train --root": [*TRAIN, "--hr", "~/my photos", "--root", ""],
    "train --hr": [*TRAIN, "--hr", "", "--root", "runs"],
    "train --pretrained": [*TRAIN, "--hr", "~/my photos", "--pretrained", "", "--root", "runs"],
    "train --val": [*TRAIN, "--hr", "~/my photos", "--val", "", "--root", "runs"],
    "plot RUN": ["plot", ""],
    "plot --out": ["plot", "run", "--out", ""],
    "prepare-data HR_FOLDER": ["prepare-data", "", "-o", "set"],
    "prepare-data -o": ["prepare-data", "~/my photos", "-o", ""],
    "demo --out": ["demo", "--iters", "1", "--out", ""],
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_path_is_refused_before_anything_is_written(home, tmp_path, name, capsys):
    """As of a variable in a script that is not set; it is not the working folder."""
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(EMPTY[name]) == 2
    command, argument = name.split()
    error = capsys.readouterr().err
    assert error.startswith(f"issp {command}") and error.count("\n") == 1
    assert ": error: argument " in error
    assert argument in error.split("argument ")[1].split(" is empty ")[0].split("/")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_path_in_a_file_and_in_python_is_refused(home, capsys):
    sentence = "the name of a file or folder is empty: write . for the working folder"
    tree = {"name": "run", "scale": 2, "network_g": {"type": "edsr-tiny"}}
    tree |= {"train": {"total_iter": 1}, "datasets": {"train": {"dataroot_gt": "~/my photos"}}}
    for key in ("path.pretrain_network_g", "path.resume_state", "path.experiments_root"):
        section, name = key.split(".")
        with pytest.raises(errors.ConfigError, match=f"{key} {sentence}"):
            config.parse({**tree, section: {name: ""}})
    assert cli.main(["test", MODEL, "--data", "mine="]) == 2
    assert f"issp test: error: {sentence}\n" == capsys.readouterr().err
    for key in ("lq_root", "meta_info_file"):
        with pytest.raises(ValueError, match=sentence):
            data.PairedFolder("~/my photos", 2, **{key: ""})
    with pytest.raises(ValueError, match="filename_tmpl needs {}"):
        data.PairedFolder("~/my photos", 2, filename_tmpl="")
    for call in (issp.load, data.read_image, data.ImageFolder, config.load_yaml, data.image_size):
        with pytest.raises(ValueError, match=sentence):
            call("")
    with pytest.raises(ValueError, match=sentence):
        issp.save(issp.load("~/my models/m.safetensors"), "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_working_folder_that_is_gone_is_named(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    example = cli.command_module(command).EXAMPLE.replace("\n             ", " ").splitlines()[0]
    assert cli.main(shlex.split(example)[1:]) == 2
    sentence = "the working folder has been removed: change to one that is there"
    assert capsys.readouterr().err == f"issp {command}: error: {sentence}\n"


WRITING = {
    "upscale": ["upscale", "~/my photos", MODEL, "-o"],
    "test": ["test", MODEL, "--data", "~/my photos", "--save"],
    "prepare-data": ["prepare-data", "~/my photos", "--scales", "2", "-o"],
    "train": [*TRAIN, "--hr", "~/my photos", "--root"],
    "demo": ["demo", "--iters", "1", "--out"],
}


@pytest.mark.parametrize("place", ["file", "below a file", "link to nothing"])
@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_cannot_hold_results_is_refused_before_any_work(
    home, tmp_path, monkeypatch, capsys, command, place
):
    if command == "demo":
        pytest.importorskip("skimage", reason="the demo's photographs")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out = {"file": "file", "below a file": "file/results", "link to nothing": "link"}[place]
    monkeypatch.setattr(issp.models.EDSR, "restore", lambda *_: pytest.fail("computed"))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([*WRITING[command], out]) == 2
    kind = "a link to nothing" if place == "link to nothing" else "a file"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"issp {command}: error: ") and "[Errno" not in error
    if (command, place) == ("upscale", "file"):
        assert error.endswith("-o file is a file: name a folder, or a file such as result.png")
    else:
        assert f"cannot write into {out}" in error and f" is {kind}; choose a folder" in error
    assert [x for x in sorted(tmp_path.rglob("*")) if "cache" not in x.parts] == before


def test_the_suffix_of_results_may_be_empty(home):
    assert cli.main(["upscale", "~/my photos", MODEL, "-o", "out", "--suffix", ""]) == 0
    assert os.listdir("out") == ["a.png"]


@pytest.mark.full
def test_names_that_are_not_utf8(home):
    """In the terminal of a user, which refuses text that it cannot show."""
    strange = os.fsdecode(b"caf\xe9 set")
    try:
        os.rename(home / "my photos", home / strange)
        os.rename(home / strange / "a.png", home / strange / os.fsdecode(b"\xfc ber.png"))
    except OSError as error:
        pytest.skip(f"the file system refuses such names: {error}")
    root, model = str(home / os.fsdecode(b"runs\xff")), str(home / "my models/m.safetensors")
    source, out = str(home / strange), str(home / "out")
    os.makedirs(root)
    for command in (
        [
            *TRAIN[:-4],
            *TRAIN[-3:],
            "--hr",
            source,
            "--val",
            source,
            "--root",
            root,
            "--save-images",
        ],
        ["plot", f"{root}/run", "--out", out],
        ["train", f"{root}/run/config.yml", "--resume"],
        ["test", "--model", f"{root}/run/models/net_g_latest.safetensors", "--data", source],
        ["test", "--model", model, "--data", source, "--save", out, "--per-image"],
        ["upscale", source, "--model", model, "--out", out],
        ["prepare-data", source, "--out", out, "--scales", "2"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "issp", *command],
            capture_output=True,
            env={
                **os.environ,
                "PYTHONIOENCODING": "utf-8:strict",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        assert done.returncode == 0, (command, done.stderr)
    made = {os.fsencode(file.name) for file in (home / "out").rglob("*.png")}
    assert b"\xfc ber_x2.png" in made and b"\xfc berx2.png" in made
    scores = (home / root / "run" / "log" / "validation.csv").read_text(encoding="utf-8")
    assert "caf\\udce9 set" in scores
