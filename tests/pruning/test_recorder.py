"""The recorder: values of plain torch, which layers and steps have rows, and no row twice."""

import copy
import re
import types

import pytest
import torch
from torch import nn

import issp
from issp.pruning import recorder
from issp.utils.csv_log import read_csv
from tests.pruning.networks import adam, net, step, train
from tests.utils.disk import full_disk

STATISTICS = ("norm", "variance", "mean", "std")
FREEZE = 4


def by_layer(folder, name):
    """(iteration, layer) -> row of one of the files."""
    rows = read_csv(folder / f"{name}.csv")
    keyed = {(row["iteration"], str(row["layer"])): row for row in rows}
    assert len(keyed) == len(rows), "a row is there twice"
    return keyed


def issp_adam(model):
    return issp.optim.Adam(model.parameters(), 1e-2)


def in_two_groups(model):
    """The convolution in the middle apart: buckets whose layers alternate in the model's order."""
    middle = list(model[2].parameters())
    others = [p for p in model.parameters() if all(p is not x for x in middle)]
    return issp.optim.Adam([{"params": others}, {"params": middle}], 1e-2)


class Watch:
    """What plain torch makes of every step: rows as the recorder should write them."""

    def __init__(self, model, pruner):
        self.layers = {n: model.get_submodule(n) for n in ("0", "2.0", "4")}
        self.gradients, self.masks, self._kept = {}, {}, pruner.masks()
        pruner.on_step(self)

    def __call__(self, pruner):
        iteration, kept = pruner.step_count, pruner.masks()
        for name, layer in self.layers.items():
            grad = layer.weight.grad.double()
            size = grad.abs()
            values = [x.item() for x in (grad.norm(), size.var(), size.mean(), size.std())]
            self.gradients[iteration, name] = values
            flips = int((kept[name] != self._kept[name]).sum())
            zeros = int((layer.weight == 0).sum())
            self.masks[iteration, name] = [flips, flips / 2, pruner.thresholds()[name], zeros]
        self._kept = kept


@pytest.mark.parametrize("optimizer", [adam, issp_adam, in_two_groups])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_those_of_plain_torch_in_both_stages(tmp_path, optimizer, memory_format):
    model = net().to(memory_format=memory_format)
    opt = optimizer(model)
    schedule = issp.Linear(0.0, 0.9, begin=0, end=3)  # the number of selected weights changes
    pruner = issp.attach(model, opt, schedule=schedule, freeze_at=FREEZE)
    watch = Watch(model, pruner)
    with issp.Recorder(pruner, tmp_path):
        train(model, opt, range(6))
    step(model, opt, 6)  # not recorded any more
    gradients, masks = by_layer(tmp_path, "gradients"), by_layer(tmp_path, "masks")
    expected = {key: x for key, x in watch.gradients.items() if key[0] < 7}
    assert list(gradients) == list(masks) == list(expected)  # in the model's order
    for (iteration, name), row in gradients.items():
        assert row["stage"] == ("pruning" if iteration <= FREEZE else "fine-tuning")
        values = [row[column] for column in STATISTICS]
        assert values == pytest.approx(expected[iteration, name], rel=1e-12)
    for key, row in masks.items():
        values = [row[column] for column in ("flips", "swaps", "threshold", "zeros")]
        assert values == watch.masks[key]
    assert any(row["flips"] for row in masks.values())
    assert all(masks[i, n]["zeros"] > 0 for i in (4, 5, 6) for n in watch.layers)


def test_a_freeze_by_hand_begins_the_second_stage(tmp_path):
    model = net()
    opt = adam(model)
    pruner = issp.attach(model, opt, sparsity=0.5, freeze_at=3)
    log = issp.Recorder(pruner, tmp_path)
    train(model, opt, range(2))
    pruner.freeze()
    train(model, opt, range(2))
    log.close()
    stages = [row["stage"] for row in read_csv(tmp_path / "gradients.csv") if row["layer"] == 4]
    assert stages == ["pruning"] * 2 + ["fine-tuning"] * 2
    flips = [row["flips"] for row in read_csv(tmp_path / "masks.csv") if row["layer"] == 4]
    assert flips[0] > 0 and flips[2:] == [0, 0]


