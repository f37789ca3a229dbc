"""`sparsity.accelerate`: the driver trains the kept weights alone; its files stay the same."""

import pytest
import torch
from torch import nn

import issp
from issp.nn import autotune
from issp.nn.sparse_training import SparseTrainingConv2d, SparseTrainingLayer
from issp.sr import checkpoint, config
from issp.sr.interrupt import Interrupted
from issp.utils.errors import ConfigError
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import timed_fixture  # noqa: F401
from tests.sr.runs import FREEZE, TOTAL, assert_same_logs, draw_photos, run, stop_at, tree_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def forwards(monkeypatch):
    """How many training steps ran through a sparse layer."""
    count = [0]
    forward = SparseTrainingLayer.forward

    def counted(self, input):
        count[0] += torch.is_grad_enabled() and input.shape[1] == 3
        return forward(self, input)

    monkeypatch.setattr(SparseTrainingLayer, "forward", counted)
    return count


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_ends_with_the_same_network_but_for_rounding(ema, photos, tmp_path, forwards):
    tree = tree_of(photos, tmp_path)
    tree["train"]["ema_decay"] = ema
    dense, _ = run(tree, name="dense")
    assert forwards[0] == 0
    sparse, folder = run(tree, name="sparse", sparsity__accelerate=True)
    assert forwards[0] == TOTAL - FREEZE
    assert all(type(m) is not SparseTrainingConv2d for m in sparse.modules())
    saved = issp.load(folder / "models" / "net_g_latest.safetensors")
    for (name, x), y, z in zip(
        dense.state_dict().items(),
        sparse.state_dict().values(),
        saved.state_dict().values(),
        strict=True,
    ):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-5), name
        assert torch.equal(x == 0, y == 0), name
        assert_bitwise_equal(z, y, name)


@pytest.mark.parametrize("at", [FREEZE - 1, FREEZE, FREEZE + 2])
@pytest.mark.parametrize("accelerate", [True, "auto"])
def test_a_break_changes_no_bit(at, accelerate, photos, tmp_path, monkeypatch, timed):
    tree = tree_of(photos, tmp_path / "whole")
    tree["sparsity"]["accelerate"] = accelerate
    tree["logger"]["save_checkpoint_freq"] = 1
    whole, folder = run(tree)
    tree = {**tree, "path": {"experiments_root": str(tmp_path / "broken")}}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, at)
        run(tree)
    resumed, again = run(tree, resume=True)
    for (name, x), y in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert_bitwise_equal(y, x, name)
    assert_same_logs(again, folder, ("train", "validation", "layers"))


def test_a_state_goes_on_without_acceleration(photos, tmp_path, monkeypatch, forwards):
    tree = tree_of(photos, tmp_path)
    tree["sparsity"]["accelerate"] = True
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, FREEZE + 2)
        run(tree)
    assert forwards[0] == 2
    state = checkpoint.read_state(tmp_path / "run" / "training_states" / f"{FREEZE + 2}.state")
    shapes = {name: x.shape for name, x in state["model"].items()}
    moments = [x["exp_avg"].shape for x in state["optimizer"]["state"].values()]
    assert moments == list(shapes.values()), "dense in the file"
    model, _ = run(tree, resume=True, sparsity__accelerate=False)
    assert forwards[0] == 2
    kept = issp.num_pruned(model.body[0].conv1.weight.numel(), 0.8)
    assert int((model.body[0].conv1.weight == 0).sum()) == kept


def test_auto_stays_dense_where_sparse_is_slower(photos, tmp_path, timed, forwards):
    timed["sparse"] = 9.0
    _, folder = run(tree_of(photos, tmp_path), sparsity__accelerate="auto")
    assert forwards[0] < TOTAL - FREEZE, "some are those of the measurement"
    text = (folder / "log" / "train.log").read_text()
    assert text.count("training: The model is dense throughout") == 1


def test_auto_says_what_it_has_chosen(photos, tmp_path, timed):
    _, folder = run(tree_of(photos, tmp_path), sparsity__accelerate="auto")
    text = (folder / "log" / "train.log").read_text()
    assert text.count("training: 6 of 6 layers are sparse; the whole model takes") == 1
    assert timed["measured"], "layers were timed"
    assert autotune.Cache().path.is_file()


def test_gradients_are_recorded_on(photos, tmp_path):
    tree = tree_of(photos, tmp_path)
    tree["logger"] |= {"grad_stats_freq": 1, "mask_stats_freq": 1}
    _, folder = run(tree, sparsity__accelerate=True)
    for name, columns in (("gradients", 7), ("masks", 6)):
        rows = (folder / "log" / f"{name}.csv").read_text().splitlines()
        assert len(rows) == 1 + TOTAL * 6 and len(rows[-1].split(",")) == columns
    zeros = {r.split(",")[1]: int(r.split(",")[-1]) for r in rows if r.startswith(f"{TOTAL},")}
    model = issp.load(folder / "models" / "net_g_latest.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert zeros == {n: issp.num_pruned(m.weight.numel(), 0.8) for n, m in layers.items()}


@pytest.mark.parametrize(
    ("sparsity", "sentence"),
    [
        ({"accelerate": "yes"}, "sparsity.accelerate is 'yes': it must be true, false or auto"),
        ({"accelerate": 1}, "sparsity.accelerate is 1: it must be true, false or auto"),
        (
            {"method": "dense", "accelerate": True},
            "sparsity has accelerate, but method dense prunes nothing: drop it",
        ),
    ],
)
def test_wrong_values_are_refused(sparsity, sentence, photos, tmp_path):
    tree = tree_of(photos, tmp_path)
    tree["sparsity"] = {"freeze_iter": FREEZE, **sparsity}
    with pytest.raises(ConfigError) as error:
        config.parse(tree)
    assert sentence in str(error.value)
