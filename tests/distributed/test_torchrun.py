"""The documented command as a user types it: `torchrun --nproc_per_node=2 -m issp train`."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from issp.sr import logging
from tests.distributed.ranks import needs_gloo
from tests.sr.runs import TOTAL, draw_photos, tree_of

yaml = pytest.importorskip("yaml", reason="PyYAML reads the configuration files")
pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = [needs_gloo, pytest.mark.full]

SECONDS = 240  # until a command is taken for hanging


@pytest.fixture
def tree(tmp_path):
    return tree_of(draw_photos(tmp_path / "hr"), tmp_path / "experiments")


@contextlib.contextmanager
def torchrun(folder, *arguments):
    """The command in a session of its own, which ends with the test."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "issp"]
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ISSP_CACHE": str(folder / "cache")},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def write(folder, tree, **changes):
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({**tree, **changes}))
    return path


def told(stderr):
    """What the command itself has written to stderr, not torchrun."""
    return [line for line in stderr.splitlines() if line.startswith("issp train:")]


def test_a_run_prints_once_and_ends_well(tree, tmp_path):
    with torchrun(tmp_path, "train", write(tmp_path, tree)) as process:
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    folder = tmp_path / "experiments" / "run"
    assert [line.split(":")[0] for line in out.splitlines()].count("done") == 1
    assert out.count(f"{TOTAL}/{TOTAL}") == 1 and "warning" not in err
    assert [row["iteration"] for row in logging.read_csv(folder / "log" / "train.csv")][-1] == TOTAL
    assert (folder / "models" / "net_g_latest.safetensors").is_file()


def test_a_bad_setting_is_one_line(tree, tmp_path):
    with torchrun(tmp_path, "train", write(tmp_path, tree, scale=7)) as process:
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert len(told(err)) == 1 and "no multiple of 7" in told(err)[0], err
    # torchrun may end the second rank before it has found the same.
    assert err.count("exitcode  : 2 ") >= 1, "the status of bad input"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once(tree, tmp_path, number):
    """Ctrl-C reaches torchrun and its processes, and torchrun repeats it."""
    tree["train"]["total_iter"] = 200_000
    tree["val"]["val_freq"] = 200_000
    with torchrun(tmp_path, "train", write(tmp_path, tree)) as process:
        log = tmp_path / "experiments" / "run" / "log" / "train.csv"
        limit = time.monotonic() + SECONDS
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < limit, process.communicate()
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=SECONDS)
    states = list((tmp_path / "experiments" / "run" / "training_states").iterdir())
    assert len(states) == 1, err
    (line,) = told(err)
    assert line.startswith(f"issp train: stopped after iteration {states[0].stem}; continue with:")


def test_a_study_is_refused(tmp_path):
    study = tmp_path / "study.yml"
    study.write_text("{}")
    with torchrun(tmp_path, "study", study) as process:
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "issp study: error: a study trains in processes of its own: start it without" in err
