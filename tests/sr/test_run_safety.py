"""A run is not lost: checked before it begins, saved when it fails, resumed as it was."""

import errno
import itertools
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from issp import cli, data
from issp.sr import builders, checkpoint, evaluate, logging, preflight
from issp.sr.data import datasets
from issp.sr.interrupt import Interrupted, StopRequest
from issp.sr.run_folder import RunFolder
from issp.utils.errors import ConfigError, NonFiniteLossError
from tests.sr.runs import (
    FREEZE,
    TOTAL,
    assert_equal,
    assert_same_logs,
    draw_photos,
    log,
    run,
    stop_at,
)
from tests.utils.disk import full_disk

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")

# A run of a second: no validation, no averaged model.
SHORT = {"train__total_iter": 6, "sparsity__freeze_iter": 3, "val__val_freq": 50}


def folder_of(tree):
    return Path(tree["path"]["experiments_root"]) / tree["name"]


def states(folder):
    return sorted(path.name for path in (folder / "training_states").glob("*.state"))


def contents(folder):
    """Every file of a folder, by its name, with the time of its last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("fault", ["small", "odd", "cut", "border"])
def test_a_validation_image_is_checked_before_anything_is_written(tree, tmp_path, fault):
    folder, metrics = tmp_path / "val", {"ssim": {"type": "calculate_ssim"}}
    draw_photos(folder / "HR")
    image = data.read_image(folder / "HR" / "2.png")
    if fault == "small":  # 13 pixels less the border of 2 on each side: 9, and SSIM needs 11
        data.write_image(folder / "HR" / "2.png", image[:13])
    elif fault == "odd":
        for i in range(4):
            data.write_image(
                folder / "LR_bicubic" / "X2" / f"{i}x2.png", image[: 20 - (i == 2), :22]
            )
    elif fault == "cut":
        whole = (folder / "HR" / "2.png").read_bytes()
        (folder / "HR" / "2.png").write_bytes(whole[: len(whole) // 2])
    else:
        metrics["psnr"] = {"crop_border": 20}
    with pytest.raises((ValueError, OSError), match=r"[0-3](x2)?\.png"):
        run(tree, datasets__val__dataroot_gt=str(folder), val__metrics=metrics)
    assert not (tmp_path / "experiments").exists()


def test_a_training_image_in_memory_is_checked_before_anything_is_written(tree, tmp_path):
    folder = draw_photos(tmp_path / "photos")
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"3\.png"):
        run(tree, datasets__train__dataroot_gt=str(folder))
    assert not (tmp_path / "experiments").exists()


FAULTS = {
    "image": OSError(errno.EIO, "Input/output error", "set/a.png"),
    "content": ValueError("set/a.png is damaged"),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
}


def fail_validation(patch, iteration, error):
    """Every validation after an iteration fails, after the first model of it was scored."""
    advance, of_set = logging.Progress.advance, evaluate.evaluate
    calls = {}

    def count(self, done):
        advance(self, done)
        calls[done] = 0

    def fail_later(*args, **kwargs):
        last = max(calls, default=None)
        if last is not None:
            calls[last] += 1
        if last == iteration and calls[last] == (2 if iteration < FREEZE else 1):
            raise error
        return of_set(*args, **kwargs)

    patch.setattr(logging.Progress, "advance", count)
    patch.setattr(evaluate, "evaluate", fail_later)


@pytest.mark.full
@pytest.mark.parametrize(
    "iteration, fault", [(3, "image"), (FREEZE, "content"), (9, "CPU"), (3, "GPU")]
)
def test_a_failing_validation_costs_itself_and_not_the_run(tree, monkeypatch, iteration, fault):
    whole, expected = run(tree, name="whole")
    with monkeypatch.context() as patch:
        fail_validation(patch, iteration, FAULTS[fault])
        model, folder = run(tree)
    assert_equal(model.state_dict(), whole.state_dict())
    assert states(folder) == sorted([f"{iteration}.state", f"{TOTAL}.state"])
    said = (folder / "log" / "train.log").read_text()
    line = f"the validation of iteration {iteration} failed, its state is saved and the training"
    assert said.count(line) == 1
    scored, all_scored = (
        logging.read_csv(f / "log" / "validation.csv") for f in (folder, expected)
    )
    others = [row for row in all_scored if row["iteration"] != iteration]
    assert [row for row in scored if row["iteration"] != iteration] == others
    made = len(scored) - len(others)
    assert made == (1 if iteration < FREEZE else 0), "the masked model was scored, the soft one not"
    assert {i: p for i, p in log(folder, "iteration", "psnr") if i != iteration} == {
        i: p for i, p in log(expected, "iteration", "psnr") if i != iteration
    }
    # Both logs have the masked model's score and neither has the soft one's.
    (row,) = [row for row in logging.read_csv(folder / "log" / "train.csv")
              if row["iteration"] == iteration]  # fmt: skip
    masked = [r["psnr"] for r in scored if (r["iteration"], r["model"]) == (iteration, "masked")]
    assert row["psnr"] is None and [row["psnr_masked"]] == (masked or [None])
    # From the saved state the validation is made up for.
    state = folder / "training_states" / f"{iteration}.state"
    again, folder = run(tree, path__resume_state=str(state))
    assert_equal(again.state_dict(), whole.state_dict())
    assert_same_logs(folder, expected, ("train", "validation"))


def test_a_failing_validation_at_the_end_is_repeated_by_the_resumed_run(tree, monkeypatch):
    """The run would have no score otherwise."""
    whole, expected = run(tree, name="whole")
    with monkeypatch.context() as patch:
        fail_validation(patch, TOTAL, FAULTS["image"])
        with pytest.raises(OSError, match=r"set/a\.png"):
            run(tree)
    assert states(folder_of(tree)) == [f"{TOTAL}.state"]
    text = (folder_of(tree) / "log" / "train.log").read_text()
    assert f"the state of iteration {TOTAL} is saved; continue with: issp train " in text
    resumed, folder = run(tree, resume=True)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_same_logs(folder, expected, ("train", "validation", "layers"))


def test_a_bug_in_a_validation_ends_the_run_after_its_state_is_saved(tree, monkeypatch):
    fail_validation(monkeypatch, 3, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(tree)
    assert states(folder_of(tree)) == ["3.state"]


def test_a_signal_during_a_long_validation_does_not_wait_for_its_end(tree, monkeypatch):
    whole, expected = run(tree, name="whole", logger__grad_stats_freq=3)
    scored, of_set = [], evaluate.evaluate
    images = 1 + 2 * 4 + 2  # one before the run; at iteration 3 by the soft and the masked model

    def signalled(upscaler, *args, **kwargs):
        def upscale(image):
            scored.append(1)
            if len(scored) == images:
                os.kill(os.getpid(), signal.SIGTERM)
            return upscaler(image)

        return of_set(upscale, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", signalled)
        with pytest.raises(Interrupted) as stopped:
            run(tree, logger__grad_stats_freq=3)
    assert len(scored) == images and stopped.value.status == 128 + signal.SIGTERM
    assert stopped.value.iteration == 6 and states(folder_of(tree)) == ["6.state"]
    resumed, folder = run(tree, resume=True, logger__grad_stats_freq=3)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_same_logs(folder, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_training_image_saves_the_state_first(tree, tmp_path, monkeypatch, workers):
    if workers:
        pytest.importorskip("multiprocessing.synchronize", reason="no worker processes here")
    monkeypatch.setattr(datasets, "AUTO_MEMORY", 0)  # images are read when they are drawn
    folder = draw_photos(tmp_path / "photos")
    changes = {**SHORT, "datasets__train__dataroot_gt": str(folder)}
    changes["datasets__train__num_worker_per_gpu"] = workers
    whole, _ = run(tree, name="whole", **changes)
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(good[:-200])
    with pytest.raises(ValueError, match=r"1\.png"):
        run(tree, **changes)
    (folder / "1.png").write_bytes(good)
    experiment = tmp_path / "experiments" / "run"
    saved = states(experiment)
    first = [draw.image for draw in data.EnlargedSampler(4, seed=3).take(12)].index(1)
    assert saved == ([f"{first // 2}.state"] if first >= 2 else []), "the last whole iteration"
    resumed, _ = run(tree, resume=bool(saved), **changes)
    assert_equal(resumed.state_dict(), whole.state_dict())


DROPS_PATHS = {
    **{"type": "SwinIR", "upsampler": "pixelshuffledirect", "embed_dim": 8, "depths": [2, 2]},
    **{"num_heads": [2, 2], "window_size": 4, "img_size": 8, "mlp_ratio": 2},
    "drop_path_rate": 0.5,
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("network", ["EDSR", "SwinIR"])
def test_an_iteration_that_fails_is_repeated_with_its_batch(tree, monkeypatch, network, workers):
    """SwinIR has drawn which paths it drops when the backward pass fails."""
    changes = {**SHORT, "datasets__train__num_worker_per_gpu": workers}
    if network == "SwinIR":
        changes["network_g"] = DROPS_PATHS
    whole, expected = run(tree, name="whole", **changes)
    numbers = itertools.count(1)

    def fail_in_the_fifth(gradient):
        if next(numbers) == 5:
            raise MemoryError("no memory for a gradient")

    def failing(config):
        function = builders_loss(config)

        def loss(output, target):
            output.register_hook(fail_in_the_fifth)
            return function(output, target)

        return loss

    builders_loss = builders.loss
    with monkeypatch.context() as patch:
        patch.setattr(builders, "loss", failing)
        with pytest.raises(MemoryError, match="no memory for a gradient"):
            run(tree, **changes)
    assert states(folder_of(tree)) == ["4.state"]
    resumed, folder = run(tree, resume=True, **changes)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_same_logs(folder, expected, ("train",), SHORT["train__total_iter"])


def test_a_loss_that_is_not_finite_leaves_no_state_to_resume_from(tree):
    with pytest.raises(NonFiniteLossError):
        run(tree, train__optim_g={"lr": 1e30}, val__val_freq=50)
    assert states(folder_of(tree)) == []
    # Between two rows of the log it is looked at before a state is written.
    often = {"logger__print_freq": 50, "logger__save_checkpoint_freq": 1, "name": "often"}
    with pytest.raises(NonFiniteLossError):
        run(tree, train__optim_g={"lr": 1e30}, val__val_freq=50, sparsity__freeze_iter=12, **often)
    assert "1.state" in states(folder_of({**tree, "name": "often"}))


def test_a_best_model_that_could_not_be_written_is_written_by_the_resumed_run(tree, monkeypatch):
    _, whole = run(tree, name="whole")
    save = checkpoint.save

    def full(model, path, **extra):
        if path.name == "net_g_best.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, path, **extra)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(tree)
    assert states(folder_of(tree)) == [f"{FREEZE}.state"]
    _, folder = run(tree, resume=True)
    best = [
        checkpoint.read_tensors(f / "models" / "net_g_best.safetensors") for f in (folder, whole)
    ]
    assert_equal(*best)


@pytest.mark.parametrize("fate", ["gone", "damaged", "abandoned", "elsewhere"])
def test_the_best_model_and_its_score_belong_together_after_a_resume(tree, fate):
    _, folder = run(tree, logger__save_checkpoint_freq=3, train__ema_decay=0)
    best = folder / "models" / "net_g_best.safetensors"
    start = {"resume": True, "train__total_iter": TOTAL + 3}
    if fate == "gone":
        best.unlink()
    elif fate == "damaged":
        best.write_bytes(best.read_bytes()[:100])
    else:  # the state of iteration 9, when the best model was another
        start = {"path__resume_state": str(folder / "training_states" / "9.state")}
        start["name"] = "other" if fate == "elsewhere" else "run"
    # Nothing is learned any more, so that no validation exceeds the best of the state.
    changes = {"train__optim_g__lr": 0.0, "train__ema_decay": 0}
    _, folder = run(tree, **start, **changes)
    best = folder / "models" / "net_g_best.safetensors"
    _, metadata = checkpoint.read_tensors(best)
    rows = logging.read_csv(folder / "log" / "validation.csv")
    scores = {row["iteration"]: row["psnr"] for row in rows}
    assert metadata["psnr"] == scores[metadata["iteration"]]
    said = (folder / "log" / "train.log").read_text().splitlines()
    last = [line for line in said if "best: " in line][-1]
    assert last.endswith(f"{metadata['psnr']:.2f} dB at iteration {metadata['iteration']}")
    endings = {"damaged": ["damaged"], "abandoned": ["old"]}.get(fate, [])
    assert [
        e for e in ("old", "damaged") if best.with_name(f"{best.name}.{e}").is_file()
    ] == endings


@pytest.mark.full
@pytest.mark.parametrize(
    "change", ["none", "folder", "images", "other set", "border", "channel", "LR"]
)
def test_best_scores_of_other_validation_images_are_not_compared(tree, tmp_path, change):
    _, folder = run(tree, train__ema_decay=0)
    best = folder / "models" / "net_g_best.safetensors"
    before, metadata = best.read_bytes(), checkpoint.read_tensors(best)[1]
    photos = draw_photos(tmp_path / "elsewhere")
    changes = {"datasets__val__dataroot_gt": str(photos)}
    if change == "none":
        changes = {"datasets__val": {**tree["datasets"]["val"], "name": "another name"}}
    elif change == "images":
        data.write_image(photos / "3.png", data.read_image(photos / "3.png")[:30])
    elif change == "other set":
        for file in photos.iterdir():
            file.rename(file.with_name(f"x{file.name}"))
    elif change == "border":
        changes = {"val__metrics__psnr__crop_border": 5}
    elif change == "channel":
        changes = {"val__metrics__psnr__test_y_channel": False}
    elif change == "LR":
        for file in photos.iterdir():
            lr = data.imresize(data.read_image(file), 0.5)
            data.write_image(tmp_path / "lr" / file.name, lr)
        changes["datasets__val__dataroot_lq"] = str(tmp_path / "lr")
    # Nothing is learned any more: no later validation exceeds the best one of the same images.
    changes |= {"train__optim_g__lr": 0.0, "train__ema_decay": 0}
    run(tree, resume=True, train__total_iter=TOTAL + 3, **changes)
    old = best.with_name(f"{best.name}.old")
    said = (folder / "log" / "train.log").read_text()
    if change in ("none", "folder"):
        assert best.read_bytes() == before and not old.exists() and "other validation" not in said
        return
    assert old.read_bytes() == before
    line = f"{best} is the best on other validation images, or by another crop border or channel"
    assert f"{line}: it is kept as {old.name}" in said
    now = checkpoint.read_tensors(best)[1]
    rows = logging.read_csv(folder / "log" / "validation.csv")
    assert now["iteration"] == TOTAL + 3 > metadata["iteration"]
    assert now["psnr"] == rows[-1]["psnr"]


def test_a_state_without_the_name_of_its_images_keeps_its_best_model(tree):
    """As earlier versions wrote it."""
    _, folder = run(tree, train__ema_decay=0)
    path = folder / "training_states" / f"{TOTAL}.state"
    state = checkpoint.read_state(path)
    del state["best"]["scored_on"]
    checkpoint.write_state(state, path)
    best = folder / "models" / "net_g_best.safetensors"
    before, changes = best.read_bytes(), {"train__optim_g__lr": 0.0, "train__ema_decay": 0}
    run(tree, resume=True, train__total_iter=TOTAL + 3, **changes)
    assert best.read_bytes() == before and not best.with_name(f"{best.name}.old").exists()


@pytest.mark.parametrize("fate", ["gone", "damaged", "overwritten"])
def test_the_model_of_the_best_iteration_takes_the_place_of_a_best_one_that_is_lost(tree, fate):
    _, folder = run(tree, logger__save_checkpoint_freq=3, train__ema_decay=0)
    best = folder / "models" / "net_g_best.safetensors"
    before = checkpoint.read_tensors(best)
    if fate == "gone":
        best.unlink()
    elif fate == "damaged":
        best.write_bytes(best.read_bytes()[:-50] + bytes(50))
    else:  # by a run that was killed before it saved the state of that iteration
        checkpoint.save(checkpoint.load(best), best, psnr=99.0, iteration=TOTAL + 1)
    # Nothing is learned any more: a search that began anew would find another best one.
    changes = {"train__optim_g__lr": 0.0, "train__ema_decay": 0}
    run(tree, resume=True, train__total_iter=TOTAL + 3, **changes)
    assert_equal(checkpoint.read_tensors(best), before)
    said = (folder / "log" / "train.log").read_text()
    place = f"net_g_{before[1]['iteration']}.safetensors takes its place"
    assert said.count(place) == (fate != "gone")
    assert best.with_name(f"{best.name}.damaged").is_file() == (fate == "damaged")


def test_a_latest_model_of_an_earlier_end_is_not_taken_for_that_of_this(tree):
    """The process was killed between the last state of a longer run and its model."""
    model, folder = run(tree, train__total_iter=TOTAL + 3)
    run(tree, name="shorter")
    latest = "models/net_g_latest.safetensors"
    shutil.copy(folder.with_name("shorter") / latest, folder / latest)
    run(tree, resume=True, train__total_iter=TOTAL + 3)
    assert_equal(checkpoint.load(folder / latest).state_dict(), model.state_dict())
    (folder / latest).write_bytes((folder / latest).read_bytes()[:-1])
    run(tree, resume=True, train__total_iter=TOTAL + 3)
    assert_equal(checkpoint.load(folder / latest).state_dict(), model.state_dict())


FOREIGN = ("train.csv", "validation.csv", "layers.csv", "gradients.csv", "train.log", "tensorboard")


@pytest.mark.parametrize("name", [*FOREIGN, "environment.json", "../config.yml"])
def test_files_in_the_place_of_logs_are_refused_before_anything_is_written(tree, stopped_run, name):
    path = stopped_run / "log" / name
    if name.endswith("csv"):
        path.write_bytes(b"\xff\xfe no log")
    elif name == "tensorboard":
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
    before = contents(stopped_run)
    with pytest.raises(ConfigError, match=f"{path.name} is a|cannot read log .*{name}.*; move it"):
        run(tree, resume=True, logger__grad_stats_freq=2, logger__use_tb_logger=True)
    assert contents(stopped_run) == before


@pytest.mark.parametrize("name", ["models", "log", "training_states", "log/train.log"])
def test_a_place_without_permission_is_refused_before_anything_is_written(
    tree, stopped_run, monkeypatch, name
):
    access, place = os.access, stopped_run / name
    denied = lambda path, mode: Path(path) != place.absolute() and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", denied)  # root has every permission
    before = contents(stopped_run)
    with pytest.raises(PermissionError, match=f"cannot write .*{name}: no permission"):
        run(tree, resume=True)
    assert contents(stopped_run) == before


@pytest.mark.parametrize("second", ["kept", "4.state"])
def test_a_full_disk_is_named_and_the_state_before_is_intact(tree, monkeypatch, second):
    changes = {**SHORT, "logger__save_checkpoint_freq": 2}
    write, times = checkpoint.write_state, itertools.count(1)

    def full(state, path):
        if next(times) == 2:
            raise OSError(errno.ENOSPC, f"cannot write {path}: No space left on device")
        write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(tree, **changes)
    # The state before is there, and the one that was tried again once there was room.
    assert states(folder_of(tree)) == ["2.state", "4.state"]
    whole, _ = run(tree, name="whole", **changes)
    (folder_of(tree) / "training_states" / second).unlink(missing_ok=True)
    resumed, _ = run(tree, resume=True, **changes)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_a_disk_that_gets_full_within_a_state_leaves_the_one_before(tree, monkeypatch):
    changes = {**SHORT, "logger__save_checkpoint_freq": 2, "logger__keep_training_states": 1}
    whole, _ = run(tree, name="whole", **changes)
    save = RunFolder.save_state

    def full(self, state, keep):
        with monkeypatch.context() as patch:
            if state["iteration"] >= 4:
                full_disk(patch, after=5000)
            return save(self, state, keep)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", full)
        with pytest.raises(OSError, match=r"cannot write .*4\.state: No space .*the disk is full"):
            run(tree, **changes)
    folder = folder_of(tree) / "training_states"
    assert [path.name for path in folder.iterdir()] == ["2.state"]
    resumed, _ = run(tree, resume=True, **changes)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_models_of_old_checkpoints_go_where_that_is_asked_for(tree):
    def models(folder):
        names = sorted(path.name for path in (folder / "models").glob("*.safetensors"))
        return [name.removeprefix("net_g_").removesuffix(".safetensors") for name in names]

    often = {"logger__save_checkpoint_freq": 2, "logger__keep_training_states": 9}
    whole, folder = run(tree, name="all", **often)
    assert models(folder) == ["10", "12", "2", "4", "6", "8", "best", "latest"]
    model, folder = run(tree, **often, logger__keep_models=2)
    assert models(folder) == ["10", "12", "best", "latest"]
    assert_equal(model.state_dict(), whole.state_dict())
    # Back at an earlier state, the models of the iterations that it gives up are not the latest.
    state = folder / "training_states" / "4.state"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Interrupted):
            run(tree, **often, logger__keep_models=1, path__resume_state=str(state))
    assert [n for n in models(folder) if n.isdigit()] == ["10", "12", "8"]


def test_too_little_space_is_said_before_the_run(tree, tmp_path, monkeypatch):
    def free(size):
        usage = types.SimpleNamespace(free=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    free(1000)
    with pytest.raises(ConfigError, match=r"0\.0 MB free and one checkpoint takes 0\.[0-9] MB"):
        run(tree, **SHORT)
    assert not (tmp_path / "experiments").exists()
    free(100_000)  # the network has some 4000 weights: enough for one state, not for three
    _, folder = run(tree, **SHORT, logger__save_checkpoint_freq=1)
    assert "the checkpoints will take" in (folder / "log" / "train.log").read_text()


def test_a_closed_terminal_saves(tree, monkeypatch):
    def hang_up(self, iteration):
        if iteration == 4:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # from the shell and from the terminal
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logging.Progress, "advance", hang_up)
    with pytest.raises(Interrupted) as stopped:
        run(tree, **SHORT)
    assert stopped.value.status == 128 + signal.SIGHUP and states(folder_of(tree)) == ["4.state"]
    last = (folder_of(tree) / "log" / "train.log").read_text().splitlines()[-1]
    assert "Interrupted: stopped after iteration 4; continue with: issp train " in last


def test_nohup_goes_on_and_a_second_ctrl_c_acts_at_once():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_training_in_the_same_folder_is_refused(tree, monkeypatch):
    advance, refused = logging.Progress.advance, []

    def start_another(self, iteration):
        advance(self, iteration)
        if iteration == 2 and not refused:
            for resume in (False, True):
                with pytest.raises(ConfigError, match="another training runs in .*run: wait"):
                    run(tree, **SHORT, resume=resume, path__resume_state=None)
                refused.append(resume)

    monkeypatch.setattr(logging.Progress, "advance", start_another)
    _, folder = run(tree, **SHORT, logger__save_checkpoint_freq=1)
    assert refused == [False, True]
    assert [path.name for path in folder.parent.iterdir()] == ["run"], "nothing was moved"
    run(tree, **SHORT)  # free again


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"train__optim_g": {"type": "SGD", "lr": 1e-3}}, "another `train.optim_g.type`"),
        ({"train__optim_g": {"type": "AdamW", "lr": 1e-3}}, "another `train.optim_g.type`"),
        ({"train__optim_g": {"betas": [0.8, 0.99]}}, r"betas was \[0.9, 0.99\] .* \[0.8, 0.99\]"),
        ({"train__optim_g__weight_decay": 0.5}, "weight_decay was 0.0 .* is 0.5 now"),
        ({"train__ema_decay": 0}, "another `train.ema_decay`"),
        ({"train__ema_decay": 0.5}, "train.ema_decay was 0.9 .* is 0.5 now"),
        ({"sparsity__ratio": 0.5}, "sparsity"),
    ],
)
def test_resume_with_other_settings_is_refused_before_config_yml_is_touched(
    tree, stopped_run, changes, part
):
    before = contents(stopped_run)
    with pytest.raises(ValueError, match=rf"cannot resume from .*4\.state: .*{part}"):
        run(tree, resume=True, train__total_iter=8, **changes)
    assert contents(stopped_run) == before


@pytest.fixture
def stopped_run(tree):
    """The folder of a run that was stopped after four of six iterations."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            run(tree)
    return folder_of(tree)


