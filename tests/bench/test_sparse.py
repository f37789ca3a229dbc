"""What `python -m bench conv` and `matmul` time: layers, patterns, calls; refusal if wrong."""

import math

import pytest
import torch

from bench.harness.errors import ParityError
from bench.sparse import calls, forms, measure, parity
from bench.sparse import layers as sparse_layers
from bench.sparse.calls import DenseVariant, LayerTensors
from bench.sparse.forms import Form
from bench.sparse.layers import Layer
from issp import Keep, num_pruned, ops
from issp.sr import shapes

pytestmark = pytest.mark.usefixtures("one_thread")

CONV = Layer((8, 8, 3, 3), (1, 8, 6, 5), ("tiny",))
LINEAR = Layer((8, 8), (2, 5, 8))


class TestLayers:
    @pytest.mark.parametrize("model", measure.MODELS)
    @pytest.mark.full
    def test_every_prunable_shape_is_met(self, model):
        both = [
            layer
            for conv in (True, False)
            for layer in sparse_layers.of_models([model], [(16, 16)], conv)
        ]
        assert {layer.weight for layer in both} == set(shapes.prunable_shapes(model))

    @pytest.mark.full
    def test_sizes_are_those_inside_the_network(self):
        layers = sparse_layers.of_models(["edsr-l"], [(48, 64)], conv=True)
        assert [layer.name for layer in layers] == [
            "3x3 3->256 at 48x64",
            "3x3 256->256 at 48x64",
            "3x3 256->1024 at 48x64",
            "3x3 256->1024 at 96x128",
            "3x3 256->3 at 192x256",
        ]
        linear = sparse_layers.of_models(["swinir-light"], [(16, 24)], conv=False)
        assert {layer.applications for layer in linear} == {16 * 24}

    def test_a_layer_of_two_networks_is_one(self):
        layers = sparse_layers.of_models(["edsr-l", "edsr-l"], [(8, 8)], conv=True)
        assert len(layers) == 5 and all(layer.models == ("edsr-l",) for layer in layers)

    @pytest.mark.parametrize("layer", [CONV, LINEAR, Layer((4, 2, 1, 1), (1, 2, 3, 7))])
    def test_output_shape_is_torchs(self, layer):
        x, weight = torch.zeros(layer.x), torch.zeros(layer.weight)
        assert calls.dense_op(layer)(x, weight).shape == layer.y
        assert layer.applications * layer.weight[0] == math.prod(layer.y)

    def test_a_large_layer_is_cut_for_the_check(self):
        assert CONV.cut(1e9) is CONV
        part = Layer((256, 256, 3, 3), (1, 256, 128, 128)).cut(1e9)
        assert part.weight == (256, 256, 3, 3)
        flops = 2 * math.prod(part.weight) * part.applications
        assert 0.5e9 < flops <= 1e9
        assert 0.5e9 < 2 * 180 * 60 * Layer((180, 60), (1, 10**6, 60)).cut(1e9).applications <= 1e9

    @pytest.mark.parametrize("text", ["", "48x", "x48", "4 8", "-3", "0x48", "1e3"])
    def test_bad_numbers_are_refused(self, text):
        with pytest.raises(ValueError, match="is not a product of positive numbers"):
            sparse_layers.parse_numbers(text)

    def test_sizes_are_parsed(self):
        assert sparse_layers.parse_size("48") == (48, 48)
        assert sparse_layers.parse_size("48x64") == (48, 64)
        with pytest.raises(ValueError, match="'4x4x4' is no image size"):
            sparse_layers.parse_size("4x4x4")


