"""`issp train` in several processes: one run, whatever happens to one of them."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from issp.sr import checkpoint, config
from issp.sr.distributed import Ranks
from issp.sr.resume import SavedState
from issp.sr.training_run import TrainingRun
from issp.utils.errors import ConfigError
from tests.asserts import assert_bitwise_equal
from tests.distributed.driver import (
    fail_rank_1,
    folder_of,
    kill_rank_1,
    start,
    states,
    stop_rank_1,
    tree_in,
)
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.sr.runs import FREEZE, TOTAL, assert_same_logs, log, run

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = needs_gloo


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    return tree_in(tmp_path)


def test_ranks_share_the_batches_of_one_process(tree, tmp_path):
    """Two with two crops each are one with four, up to the rounding of a mean."""
    first, second = run_ranks(start, 2, tree, launched=True)
    for name in first:
        assert_bitwise_equal(second[name], first[name], name)
    alone = {**tree, "path": {"experiments_root": str(tmp_path / "alone")}}
    model, folder = run(alone, datasets__train__batch_size_per_gpu=4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)
        assert torch.equal(first[name] == 0, value == 0), name
    ours, theirs = (log(f, "iteration", "loss", "psnr") for f in (folder_of(tree), folder))
    assert [row[0] for row in ours] == [3, 5, 6, 9, 10, 12] == [row[0] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert [x or 0 for x in one] == pytest.approx([x or 0 for x in other], rel=1e-4)


def test_a_signal_to_any_rank_saves_once_and_the_run_resumes_to_the_same_bits(tree, tmp_path):
    whole = {**tree, "path": {"experiments_root": str(tmp_path / "whole")}}
    expected = run_ranks(start, 2, whole, launched=True)[0]
    ended = run_ranks(start, 2, tree, stop_rank_1, launched=True)
    assert [kind for kind, _ in ended] == ["Interrupted", "OtherRankEnded"]
    sentence = ended[0][1]
    assert sentence.startswith("stopped after iteration 5; continue with: torchrun --nproc_per_")
    assert "node=2 -m issp train " in sentence and sentence.endswith("config.yml --resume")
    assert states(tree) == [5]
    for result in run_ranks(start, 2, tree, None, True, launched=True):
        for name in expected:
            assert_bitwise_equal(result[name], expected[name], name)
    assert_same_logs(folder_of(tree), folder_of(whole), ("train", "validation"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "method"),
    [("EDSR", "srp"), ("EDSR", "scratch"), ("EDSR", "assl"), ("EDSR", "sls"), ("SwinIR", "iss-p")],
)
def test_what_is_drawn_or_learned_resumes(tree, tmp_path, kind, method):
    """SwinIR drops paths at random, on every rank others."""
    tree["sparsity"] = {"method": method, "freeze_iter": 8, "ratio": 0.8}
    if method == "sls":
        tree["sparsity"]["options"] = {"of": 8, "weight": 1.0, "epoch": 2, "lr": 0.3}
    if method == "assl":
        tree["sparsity"]["options"] = {"align_steps": 2}
    tree["network_g"]["num_block"] = 2
    if kind == "SwinIR":
        small = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
        tree["network_g"] = {"type": "SwinIR", "upsampler": "pixelshuffledirect", **small}
        tree["network_g"] |= {"img_size": 8, "mlp_ratio": 2, "drop_path_rate": 0.5}
    whole = {**tree, "path": {"experiments_root": str(tmp_path / "whole")}}
    expected = run_ranks(start, 2, whole, launched=True)
    stopped = run_ranks(start, 2, tree, stop_rank_1, launched=True)
    assert stopped[0][0] == "Interrupted", stopped
    for result in [*expected, *run_ranks(start, 2, tree, None, True, launched=True)]:
        for name in expected[0]:
            assert_bitwise_equal(result[name], expected[0][name], name)
    assert_same_logs(folder_of(tree), folder_of(whole), ("train", "validation"))


@pytest.mark.full
def test_sparse_fine_tuning_resumes(tree, tmp_path):
    """The gradients of the kept weights alone are shared."""
    tree["sparsity"] |= {"accelerate": True, "freeze_iter": 4}
    whole = {**tree, "path": {"experiments_root": str(tmp_path / "whole")}}
    expected = run_ranks(start, 2, whole, launched=True)
    assert run_ranks(start, 2, tree, stop_rank_1, launched=True)[0][0] == "Interrupted"
    for result in [*expected, *run_ranks(start, 2, tree, None, True, launched=True)]:
        for name in expected[0]:
            assert_bitwise_equal(result[name], expected[0][name], name)


@pytest.mark.parametrize("hook", [fail_rank_1, kill_rank_1])
def test_a_rank_that_fails_ends_all_with_one_error_and_the_state_is_saved(tree, tmp_path, hook):
    whole = {**tree, "path": {"experiments_root": str(tmp_path / "whole")}}
    expected = run_ranks(start, 2, whole, launched=True)[0]
    first, second = run_ranks(start, 2, tree, hook, launched=True)
    if hook is fail_rank_1:
        assert first == ("OtherRankEnded", "rank 1: ValueError: image 1.png is damaged")
        assert second == ("ValueError", "image 1.png is damaged")
    else:
        assert first[0] == "LostRankError" and second is None
        assert first[1].startswith("another rank has ended without a word")
    assert states(tree) in ([6], [7])  # rank 1 may be gone before the others' seventh step
    for resumed in run_ranks(start, 2, tree, None, True, launched=True):
        for name in expected:
            assert_bitwise_equal(resumed[name], expected[name], name)
    assert states(tree)[-1] == TOTAL


def test_a_rank_that_refuses_its_settings_ends_all(tree):
    tree["num_gpu"] = 4
    ended = run_ranks(start, 2, tree, launched=True)
    kinds = sorted(kind for kind, _ in ended)
    assert kinds == ["ConfigError", "OtherRankEnded"]
    assert all("num_gpu is 4, but 2 processes were started" in text for _, text in ended)
    assert not folder_of(tree).exists()


def validate_slowly(tree, stops):
    """Validation takes longer than the group of the gradients waits."""
    initialise = dist.init_process_group
    dist.init_process_group = lambda **kwargs: initialise(**kwargs, timeout=timedelta(seconds=1))
    validate = TrainingRun.validate

    def slow(self, iteration, *columns):
        time.sleep(2.5)
        if stops and iteration == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(self, iteration, *columns)

    TrainingRun.validate = slow
    return start(tree)


@pytest.mark.full
@pytest.mark.parametrize("stops", [False, True])
def test_the_others_wait_for_a_long_validation(tree, stops):
    tree["val"]["val_freq"] = 6
    first, second = run_ranks(validate_slowly, 2, tree, stops, launched=True)
    if stops:
        assert first[0] == "Interrupted" and "stopped after iteration 6" in first[1]
        assert second[0] == "OtherRankEnded" and "stopped after iteration 6" in second[1]
    assert states(tree) == [6 if stops else TOTAL]


def find_nothing(tree):
    """Rank 1 does not see the state that rank 0 resumes from."""
    if os.environ["RANK"] == "1":
        SavedState.find = classmethod(lambda *_: None)
    return start(tree, resume=True)


def test_ranks_that_find_different_states_are_refused(tree):
    run_ranks(start, 2, tree, stop_rank_1, launched=True)
    ended = run_ranks(find_nothing, 2, tree, launched=True)
    assert sorted(kind for kind, _ in ended) == ["ConfigError", "OtherRankEnded"]
    assert all("the ranks resume from the iterations 5, 0: give all" in text for _, text in ended)


def test_another_number_of_ranks_goes_on_from_a_state(tree):
    run_ranks(start, 2, tree, stop_rank_1, launched=True)
    model, _ = run(tree, resume=True)
    weight = model.state_dict()["conv_last.weight"]
    assert 0 < int((weight == 0).sum()) < weight.numel()
    state = checkpoint.read_state(folder_of(tree) / "training_states" / f"{TOTAL}.state")
    assert state["batches"]["sampler"]["position"] == 5 * 2 * 2 + (TOTAL - 5) * 2


@pytest.mark.parametrize(
    ("ranks", "changes", "sentence"),
    [
        (Ranks(), {"num_gpu": 4}, "num_gpu is 4.*nproc_per_node=4.*batch_size_per_gpu to 8"),
        (Ranks(), {"dist": True}, "dist is true, but one process was started: start torchrun"),
        (Ranks(world=2, local_world=2), {"num_gpu": 1}, "num_gpu is 1, but 2 processes"),
    ],
)
def test_settings_that_contradict_the_processes_are_refused(tree, ranks, changes, sentence):
    for key, value in changes.items():
        config.set_key(tree, key.replace("__", "."), value)
    with pytest.raises(ConfigError, match=sentence):
        ranks.check(config.parse(tree))


@pytest.mark.parametrize("gpus", [0, "auto", 2, 4])
def test_settings_that_fit_are_not(tree, gpus):
    Ranks(world=4, local_world=2).check(config.parse({**tree, "num_gpu": gpus, "dist": True}))


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    ranks = Ranks(rank=3, world=4, local_rank=1, local_world=2)
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert ranks.device("auto") == torch.device("cuda", 1) and taken == [1]
    assert ranks.device("cpu") == torch.device("cpu")
    assert ranks.command == "torchrun --nnodes=2 --nproc_per_node=2 -m issp"
    with pytest.raises(ConfigError, match="device is cuda:0, but each of the 4 processes"):
        ranks.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes were started on a machine with 1 GPUs"):
        ranks.device("cuda")


def test_freeze_is_in_the_runs():
    assert 5 < FREEZE < 7  # the runs above are stopped before it and killed after it