def test_the_learning_rate_may_change_at_a_resume(tree, stopped_run):
    run(tree, resume=True, train__optim_g__lr=5e-4)
    rates = dict(log(stopped_run, "iteration", "lr"))
    assert rates[4] == 1e-3 and rates[6] == 5e-4


def test_a_finished_run_stays_as_it_is(tree):
    model, folder = run(tree)
    before = contents(folder)
    again, _ = run(tree, resume=True, val__save_img=True, train__total_iter=TOTAL - 1)
    assert contents(folder) == before
    assert_equal(again.state_dict(), model.state_dict())
    latest = folder / "models" / "net_g_latest.safetensors"
    latest.unlink()  # as if the process had ended between the two files
    run(tree, resume=True)
    assert_equal(checkpoint.load(latest).state_dict(), model.state_dict())


def test_milestones_that_are_shares_move_with_a_longer_run(tree):
    shares = {"milestones": [0.5]}
    _, folder = run(tree, train__scheduler=shares, logger__print_freq=1)
    assert dict(log(folder, "iteration", "lr"))[TOTAL] == 5e-4
    run(tree, train__scheduler=shares, logger__print_freq=1, resume=True, train__total_iter=20)
    rates = dict(log(folder, "iteration", "lr"))
    # Half of 14 fine-tuning iterations: those from 13 on are slower, 13 itself not yet.
    assert (rates[13], rates[14]) == (1e-3, 5e-4) and max(rates) == 20