@pytest.mark.parametrize("optimizer", [adam, issp_adam])
@pytest.mark.parametrize(
    "method, ranked",
    [
        (issp.methods.StaleISSR(interval=3), {3, 6}),
        (issp.methods.SRP(), set()),
        (issp.methods.Dense(), set()),
        (issp.methods.L1(), set()),
    ],
)
def test_a_step_that_selects_nothing_has_no_flips(tmp_path, optimizer, method, ranked):
    model = net()
    opt = optimizer(model)
    sparsity = {} if method.name == "dense" else {"sparsity": 0.5}
    pruner = issp.attach(model, opt, method=method, **sparsity)
    watch = Watch(model, pruner)
    with issp.Recorder(pruner, tmp_path):
        train(model, opt, range(7))
    masks = by_layer(tmp_path, "masks")
    assert len(masks) == 7 * 3
    assert {i for (i, _), row in masks.items() if row["flips"]} <= ranked
    for key, row in masks.items():
        threshold = watch.masks[key][2]
        found = [row["flips"], row["swaps"], row["threshold"], row["zeros"]]
        expected = [*watch.masks[key][:2], None if threshold != threshold else threshold]
        assert found == [*expected, watch.masks[key][3]]


@pytest.mark.parametrize(
    "layers, base, names",
    [
        (None, 1, ["0", "2.0", "4"]),
        ([1, 3], 1, ["0", "4"]),
        ([2, 0], 0, ["0", "4"]),
        (2, 1, ["2.0"]),
        ("2", 1, ["2.0"]),  # a container, not the second layer
        (["re:[04]", "2.*"], 1, ["0", "2.0", "4"]),
        (["4", 1], 1, ["0", "4"]),
    ],
)
def test_layers_by_name_and_by_number(tmp_path, layers, base, names):
    model = net()
    opt = issp_adam(model)
    pruner = issp.attach(model, opt, sparsity=0.5)
    watch = Watch(model, pruner)
    with issp.Recorder(pruner, tmp_path, layers, every=2, index_base=base):
        train(model, opt, range(5))
    masks = by_layer(tmp_path, "masks")
    assert list(masks) == [(i, name) for i in (2, 4) for name in names]
    for key, row in masks.items():  # of the right layer in its bucket
        assert [row["flips"], row["threshold"]] == [watch.masks[key][0], watch.masks[key][2]]
    assert list(by_layer(tmp_path, "gradients")) == list(masks)


@pytest.mark.parametrize(
    "base, names",
    [
        (1, ["conv_first", "0/0.attn.proj", "1/2.attn.proj", "3/0.mlp.fc2"]),
        (0, ["0/0.attn.qkv", "0/0.mlp.fc1", "1/2.mlp.fc1", "3/1.attn.qkv"]),
    ],
)
def test_the_numbers_of_the_papers_figure_in_either_base(base, names):
    """docs/method.md, section 1.6."""
    model = issp.models.build("swinir-light", scale=4)
    layers = recorder.choose_layers(model, [1, 3, 36, 80], base)
    expected = [re.sub(r"(\d)/(\d)", r"layers.\1.residual_group.blocks.\2", name) for name in names]
    assert [layer.name for layer in layers] == expected


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"layers": [4]}, "there is no layer 4: they are numbered from 1 to 3"),
        ({"layers": 0}, "there is no layer 0: they are numbered from 1 to 3"),
        ({"layers": 3, "index_base": 0}, "they are numbered from 0 to 2"),
        ({"layers": "body.*"}, '"body.*" matches no module'),
        ({"layers": "2.1"}, '"2.1" matches no module'),  # the norm is not pruned
        ({"layers": []}, "layers is empty"),
        ({"index_base": 2}, "index_base is 2"),
        ({"every": 0}, "every is 0"),
        ({"record": "weights"}, "'weights' is none of gradients, masks"),
        ({"record": ()}, "record is empty"),
    ],
)
def test_what_cannot_be_recorded_is_named_before_a_file_is_made(tmp_path, options, problem):
    model = net()
    pruner = issp.attach(model, adam(model), sparsity=0.5)
    with pytest.raises(ValueError, match=problem.replace("*", r"\*")):
        issp.Recorder(pruner, tmp_path, **options)
    with pytest.raises(TypeError, match="True is neither"):
        issp.Recorder(pruner, tmp_path, layers=[True])
    with pytest.raises(ValueError, match="has no masks"):
        issp.Recorder(model, tmp_path, record="masks")
    assert not list(tmp_path.iterdir())


