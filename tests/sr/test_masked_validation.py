"""Validation while pruning: of the masked model, beside the soft one, and without a trace."""

import pytest
import torch

from issp.ops import reference
from issp.sr import checkpoint, config, data, evaluate, logging
from issp.sr.training_run import TrainingRun
from tests.sr.runs import FREEZE, TOTAL, assert_equal, run

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")

EVERY = {"logger__save_checkpoint_freq": 3, "logger__keep_training_states": 9}


def psnr_of(model, tree):
    """PSNR on the validation set, by nothing of the driver."""
    pairs = data.PairedFolder(tree["datasets"]["val"]["dataroot_gt"], 2)
    scores = evaluate.evaluate(evaluate.of_model(model), data.EvalDataset(pairs), ssim=None)
    return evaluate.mean(scores).psnr


def with_zeros(model, folder, iteration):
    """A model with zeros written where the masks of a training state are."""
    state = checkpoint.read_state(folder / "training_states" / f"{iteration}.state")
    for name, layer in state["pruner"]["layers"].items():
        weight = model.get_submodule(name).weight
        kept = reference.unpack(layer["mask"], weight.numel()).view(weight.shape)
        with torch.no_grad():
            weight.copy_(torch.where(kept, weight, 0.0))
    return model


def scores(folder):
    """iteration -> model -> row of validation.csv."""
    found = {}
    for row in logging.read_csv(folder / "log" / "validation.csv"):
        found.setdefault(row["iteration"], {})[row["model"]] = row
    return found


@pytest.mark.parametrize("ema", [0, 0.9])
def test_masked_scores_are_those_of_a_copy_with_zeros(tree, ema):
    _, folder = run(tree, train__ema_decay=ema, **EVERY)
    rows = {r["iteration"]: r for r in logging.read_csv(folder / "log" / "train.csv")}
    found = scores(folder)
    assert {i: list(found[i]) for i in found} == {
        3: ["masked", "soft"], FREEZE: ["sparse"], 9: ["sparse"], TOTAL: ["sparse"]
    }  # fmt: skip
    for iteration, models in found.items():
        path = folder / "models" / f"net_g_{iteration}.safetensors"
        saved = checkpoint.load(path)  # soft while pruning, as it is saved
        own = psnr_of(saved, tree)
        masked = psnr_of(with_zeros(saved, folder, iteration), tree)
        assert models.get("soft", models.get("sparse"))["psnr"] == own == rows[iteration]["psnr"]
        if iteration == 3:
            assert models["masked"]["psnr"] == masked == rows[3]["psnr_masked"] != own
        else:
            assert rows[iteration]["psnr_masked"] == (own if iteration == FREEZE else None)