def test_a_moved_run_resumes_in_its_new_place(tree, stopped_run, tmp_path):
    place = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(stopped_run, place)
    before = contents(stopped_run)
    assert cli.main(["train", str(place / "config.yml"), "--resume", "--quiet"]) == 0
    assert states(place) == ["12.state", "4.state"]
    assert contents(stopped_run) == before, "the run in the old place"
    assert (
        cli.main(["train", str(place / "config.yml"), "--resume", "--iters", "13", "--quiet"]) == 0
    )
    assert states(place) == ["12.state", "13.state"]


def test_resume_state_in_the_file_is_resumed_from(tree, stopped_run):
    whole, _ = run(tree, name="whole")
    state = str(stopped_run / "training_states" / "4.state")
    resumed, folder = run(tree, name="other", path__resume_state=state)
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert [i for (i,) in log(folder, "iteration")] == [6, 8, 9, 10, 12]
    assert "resume_state:" not in (folder / "config.yml").read_text()

    # Back to iteration 4 in its own folder: the states of the abandoned branch are kept aside.
    run(tree, resume=True)
    assert states(stopped_run) == ["12.state", "4.state"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Interrupted):
            run(tree, path__resume_state=state)
    assert states(stopped_run) == ["4.state", "5.state"]
    assert (stopped_run / "training_states" / "12.state.old").is_file()
    resumed, _ = run(tree, resume=True, path__resume_state=state)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_a_sparse_model_keeps_its_zeros_or_a_line_says_that_it_does_not(tree, tmp_path):
    sparse, folder = run(tree)
    path = str(folder / "models" / "net_g_latest.safetensors")
    del tree["sparsity"]
    start = {"path__pretrain_network_g": path, "train__total_iter": 4}
    tuned, folder = run(tree, name="tuned", sparsity={"from_zeros": True}, **start)
    moved = 0
    for name, before in sparse.state_dict().items():
        after = tuned.state_dict()[name]
        if name.endswith("weight"):
            assert torch.equal(after == 0, before == 0), name
        moved += int((after != before).sum())
    assert moved > 100
    assert {stage for (stage,) in log(folder, "stage")} == {"fine-tuning"}
    assert "fills them again" not in (folder / "log" / "train.log").read_text()

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            run(tree, name="resumed", sparsity={"from_zeros": True}, **start)
    gone = {**start, "path__pretrain_network_g": "a/file/that/was/deleted.safetensors"}
    resumed, folder = run(tree, name="resumed", sparsity={"from_zeros": True}, resume=True, **gone)
    assert_equal(resumed.state_dict(), tuned.state_dict())
    assert "path.pretrain_network_g is not read again" in (folder / "log" / "train.log").read_text()

    dense, folder = run(tree, name="dense", **start)
    line = "% of the pretrained weights are zero, and this training fills them again"
    assert line in (folder / "log" / "train.log").read_text()
    assert checkpoint.sparsity(dense)["zeros"] == 0


