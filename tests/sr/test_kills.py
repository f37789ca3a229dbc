"""SIGKILL at any moment, also in the middle of a write: what is on disk is whole and goes on."""

import itertools
import json
import random
from pathlib import Path

import pytest

from issp.sr import checkpoint
from tests.processes import ForkServer
from tests.sr.runs import assert_equal, assert_same_logs

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")

# Trains until it ends or is killed: after `delay` seconds by another process, or by itself at the
# `at`-th call of one kind: halfway through a write, before an fsync, after a replace or an unlink.
_RUN = """
import collections, json, os, time
from issp.sr import config
from issp.sr.run_folder import RunFolder
from issp.sr.train import train
from issp.utils import files

asked, calls, process = json.loads({asked!r}), collections.Counter(), os.getpid()

def is_due(kind):
    calls[kind] += 1
    return kind == asked["kind"] and calls[kind] == asked["at"]

def kill():
    os.kill(process, 9)

class Deadly:
    def __init__(self, file):
        self._file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self._file.close()
    def __getattr__(self, name):
        return getattr(self._file, name)
    def write(self, content):
        if is_due("write"):
            self._file.write(bytes(content)[: len(bytes(content)) // 2])
            self._file.flush()
            kill()
        return self._file.write(content)

def deadly(kind):
    call = getattr(os, kind)
    def wrapped(*args, **kwargs):
        due = is_due(kind)
        if due and kind == "fsync":
            kill()
        result = call(*args, **kwargs)
        if due:
            kill()
        return result
    setattr(os, kind, wrapped)

files.open = lambda *args, **kwargs: Deadly(open(*args, **kwargs))
for kind in ("fsync", "replace", "unlink"):
    deadly(kind)
settings = config.parse(asked["tree"])
resume = RunFolder(settings.folder).latest_state() is not None
if asked["kind"] == "moment" and os.fork() == 0:
    time.sleep(asked["at"])
    if os.getppid() == process:
        kill()
    os._exit(0)
began = time.monotonic()
train(settings, resume=resume, quiet=True)
print(json.dumps({{"moment": time.monotonic() - began, **calls}}))
"""


@pytest.fixture(scope="module")
def server():
    # Imported once. Nothing is computed in it, so that a fork of it has no threads.
    server = ForkServer("torch, issp.sr.train")
    yield server
    server.close()


@pytest.fixture
def often(tree):
    """Saves after every iteration."""
    tree["logger"].update(save_checkpoint_freq=1, keep_training_states=2, grad_stats_freq=3)
    return tree


def start(server, tree, name, kind="", at=0.0):
    """One start of the run; what each kind of kill can choose from if it ended, else None."""
    asked = {"tree": {**tree, "name": name}, "kind": kind, "at": at}
    done = server.run(_RUN.format(asked=json.dumps(asked)), OMP_NUM_THREADS="1")
    assert done.returncode in (0, -9), done.stderr
    return json.loads(done.stdout) if done.returncode == 0 else None


def look(folder):
    """The latest iteration with a state and the models of a run, after reading all of them."""
    states = {int(path.stem): path for path in folder.glob("training_states/*.state")}
    for iteration, path in states.items():
        assert checkpoint.read_state(path)["iteration"] == iteration
    models = list(folder.glob("models/net_g_*.safetensors"))
    for path in models:
        checkpoint.read_tensors(path)
    # The best one may be that of an iteration that is done again: it is set aside for a moment.
    return max(states, default=0), {path.name for path in models} - {"net_g_best.safetensors"}


def survive(server, tree, name, rng, kinds, most, kills):
    """Kills the run at random, up to `kills` times, and starts it again until it ends.

    Nothing that was saved before a kill is missing or damaged after it. Returns its folder and how
    often it was killed.
    """
    folder, killed = Path(tree["path"]["experiments_root"], name), 0
    latest, models = 0, set()
    while True:
        kind = rng.choice(kinds) if killed < kills else ""
        end = most.get(kind, 1)
        at = rng.uniform(0, end) if kind == "moment" else rng.randint(1, end)
        if start(server, tree, name, kind, at):
            return folder, killed
        killed += 1
        before, kept = latest, models
        latest, models = look(folder)
        assert latest >= before and (models >= kept or not before), (kind, at)


def assert_same_end(folder, expected):
    """The same files with the same content, times aside, and nothing that a kill has left."""
    places = (folder, expected)
    files = [
        {f.relative_to(place) for f in place.rglob("*") if f.suffix != ".old"} for place in places
    ]
    assert files[0] == files[1]
    assert_same_logs(folder, expected)
    for path in expected.glob("models/*"):
        ours, theirs = (checkpoint.read_tensors(p / "models" / path.name) for p in places)
        assert_equal(ours, theirs, path.name)


@pytest.mark.parametrize(
    "kind, kills", [("moment", 30), ("write", 8), ("fsync", 4), ("replace", 4), ("unlink", 4)]
)
@pytest.mark.full
def test_fifty_kills_lose_nothing_and_change_no_bit(server, often, kind, kills):
    most = start(server, often, "whole")
    expected = Path(often["path"]["experiments_root"], "whole")
    rng, left = random.Random(kind), kills
    for number in itertools.count():  # a new run each time: one may end before its first kill
        folder, killed = survive(server, often, f"run{number}", rng, [kind], most, left)
        assert_same_end(folder, expected)
        left -= killed
        if not left:
            break


@pytest.mark.full
@pytest.mark.parametrize("accelerate", [False, True])
def test_a_few_kills_lose_nothing_and_change_no_bit(server, often, accelerate):
    often["sparsity"]["accelerate"] = accelerate
    most = start(server, often, "whole")
    kinds = ("write", "moment")
    folder, killed = survive(server, often, "run", random.Random(2), kinds, most, 2)
    assert killed
    assert_same_end(folder, Path(often["path"]["experiments_root"], "whole"))
