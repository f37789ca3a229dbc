"""`issp train` with `train.parallel: fsdp`: the run is that of DistributedDataParallel."""

import os
import signal
import zlib

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from issp.nn.sharding import is_sharded
from issp.optim.step import FusedStep
from issp.sr import builders, checkpoint, config, logging
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
from tests.sr.runs import TOTAL, assert_equal, assert_same_logs, log, run

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")
pytestmark = needs_gloo

SWINIR = {
    **{"type": "SwinIR", "upsampler": "pixelshuffledirect", "embed_dim": 8, "depths": [2, 2]},
    **{"num_heads": [2, 2], "window_size": 4, "img_size": 8, "mlp_ratio": 2},
    "drop_path_rate": 0.5,
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))
    tree = tree_in(tmp_path)
    tree["train"]["parallel"] = "fsdp"
    return tree


def other(tree, name, **train):
    """The same run under another name, with some settings of `train` changed."""
    return {**tree, "name": name, "train": {**tree["train"], **train}}


def last_state(tree, iteration=TOTAL):
    return checkpoint.read_state(folder_of(tree) / "training_states" / f"{iteration}.state")


def validations(tree):
    return logging.read_csv(folder_of(tree) / "log" / "validation.csv")


def with_equal_gradients(tree, hook=None, resume=False):
    """`start` with gradients that name and step decide, and torch's own steps, as of shards."""
    FusedStep._fallback_reason = lambda self, group: "torch steps shards"
    make = builders.optimizer

    def optimizer(settings, model):
        opt = make(settings, model)
        names = {p: name for name, p in model.named_parameters()}

        def replace(*_):
            for p, name in names.items():
                p.grad = gradient(p, name, int(opt.state[p]["step"]) if p in opt.state else 0)

        opt.register_step_pre_hook(replace)
        return opt

    builders.optimizer = optimizer
    return start(tree, hook, resume)


def gradient(p, name, step):
    seed = zlib.crc32(name.encode()) + step
    grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return distribute_tensor(grad, p.device_mesh, p.placements) if is_sharded(p) else grad


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_shards_have_the_bits_of_whole_copies(tree, world):
    """8 rows of weights and 3 of the last one: of 4 ranks one has none."""
    ddp = other(tree, "ddp", parallel="ddp")
    ends = {}
    for one in (tree, ddp):
        ends[one["name"]] = run_ranks(with_equal_gradients, world, one, launched=True)[0]
    for name, expected in ends["ddp"].items():
        assert_bitwise_equal(ends["run"][name], expected, name)
    ours, theirs = last_state(tree), last_state(ddp)
    for part in ("model", "ema", "optimizer", "pruner", "batches", "random"):
        assert_equal(ours[part], theirs[part], part)
    assert validations(tree) == validations(ddp)
    assert_same_rows(tree, ddp)


def assert_same_rows(tree, ddp):
    """The losses are of forward passes whose weights lie in another order of memory."""
    columns = ("iteration", "stage", "lr", "psnr", "flips", "threshold", "selected", "zeros")
    ours, theirs = (repr(log(folder_of(x), *columns)) for x in (tree, ddp))
    assert ours == theirs
    losses = [[row[0] for row in log(folder_of(x), "loss")] for x in (tree, ddp)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    layers = [logging.read_csv(folder_of(x) / "log" / "layers.csv") for x in (tree, ddp)]
    assert layers[0] == layers[1]


@pytest.mark.full
def test_the_gradients_of_fully_shard_are_those_of_ddp(tree):
    ddp = other(tree, "ddp", parallel="ddp")
    ours, theirs = (run_ranks(start, 2, one, launched=True)[0] for one in (tree, ddp))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-6)
        assert torch.equal(ours[name] == 0, expected == 0), name