class TestForms:
    @pytest.mark.parametrize(
        ("channels", "sparsity", "pattern"),
        [
            (256, 0.5, (1, 2)),
            (256, 0.9, (13, 128)),
            (256, 0.9375, (1, 16)),
            (256, 0.95, (13, 256)),
            (256, 0.99, (3, 256)),
            (60, 0.9, (1, 10)),
            (60, 0.95, (1, 20)),
            (180, 0.99, (1, 90)),
            (3, 0.75, (1, 3)),
            (3, 0.9, None),
            (2, 0.95, None),
        ],
    )
    def test_pattern(self, channels, sparsity, pattern):
        assert forms.nm_pattern(channels, sparsity) == pattern

    @pytest.mark.parametrize("channels", [2, 3, 5, 60, 64, 120, 180, 256, 720])
    @pytest.mark.parametrize("sparsity", measure.SPARSITIES)
    def test_patterns_divide_and_never_prune_more_than_asked(self, channels, sparsity):
        pattern = forms.nm_pattern(channels, sparsity)
        if pattern:
            n, m = pattern
            assert channels % m == 0 and 1 - n / m <= sparsity + 1e-12
            assert n / m <= 2 * (1 - sparsity) + 1e-12

    def test_unstructured_is_exact(self):
        weight = torch.randn(16, 8, 3, 3)
        sparse = forms.make(weight, Form(nm=False), 0.9)
        kept = weight.numel() - num_pruned(weight.numel(), 0.9)
        assert sparse.weights == kept and sparse.label == "90.02 %"
        smallest = weight.abs()[sparse.dense == 0].max()
        assert smallest <= weight.abs()[sparse.dense != 0].min()
        assert torch.equal(sparse.packed.to_dense(), sparse.dense)

    def test_rows_that_share_what_they_keep_are_exact_too(self):
        weight = torch.randn(16, 8, 3, 3)
        sparse = forms.make(weight, Form(4, nm=False), 0.9)
        sums = weight.view(4, 4, 72).abs().sum(1)
        kept = (sparse.dense.view(4, 4, 72) != 0).all(1)
        assert kept.sum() == 288 - num_pruned(288, 0.9) and sparse.label == "90.28 %"
        assert sums[~kept].max() <= sums[kept].min()
        assert sparse.weights == 4 * kept.sum() and sparse.packed.values.shape[1] == 4
        assert torch.equal(sparse.packed.to_dense(), sparse.dense)

    @pytest.mark.parametrize("v", [1, 4])
    def test_nm_is_the_pattern(self, v):
        weight = torch.randn(16, 20, 3, 3)
        sparse = forms.make(weight, Form(v), 0.9)
        assert sparse.label == "1:10 (90 %)" and sparse.packed.keep == Keep(1, of=10, v=v)
        assert sparse.weights == weight.numel() // 10
        assert torch.equal(sparse.packed.to_dense(), sparse.dense)

    def test_what_does_not_fit_is_named(self):
        assert forms.unsupported_reason(Form(4), (3, 64), 0.5) == "v=4 does not divide 3 outputs"
        reason = forms.unsupported_reason(Form(1), (64, 3, 3, 3), 0.95)
        assert reason == "no N:M of 3 input channels prunes about 95 %"
        assert forms.unsupported_reason(Form(nm=False), (3, 3), 0.95) is None

    def test_gpus_time_tensor_cores_from_v_16_on(self):
        assert [form.name for form in forms.forms("cpu")] == [
            *("unstructured", "N:M v=1", "N:M v=4")
        ]
        names = [form.name for form in forms.forms("cuda")]
        assert names[-5:] == [
            *("N:M v=8", "N:M v=16 tf32", "N:M v=16 bf16", "N:M v=32 tf32", "N:M v=32 bf16")
        ]


