"""`issp.pack`: every layer on its fastest measured path, equal results, reasons in the report."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import issp
from issp.deploy import autotune, pack
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

        inputs = pack._layer_inputs(net := Named(), (torch.randn(4, 8),))
        assert inputs == {net.linear: [pack.LayerInput((4, 8), False, torch.float32)]}

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

    def test_unbatched_input(self, cache, timed):
        packed = issp.pack(prune_(nn.Conv2d(3, 4, 3)), torch.randn(3, 8, 8), cache=cache)
        assert packed.report.lines[0].reason.startswith("its input has no batch")

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
