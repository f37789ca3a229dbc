"""Thousands of damaged files: every one loads or ends in one sentence, and nothing is touched."""

import random
import re
import shutil

import numpy as np
import pytest
import torch

import issp
from issp import cli, data, models
from issp.sr import checkpoint
from issp.utils import denormals
from issp.utils.errors import UserError
from tests.sr import damage
from tests.tiers import FULL, quick_or_full

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]

ITERATIONS = 3
USERS = (UserError, ValueError, OSError)


class Started(BaseException):
    """The first batch was asked for: everything before the training went well."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hr")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        data.write_image(folder / f"{i}.png", pixels)
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """The folder of a run that stopped before its last iteration."""
    root = tmp_path_factory.mktemp("experiments")
    tree = {
        "name": "run",
        "scale": 2,
        "device": "cpu",
        "path": {"experiments_root": str(root)},
        "network_g": {"type": "EDSR", "num_feat": 4, "num_block": 1},
        "datasets": {
            "train": {"dataroot_gt": str(photos), "gt_size": 8, "batch_size_per_gpu": 1},
        },
        "train": {"total_iter": ITERATIONS, "ema_decay": 0.9, "optim_g": {"lr": 1e-3}},
        "sparsity": {"ratio": 0.5, "freeze_iter": 2},
        "logger": {"use_tb_logger": False, "save_checkpoint_freq": 1, "keep_training_states": 9},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denormals, "flush_denormals", lambda: True)
        issp.train.train(issp.config.parse(tree), quiet=True)
    (root / "run" / "training_states" / f"{ITERATIONS}.state").unlink()
    return root / "run"


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def copied(run, place):
    """A copy of a run's folder, whose configuration names it."""
    folder = shutil.copytree(run, place / "run")
    config = folder / "config.yml"
    config.write_text(config.read_text().replace(str(run.parent), str(folder.parent)))
    return folder, config


def only_state(folder, iteration):
    """The state of an iteration, after the others are removed."""
    state = folder / "training_states" / f"{iteration}.state"
    for other in folder.glob("training_states/*"):
        if other != state:
            other.unlink()
    return state


def command(capsys, *arguments):
    """Runs `issp`; returns its status, after a look at what it printed."""
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    if status:
        lines = output.err.strip().splitlines()
        assert status == 2 and len(lines) == 1 and ": error: " in lines[0], output.err
        assert len(lines[0]) < 1500, lines[0]
    return status


def network(kind):
    if kind == "EDSR":
        return models.EDSR(num_feat=4, num_block=1, upscale=2)
    return models.SwinIR(
        img_size=16, window_size=8, depths=[2], num_heads=[2], embed_dim=8, mlp_ratio=1,
        upscale=2, upsampler="pixelshuffledirect",
    )  # fmt: skip


def save(model, form, file):
    if form == "safetensors":
        issp.save(model, file)
    else:
        legacy = form == "legacy"
        content = {"params": model.state_dict(), "params_ema": model.state_dict()}
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)


def spoil(file, form, rng):
    """Damages a model or state in place, in its bytes or in what they hold."""
    content = file.read_bytes()
    if rng.random() < 0.5:
        file.write_bytes(damage.damage_bytes(content, rng))
    elif form == "safetensors":
        file.write_bytes(damage.damage_safetensors(content, rng))
    else:
        tree = torch.load(file, weights_only=True)
        torch.save(damage.damage_tree(tree, rng), file)