def test_a_signal_saves_once_and_the_run_resumes_to_the_same_bits(tree):
    whole = other(tree, "whole")
    expected = run_ranks(start, 2, whole, launched=True)
    ended = run_ranks(start, 2, tree, stop_rank_1, launched=True)
    assert [kind for kind, _ in ended] == ["Interrupted", "OtherRankEnded"]
    assert states(tree) == [5]
    resumed = run_ranks(start, 2, tree, None, True, launched=True)
    for result, one in zip(resumed, expected, strict=True):
        for name in one:
            assert_bitwise_equal(result[name], one[name], name)
    assert_same_logs(folder_of(tree), folder_of(whole), ("train", "validation"))


@pytest.mark.full
@pytest.mark.parametrize("world, parallel", [(1, "fsdp"), (2, "ddp"), (4, "fsdp")])
def test_a_run_goes_on_with_another_number_of_ranks_or_whole_copies(tree, world, parallel):
    """Its gradients do not depend on the ranks, so neither do its bits."""
    whole = other(tree, "whole")
    expected = run_ranks(with_equal_gradients, 2, whole, launched=True)[0]
    run_ranks(with_equal_gradients, 2, tree, stop_rank_1, launched=True)
    resumed = other(tree, "run", parallel=parallel)
    result = run_ranks(with_equal_gradients, world, resumed, None, True, launched=True)[0]
    for name in expected:
        assert_bitwise_equal(result[name], expected[name], name)
    for part in ("model", "ema", "optimizer", "pruner"):
        assert_equal(last_state(tree)[part], last_state(whole)[part], part)


@pytest.mark.full
def test_a_run_of_one_process_goes_on_in_shards(tree):
    whole = other(tree, "whole")
    expected = run_ranks(with_equal_gradients, 1, whole, launched=True)[0]
    assert (
        run_ranks(with_equal_gradients, 1, tree, stop_rank_0, launched=True)[0][0] == "Interrupted"
    )
    result = run_ranks(with_equal_gradients, 2, tree, None, True, launched=True)[0]
    for name in expected:
        assert_bitwise_equal(result[name], expected[name], name)


def stop_rank_0(rank, iteration):
    if rank == 0 and iteration == 4:
        os.kill(os.getpid(), signal.SIGTERM)


SETTINGS = {
    "dense": {"sparsity": None},
    "the method dense": {"sparsity": {"method": "dense", "freeze_iter": 6}},
    "iht": {"sparsity": {"method": "iht", "ratio": 0.8, "freeze_iter": 6}},
    "l1": {"sparsity": {"method": "l1", "ratio": 0.8, "freeze_iter": 6}},
    "N:M": {"sparsity": {"keep": {"n": 2, "of": 4}, "freeze_iter": 6, "exclude": ["conv_first"]}},
    "SGD": {"train": {"optim_g": {"type": "SGD", "lr": 1e-3, "momentum": 0.9}, "ema_decay": 0}},
    "AdamW": {"train": {"optim_g": {"type": "AdamW", "lr": 1e-3, "amsgrad": True}}},
    "SwinIR": {"network_g": SWINIR},
    "the freeze at the end": {"sparsity": {"ratio": 0.8, "freeze_iter": TOTAL}},
}


@pytest.mark.full
@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_is_trained_resumes(tree, name):
    for section, values in SETTINGS[name].items():
        merged = {**tree[section], **values} if section == "train" else values
        tree = {**tree, section: merged}
    if name == "the freeze at the end":
        tree["train"].pop("scheduler")
    whole = other(tree, "whole")
    expected = run_ranks(start, 2, whole, launched=True)
    stopped = run_ranks(start, 2, tree, stop_rank_1, launched=True)
    assert stopped[0][0] == "Interrupted", stopped
    resumed = run_ranks(start, 2, tree, None, True, launched=True)
    for result, one in zip(resumed, expected, strict=True):
        for key in one:
            assert_bitwise_equal(result[key], one[key], key)
    assert_same_logs(folder_of(tree), folder_of(whole), ("train", "validation"))


@pytest.mark.full
def test_sparse_weights_keep_their_zeros(tree):
    run_ranks(start, 2, tree, launched=True)
    model = folder_of(tree) / "models" / "net_g_latest.safetensors"
    tuned = other(tree, "tuned")
    tuned["path"] = {**tree["path"], "pretrain_network_g": str(model)}
    tuned["sparsity"] = {"from_zeros": True}
    result = run_ranks(start, 2, tuned, launched=True)[0]
    before = checkpoint.read_tensors(model)[0]
    for name, value in before.items():
        if name.endswith("weight"):
            assert torch.equal(result[name] == 0, value == 0), name
            assert not torch.equal(result[name], value), name


