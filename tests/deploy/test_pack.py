"""`issp.pack`: every layer on its fastest measured path, equal results, reasons in the report."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import issp
from issp.deploy import pack
from issp.nn import autotune
from issp.nn.layer_inputs import LayerInput, layer_inputs
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import (
    EXAMPLE,
    kinds,
    line,
    prune_,
)
from tests.sr.networks import every_small


class TestResults:
    def test_equal_the_dense_models_within_twice_its_error(self, net, cache, timed):
        x = torch.randn(EXAMPLE)
        packed = issp.pack(net.eval(), x, cache=cache)
        exact = copy.deepcopy(net).double()(x.double())
        packed_error, dense_error = ((m(x).double() - exact).abs().max() for m in (packed, net))
        assert kinds(packed)["head"] == "SparseConv2d" and kinds(packed)["twice"] == "SparseLinear"
        assert packed_error <= 2 * dense_error + torch.finfo(x.dtype).eps * exact.abs().max()

    def test_the_model_is_left_as_it_is(self, net, cache, timed):
        before = copy.deepcopy(net.state_dict())
        names = kinds(net)
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        assert kinds(net) == names and net.training and not hasattr(net, "report")
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert packed.training and packed.head.training and packed.norm.training
        assert torch.equal(packed.norm.running_mean, before["norm.running_mean"])
        with torch.no_grad():
            packed.mirrored.weight.zero_()
        assert net.mirrored.weight.any()

    def test_dense_where_sparse_is_slower(self, net, cache, timed):
        timed |= {"rows": 5.0, "rows v=4": 4.0}
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        assert kinds(packed) == kinds(net)
        assert torch.equal(packed.eval()(x := torch.randn(EXAMPLE)), net.eval()(x))
        assert line(packed, "head").reason == "sparse takes 1.67 times as long"
        assert packed.report.whole is None and "0 of 7 layers are sparse" in packed.report()

    def test_channels_last_where_that_is_fastest(self, net, cache, timed):
        timed |= {"dense channels_last": 0.5}
        packed = issp.pack(net.eval(), torch.randn(EXAMPLE), cache=cache)
        assert line(packed, "head").choice == "dense channels_last"
        assert packed.head.weight.is_contiguous(memory_format=torch.channels_last)
        x = torch.randn(EXAMPLE)
        torch.testing.assert_close(packed(x), net(x))
        assert packed.head(x).is_contiguous()
        assert packed.state_dict().keys() == copy.deepcopy(packed).state_dict().keys()

    def test_dense_as_a_whole_where_the_whole_is_slower(self, net, cache, timed):
        timed["packed"] = 9.0
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        assert kinds(packed) == kinds(net)
        assert line(packed, "head").choice == "dense"
        assert line(packed, "head").reason.endswith("but the whole model is slower with it")
        assert "The model is dense throughout" in packed.report()

    def test_a_model_that_measured_slower_is_dense_however_its_times_spread(
        self, net, cache, timed, monkeypatch
    ):
        """Packed is slower in the median, but not in three quarters of the rounds."""
        packed_times = [5.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0]

        def measure(dense, sparse, *args, **kwargs):
            times = timed | {"packed": packed_times, "dense": 2.0}
            if "packed" not in dense:
                return layer_by_layer(dense, sparse)
            samples = {name: times[name] for name in (*dense, *sparse)}
            samples = {n: t if isinstance(t, list) else [t] * 7 for n, t in samples.items()}
            return autotune.decide(samples, list(dense))

        layer_by_layer = autotune.measure
        monkeypatch.setattr(autotune, "measure", measure)
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        assert kinds(packed) == kinds(net)
        assert line(packed, "head").reason.endswith("but the whole model is slower with it")
        assert "would take 5000 ms, dense 2000 ms" in packed.report()
        packed_times[:] = [1.9] * 7  # by less than the margin of a layer, but faster
        assert kinds(issp.pack(net, torch.randn(EXAMPLE), cache=cache))["head"] == "SparseConv2d"

    def test_what_made_a_model_slower_is_measured_again(self, net, cache, timed):
        x = torch.randn(EXAMPLE)
        timed["packed"] = 9.0
        assert "measured again the next time" in issp.pack(net, x, cache=cache).report()
        timed |= {"packed": 1.0, "rows": 5.0, "rows v=4": 5.0}
        before = len(timed["measured"])
        again = issp.pack(net, x, cache=cache)
        assert len(timed["measured"]) == before + 4 and kinds(again) == kinds(net)
        assert line(again, "head").reason == "sparse takes 1.67 times as long"

    def test_packing_again_starts_from_the_dense_model(self, net, cache, timed):
        packed = issp.pack(net.eval(), torch.randn(EXAMPLE), cache=cache)
        x = torch.randn(1, 3, 20, 20)
        again = issp.pack(packed, x, cache=cache)
        assert line(again, "head").shape == "8x3x3x3 on 1x3x20x20"
        assert again.report is not packed.report
        assert_bitwise_equal(again(x), packed(x), "the result")

    def test_a_layer_under_two_names_is_replaced_under_both(self, cache, timed):
        shared = nn.Linear(8, 8)
        net = prune_(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)))
        packed = issp.pack(net, torch.randn(4, 8), cache=cache)
        assert packed[0] is packed[2][0] and isinstance(packed[0], issp.nn.SparseLinear)
        assert [line.name for line in packed.report.lines] == ["0"]

    def test_a_model_that_is_one_layer(self, cache, timed):
        layer = prune_(nn.Linear(8, 8))
        packed = issp.pack(layer, torch.randn(4, 8), cache=cache)
        assert isinstance(packed, issp.nn.SparseLinear)
        assert packed.report.lines[0].name == "(model)"
        x = torch.randn(4, 8)
        torch.testing.assert_close(packed(x), layer(x))

    def test_several_arguments_and_shapes_of_one_layer(self, cache, timed):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x, y):
                return self.linear(x).sum() + self.linear(y).sum()

        packed = issp.pack(prune_(Two()), (torch.randn(4, 8), torch.randn(2, 3, 8)), cache=cache)
        assert line(packed, "linear").shape == "8x8 on 4x8 on 2x3x8"

    def test_an_input_passed_by_name(self, cache, timed):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x):
                return self.linear(input=x)

        inputs = layer_inputs(net := Named(), (torch.randn(4, 8),))
        assert inputs == {net.linear: [LayerInput((4, 8), False, torch.float32)]}

    def test_copies_and_pickles(self, net, cache, timed):
        packed = issp.pack(net.eval(), torch.randn(EXAMPLE), cache=cache)
        x = torch.randn(EXAMPLE)
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert torch.equal(twin(x), packed(x)) and twin.report() == packed.report()

    def test_a_wrong_sparse_result_is_an_error_that_names_the_layer(
        self, net, cache, timed, monkeypatch
    ):
        right = issp.nn.SparseConv2d.forward
        monkeypatch.setattr(issp.nn.SparseConv2d, "forward", lambda *a: right(*a) + 1e-4)
        with pytest.raises(RuntimeError, match="the sparse result of head is off by"):
            issp.pack(net, torch.randn(EXAMPLE), cache=cache)


class TestModes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast_layers_are_packed_as_without(self, net, cache, timed, dtype):
        """Behind the first layer their inputs have another dtype than their weights."""
        x, plain = torch.randn(EXAMPLE), kinds(issp.pack(net, torch.randn(EXAMPLE), cache=cache))
        net.eval()
        with torch.autocast("cpu", dtype=dtype):
            packed = issp.pack(net, x, cache=cache)
            y, expected = packed(x), net(x)
        assert kinds(packed) == plain and y.dtype == expected.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        assert {p.dtype for p in packed.parameters()} == {torch.float32}

    def test_a_layer_of_another_dtype_than_its_input_is_named(self, cache, timed):
        inputs = [LayerInput((4, 8), False, torch.float64)]
        layer = prune_(nn.Linear(8, 8))
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                row, new = pack.pack_layer("a", layer, inputs, None, cache)
            assert row.reason == "its input is not torch.float32 as its weight is" and new is None

    def test_inside_inference_mode_parameters_are_ordinary(self, net, cache, timed):
        with torch.inference_mode():
            x = torch.randn(EXAMPLE)
            packed = issp.pack(net, x, cache=cache)
            dense = issp.unpack(packed)
            y = packed(x)
        assert kinds(packed)["head"] == "SparseConv2d"
        for model in (packed, dense):
            assert not any(t.is_inference() for t in model.state_dict().values())
            x = torch.randn(EXAMPLE, requires_grad=True)
            model(x).sum().backward()
            assert x.grad.any() and all(p.grad is not None for p in model.head.parameters())
        assert y.is_inference()

    @pytest.mark.parametrize("fastest", ["rows", "dense channels_last"])
    def test_a_batch_of_none_and_activation_checkpointing(self, net, cache, timed, fastest):
        timed[fastest] = 0.5
        packed = issp.pack(net.eval(), torch.randn(EXAMPLE), cache=cache)
        assert line(packed, "head").choice == fastest
        x = torch.zeros(0, *EXAMPLE[1:], requires_grad=True)
        y = packed(x)
        assert y.shape == net(x).shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert not any(p.grad.any() for n, p in packed.named_parameters() if "unused" not in n)
        x, gradients = torch.randn(EXAMPLE), []
        for call in (
            packed,
            *(partial(checkpoint, packed, use_reentrant=r) for r in (True, False)),
        ):
            x = x.detach().requires_grad_()
            packed.zero_grad()
            call(x).square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in packed.parameters() if p.grad is not None)])
        for other in gradients[1:]:
            for one, two in zip(gradients[0], other, strict=True):
                assert_bitwise_equal(two, one, "a gradient with checkpoints")

    @pytest.mark.parametrize("fastest", ["rows", "dense channels_last"])
    def test_torch_fx_sees_the_layers(self, net, cache, timed, fastest):
        timed[fastest] = 0.5
        packed = issp.pack(net.eval(), x := torch.randn(EXAMPLE), cache=cache)
        traced = torch.fx.symbolic_trace(packed)
        called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
        assert called == [
            n.target for n in torch.fx.symbolic_trace(net).graph.nodes if n.op == "call_module"
        ]
        assert_bitwise_equal(traced(x), packed(x), "the traced model's result")

    def test_a_default_device_does_not_matter(self, net, cache, timed):
        with torch.device("meta"):
            packed = issp.pack(net, torch.randn(EXAMPLE, device="cpu"), cache=cache)
        assert kinds(packed)["head"] == "SparseConv2d"
        assert {t.device.type for t in packed.state_dict().values()} == {"cpu"}


class TestForms:
    def test_rows_that_share_their_zeros_are_found(self, cache, timed):
        timed["rows v=4"] = 0.5
        layer = nn.Linear(20, 8)
        layer.weight.data = issp.ops.nm_prune(layer.weight.data, issp.Keep(1, of=10, v=4))
        packed = issp.pack(layer, torch.randn(4, 20), cache=cache)
        assert packed.report.lines[0].form == "rows v=4" and packed.v == 4

    def test_rows_that_do_not_share_them_have_one_form(self, cache, timed):
        issp.pack(prune_(nn.Linear(20, 8)), torch.randn(4, 20), cache=cache)
        assert timed["measured"][0] == ("dense", "rows")

    def test_a_pattern_is_used(self, cache, timed):
        keep = issp.Keep(1, of=10, v=4)
        layer = nn.Linear(20, 8)
        layer.weight.data = issp.ops.nm_prune(layer.weight.data, keep)
        packed = issp.pack(layer, torch.randn(4, 20), keep=keep, cache=cache)
        assert isinstance(packed, issp.nn.NMLinear)
        assert packed.report.lines[0].choice == "1:10 v=4"

    @pytest.mark.parametrize("keep", [issp.Keep(1, of=5), issp.Keep(2, of=4)])
    def test_a_pattern_that_does_not_fit_names_the_layer_and_why(self, cache, timed, keep):
        net = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 4))
        net[1].weight.data = issp.ops.nm_prune(net[1].weight.data, issp.Keep(1, of=5))
        net[0].weight.data[0, :4] = torch.tensor([1.0, 2.0, 3.0, 0.0])
        packed = issp.pack(net, torch.randn(4, 8), keep=keep, cache=cache)
        assert type(packed[0]) is nn.Linear
        assert re.match(rf"{keep.n}:{keep.of} v=1 does not fit 0: ", line(packed, "0").reason)

    def test_patterns_by_name(self, cache, timed):
        net = nn.Sequential(prune_(nn.Linear(8, 8)), nn.Linear(8, 8))
        net[1].weight.data = issp.ops.nm_prune(net[1].weight.data, issp.Keep(2, of=4))
        packed = issp.pack(net, torch.randn(4, 8), keep={"1": issp.Keep(2, of=4)}, cache=cache)
        assert kinds(packed) == {"0": "SparseLinear", "1": "NMLinear"}


class TestReport:
    def test_has_a_line_per_layer_and_all_columns(self, net, cache, timed):
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        rows = [
            [cell.strip() for cell in row.strip("|").split("|")]
            for row in packed.report().splitlines()
            if row.startswith("|")
        ]
        assert rows[0] == [
            *("layer", "shape", "sparsity", "form", "us sparse", "us dense", "choice", "why")
        ]
        names = ["head", "strided", "same", "grouped", "mirrored", "twice", "unused"]
        assert [row[0] for row in rows[2:]] == names and {len(row) for row in rows} == {8}
        assert rows[2][1:] == [
            *("8x3x3x3 on 2x3x12x10", "90.28 %", "rows", "1000000", "3000000", "rows"),
            "3.00 times as fast as dense",
        ]
        assert "3 of 7" not in packed.report() and "4 of 7 layers are sparse" in packed.report()
        assert "3.00 times as fast." in packed.report()
        assert torch.__version__ in packed.report()

    def test_says_why_a_layer_stays_dense(self, net, cache, timed):
        net.full = nn.Linear(4, 4)
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        grouped, mirrored = (line(packed, name).reason for name in ("grouped", "mirrored"))
        assert grouped == "sparse layers have groups = 1 only, not 4"
        assert mirrored == 'sparse layers pad by zeros only, not by "reflect"'
        assert line(packed, "unused").reason == "the example does not reach it"

    def test_says_that_nothing_is_zero(self, cache, timed):
        packed = issp.pack(nn.Linear(4, 4), torch.randn(2, 4), cache=cache)
        assert packed.report.lines[0].reason.startswith("no weight is zero")
        assert timed["measured"] == []

    def test_says_that_a_layer_is_something_else(self, cache, timed):
        layer = prune_(nn.Linear(4, 4))
        nn.utils.parametrizations.weight_norm(layer)
        packed = issp.pack(layer, torch.randn(2, 4), cache=cache)
        assert packed.report.lines[0].reason.startswith("it is a ParametrizedLinear")

    def test_an_empty_example(self, cache, timed):
        packed = issp.pack(prune_(nn.Conv2d(3, 4, 3)), torch.zeros(0, 3, 8, 8), cache=cache)
        assert packed.report.lines[0].reason == "its input is empty: pass an example that is not"
        assert timed["measured"] == []

    @pytest.mark.parametrize("fastest", ["rows", "dense channels_last"])
    def test_an_image_without_a_batch(self, cache, timed, fastest):
        timed[fastest] = 0.5
        conv, x = prune_(nn.Conv2d(3, 4, 3)), torch.randn(3, 8, 8)
        for example in (x, x[None]):
            packed = issp.pack(conv, example, cache=cache)
            assert packed.report.lines[0].choice == fastest
            torch.testing.assert_close(packed(x), conv(x))

    def test_a_candidate_that_fails_is_named(self, cache, timed, monkeypatch):
        def measure(dense, sparse, *args, **kwargs):
            return autotune.Choice("dense", {"dense": 2.0}, {"rows": "no kernel"}, "alone")

        monkeypatch.setattr(autotune, "measure", measure)
        packed = issp.pack(prune_(nn.Linear(4, 4)), torch.randn(2, 4), cache=cache)
        assert packed.report.lines[0].reason == "alone; rows could not be timed: no kernel"


class TestMemory:
    def test_choices_are_remembered(self, net, cache, timed):
        first = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        count = len(timed["measured"])
        timed |= {"rows": 50.0}
        again = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        assert len(timed["measured"]) == count + 1  # the whole model is always measured
        assert kinds(again) == kinds(first)

    def test_other_shapes_and_sparsities_are_measured_anew(self, cache, timed):
        issp.pack(prune_(nn.Linear(40, 8)), torch.randn(4, 40), cache=cache)
        for sparsity, rows in ((0.9, 5), (0.5, 4)):
            before = len(timed["measured"])
            issp.pack(prune_(nn.Linear(40, 8), sparsity), torch.randn(rows, 40), cache=cache)
            assert len(timed["measured"]) == before + 2

    def test_the_users_folder_is_used(self, timed, monkeypatch, tmp_path):
        monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "choices"))
        issp.pack(prune_(nn.Linear(4, 4)), torch.randn(2, 4))
        assert (tmp_path / "choices" / "choices.json").is_file()


@every_small
def test_with_a_real_clock_nothing_slower_is_chosen(make, cache, threads):
    threads(1)
    net = prune_(make()).eval()
    x = torch.rand(1, 3, 16, 16)
    packed = issp.pack(net, x, cache=cache)
    for row in packed.report.lines:
        if row.choice not in ("dense", "dense channels_last"):
            assert row.sparse < row.dense
    with torch.no_grad():
        torch.testing.assert_close(packed(x), net(x), rtol=1e-4, atol=1e-5)


@every_small
@torch.no_grad()  # torch's pixel_shuffle has no backward for an empty batch
def test_a_network_takes_a_batch_of_none(make, cache, timed):
    net = prune_(make()).eval()
    packed = issp.pack(net, torch.rand(1, 3, 16, 16), cache=cache)
    assert any(row.is_sparse for row in packed.report.lines)
    for model in (net, packed):
        y = model(torch.zeros(0, 3, 16, 16))
        assert y.shape == (0, 3, 16 * net.scale, 16 * net.scale)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((3, torch.zeros(1)), TypeError, "model must be a torch module, not int"),
        (
            (nn.Linear(4, 4), torch.zeros(1, 4), {"x*": issp.Keep(1, of=2)}),
            ValueError,
            "matches no",
        ),
        ((nn.Linear(4, 4, device="meta"), torch.zeros(1, 4)), ValueError, "the model is on meta"),
        ((nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4), {"0": 0.5}), TypeError, "issp.Keep"),
    ],
)
def test_bad_input(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        issp.pack(*arguments)


def test_a_model_with_a_report_of_its_own_is_refused():
    net = nn.Linear(4, 4)
    net.report = "taken"
    with pytest.raises(ValueError, match='has an attribute "report" already: rename it'):
        issp.pack(net, torch.zeros(1, 4))


def test_the_comparison_finds_one_percent():
    dense = nn.Linear(8, 8)
    wrong = copy.deepcopy(dense)
    wrong.weight.data *= 1.01
    pack._check_accuracy("same", dense, copy.deepcopy(dense), torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="the sparse result of head is off"):
        pack._check_accuracy("head", dense, wrong, torch.randn(4, 8))