def test_a_resumed_recording_equals_one_without_a_break(tmp_path):
    def training(folder, first, last, saved=None):
        model = net()
        opt = issp_adam(model)
        pruner = issp.attach(model, opt, sparsity=0.8, freeze_at=5)
        if saved:
            for part, state in zip((model, opt, pruner), saved, strict=True):
                part.load_state_dict(copy.deepcopy(state))  # torch would share the moments
        with issp.Recorder(pruner, folder, every=2):
            train(model, opt, range(first, last))
        return model.state_dict(), opt.state_dict(), pruner.state_dict()

    training(tmp_path / "whole", 0, 9)
    saved = training(tmp_path / "broken", 0, 4)
    training(tmp_path / "broken", 4, 7, saved)  # goes on beyond the state, and is lost
    training(tmp_path / "broken", 4, 9, saved)
    for name in ("gradients.csv", "masks.csv"):
        whole, broken = (tmp_path / run / name for run in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes()
        assert len(whole.read_bytes().splitlines()) == 1 + 4 * 3


def test_a_layer_appears_once_it_is_trained(tmp_path):
    model = net()
    model[0].requires_grad_(False)
    opt = issp.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    pruner = issp.attach(model, opt, sparsity=0.5)
    with issp.Recorder(pruner, tmp_path):
        step(model, opt, 0)
        model[0].requires_grad_(True)
        opt.add_param_group({"params": list(model[0].parameters())})
        train(model, opt, (1, 2))
    names = {i: [n for j, n in by_layer(tmp_path, "masks") if j == i] for i in (1, 2, 3)}
    assert names == {1: ["2.0", "4"], 2: ["0", "2.0", "4"], 3: ["0", "2.0", "4"]}
    gradients = by_layer(tmp_path, "gradients")
    assert (1, "0") not in gradients and gradients[2, "0"]["norm"] > 0


def test_a_layer_without_a_gradient_has_no_statistics(tmp_path):
    model = net()
    opt = adam(model)
    pruner = issp.attach(model, opt, sparsity=0.5)
    with issp.Recorder(pruner, tmp_path):
        step(model, opt, 0)
        model[2][0].weight.grad = None
        opt.step()
    assert (2, "2.0") not in by_layer(tmp_path, "gradients")
    assert (2, "2.0") in by_layer(tmp_path, "masks")


def scaled_step(model, opt, scaler, seed, overflow=False):
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 3, 6, 6, generator=rng), torch.randn(4, 10, generator=rng)
    opt.zero_grad()
    loss = (model(x) - y).square().mean() * (float("inf") if overflow else 1.0)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("optimizer", [adam, issp_adam])
def test_skipped_steps_have_no_rows_and_gradients_no_scale(tmp_path, optimizer):
    """GradScaler leaves the gradients of fused optimizers scaled, and skips within the step."""

    def training(folder, scaler, seeds):
        model = net()
        opt = optimizer(model)
        pruner = issp.attach(model, opt, sparsity=0.5)
        with issp.Recorder(pruner, folder):
            for seed in seeds:
                scaled_step(model, opt, scaler, abs(seed), overflow=seed < 0)
        return pruner.step_count

    plain = torch.amp.GradScaler("cpu", enabled=False)
    # No growth, and a new scale after the overflow: powers of two leave the bits as they are.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    assert training(tmp_path / "plain", plain, (1, 2, 3)) == 3
    assert training(tmp_path / "scaled", scaler, (1, -9, 2, -9, 3)) == 3
    for name in ("gradients.csv", "masks.csv"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "scaled" / name).read_bytes()