def raising(monkeypatch, when):
    """The n-th scoring of a set raises an error."""
    real, calls = evaluate.evaluate, []

    def fail(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        if len(calls) == when:
            raise OSError("no such image")
        return result

    monkeypatch.setattr(evaluate, "evaluate", fail)


@pytest.mark.full
@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.parametrize("failing", [None, 2, 3])  # the first is before the first iteration
def test_no_weight_is_touched_also_where_the_validation_fails(tree, monkeypatch, ema, failing):
    seen = []

    def bits(run):
        models = {"model": run.model, "ema": run.ema}
        return {
            f"{kind}.{name}": value.clone().view(torch.int32)
            for kind, model in models.items()
            if model is not None
            for name, value in model.state_dict().items()
            if value.is_floating_point()
        }

    validate = TrainingRun.validate

    def watched(self, iteration, columns):
        before, was_training = bits(self), self.model.training
        try:
            validate(self, iteration, columns)
        finally:
            assert_equal(bits(self), before)
            assert self.model.training == was_training
            seen.append(iteration)

    monkeypatch.setattr(TrainingRun, "validate", watched)
    if failing is not None:
        raising(monkeypatch, when=failing)
    _, folder = run(tree, train__ema_decay=ema)
    assert seen == [3, FREEZE, 9, TOTAL]
    said = (folder / "log" / "train.log").read_text()
    assert said.count("no such image") == (failing is not None)


@pytest.mark.full
def test_a_run_that_failed_while_masked_goes_on_as_one_that_did_not(tree, monkeypatch):
    whole, expected = run(tree, name="whole")
    with monkeypatch.context() as patch:
        raising(patch, when=2)
        model, folder = run(tree)
    assert_equal(model.state_dict(), whole.state_dict())
    state = str(folder / "training_states" / "3.state")  # saved because of the failure
    resumed, folder = run(tree, path__resume_state=state)
    assert_equal(resumed.state_dict(), whole.state_dict())
    for name in ("validation.csv", "layers.csv"):
        assert (folder / "log" / name).read_bytes() == (expected / "log" / name).read_bytes()


@pytest.mark.full
def test_the_soft_model_need_not_be_scored(tree):
    both = run(tree, name="both")[1]
    _, folder = run(tree, val__soft=False, val__save_img=True)
    assert {i: list(models) for i, models in scores(folder).items()}[3] == ["masked"]
    rows = {r["iteration"]: r for r in logging.read_csv(folder / "log" / "train.csv")}
    assert rows[3]["psnr"] is None and rows[FREEZE]["psnr"] is not None
    assert rows[3]["psnr_masked"] == scores(both)[3]["masked"]["psnr"]
    text = (folder / "log" / "train.log").read_text()
    assert f"PSNR {rows[3]['psnr_masked']:.2f} dB masked  selected" in text


@pytest.mark.full
def test_pictures_are_those_of_the_masked_model(tree):
    pictures = {}
    for soft in (True, False):
        _, folder = run(tree, name=f"soft-{soft}", val__soft=soft, val__save_img=True)
        images = sorted((folder / "visualization" / "set").rglob("*.png"))
        pictures[soft] = [(path.name, path.read_bytes()) for path in images]
    assert pictures[True] == pictures[False]
    assert [name for name, _ in pictures[True]][:4] == ["0_12.png", "0_3.png", "0_6.png", "0_9.png"]


@pytest.mark.parametrize("ema, models", [(0, ["masked"]), (0.9, ["masked", "soft"])])
def test_a_model_that_is_masked_already_is_scored_once(tree, ema, models):
    """IHT writes the zeros after every step, but an average of such weights is soft."""
    _, folder = run(tree, sparsity__method="iht", train__ema_decay=ema)
    assert list(scores(folder)[3]) == models
    row = logging.read_csv(folder / "log" / "train.csv")[1]
    assert row["iteration"] == 3 and (row["psnr"] == row["psnr_masked"]) == (ema == 0)


@pytest.mark.full
@pytest.mark.parametrize("sparsity", [None, {"method": "dense", "freeze_iter": FREEZE}])
def test_a_dense_run_says_so(tree, sparsity):
    _, folder = run(tree, sparsity=sparsity)
    assert {model for models in scores(folder).values() for model in models} == {"dense"}
    rows = logging.read_csv(folder / "log" / "train.csv")
    assert {row["psnr_masked"] for row in rows} == {None}


def test_tensorboard_gets_both_by_name(tree, monkeypatch):
    events = []
    monkeypatch.setattr(
        logging.TensorBoardLog, "add", lambda self, row, prefix="": events.append((row, prefix))
    )
    _, folder = run(tree)
    found = scores(folder)
    by_iteration = {}
    for row, prefix in events:
        if prefix == "set/":
            by_iteration.setdefault(row["iteration"], {}).update(row)
    assert by_iteration[3]["psnr"] == found[3]["soft"]["psnr"]
    assert by_iteration[3]["psnr_masked"] == found[3]["masked"]["psnr"]
    assert by_iteration[FREEZE]["psnr"] == by_iteration[FREEZE]["psnr_masked"]
    assert "psnr_masked" not in by_iteration[9]
    rows = {row["iteration"]: row for row, prefix in events if not prefix}
    assert rows[3]["psnr_masked"] == found[3]["masked"]["psnr"]


def test_the_configuration_takes_true_and_false_alone(tree):
    with pytest.raises(ValueError, match="val.soft must be true or false"):
        config.parse({**tree, "val": {"soft": 1}})