def test_the_log_says_whose_score_and_whose_zeros_it_shows(tree):
    _, folder = run(tree, val__val_freq=4, logger__print_freq=4)
    lines = [line[20:] for line in (folder / "log" / "train.log").read_text().splitlines()]
    rows = {int(line.split("/")[0]): line for line in lines if "/12  " in line}
    assert list(rows) == [4, FREEZE, 8, TOTAL], "the iteration of the freeze is scored as well"
    assert " dB masked, " in rows[4] and " dB soft  selected 80" in rows[4]
    assert "zeros 0.0 %" in rows[4]
    for i in (FREEZE, 8, TOTAL):
        assert "dB  " in rows[i] and "soft" not in rows[i] and "zeros 80" in rows[i]
    assert any(line.startswith("iteration 6: the mask is frozen and 80") for line in lines)
    assert lines[-1].startswith("best: ")


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the system has no pseudo-terminals")
def test_a_terminal_that_goes_away_leaves_a_state(training_photos, tmp_path):
    import pty

    command = [
        "train", "--model", "edsr-tiny", "--scale", "2", "--hr", str(training_photos), "--iters",
        "1000000", "--batch", "1", "--patch", "16", "--print-freq", "1", "--name", "run", "--root",
        str(tmp_path / "experiments"), "--device", "cpu", "--no-tensorboard", "--set",
        "network_g.num_feat=8", "network_g.num_block=1",
    ]  # fmt: skip
    process, terminal = pty.fork()
    if not process:
        os.environ.update(
            COLUMNS="40", ISSP_CACHE=str(tmp_path), PYTHONPATH=os.pathsep.join(sys.path)
        )
        os.execv(sys.executable, [sys.executable, "-m", "issp", *command])
    shown = b""
    while b"s/it" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (state,) = states(tmp_path / "experiments" / "run")
    assert int(state.removesuffix(".state")) >= 1