@pytest.mark.parametrize("form", ["safetensors", "pth", "legacy"])
@pytest.mark.parametrize("kind", ["EDSR", "SwinIR"])
def test_models(photos, tmp_path, capsys, kind, form):
    model = network(kind)
    file = tmp_path / f"m.{'safetensors' if form == 'safetensors' else 'pth'}"
    images = [str(photos), "--model", file, "-o", tmp_path / "out", "--device", "cpu"]
    loaded = 0
    for number in range(quick_or_full(6, 200)):
        rng = random.Random(f"{kind} {form} {number}")
        save(model, form, file)
        spoil(file, form, rng)
        before = file.read_bytes()
        try:
            if form == "safetensors":
                net = issp.load(file)
            else:
                net = network(kind)
                tensors, _ = checkpoint.read_tensors(file, rng.choice((None, "params")))
                checkpoint.load_weights(net, tensors, file, strict=rng.random() < 0.5)
            loaded += 1
            with torch.no_grad():
                models.upscale(net.eval(), torch.rand(1, 3, 8, 8))
        except USERS as error:
            assert str(error)
        if form == "safetensors" and number % 4 == 0:
            command(capsys, "upscale", *images)
        assert file.read_bytes() == before
    assert loaded or not FULL


def flip(file):
    """Damages one bit of a file, in the middle of its tensors."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def final(folder):
    return issp.load(folder / "models" / "net_g_latest.safetensors").state_dict()


@pytest.mark.parametrize("damage_file", [flip, lambda file: file.write_bytes(b"")])
def test_a_damaged_state_is_set_aside_and_the_one_before_is_resumed(
    run, tmp_path, capsys, damage_file
):
    whole, config = copied(run, tmp_path / "whole")
    assert cli.main(["train", str(config), "--resume", "--quiet"]) == 0
    folder, config = copied(run, tmp_path / "damaged")
    state, earlier = (folder / "training_states" / f"{i}.state" for i in (2, 1))
    damage_file(state)
    spoilt = state.read_bytes()
    assert cli.main(["train", str(config), "--resume"]) == 0
    output = capsys.readouterr()
    line = r"2\.state is damaged or .*; it is kept as 2\.state\.damaged, and 1\.state is resumed"
    for text in (output.out + output.err, (folder / "log" / "train.log").read_text()):
        assert len(re.findall(line, text)) == 1, text
    assert state.with_name("2.state.damaged").read_bytes() == spoilt
    assert sorted(f.name for f in state.parent.iterdir()) == [
        "1.state", "2.state", "2.state.damaged", "3.state"
    ]  # fmt: skip
    assert earlier.is_file() and all(
        torch.equal(a, b)
        for a, b in zip(final(folder).values(), final(whole).values(), strict=True)
    )


def test_a_damaged_state_that_is_named_is_refused(run, tmp_path, capsys):
    folder, config = copied(run, tmp_path)
    state = folder / "training_states" / "2.state"
    flip(state)
    before = contents(folder)
    assert cli.main(["train", str(config), "--set", f"path.resume_state={state}", "--quiet"]) == 2
    assert f"{state} is damaged or cut short" in capsys.readouterr().err
    assert contents(folder) == before


def test_states_that_are_all_damaged_are_refused_and_stay(run, tmp_path, capsys):
    folder, config = copied(run, tmp_path)
    for state in folder.glob("training_states/*.state"):
        flip(state)
    before = contents(folder)
    assert cli.main(["train", str(config), "--resume", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "2.state is damaged or cut short" in error
    assert "; the states before it are damaged too (1)" in error and error.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["safetensors", "pth", "BasicSR", "text"])
def test_what_is_no_training_state_is_named(run, tmp_path, capsys, kind):
    folder, config = copied(run, tmp_path)
    file, model = tmp_path / "given", network("EDSR")
    sentences = {
        "safetensors": f"{file} is a safetensors file, which holds a model and no training state",
        "pth": f"cannot resume from {file}: it has no section model: it is damaged or something",
        "BasicSR": f"cannot resume from {file}: it is one of BasicSR, without weights: begin with",
        "text": f"{file} is a text file",
    }
    if kind == "BasicSR":
        torch.save({"epoch": 1, "iter": 2, "optimizers": [], "schedulers": []}, file)
    elif kind == "text":
        file.write_text("hello\n")
    else:
        save(model, kind, file)
    before = contents(folder)
    assert cli.main(["train", str(config), "--set", f"path.resume_state={file}", "--quiet"]) == 2
    assert sentences[kind] in capsys.readouterr().err
    assert contents(folder) == before


def test_names_of_wrappers_in_a_state_are_read(run, tmp_path):
    """As a script leaves them that wraps the network and then writes our state."""
    finals = []
    for prefixes in ((), ("module._orig_mod.", "_forward_module.module.")):
        folder, config = copied(run, tmp_path / f"{len(prefixes)}")
        state = only_state(folder, 2)
        tree = torch.load(state, weights_only=True)
        for part, prefix in zip(("model", "ema"), prefixes, strict=False):
            tree[part] = {f"{prefix}{name}": value for name, value in tree[part].items()}
        torch.save(tree, state)
        assert cli.main(["train", str(config), "--resume", "--quiet"]) == 0
        finals.append(issp.load(folder / "models" / "net_g_latest.safetensors").state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_training_states(run, tmp_path, capsys):
    resumed = 0
    for number in range(quick_or_full(12, 500)):
        rng = random.Random(f"state {number}")
        folder, config = copied(run, tmp_path / f"{number}")
        spoil(only_state(folder, rng.choice((1, 2))), "state", rng)
        before = contents(folder)
        if command(capsys, "train", config, "--resume", "--quiet"):
            assert contents(folder) == before
        else:
            resumed += 1
        shutil.rmtree(folder.parent)
    assert resumed


def changed(tree, place, change):
    """Applies a function to the value at a dotted place of nested dicts and lists."""
    *way, last = [int(key) if key.lstrip("-").isdigit() else key for key in place.split("/")]
    for key in way:
        tree = tree[key]
    tree[last] = change(tree[last])


PLACES = [
    ("iteration", lambda _: -1, "iteration is -1"),
    ("iteration", lambda _: 10**30, "iteration is 1000"),
    ("iteration", lambda _: torch.tensor(2), "iteration is a tensor"),
    ("model", lambda _: None, "it has no section model"),
    ("random", lambda _: [], "it has no section random"),
    ("meter/count", lambda _: 0.5, "meter.count is 0.5"),
    ("meter/loss", lambda x: x[None], r"meter.loss has shape \(1,\)"),
    ("meter/loss", lambda x: x * float("nan"), "meter.loss holds NaN or infinite numbers"),
    ("best/psnr", lambda _: float("nan"), "best.psnr is nan"),
    ("best/iteration", lambda _: "1", "best.iteration is '1'"),
    ("best", lambda x: {**x, "ssim": 0.9}, "the unknown entry best.ssim: it is of another version"),
    ("batches/sampler/position", lambda _: -3, "batches.sampler.position is -3"),
    ("batches/sampler/seed", lambda _: torch.zeros(2), "batches.sampler.seed is a tensor"),
    ("model/conv_last.weight", lambda x: x.flatten(), "conv_last.weight is .108,. in the file"),
    ("model/conv_last.bias", lambda x: x / 0, "model.conv_last.bias holds NaN or infinite"),
    ("ema/conv_last.bias", lambda x: x.to_sparse(), "ema.conv_last.bias does not hold plain"),
    ("model", lambda x: {**x, 5: x["conv_last.bias"]}, "5 is not the name of a weight"),
    ("optimizer/state/0/exp_avg", lambda x: x[:2], "exp_avg .* has shape .2, 3, 3, 3."),
    ("optimizer/state/0/exp_avg", lambda x: x.flatten(), "exp_avg .* has shape .108,."),
    ("optimizer/state/0/exp_avg_sq", lambda x: -x - 1, "exp_avg_sq, a mean of squares, holds neg"),
    ("optimizer/state/1/step", lambda _: "x", "optimizer.state.1.step is 'x'"),
    ("optimizer/state/1/step", lambda _: torch.tensor(-1.0), "step .* is no number from 0 on"),
    ("optimizer/state/1/step", lambda _: 2**63, "optimizer.state.1.step is 9223"),
    ("pending", lambda _: [1], "pending is"),
    ("pending", lambda _: 1, "pending is 1"),
    ("optimizer/param_groups/0", lambda _: torch.zeros(2), "optimizer.param_groups.0 is a tensor"),
    ("pruner/layers/conv_first/shape", lambda x: [torch.zeros(2)] * 4, "shape.0 is a tensor"),
    ("pruner/layers/conv_first/mask", lambda x: x[:-1], "mask of conv_first .* is damaged"),
    ("pruner/layers/conv_first/mask", lambda x: x[:1].expand(len(x)), "mask does not hold plain"),
    ("optimizer/param_groups/0/capturable", lambda _: True, "capturable was True when"),
    ("optimizer/param_groups/0/maximize", lambda _: True, "maximize was True when"),
    ("optimizer/param_groups/0/eps", lambda _: 1.0, "train.optim_g.eps was 1.0 when"),
    ("pruner/stage", lambda _: "prunning", "stage or the step_count of the pruner"),
    ("random/numpy/2", lambda _: 10**6, "random generators are damaged: numpy's position"),
    ("random/torch", lambda x: x[:100], "random generators are damaged"),
    ("random/python", lambda x: x[:-1], "random generators are damaged"),
]


@pytest.mark.parametrize("place, change, sentence", PLACES, ids=[f"{p}-{s}" for p, _, s in PLACES])
def test_a_damaged_place_of_a_state_is_named(run, tmp_path, capsys, place, change, sentence):
    folder, config = copied(run, tmp_path)
    state = only_state(folder, 2)
    tree = torch.load(state, weights_only=True)
    changed(tree, place, change)
    torch.save(tree, state)
    before = contents(folder)
    assert cli.main(["train", str(config), "--resume", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: cannot resume from {state}: .*{sentence}", error), error
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["ema", "pruner"])
def test_a_state_of_another_version_is_named(run, tmp_path, capsys, name):
    folder, config = copied(run, tmp_path)
    state = only_state(folder, 2)
    tree = torch.load(state, weights_only=True)
    del tree[name]
    torch.save(tree, state)
    before = contents(folder)
    assert cli.main(["train", str(config), "--resume", "--quiet"]) == 2
    sentence = f"error: {state} is not a training state of this version: '{name}'"
    assert sentence in capsys.readouterr().err
    assert contents(folder) == before


def test_a_file_of_something_else_than_a_dictionary_is_named(run, tmp_path, capsys):
    folder, config = copied(run, tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save([1], only_state(folder, 2))
    for words in (["--resume"], ["--set", f"path.pretrain_network_g={tmp_path / 'list.pth'}"]):
        assert cli.main(["train", str(config), *words, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert " holds a list, not a dictionary of tensors" in error and error.count("\n") == 1


def test_a_state_that_is_whole_is_resumed(run, tmp_path):
    """What the cases above differ from."""
    folder, config = copied(run, tmp_path)
    only_state(folder, 2)
    assert cli.main(["train", str(config), "--resume", "--quiet"]) == 0
    assert (folder / "models" / "net_g_latest.safetensors").exists()


def test_configurations(run, tmp_path, capsys, monkeypatch):
    def start(_):
        raise Started

    monkeypatch.setattr(data.TrainLoader, "__next__", start)
    monkeypatch.chdir(tmp_path)  # of a path that became relative
    started = 0
    for number in range(quick_or_full(12, 400)):
        rng = random.Random(f"config {number}")
        folder, config = copied(run, tmp_path / f"{number}")
        if rng.random() < 0.5:
            config.write_bytes(damage.damage_bytes(config.read_bytes(), rng))
        else:
            config.write_text(damage.damage_yaml(config.read_text(), rng))
        before = contents(folder)
        try:
            if command(capsys, "train", config, "--resume", "--quiet"):
                assert contents(folder) == before
        except Started:
            started += 1
        shutil.rmtree(folder.parent)
    assert started