def fail_to_validate(tree, resume=False):
    """On rank 0 the second validation finds an image that cannot be read."""
    validate = TrainingRun.validate

    def refuse(self, iteration, *columns):
        if iteration == 6:
            raise ValueError("image 1.png is damaged")
        return validate(self, iteration, *columns)

    TrainingRun.validate = refuse
    return start(tree, resume=resume)


@pytest.mark.full
def test_a_failing_validation_costs_itself_and_leaves_a_state_of_all_shards(tree):
    whole = other(tree, "whole")
    expected = run_ranks(start, 2, whole, launched=True)[0]
    result = run_ranks(fail_to_validate, 2, tree, launched=True)[0]
    for name in expected:
        assert_bitwise_equal(result[name], expected[name], name)
    assert states(tree) == [6, TOTAL]
    (folder_of(tree) / "training_states" / f"{TOTAL}.state").unlink()
    for result in run_ranks(start, 2, tree, None, True, launched=True)[:1]:
        for name in expected:
            assert_bitwise_equal(result[name], expected[name], name)


@pytest.mark.full
@pytest.mark.parametrize("hook", [fail_rank_1, kill_rank_1])
def test_a_rank_that_fails_ends_all_with_one_error(tree, hook):
    """Rows that cannot be read leave a state; those of a rank that is gone are lost."""
    tree["logger"]["save_checkpoint_freq"] = 3
    whole = other(tree, "whole")
    expected = run_ranks(start, 2, whole, launched=True)[0]
    first, second = run_ranks(start, 2, tree, hook, launched=True)
    if hook is fail_rank_1:
        assert first == ("OtherRankEnded", "rank 1: ValueError: image 1.png is damaged")
        assert second == ("ValueError", "image 1.png is damaged")
    else:
        assert first[0] == "LostRankError" and second is None
    assert states(tree) == ([6, 7] if hook is fail_rank_1 else [3, 6])
    result = run_ranks(start, 2, tree, None, True, launched=True)[0]
    for name in expected:
        assert_bitwise_equal(result[name], expected[name], name)


def test_one_process_has_all_weights_and_says_so(tree):
    whole = other(tree, "whole", parallel="ddp")
    expected, _ = run(whole)
    model, folder = run(tree)
    assert_equal(model.state_dict(), expected.state_dict())
    said = (folder / "log" / "train.log").read_text()
    assert said.count("train.parallel is fsdp, but one process was started") == 1


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("train.parallel", "zero", "'zero' is not supported: .*ddp, fsdp"),
        ("logger.grad_stats_freq", 2, "logger.grad_stats_freq records whole layers, not shards"),
        ("logger.mask_stats_freq", 2, "logger.mask_stats_freq records whole layers, not shards"),
        ("sparsity.accelerate", True, "sparsity.accelerate needs whole layers, not shards"),
        ("sparsity.method", "srp", "method srp needs whole layers.*one of iss-p, iht, l1, dense"),
    ],
)
def test_what_needs_whole_layers_is_refused(tree, key, value, sentence):
    if key == "sparsity.method":
        del tree["sparsity"]["ratio"]
    config.set_key(tree, key, value)
    with pytest.raises(ConfigError, match=sentence):
        config.parse(tree)


def test_a_pattern_that_shards_would_cut_is_refused_before_anything_is_written(tree):
    tree["sparsity"] = {"keep": {"n": 1, "of": 2, "v": 8}, "freeze_iter": 6}
    tree["sparsity"]["exclude"] = ["conv_first", "conv_last"]
    ended = run_ranks(start, 2, tree, launched=True)
    assert {"ValueError", "OtherRankEnded"} >= {kind for kind, _ in ended}
    assert all("its 8 rows are sharded by 4, which cuts groups of" in text for _, text in ended)
    assert not folder_of(tree).exists()