def test_settings_without_effect_are_named_at_the_start(tree):
    del tree["datasets"]["val"]
    _, folder = run(tree, **SHORT, logger__wandb={"project": "sr"}, val__suffix="x")
    text = (folder / "log" / "train.log").read_text()
    assert text.count("without validation: datasets has no entry val") == 1
    assert text.count("without effect here: val.suffix, logger.wandb") == 1


def test_long_checks_say_how_far_they_are(tree, monkeypatch):
    monkeypatch.setattr(preflight, "_EVERY", -1)
    _, folder = run(tree, **SHORT)
    lines = [line[20:] for line in (folder / "log" / "train.log").read_text().splitlines()]
    assert lines[0] == "set: decoding image 1 of 4"
    assert "training images: decoding image 4 of 4" in lines


def test_a_root_that_is_no_folder_is_named(tree, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        run(tree, **SHORT, path__experiments_root=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_crop_that_the_network_cannot_take_is_named_before_the_run(tree, tmp_path):
    swinir = {"type": "SwinIR", "img_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2]}
    swinir |= {"window_size": 8, "upsampler": "pixelshuffledirect"}
    with pytest.raises(
        ConfigError, match=r"datasets\.train\.gt_size 24: .*multiples of 8, got 12x12"
    ):
        run(tree, **SHORT, network_g=swinir, datasets__train__gt_size=24)
    assert not (tmp_path / "experiments").exists()
