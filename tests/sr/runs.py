"""Short training runs for tests of the driver: 12 iterations of a tiny network on 4 pictures."""

import copy
import os
import signal

import numpy as np
import torch

from issp import data
from issp.sr import checkpoint, config, logging
from issp.sr.train import train

TOTAL, FREEZE = 12, 6


def draw_photos(folder):
    """Four pictures of waves, 44 x 40 pixels."""
    y, x = np.mgrid[:40, :44]
    for i in range(4):
        waves = [np.sin(x / (2 + i + c)) + np.cos(y / (3 + c)) for c in range(3)]
        image = (np.stack(waves, axis=2) * 60 + 127).astype(np.uint8)
        data.write_image(folder / f"{i}.png", image)
    return folder


def tree_of(photos, root):
    """The nested mapping of a run in `root`."""
    return {
        "name": "run",
        "scale": 2,
        "manual_seed": 3,
        "device": "cpu",
        "path": {"experiments_root": str(root)},
        "network_g": {"type": "EDSR", "num_feat": 8, "num_block": 1},
        "datasets": {
            "train": {"dataroot_gt": str(photos), "gt_size": 16, "batch_size_per_gpu": 2},
            "val": {"name": "set", "dataroot_gt": str(photos)},
        },
        "train": {
            "total_iter": TOTAL,
            "ema_decay": 0.9,
            "optim_g": {"lr": 1e-3, "betas": [0.9, 0.99]},
            "scheduler": {"milestones": [2, 4]},
        },
        "sparsity": {"ratio": 0.8, "freeze_iter": FREEZE},
        "val": {"val_freq": 3, "metrics": {"psnr": {"test_y_channel": True}}},
        "logger": {"print_freq": 2, "save_checkpoint_freq": 100, "use_tb_logger": False},
    }


def run(tree, **changes):
    """Trains with some keys changed, "a.b" for nested ones; returns the model and the folder."""
    tree = copy.deepcopy(tree)
    resume = changes.pop("resume", False)
    for key, value in changes.items():
        config.set_key(tree, key.replace("__", "."), value)
    settings = config.parse(tree)
    return train(settings, resume=resume, quiet=True), settings.folder


def stop_at(monkeypatch, iteration):
    """The process gets a real SIGINT during that iteration."""
    advance = logging.Progress.advance

    def advance_and_signal(self, done):
        advance(self, done)
        if done == iteration:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(logging.Progress, "advance", advance_and_signal)


def log(folder, *columns):
    rows = logging.read_csv(folder / "log" / "train.csv")
    return [[row[column] for column in columns] for row in rows]


def assert_equal(a, b, path="state"):
    """Nested plain values and tensors, bitwise; names the first difference."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) or a.numel() == 0, path
    else:
        assert a == b or (a != a and b != b), path


def assert_same_logs(
    folder, expected, names=("train", "validation", "layers", "gradients"), last=TOTAL
):
    """All rows of two runs, times aside, and the state that they end with."""
    for name in names:
        rows = [
            [{k: v for k, v in row.items() if k not in ("seconds", "update_share")} for row in log]
            for log in map(
                logging.read_csv, (p / "log" / f"{name}.csv" for p in (folder, expected))
            )
        ]
        assert repr(rows[0]) == repr(rows[1]), name  # NaN is not equal to itself
    states = [path / "training_states" / f"{last}.state" for path in (folder, expected)]
    assert_equal(*map(checkpoint.read_state, states))
