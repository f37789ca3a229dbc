"""A study survives kills at any moment, has equal budgets and goes on past a run that fails."""

import errno
import os
import random
import re
import shutil
import signal
import time

import pytest

from issp.sr import builders, config, evaluate, logging, results
from issp.sr.data import EvalDataset, PairedFolder
from issp.sr.study import runner
from tests.sr.study.files import (
    FREEZE,
    TOTAL,
    assert_same_studies,
    children,
    is_alive,
    start,
    study,
    study_tree,
    write,
)

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytest.importorskip("matplotlib", reason="the report has a figure")

pytestmark = pytest.mark.full  # every study starts processes that import torch

# A loss, a penalty and a state; a second draw of the weights; nothing at all.
METHODS = ["assl", "scratch", "dense"]
SECONDS = 120  # for what takes a few, on a busy machine


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISSP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole(training_photos, tmp_path_factory):
    """The folder of a study without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert study(write(tree_of_study(training_photos, folder), folder / "study.yml")) == 0
    return folder / "out"


def tree_of_study(photos, folder):
    tree = study_tree(photos, folder)
    tree["grid"]["method"] = METHODS
    return tree


def wait_until(condition, process):
    """Waits for a condition, as long as the process runs."""
    end = time.monotonic() + SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)


def wait_for_end(numbers):
    end = time.monotonic() + SECONDS
    while any(map(is_alive, numbers)):
        assert time.monotonic() < end, "a worker outlives its study"
        time.sleep(0.02)


@pytest.mark.parametrize("workers_too", [False, True], ids=["study", "workers"])
def test_a_study_that_is_killed_at_any_moment_ends_as_one_without_a_break(
    whole, training_photos, tmp_path, workers_too
):
    path, out = (
        write(tree_of_study(training_photos, tmp_path), tmp_path / "s.yml"),
        tmp_path / "out",
    )
    rng = random.Random(workers_too)
    # A moment of each kind, then a random while: before a state, between states, while scoring.
    moments = [
        lambda: len(list(out.glob("runs/*/training_states/*.state"))) >= 2,
        lambda: bool(list(out.glob("runs/*/models/net_g_latest.safetensors"))),
        lambda: len(list(out.glob("runs/EDSR*"))) >= 2,
        lambda: len(list(out.glob("runs/EDSR*/results.csv"))) >= 2,
    ]
    killed = 0
    for moment in moments:
        process = start(path)
        wait_until(moment, process)
        time.sleep(rng.uniform(0, 0.2))
        workers = children(process)
        killed += process.poll() is None
        process.kill()
        if workers_too:
            for number in workers:
                os.kill(number, signal.SIGKILL)
        process.communicate()
        if not workers_too:
            wait_for_end(workers)
    assert killed >= 3
    assert study(path) == 0
    assert_same_studies(whole, out)


def test_two_workers_give_the_results_of_one(whole, training_photos, tmp_path):
    path = write(tree_of_study(training_photos, tmp_path), tmp_path / "study.yml")
    assert study(path, "--workers", "2") == 0
    assert_same_studies(whole, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_runs_and_says_how_to_go_on(whole, training_photos, tmp_path, number):
    tree = tree_of_study(training_photos, tmp_path)
    path, out = write(tree, tmp_path / "study.yml"), tmp_path / "out"
    process = start(path, "--workers", "2")
    wait_until(lambda: len(list(out.glob("runs/*/training_states/*.state"))) >= 2, process)
    workers = children(process)
    process.send_signal(number)
    text = process.communicate(timeout=SECONDS)[0].decode()
    assert process.returncode == 128 + number and len(workers) == 2
    assert not any(map(is_alive, workers))
    found = re.search(r"stopped with (\d) of 6 runs finished; continue with: (.*)", text)
    assert found and found[2] == f"issp study {path} --workers=2 --threads=1"
    assert int(found[1]) < 6
    assert study(path, "--workers", "2") == 0
    assert_same_studies(whole, out)


def test_a_finished_study_trains_and_scores_nothing_again(whole, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*") if path.is_file()
    }
    assert study(whole / "study.yml") == 0
    assert "6 runs, 6 are finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_damaged_model_of_a_trained_run_is_written_again_from_its_state(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    model = sorted(out.glob("runs/*/models/net_g_latest.safetensors"))[0]
    model.write_bytes(model.read_bytes()[:-1])
    (model.parent.parent / results.FILE_NAME).unlink()  # killed before it was scored
    assert study(out / "study.yml") == 0
    assert_same_studies(whole, out)


def test_all_runs_have_the_same_budget(whole):
    budgets, data = set(), {0: set(), 1: set()}
    for folder in (path.parent for path in sorted(whole.glob("runs/*/config.yml"))):
        settings = config.parse(config.load_yaml(folder / "config.yml"))
        rows = logging.read_csv(folder / "log" / "train.csv")
        stages = [(row["iteration"], row["stage"], row["lr"]) for row in rows]
        images = settings.train_data.model_dump_json()
        budgets.add((tuple(stages), images, settings.train.model_dump_json()))
        assert stages[-1][:2] == (TOTAL, "fine-tuning")
        assert [s for s in stages if s[1] == "pruning"][-1][0] == FREEZE
        batches = builders.loader(settings, pin_memory=False)
        data[settings.manual_seed].add(next(batches)["lq"].numpy().tobytes())
    assert len(budgets) == 1 and len(list(whole.glob("runs/*/config.yml"))) == 6
    assert len(data[0]) == len(data[1]) == 1 and data[0] != data[1]


def test_results_hold_exact_zeros_and_both_channels(whole, training_photos):
    rows = results.read(whole)
    assert [row.channel for row in rows] == ["y", "rgb"] * 7
    assert {row.set for row in rows} == {"waves"} and {row.images for row in rows} == {4}
    bicubic, rows = rows[:2], rows[2:]
    assert {(r.method, r.arch, r.sparsity, r.seed) for r in bicubic} == {
        ("bicubic", "", None, None)
    }
    dataset = EvalDataset(PairedFolder(training_photos, 2))
    mean = evaluate.mean(evaluate.evaluate(evaluate.bicubic(2), dataset))
    assert (bicubic[0].psnr, bicubic[0].ssim) == (mean.psnr, mean.ssim)
    for row in rows:
        settings = config.parse(config.load_yaml((whole / row.model).parents[1] / "config.yml"))
        model = builders.network(settings)
        weights = [m.weight.numel() for m in model.modules() if hasattr(m, "stride")]
        pruned = sum(-(-8 * n // 10) for n in weights)
        level = 0 if row.method == "dense" else 0.8
        assert row.zeros == (pruned / sum(weights) if level else 0) and row.sparsity == level
        assert (row.method, row.seed) == (settings.sparsity.method, settings.manual_seed)


def test_a_run_that_fails_is_listed_and_the_others_go_on(training_photos, tmp_path, capsys):
    tree = tree_of_study(training_photos, tmp_path)
    tree["methods"] = {"no-layer": {"method": "iss-p", "exclude": ["nothing*"]}}
    tree["grid"] = {"method": ["no-layer", "iht"], "seed": 0}
    tree["base"]["train"]["total_iter"] = FREEZE
    assert study(write(tree, tmp_path / "study.yml")) == 1
    text = capsys.readouterr()
    assert 'failed: EDSR_x2_no-layer_0.95_seed0: exclude: "nothing*" matches no' in text.err
    assert {row.method for row in results.read(tmp_path / "out")} == {"bicubic", "iht"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "1 of 2 runs are finished." in report
    assert "Not finished: EDSR_x2_no-layer_0.95_seed0." in report


def test_a_worker_that_is_killed_fails_its_run_and_is_replaced(training_photos, tmp_path):
    tree = tree_of_study(training_photos, tmp_path)
    path, out = write(tree, tmp_path / "study.yml"), tmp_path / "out"
    process = start(path)
    wait_until(lambda: bool(list(out.glob("runs/*/training_states/*.state"))), process)
    (worker,) = children(process)
    os.kill(worker, signal.SIGKILL)
    text = process.communicate(timeout=SECONDS)[0].decode()
    assert process.returncode == 1
    assert re.search(r"failed: EDSR_x2_\S+: its process ended with status -9", text), text
    assert len(list(out.glob("runs/EDSR*/results.csv"))) == 5


def test_a_study_goes_on_when_nobody_reads_its_output(whole, training_photos, tmp_path):
    tree = tree_of_study(training_photos, tmp_path)
    path, out = write(tree, tmp_path / "study.yml"), tmp_path / "out"
    process = start(path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=SECONDS) == 0
    assert (out / "report.md").is_file()
    assert_same_studies(whole, out)


def test_runs_are_saved_when_the_study_itself_fails(training_photos, tmp_path, monkeypatch):
    tree = tree_of_study(training_photos, tmp_path)
    tree["base"]["train"]["total_iter"] = 100_000
    tree["base"]["logger"]["save_checkpoint_freq"] = 100_000
    path, out = write(tree, tmp_path / "study.yml"), tmp_path / "out"

    def fail_once_a_run_is_under_way(self):
        if any(len(logging.read_csv(log)) > 3 for log in out.glob("runs/*/log/train.csv")):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runner._Work, "_show", fail_once_a_run_is_under_way)
    assert study(path) == 2
    (state,) = out.glob("runs/*/training_states/*.state")
    assert 0 < int(state.stem) < 100_000


def test_a_second_study_in_the_folder_is_refused_while_the_first_runs(training_photos, tmp_path):
    tree = tree_of_study(training_photos, tmp_path)
    path, out = write(tree, tmp_path / "study.yml"), tmp_path / "out"
    first = start(path)
    wait_until(lambda: bool(list(out.glob("runs/EDSR*"))), first)
    second = start(path)
    text = second.communicate(timeout=SECONDS)[0].decode()
    first.terminate()
    first.communicate(timeout=SECONDS)
    assert second.returncode == 2 and f"another training runs in {out}" in text
