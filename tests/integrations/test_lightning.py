"""The callback in Lightning's own trainer, against a plain loop, bit for bit."""

import csv

import pytest
import torch
from torch import nn

import issp
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.integrations.loops import (
    METHODS,
    RESUMED,
    STEPS,
    Net,
    arguments,
    assert_same,
    assert_sparse,
    batches,
    optimizer_of,
    samples,
    train_plainly,
)

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
from issp.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = [
    pytest.mark.full,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, _):
        return (self.net(batch[0]) - batch[1]).abs().mean()

    test_step = training_step

    def configure_optimizers(self):
        return optimizer_of(self)


class ByStep(Module):
    """Takes the batch of the step: Lightning does not rewind a plain loader within an epoch."""

    def training_step(self, batch, index):
        return super().training_step(list(batches(STEPS))[self.trainer.global_step], index)


def fit(
    callback,
    steps=STEPS,
    accumulate=1,
    module=None,
    ckpt_path=None,
    callbacks=(),
    library=pl,
    **options,
):
    """Trains, and returns module and trainer; the data start with the first batch of an epoch."""
    data = torch.utils.data.DataLoader(samples(2 * STEPS * accumulate), batch_size=2)
    module = Module() if module is None else module
    torch.manual_seed(3)  # "scratch" draws weights when it is attached
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = library.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_equals_a_plain_loop(name, accumulate):
    callback = PruningCallback(module="net", **arguments(name))
    module, _ = fit(callback, accumulate=accumulate)
    expected, pruner = train_plainly(name, accumulate)
    assert_same(module.net, expected)
    assert_sparse(module.net, callback.pruner)
    assert callback.pruner.step_count == pruner.step_count == STEPS
    assert not callback.pruner.attached


def checkpoints(tmp_path):
    return pl.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )


@pytest.mark.parametrize("name, step", RESUMED)
def test_resumes_with_equal_bits(name, step, tmp_path):
    callback = PruningCallback(**arguments_of_module(name))
    whole, trainer = fit(
        callback, module=ByStep(), callbacks=[checkpoints(tmp_path)], enable_checkpointing=True
    )
    again = PruningCallback(**arguments_of_module(name))
    module = ByStep()
    nn.init.zeros_(module.net.head.weight)  # the checkpoint decides
    module, resumed = fit(again, module=module, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.global_step == STEPS
    assert_same(module, whole)
    assert again.pruner.step_count == STEPS and again.pruner.frozen
    for kept, expected in zip(
        again.pruner.masks().values(), callback.pruner.masks().values(), strict=True
    ):
        assert torch.equal(kept, expected)
    moments, expected = (t.optimizers[0].state_dict()["state"] for t in (resumed, trainer))
    for number, values in expected.items():
        for key, x in values.items():
            assert torch.equal(moments[number][key], x)


def arguments_of_module(name):
    given = arguments(name)
    if name == "assl":
        given["method"] = issp.methods.ASSL(
            weight=0.1, align_steps=2, constrained=["net.body.*"], delta=0.1, interval=1
        )
    return given


def test_the_state_in_a_checkpoint_is_plain(tmp_path):
    callback = PruningCallback(module="net", **arguments("iss-p"))
    fit(callback, steps=3, callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    state = saved["callbacks"][callback.state_key]
    assert state["step_count"] == 3 and state["stage"] == "pruning"
    assert set(state["layers"]) == {"head", "body.0", "body.2", "tail"}
    assert not any("mask" in key for key in saved["state_dict"])


def test_a_checkpoint_without_the_state_is_named(tmp_path):
    fit(pl.Callback(), steps=3, callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    callback = PruningCallback(**arguments("iss-p"))
    with pytest.warns(UserWarning, match="at step 3 without a state of the pruner"):
        fit(callback, ckpt_path=tmp_path / "step=3.ckpt")
    assert callback.pruner.step_count == STEPS - 3


def test_another_sparsity_than_in_the_checkpoint_is_refused(tmp_path):
    callback = PruningCallback(**arguments("iss-p"))
    fit(callback, steps=3, callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    other = PruningCallback(**arguments("iss-p") | {"sparsity": 0.5})
    with pytest.raises(ValueError, match="saved with for layer net.head the sparsity 0.8"):
        fit(other, ckpt_path=tmp_path / "step=3.ckpt")


def test_a_second_fit_prunes_anew_whatever_an_evaluation_has_loaded(tmp_path):
    callback = PruningCallback(module="net", **arguments("iss-p"))
    module, trainer = fit(
        callback, steps=3, callbacks=[checkpoints(tmp_path)], enable_checkpointing=True
    )
    data = torch.utils.data.DataLoader(samples(2 * STEPS), batch_size=2)
    trainer.test(module, data, ckpt_path=tmp_path / "step=2.ckpt")
    first = callback.pruner
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    with pytest.warns(UserWarning, match="at step 3 without a state of the pruner"):
        trainer.fit(module, data)
    assert first.step_count == 3 and callback.pruner is not first
    assert callback.pruner.step_count == 5 and callback.pruner.frozen


def test_a_fit_after_one_that_has_raised(tmp_path):
    class Raising(Module):
        def training_step(self, batch, index):
            if index == 4:
                raise KeyError("of the user")
            return super().training_step(batch, index)

    callback = PruningCallback(module="net", **arguments("iss-p"))
    module = Raising()
    with pytest.raises(KeyError, match="of the user"):
        fit(callback, module=module, callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    interrupted = callback.pruner
    module, _ = fit(callback, module=ByStep(), ckpt_path=tmp_path / "step=4.ckpt")
    assert_same(module.net, train_plainly("iss-p")[0])
    assert interrupted.step_count == 4 and not interrupted.attached


def test_reduced_precision_on_a_cpu():
    callback = PruningCallback(module="net", **arguments("assl") | {"method": "iss-r"})
    module, _ = fit(callback, precision="bf16-mixed")
    assert_sparse(module.net, callback.pruner)
    assert next(module.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["iss-p", "iss-r", "assl"])
def test_a_step_that_overflows_does_not_count(name):
    """With a scale that is a power of 2 the scaled loop has the bits of one without a scale."""

    class Overflowing(Module):
        overflows = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * float("inf") if self.overflows and index == 2 else loss

    def train(overflows):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        callback = PruningCallback(module="net", **arguments(name))
        module = Overflowing()
        module.overflows = overflows
        fit(callback, module=module, plugins=[plugin])
        return module, callback.pruner

    module, pruner = train(overflows=False)
    assert_same(module.net, train_plainly(name)[0])
    module, pruner = train(overflows=True)
    assert pruner.step_count == STEPS - 1
    assert_sparse(module.net, pruner)


class TwoNetworks(pl.LightningModule):
    """Generator and discriminator, stepped by hand; the first optimizer is not the generator's."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = Net(0), Net(1)

    def configure_optimizers(self):
        return optimizer_of(self.discriminator), optimizer_of(self.generator)

    def training_step(self, batch, _):
        for optimizer, net in zip(
            self.optimizers(), (self.discriminator, self.generator), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward((net(batch[0]) - batch[1]).abs().mean())
            optimizer.step()


@pytest.mark.parametrize("name", ["iss-p", "iss-r"])
def test_of_two_optimizers_that_of_the_submodule_counts(name):
    callback = PruningCallback(module="generator", **arguments(name))
    module, _ = fit(callback, module=TwoNetworks(), steps=2 * STEPS)
    expected, pruner = train_plainly(name)
    assert callback.pruner.step_count == STEPS
    assert_same(module.generator, expected)
    assert all((p != 0).all() for p in module.discriminator.parameters())


def test_two_networks_are_pruned_by_two_callbacks():
    first = PruningCallback(module="generator", **arguments("iss-p"))
    second = PruningCallback(module="discriminator", **arguments("iht"))
    assert first.state_key != second.state_key
    module, _ = fit(first, module=TwoNetworks(), steps=2 * STEPS, callbacks=[second])
    assert_sparse(module.generator, first.pruner)
    assert_sparse(module.discriminator, second.pruner)
    both = PruningCallback(**arguments("iss-p"))
    module, _ = fit(both, module=TwoNetworks(), steps=2 * STEPS)
    assert_sparse(module, both.pruner)


def test_the_average_of_the_weights_has_the_zeros_too():
    for before in (False, True):
        callback = PruningCallback(module="net", **arguments("iss-p"))
        average = pl.callbacks.EMAWeightAveraging(decay=0.9)
        order = (average, callback) if before else (callback, average)
        module, _ = fit(order[0], callbacks=[order[1]])
        assert_sparse(module.net, callback.pruner)
        assert not torch.equal(module.net.tail.weight, train_plainly("iss-p")[0].tail.weight)


def test_zeros_and_flips_are_logged(tmp_path):
    callback = PruningCallback(module="net", **arguments("iss-p"))
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    fit(callback, logger=logger, log_every_n_steps=2, accumulate=2)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("pruning/net/zeros")]
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    summary = callback.pruner.summary()
    assert float(rows[-1]["pruning/net/zeros"]) == pytest.approx(summary.sparsity)
    assert float(rows[-1]["pruning/net/selected"]) == pytest.approx(summary.sparsity)
    assert float(rows[0]["pruning/net/zeros"]) == 0 and float(rows[0]["pruning/net/flips"]) > 0
    assert float(rows[-1]["pruning/net/flips"]) == 0


def fit_under_ddp(name, devices):
    """In a process that torchrun has started: step count, masks and weights."""
    callback = PruningCallback(module="net", **arguments(name))
    sampler = {"use_distributed_sampler": devices > 1}
    module, _ = fit(callback, strategy="ddp", devices=devices, **sampler)
    torch.distributed.barrier()
    return callback.pruner.step_count, callback.pruner.masks(), module.net.state_dict()


@needs_gloo
def test_one_process_of_ddp():
    ((steps, _, weights),) = run_ranks(fit_under_ddp, 1, "assl", 1, timeout=240, launched=True)
    assert steps == STEPS
    for name, weight in train_plainly("assl")[0].state_dict().items():
        assert torch.equal(weights[name], weight), name


@needs_gloo
@pytest.mark.parametrize("name", ["iss-p", "assl"])
def test_two_processes_of_ddp(name):
    """Each has half of a batch of four: the masks are equal on both, and so are the weights."""
    first, second = run_ranks(fit_under_ddp, 2, name, 2, timeout=240, launched=True)
    assert first[0] == second[0] == STEPS
    for one, other in zip(first[1:], second[1:], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(x, other[key]) for key, x in one.items())
    _, masks, weights = first
    for layer, kept in masks.items():
        assert torch.equal(weights[f"{layer}.weight"] != 0, kept)
        assert int((~kept).sum()) == issp.num_pruned(kept.numel(), 0.8)


def test_the_trainer_of_pytorch_lightning():
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    callback = PruningCallback(module="net", **arguments("assl"))
    module, _ = fit(callback, module=Other(), library=other)
    assert_same(module.net, train_plainly("assl")[0])


REFUSED = ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy"]


@pytest.mark.parametrize("name", [*REFUSED, "SingleDeviceXLAStrategy"])
def test_strategies_that_shard_are_refused(name):
    strategy = type(name, (pl.strategies.SingleDeviceStrategy,), {})("cpu")
    callback = PruningCallback(**arguments("iss-p"))
    with pytest.raises(ValueError, match=f"{name} splits the weights.*DistributedDataParallel"):
        fit(callback, strategy=strategy)


def test_what_cannot_be_right_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        PruningCallback(sparsty=0.9)
    with pytest.raises(ValueError, match="needs the optimizer's hook"):
        PruningCallback(hook=False)
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2)
    with pytest.raises(ValueError, match="use the callback WeightAveraging"):
        fit(PruningCallback(), callbacks=[averaging])
    with pytest.raises(AttributeError, match="has no attribute `generator`"):
        fit(PruningCallback(module="generator"))