def test_a_step_that_a_gpu_may_have_skipped_gives_its_place_to_the_next(tmp_path):
    """Whether AMP skips a step is known on the GPU first: its number may come once more."""
    model = net()
    opt = adam(model)
    pruner = issp.attach(model, opt, sparsity=0.5, hook=False)
    log = issp.Recorder(pruner, tmp_path, hook=False)

    def after_a_step_on_a_gpu(skipped, seed):
        step(model, opt, seed)
        pruner._counter.synchronize()
        if not skipped:
            pruner.step()
            pruner._counter.known -= 1
        event = types.SimpleNamespace(synchronize=lambda: None)
        pruner._counter._pending = torch.tensor([float(skipped)]), event
        log.step()
        return model[4].weight.grad.norm().item()

    norms = [after_a_step_on_a_gpu(skipped, i) for i, skipped in enumerate((0, 1, 0, 1))]
    log.close()
    rows = by_layer(tmp_path, "gradients")
    assert [i for i, name in rows if name == "4"] == [1, 2]
    found = [rows[i, "4"]["norm"] for i in (1, 2)]
    assert found == pytest.approx([norms[0], norms[2]], rel=1e-6)
    assert [i for i, name in by_layer(tmp_path, "masks") if name == "4"] == [1, 2]


def test_a_recorded_step_never_waits_for_the_device(tmp_path, monkeypatch):
    model = net()
    opt = issp_adam(model)
    pruner = issp.attach(model, opt, sparsity=0.5, freeze_at=2)
    log = issp.Recorder(pruner, tmp_path, layers=[1, 3], hook=False)

    def wait(*_):
        raise AssertionError("a value is read")

    for i in range(4):
        step(model, opt, i)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
                patch.setattr(torch.Tensor, name, wait)
            log.step()
    log.close()
    assert len(by_layer(tmp_path, "masks")) == len(by_layer(tmp_path, "gradients")) == 4 * 2


def test_blocks_are_written_without_being_asked(tmp_path):
    layer = nn.Linear(3, 2, bias=False)
    opt = torch.optim.SGD(layer.parameters(), 0.1)
    issp.Recorder(issp.attach(layer, opt, sparsity=0.5), tmp_path)
    layer.weight.grad = torch.ones(2, 3)
    for _ in range(150):
        opt.step()
    rows = by_layer(tmp_path, "masks")
    assert list(rows) == [(i, "(model)") for i in range(1, 101)]


def test_a_full_disk_loses_no_row_and_repeats_none(tmp_path, monkeypatch):
    model = net()
    opt = adam(model)
    pruner = issp.attach(model, opt, sparsity=0.5)
    log = issp.Recorder(pruner, tmp_path)
    train(model, opt, range(2))
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(OSError, match="the disk is full"):
            log.flush()
    train(model, opt, range(2, 4))
    log.close()
    for name in ("gradients", "masks"):
        assert list(by_layer(tmp_path, name)) == [
            (i, layer) for i in (1, 2, 3, 4) for layer in ("0", "2.0", "4")
        ]


def test_a_model_without_a_pruner_records_its_gradients(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 4, 1))
    model = model.to(memory_format=torch.channels_last)
    model[2].requires_grad_(False)
    opt = torch.optim.SGD(model[:2].parameters(), 0.1)
    with issp.Recorder(model, tmp_path, every=2, upto=1) as log:
        for _ in range(3):  # the second to the fourth
            opt.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
            opt.step()
            log.step()
    rows = by_layer(tmp_path, "gradients")
    assert list(rows) == [(i, name) for i in (2, 4) for name in ("0", "1")]
    assert {row["stage"] for row in rows.values()} == {"dense"}
    for name in ("0", "1"):
        size = model.get_submodule(name).weight.grad.double().abs()
        expected = [size.norm(), size.var(), size.mean(), size.std()]
        found = [rows[4, name][column] for column in STATISTICS]
        assert found == pytest.approx([x.item() for x in expected], rel=1e-12)
    assert not (tmp_path / "masks.csv").exists()
