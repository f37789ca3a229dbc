"""Study files of tiny networks on drawn pictures, and the command in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from issp import cli
from issp.sr import checkpoint
from tests.sr.runs import assert_equal, tree_of

ROOT = Path(__file__).resolve().parents[3]
TOTAL, FREEZE = 60, 30


def study_tree(photos, folder):
    """Two methods with two seeds, 60 iterations each."""
    base = tree_of(photos, "not used")
    del base["name"], base["datasets"]["val"]
    base["train"] |= {"total_iter": TOTAL, "ema_decay": 0}
    base["sparsity"] = {"freeze_iter": FREEZE}
    base["logger"]["save_checkpoint_freq"] = 10
    return {
        "out": str(folder / "out"),
        "base": base,
        "grid": {"method": ["iss-p", "iht"], "ratio": 0.8, "seed": [0, 1]},
        "test": {"waves": str(photos)},
    }


def write(tree, path):
    """The study file at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def study(path, *options):
    """`issp study` in this process; its workers are others."""
    return cli.main(["study", str(path), "--threads", "1", *options])


def start(path, *options):
    """`issp study` in a process of its own."""
    command = [sys.executable, "-m", "issp", "study", str(path), "--threads", "1", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def children(process):
    """Numbers of the processes that a process has started."""
    path = Path("/proc", str(process.pid), "task", str(process.pid), "children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def is_alive(number):
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        os.kill(number, 0)
        return "\nState:\tZ" not in Path("/proc", str(number), "status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def assert_same_studies(a, b):
    """Results and final states of all runs, bit for bit."""
    assert (a / "results.csv").read_text() == (b / "results.csv").read_text()
    names = sorted(path.name for path in (a / "runs").iterdir())
    assert names == sorted(path.name for path in (b / "runs").iterdir())
    for name in names:
        for file in ("models/net_g_latest.safetensors", f"training_states/{TOTAL}.state"):
            one, two = (folder / "runs" / name / file for folder in (a, b))
            if file.endswith(".state"):
                assert_equal(checkpoint.read_state(one), checkpoint.read_state(two), name)
            else:
                assert_equal(*(checkpoint.read_tensors(path)[0] for path in (one, two)), name)