class TestCalls:
    @pytest.mark.parametrize("layer", [CONV, LINEAR, Layer((8, 4, 1, 1), (1, 4, 5, 3))])
    def test_every_dense_variant_computes_the_same(self, layer):
        data = LayerTensors.of(layer, "cpu")
        for name in calls.PASSES:
            variants = calls.dense_variants(layer, "cpu")
            results = [calls.dense_call(data, v, name)() for v in variants]
            for variant, result in zip(variants, results, strict=True):
                result, first = ((r,) if name == "forward" else r for r in (result, results[0]))
                close = {"rtol": 0.05, "atol": 0.1} if variant.precision == "bf16" else {}
                for actual, expected in zip(result, first, strict=True):
                    torch.testing.assert_close(actual.float(), expected, **close)

    @pytest.mark.parametrize("layer", [CONV, LINEAR])
    @pytest.mark.parametrize("form", [Form(nm=False), Form(1), Form(4)])
    def test_a_step_gives_the_gradients_of_input_and_kept_weights(self, layer, form):
        data = LayerTensors.of(layer, "cpu")
        sparse = forms.make(data.weight, form, 0.5)
        dx, dw = calls.sparse_call(data, sparse, "step")()
        data.weight = sparse.dense
        dense_dx, dense_dw = calls.dense_call(data, DenseVariant(), "step")()
        torch.testing.assert_close(dx, dense_dx)
        torch.testing.assert_close(dw, parity.kept(dense_dw, sparse))

    @pytest.mark.parametrize("layer", [CONV, LINEAR, Layer((8, 4, 1, 1), (1, 4, 5, 3))])
    def test_torchs_sparse_product_is_the_same_product(self, layer):
        data = LayerTensors.of(layer, "cpu")
        sparse = forms.make(data.weight, Form(nm=False), 0.5)
        actual = calls.csr_call(data, sparse)().view(layer.y)
        torch.testing.assert_close(actual, calls.dense_op(layer)(data.x, sparse.dense))

    def test_a_large_unfolded_input_is_left_out(self, monkeypatch):
        monkeypatch.setattr(calls, "MOST_UNFOLDED", 100)
        sparse = forms.make(torch.randn(CONV.weight), Form(nm=False), 0.5)
        with pytest.raises(ValueError, match="the unfolded input takes"):
            calls.csr_call(LayerTensors.of(CONV, "cpu"), sparse)

    def test_one_by_one_is_also_timed_as_a_matrix_product(self):
        names = [v.name for v in calls.dense_variants(Layer((8, 4, 1, 1), CONV.x), "cpu")]
        assert names[:2] == ["fp32", "fp32 channels_last"] and "fp32 as matmul" in names


class TestParity:
    @pytest.mark.parametrize("layer", [CONV, LINEAR])
    @pytest.mark.parametrize("form", [Form(nm=False), Form(1), Form(4), Form(4, precision="bf16")])
    def test_passes(self, layer, form):
        data = LayerTensors.of(layer, "cpu")
        weight = data.weight.to(calls.DTYPES[form.precision])
        parity.check(data, forms.make(weight, form, 0.5), form)

    @pytest.mark.parametrize(
        ("op", "wrong", "named"),
        [
            ("sparse_conv2d", lambda y: y * (1 + 1e-5), "y is off by .* on average"),
            ("sparse_conv2d", lambda y: y + _one_element(y, 1e-4), "y is off by"),
            ("sparse_conv2d", lambda y: y * _scaled_backward(y), "gradient of x is off"),
            ("sparse_conv2d", lambda y: y[:, :, :-1], "y has shape"),
        ],
    )
    def test_what_is_wrong_is_refused(self, monkeypatch, op, wrong, named):
        right = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *args, **kw: wrong(right(*args, **kw)))
        data = LayerTensors.of(CONV, "cpu")
        sparse = forms.make(data.weight, Form(nm=False), 0.5)
        with pytest.raises(ParityError, match=named):
            parity.check(data, sparse, Form(nm=False))

    def test_a_wrong_gradient_of_the_values_is_refused(self, monkeypatch):
        right = ops.sparse_matmul

        def wrong(x, p):
            return right(x, p) + (p.values.sum() - p.values.detach().sum()) * 1e-3

        monkeypatch.setattr(ops, "sparse_matmul", wrong)
        data = LayerTensors.of(LINEAR, "cpu")
        sparse = forms.make(data.weight, Form(nm=False), 0.5)
        with pytest.raises(ParityError, match="the gradient of the values is off"):
            parity.check(data, sparse, Form(nm=False))


def _one_element(y: torch.Tensor, value: float) -> torch.Tensor:
    wrong = torch.zeros_like(y)
    wrong.view(-1)[-1] = value
    return wrong


def _scaled_backward(y: torch.Tensor) -> torch.Tensor:
    """Ones whose gradient is not zero: what multiplies by them has a wrong backward."""
    return torch.ones_like(y) + (y - y.detach()) * 1e-3
