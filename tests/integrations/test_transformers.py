"""The callback in the trainer of Transformers, against a plain loop, bit for bit."""

import json
import logging

import pytest
import torch
from torch import nn

import issp
from tests.integrations.loops import (
    ENGINES,
    METHODS,
    RESUMED,
    STEPS,
    Net,
    arguments,
    assert_same,
    assert_sparse,
    optimizer_of,
    pretend,
    samples,
    train_plainly,
)

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate is not installed")
from issp.integrations.transformers import PruningCallback  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


class Model(nn.Module):
    """Has the loss among its outputs, as the trainer expects."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, y):
        return {"loss": (self.net(x) - y).abs().mean()}


class InOrder(transformers.Trainer):
    """Takes the samples in order and adds the loss of a method that has one."""

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PruningCallback) and callback.pruner.method.has_loss:
                loss = loss + callback.pruner.loss()
        return loss


def trainer(callback, folder, steps=STEPS, accumulate=1, model=None, **options):
    options = {"save_strategy": "no", "max_grad_norm": 0.0, "report_to": [], **options}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    model = Model() if model is None else model
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data = [{"x": x, "y": y} for x, y in samples(2 * STEPS * accumulate)]
    return InOrder(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        optimizers=(optimizer, schedule),
        callbacks=[callback],
    )


def fit(callback, folder, resume=None, **options):
    """Trains, and returns the model and the trainer."""
    one = trainer(callback, folder, **options)
    torch.manual_seed(3)  # "scratch" draws weights when it is attached
    one.train(resume_from_checkpoint=resume)
    return one.model, one


def of_model(name):
    """The arguments for layers that are called `net.`..."""
    given = arguments(name)
    if name == "assl":
        given["method"] = issp.methods.ASSL(
            weight=0.1, align_steps=2, constrained=["net.body.*"], delta=0.1, interval=1
        )
    return given


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_equals_a_plain_loop(name, accumulate, tmp_path):
    callback = PruningCallback(**of_model(name))
    model, one = fit(callback, tmp_path, accumulate=accumulate, seed=3)
    expected, pruner = train_plainly(name, accumulate)
    assert_sparse(model, callback.pruner)
    assert callback.pruner.step_count == STEPS
    assert not callback.pruner.attached
    assert_same(model.net, expected)


@pytest.mark.parametrize("name, step", RESUMED)
def test_resumes_with_equal_bits(name, step, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    callback = PruningCallback(**of_model(name))
    whole, first = fit(callback, tmp_path / "first", **saving)
    folder = tmp_path / "moved"
    (tmp_path / "first" / f"checkpoint-{step}").rename(folder)
    again = PruningCallback(**of_model(name))
    model = Model()
    nn.init.zeros_(model.net.head.weight)  # the checkpoint decides
    model, one = fit(again, tmp_path / "second", resume=str(folder), model=model, **saving)
    assert_same(model, whole)
    assert again.pruner.step_count == STEPS and again.pruner.frozen
    expected = callback.pruner.masks()
    assert all(torch.equal(kept, expected[name]) for name, kept in again.pruner.masks().items())
    moments, expected = (x.optimizer.state_dict()["state"] for x in (one, first))
    for number, values in expected.items():
        for key, x in values.items():
            assert torch.equal(moments[number][key], x)
    # And once more from a checkpoint of the resumed run.
    folder = tmp_path / "second" / f"checkpoint-{STEPS - 1}"
    model, _ = fit(PruningCallback(**of_model(name)), tmp_path / "third", resume=str(folder))
    assert_same(model, whole)


def test_the_model_file_has_its_usual_keys(tmp_path):
    callback = PruningCallback(**of_model("iss-p"))
    _, one = fit(callback, tmp_path, save_strategy="steps", save_steps=4)
    load = pytest.importorskip("safetensors.torch", reason="needs safetensors").load_file
    saved = load(tmp_path / "checkpoint-8" / "model.safetensors")
    assert saved.keys() == Model().state_dict().keys()
    one.save_model(str(tmp_path / "end"))
    saved = load(tmp_path / "end" / "model.safetensors")
    for name, kept in callback.pruner.masks().items():
        assert torch.equal(saved[f"{name}.weight"] != 0, kept)


def test_a_checkpoint_without_the_state_is_named(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    fit(transformers.TrainerCallback(), tmp_path, steps=3, **saving)
    callback = PruningCallback(**of_model("iss-p"))
    with pytest.warns(UserWarning, match="at step 3 without a state of the pruner"):
        fit(callback, tmp_path, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert callback.pruner.step_count == STEPS - 3


def test_another_sparsity_than_in_the_checkpoint_is_refused(tmp_path):
    fit(
        PruningCallback(**of_model("iss-p")), tmp_path, steps=3, save_strategy="steps", save_steps=3
    )
    other = PruningCallback(**of_model("iss-p") | {"sparsity": 0.5})
    with pytest.raises(ValueError, match="saved with for layer net.head the sparsity 0.8"):
        fit(other, tmp_path, resume=True)


def test_a_second_training_prunes_anew(tmp_path):
    callback = PruningCallback(**of_model("iss-p"))
    model, one = fit(callback, tmp_path)
    first = callback.pruner
    one.train()
    assert callback.pruner is not first and callback.pruner.step_count == STEPS
    assert_sparse(model, callback.pruner)


def test_zeros_and_flips_are_logged(tmp_path):
    callback = PruningCallback(**of_model("iss-p"))
    _, one = fit(callback, tmp_path, logging_steps=2)
    rows = [x for x in one.state.log_history if "pruning_zeros" in x]
    assert [x["step"] for x in rows] == [2, 4, 6, 8]
    summary = callback.pruner.summary()
    assert rows[-1]["pruning_zeros"] == rows[-1]["pruning_selected"] == summary.sparsity
    assert rows[0]["pruning_zeros"] == 0 and rows[0]["pruning_flips"] > 0
    assert rows[-1]["pruning_flips"] == 0


@pytest.mark.parametrize("freeze_at, warns", [(1, False), (5, True)])
def test_a_best_model_from_the_pruning_stage_is_named(freeze_at, warns, tmp_path, recwarn):
    """The evaluation says that step 2 was the best."""

    class Scored(InOrder):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": abs(self.state.global_step - 2)}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    callback = PruningCallback(**of_model("iss-p") | {"freeze_at": freeze_at})
    one = trainer(
        callback,
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    one.__class__ = Scored
    one.train()
    found = [
        str(w.message) for w in recwarn if "the best model is that of step 2" in str(w.message)
    ]
    assert len(found) == warns
    assert_sparse(one.model, callback.pruner)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_shard_are_refused(engine, tmp_path, monkeypatch):
    callback = PruningCallback(**of_model("iss-p"))
    one = trainer(callback, tmp_path)
    begin = callback.on_train_begin

    def begin_with(*args, optimizer, **kwargs):
        with monkeypatch.context() as patch:
            pretend(patch, optimizer.accelerator_state, engine)
            begin(*args, optimizer=optimizer, **kwargs)

    callback.on_train_begin = begin_with
    with pytest.raises(ValueError, match=f"{engine} splits the weights.*DistributedDataParallel"):
        one.train()


def test_what_cannot_be_right_is_refused(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        PruningCallback(sparsty=0.9)
    with pytest.raises(ValueError, match="needs the optimizer's hook"):
        PruningCallback(hook=False)
    callback = PruningCallback(**of_model("iss-p"))
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint replaces"):
        fit(callback, tmp_path, restore_callback_states_from_checkpoint=True)


def test_a_tiny_transformer(tmp_path):
    """A model of the library: its embeddings stay, its linear layers get their zeros."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{"input_ids": torch.randint(50, (8,)), "labels": i % 2} for i in range(48)]
    callback = PruningCallback(sparsity=0.9, exclude="classifier", freeze_at=3)
    transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    masks = callback.pruner.masks()
    assert "bert.encoder.layer.1.attention.self.query" in masks and "classifier" not in masks
    for name, kept in masks.items():
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == issp.num_pruned(weight.numel(), 0.9)
        assert torch.equal(weight != 0, kept)
    assert (model.bert.embeddings.word_embeddings.weight[1:] != 0).all()
    with open(tmp_path / "checkpoint-6" / "trainer_state.json") as file:
        assert json.load(file)["stateful_callbacks"]["PruningCallback"]["attributes"]["pruner"]
