"""The command line: working examples, one-line errors with status 2, Ctrl-C loses nothing."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from issp import cli, data
from issp.sr import demo, logging
from issp.utils import denormals, errors

pytest.importorskip("PIL", reason="the commands read and write images")
pytest.importorskip("yaml", reason="runs keep their configuration as YAML")
pytest.importorskip("safetensors", reason="models are kept as safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:48, :40]
    for i in range(3):
        image = np.stack([(np.sin(x / (2 + i)) + np.cos(y / 5)) * 60 + 127] * 3, axis=2)
        data.write_image(folder / f"p{i}.png", image.astype(np.uint8))
    return folder


def train_arguments(photos, root, iters):
    return [
        "train", "--model", "edsr-tiny", "--scale", "2", "--hr", str(photos),
        "--val", f"mine={photos}", "--sparsity", "0.9", "--iters", str(iters), "--batch", "2",
        "--patch", "16", "--name", "tiny", "--root", str(root), "--no-tensorboard",
        "--set", "network_g.num_feat=8", "network_g.num_block=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The folder of a finished run of the command."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denormals, "flush_denormals", lambda: True)
        patch.setenv("ISSP_CACHE", str(root / "cache"))
        assert cli.main(train_arguments(photos, root, 8)) == 0
    return root / "tiny"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example_that_parses(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "example" in text and f"issp {name}" in text
    parser = cli.build_parser()
    lines = cli.command_module(name).EXAMPLE.replace("\n             ", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        assert words[:2] == ["issp", name]
        if "--help" not in words:
            args, unknown = parser.parse_known_args(words[1:])
            assert args.command == name and not unknown


def test_the_list_of_commands(capsys):
    assert cli.main([]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {cli.command_module(name).HELP}" in text for name in cli.COMMANDS)
    assert "`issp COMMAND --help` shows an example" in text


def one_line_error(capsys, argv, *parts):
    assert cli.main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("issp"), error
    assert "Traceback" not in error
    for part in parts:
        assert part in error, error


def test_errors_are_one_line_with_status_2(capsys, tmp_path, photos, trained):
    model = trained / "models" / "net_g_latest.safetensors"
    one_line_error(capsys, ["trian"], "unknown command 'trian': did you mean 'train'?")
    one_line_error(
        capsys,
        ["train", "--spasity", "0.9"],
        "unknown argument --spasity: did you mean '--sparsity'?",
    )
    one_line_error(capsys, ["--versoin"], "did you mean '--version'?")
    one_line_error(capsys, ["info", "now"], "unknown argument now")
    rgb = ["test", "--model", "m", "--data", "d", "--channels", "rbg"]
    one_line_error(capsys, rgb, "unknown --channels 'rbg': did you mean 'rgb'?")
    one_line_error(capsys, ["train", "--scale", "two"], "--scale")
    one_line_error(capsys, ["train"], "--model, --scale, --iters")
    one_line_error(capsys, ["train", tmp_path / "none.yml"], "none.yml")
    tiny = ["train", "--model", "edsr-tini", "--scale", 2, "--iters", 2, "--root", tmp_path / "e"]
    one_line_error(capsys, tiny, "edsr-tiny")
    tiny[2] = "edsr-tiny"
    one_line_error(capsys, [*tiny, "--hr", tmp_path / "nowhere"], "nowhere")
    one_line_error(capsys, [*tiny, "--set", "trian.lr=1"], "'train'")
    for flag in (["--freeze-at", 1], ["--shrink", 0.5], ["--method", "iht"], ["--exclude", "a"]):
        one_line_error(capsys, [*tiny, *flag], f"{flag[0]} is about pruning: add --sparsity")
    one_line_error(capsys, [*tiny, "--sparsity", 95], "sparsity.ratio is 95: write 0.95 for 95 %")
    for text in ("[1, 2]", "~", "{1: 2}", "5", "{train: [1]}", "{train: ~, val: ~, test: 3}"):
        (tmp_path / "odd.yml").write_text(f"name: a\nscale: 2\nnetwork_g: a\ndatasets: {text}\n")
        for flags in (["--val", photos], ["--hr", photos], ["--val", photos, "--hr", photos]):
            one_line_error(capsys, ["train", tmp_path / "odd.yml", *flags], "")
    one_line_error(capsys, ["demo", "--iters", 0, "--out", tmp_path / "e"], "total_iter is 0")
    for minutes in ("0", "-1", "nan", "inf"):
        demo_of = ["demo", "--minutes", minutes, "--out", tmp_path / "e"]
        one_line_error(capsys, demo_of, f"--minutes is {float(minutes)}: it must be positive")
    assert not (tmp_path / "e").exists(), "nothing is written before everything is checked"
    one_line_error(capsys, ["test", "--model", tmp_path / "m.pth", "--data", photos], "m.pth")
    one_line_error(capsys, ["plot", tmp_path], "not a run")

    (tmp_path / "bad.png").write_bytes((photos / "p0.png").read_bytes()[:200])
    upscale = ["upscale", tmp_path / "bad.png", "--model", model, "-o", tmp_path / "out"]
    one_line_error(capsys, upscale, "bad.png")
    one_line_error(capsys, [*upscale[:-1], photos, "--suffix="], "bad.png")
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:500])
    upscale = ["upscale", photos, "--model", tmp_path / "cut.safetensors", "-o", tmp_path / "out"]
    one_line_error(capsys, upscale, "cut.safetensors", "damaged or cut short")
    upscale = ["upscale", photos, "--model", model, "-o", photos, "--suffix="]
    one_line_error(capsys, upscale, "would be overwritten")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="damaged"):
        cli.main(
            ["upscale", str(tmp_path / "bad.png"), "--debug", "--model", str(model), "-o", "x"]
        )


def test_train_test_upscale_plot(trained, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    model = str(trained / "models" / "net_g_latest.safetensors")
    assert logging.read_csv(trained / "log" / "train.csv")[-1]["iteration"] == 8

    saved = tmp_path / "saved"
    test = ["test", "--model", model, "--data", f"mine={photos}", "--save", str(saved)]
    assert cli.main([*test, "--per-image"]) == 0
    text = capsys.readouterr().out
    assert "| mine/p2 " in text and "| mine " in text and "bicubic" in text
    kept = 8 * 27 + 3 * 576 + 32 * 72 + 3 * 72 - sum(
        -(-9 * n // 10) for n in (8 * 27, 576, 576, 576, 32 * 72, 3 * 72)
    )  # fmt: skip
    assert f"{kept:,} of" in text
    assert data.read_image(saved / "mine" / "p1.png").shape == (48, 40, 3)

    out = tmp_path / "big"
    assert cli.main(["upscale", str(photos), "--model", model, "-o", str(out), "--tile", "32"]) == 0
    assert data.read_image(out / "p0_x2.png").shape == (96, 80, 3)
    assert cli.main(["plot", str(trained), "-o", str(tmp_path / "plots")]) == 0
    for name in ("curves.png", "layers.png"):
        picture = data.read_image(tmp_path / "plots" / name)
        assert picture.std() > 5, "the picture is empty"


def test_prepare_data(photos, tmp_path, capsys):
    arguments = ["prepare-data", str(photos), "--out", str(tmp_path / "set"), "--scales", "2", "4"]
    assert cli.main(arguments) == 0
    assert "3 images" in capsys.readouterr().out
    assert data.read_image(tmp_path / "set" / "LR_bicubic" / "X4" / "p0x4.png").shape == (12, 10, 3)


@pytest.mark.parametrize(
    "error, is_users",
    [
        (ValueError("x"), True),
        (OSError("x"), True),
        (errors.NonFiniteLossError("x"), True),
        (errors.OutOfMemoryError("x"), True),
        (errors.MissingPackageError("x", "y"), True),
        (TypeError("x"), False),
        (RuntimeError("x"), False),
        (ImportError("x"), False),
        (KeyError("x"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_the_users_errors_become_one_line(capsys, monkeypatch, error, is_users):
    def fail(args):
        raise error

    monkeypatch.setattr(cli.command_module("info"), "main", fail)
    if is_users:
        one_line_error(capsys, ["info"], "issp info: error: x")
    else:
        with pytest.raises(type(error)):
            cli.main(["info"])
    with pytest.raises(type(error)):
        cli.main(["info", "--debug"])


def test_the_help_needs_no_optional_package():
    code = (
        "import sys\nfor name in ('pydantic', 'yaml', 'PIL', 'rich'): sys.modules[name] = None\n"
        "from issp import cli\nassert cli.main(['--help']) == 0\nassert cli.main(['info']) == 0\n"
        "assert 'issp.sr.models' not in sys.modules\n"
        "assert cli.main(['train', 'x.yml']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'training configurations need pydantic: pip install "issp[train]"' in done.stderr


def test_demo_needs_a_positive_time(capsys):
    assert cli.main(["demo", "--minutes", "-1"]) == 2
    assert "--minutes is -1" in capsys.readouterr().err


@pytest.mark.full
def test_demo(tmp_path, monkeypatch, capsys):
    y, x = np.mgrid[:120, :130]
    image = np.stack([np.sin(x * y / 300 + c) * 90 + 128 for c in range(3)], axis=2)
    photographs = {"a": image.astype(np.uint8), "b": image.astype(np.uint8)[::-1]}
    monkeypatch.setattr(data, "sample_photographs", lambda split: photographs)
    monkeypatch.setattr(demo, "PATCH", 16)
    monkeypatch.setattr(demo, "BATCH", 2)
    out = tmp_path / "demo"
    assert cli.main(["demo", "--iters", "5", "--dense", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")] == [
        "", "-----------", "bicubic", "ISS-P, 90 %", "dense twin",
    ]  # fmt: skip
    assert "195,264 of 195,264" in text and "19,515 of 195,264" in text
    for name in ("curves.png", "comparison.png"):
        assert data.read_image(out / name).std() > 5, "the picture is empty"
    assert cli.main(["demo", "--minutes", "0.001", "--out", str(out)]) == 0  # once more, over it
    assert (out / "model.safetensors").is_file()


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["active"]["cpu"] in ("cpp", "reference")
    assert facts["cpu"]["tiles"] in ("amx", "avx512", "scalar", "reference")
    assert facts["cpu"]["denormals"] in ("kept", "mixed", "flushed to zero")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", "active", "threads", "denormals", "gpu"))
    for problem in facts["backends"]["unused"].values():
        assert problem in text


def test_ctrl_c_saves_and_tells_how_to_go_on(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    arguments = train_arguments(photos, tmp_path, 100_000)
    command = [sys.executable, "-m", "issp", *arguments, "--print-freq", "1", "--val-freq", "90000"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    begun = next(line for line in child.stdout if "/100000 " in line)
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130, (begun, output, errors)
    lines = [line for line in errors.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and "continue with: issp train " in lines[0]
    (state,) = (tmp_path / "tiny" / "training_states").iterdir()
    done = int(state.stem)
    resume = shlex.split(errors.split("continue with: issp ")[1])
    with monkeypatch.context() as patch:
        patch.setattr(logging.Progress, "advance", _stop_after(done + 2))
        assert cli.main(resume) == 130
    rows = logging.read_csv(tmp_path / "tiny" / "log" / "train.csv")
    assert [row["iteration"] for row in rows] == list(range(1, done + 3))


def _stop_after(last):
    def advance(self, iteration):
        if iteration == last:
            os.kill(os.getpid(), signal.SIGINT)

    return advance


def test_hr_on_the_command_line_replaces_the_files_images(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    file, root = tmp_path / "run.yml", tmp_path / "runs"
    begin = (
        "name: a\nscale: 2\ndevice: cpu\nnetwork_g: {type: EDSR, num_feat: 8, num_block: 1}\n"
        "train: {total_iter: 1}\nlogger: {use_tb_logger: false}\n"
        "datasets:\n  train:\n    gt_size: 16\n"
    )
    command = ["train", str(file), "--hr", str(photos), "--root", str(root)]
    file.write_text(f"{begin}    dataroot_gt: other\n    dataroot_lq: other_lr\n")
    assert cli.main(command) == 0
    assert "datasets.train.dataroot_lq (other_lr) is of other images" in capsys.readouterr().out
    file.write_text(f"{begin}    type: SamplePhotographs\n")
    assert cli.main([*command, "--quiet"]) == 0
    assert f"dataroot_gt: {photos}" in (root / "a" / "config.yml").read_text()
    file.write_text(f"{begin}    dataroot_gt: {photos}\n    dataroot_lq: {photos}/none\n")
    one_line_error(capsys, command[:2] + command[4:], "none")


def test_a_warning_is_one_line_without_a_place_in_our_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    cli.main(["--version"])
    text = warnings.formatwarning(UserWarning("no params:\n the rest"), UserWarning, "a.py", 3)
    assert text == "issp: warning: no params: the rest\n"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--resume"], "--resume needs the run's configuration: experiments/NAME/config.yml"),
        (
            ["--model", "edsr-tiny", "--scale", "2", "--iters", "2", "--set", "train.total_iter"],
            "--set train.total_iter: write KEY=VALUE",
        ),
    ],
    ids=["resume", "set"],
)
def test_train_names_what_an_option_lacks(capsys, options, said):
    assert cli.main(["train", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_neither_end_a_command_nor_become_its_files(tmp_path, closed):
    code = (
        "import os, sys; from issp import cli; from issp.cli import common; cli._prepare_output()\n"
        "with open('result', 'w') as file, common.item_progress('images') as progress:\n"
        "    common._LINE_SECONDS = -1.0\n"
        "    progress(1, 2)\n"
        "    os.write(2, b'native code')\n"
        "    file.write('right')"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "result").read_text() == "right"
