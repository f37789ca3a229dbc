"""What people do to torch's modules, done to sparse layers: it works alike, or is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import symbolic_trace
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from issp import Keep
from issp.nn import NMConv2d, NMLinear, SparseConv2d, SparseLinear, convert
from tests.asserts import assert_bitwise_equal

KEEP = Keep(1, of=4, v=2)
LAYERS = {
    "NMConv2d": lambda **more: NMConv2d(8, 6, 3, padding=1, keep=KEEP, **more),
    "NMLinear": lambda **more: NMLinear(8, 6, keep=KEEP, bias=False, **more),
    "SparseConv2d": lambda **more: SparseConv2d(
        *(8, 6, (5, 3), 2, 1, (1, 2)), sparsity=0.7, v=3, activation="relu", **more
    ),
    "SparseLinear": lambda **more: SparseLinear(8, 6, sparsity=0.7, **more),
}
MASKS = ("fixed", "ste", "sr-ste")


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


@pytest.fixture(params=MASKS)
def layer(request, name):
    return LAYERS[name](mask=request.param)


def example(layer: nn.Module, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 8, 9, 7) if hasattr(layer, "kernel_size") else torch.randn(n, 5, 8)


def gradients(call, x, parameters):
    """The result, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def saving_the_sparse_op(context, op, *args, **kwargs):
    kept = op in (torch.ops.issp.sparse_conv2d.default, torch.ops.issp.sparse_matmul.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, saving_the_sparse_op),
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_activation_checkpointing(layer, kind):
    x = example(layer)
    parameters = list(layer.parameters())
    expected = gradients(layer, x, parameters)
    if kind == "reentrant":  # knows backward() alone
        x = x.requires_grad_()
        checkpoint(layer, x, **CHECKPOINTS[kind]).square().sum().backward()
        actual = [expected[0], x.grad, *(p.grad for p in parameters)]
    else:
        actual = gradients(lambda x: checkpoint(layer, x, **CHECKPOINTS[kind]), x, parameters)
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise_equal(one, other, f"a tensor of a step with {kind} checkpoints")


def test_backward_unpacks_what_was_saved_once(layer):
    """A second time would compute a checkpoint, or fetch from the host, once more."""
    unpacked = []

    def unpack(number):
        unpacked.append(number)
        return saved[number]

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or len(saved) - 1, unpack
    ):
        y = layer(example(layer).requires_grad_())
    y.sum().backward()
    assert unpacked and len(set(unpacked)) == len(unpacked)


def test_activations_on_the_host(layer):
    with torch.autograd.graph.save_on_cpu():
        x = example(layer).requires_grad_()
        layer(x).sum().backward()
    assert x.grad.isfinite().all()


class TestWeight:
    def test_says_what_code_asks_of_torchs_layers(self, layer):
        layer = layer.bfloat16()
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu"
        assert (
            layer.weight.shape
            == layer.to_dense()
            .state_dict()["weight" if layer.activation == "none" else "0.weight"]
            .shape
        )

    def test_of_a_fixed_mask_computes_as_the_layer(self):
        layer = LAYERS["NMConv2d"]()
        x = example(layer)
        assert_bitwise_equal(layer.weight, layer.packed().to_dense(), "the dense weight")
        torch.testing.assert_close(F.conv2d(x, layer.weight, layer.bias, padding=1), layer(x))
        F.conv2d(x, layer.weight, padding=1).square().sum().backward()
        by_weight, layer.values.grad = layer.values.grad, None
        (layer(x) - layer.bias.view(-1, 1, 1)).square().sum().backward()
        torch.testing.assert_close(by_weight, layer.values.grad)

    def test_is_no_parameter_of_a_fixed_mask(self):
        layer = LAYERS["SparseLinear"]()
        assert [n for n, _ in layer.named_parameters()] == ["values", "bias"]
        with pytest.raises(KeyError, match="attribute 'weight' already exists"):
            layer.weight = nn.Parameter(torch.zeros(6, 8))

    def test_is_the_parameter_of_a_trained_mask(self):
        layer = LAYERS["SparseLinear"](mask="ste")
        assert layer.weight is dict(layer.named_parameters())["weight"]
        layer.weight = nn.Parameter(torch.ones(6, 8))
        assert layer.weight.sum() == 48


class TestEmptyBatch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_result_and_gradients_are_empty_or_zero(self, layer, dtype):
        layer, x = layer.to(dtype), example(layer, 0).to(dtype).requires_grad_()
        residual = torch.zeros_like(layer.to_dense()(x)).detach().requires_grad_()
        for train in (True, False):
            with torch.set_grad_enabled(train):
                y = layer(x, residual)
            assert y.shape == residual.shape and y.dtype == dtype
        layer(x, residual).sum().backward()
        assert x.grad.shape == x.shape and residual.grad.shape == residual.shape
        for name, parameter in layer.named_parameters():
            expected = torch.zeros_like(parameter)
            if name == "weight" and layer.mask == "sr-ste":  # what is not kept decays
                pruned = layer.packed().to_dense() == 0
                expected = layer.decay * parameter.detach() * pruned
            torch.testing.assert_close(parameter.grad, expected)

    def test_tokens_of_no_length(self):
        layer = LAYERS["SparseLinear"]()
        assert layer(torch.zeros(3, 0, 8)).shape == (3, 0, 6)

    @pytest.mark.parametrize("size", [(0, 7), (9, 0), (2, 7)])
    def test_an_image_that_leaves_no_pixel_is_refused_as_by_torch(self, size):
        layer = SparseConv2d(8, 6, 3, padding=(0, 1), sparsity=0.5)
        with pytest.raises(RuntimeError):
            layer.to_dense()(torch.zeros(2, 8, *size))
        with pytest.raises(ValueError, match=r"a kernel of \(3, 3\).*does not fit x of"):
            layer(torch.zeros(2, 8, *size))


class TestMeta:
    def test_layers_are_built_loaded_and_run_there(self, name):
        for mask in MASKS:
            source = LAYERS[name](mask=mask)
            with torch.device("meta"):
                built = LAYERS[name](mask=mask)
            x = example(source)
            step = gradients(built, x.to("meta"), list(built.parameters()))
            assert [t.shape for t in step] == [
                t.shape for t in gradients(source, x, list(source.parameters()))
            ]
            for assign in (False, True):
                twin = copy.deepcopy(built)
                twin = twin if assign else twin.to_empty(device="cpu")
                twin.load_state_dict(source.state_dict(), assign=assign)
                assert_bitwise_equal(twin(x), source(x), "the loaded layer's result")

    def test_without_epilogue_and_with(self, layer):
        layer, x = layer.to("meta"), example(layer).to("meta")
        with torch.no_grad():
            residual = layer(x)
            assert layer(x, residual).shape == residual.shape
        assert layer(x, residual).shape == residual.shape

    def test_memory_is_initialised_as_torch_does(self, name):
        for mask in MASKS:
            torch.manual_seed(5)
            expected = LAYERS[name](mask=mask)
            with torch.device("meta"):
                layer = LAYERS[name](mask=mask)
            layer = layer.to_empty(device="cpu")
            torch.manual_seed(5)
            layer.reset_parameters()
            for key, value in expected.state_dict().items():
                assert_bitwise_equal(layer.state_dict()[key], value, key)

    def test_fake_tensors(self, name):
        """As estimates of memory use them."""
        for mask in MASKS:
            with FakeTensorMode():
                layer = LAYERS[name](mask=mask)
                x = example(layer).requires_grad_()
                layer(x).sum().backward()
                assert x.grad.shape == x.shape

    def test_zeros_cannot_be_read_there(self):
        dense = nn.Sequential(nn.Linear(8, 6, device="meta"))
        for call in (
            lambda: SparseLinear.from_dense(dense[0]),
            lambda: NMLinear.from_dense(dense[0], KEEP),
            lambda: convert(dense),
            lambda: convert(dense, keep=KEEP),
        ):
            with pytest.raises(ValueError, match="is on the meta device.*: give it memory"):
                call()


class TestFunctionalCall:
    def test_with_other_parameters(self, layer):
        x, twin = example(layer), copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        y = torch.func.functional_call(layer, dict(twin.named_parameters()), (x,))
        assert_bitwise_equal(y, twin(x), "the result with other parameters")

    def test_with_other_positions(self, name):
        """Also backward, which keeps lists of the transposed positions."""
        layer, other = LAYERS[name](), LAYERS[name]()
        x = example(layer)
        own = gradients(layer, x, [])
        state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        swapped = gradients(lambda x: torch.func.functional_call(layer, state, (x,)), x, [])
        for one, two in zip(swapped, gradients(other, x, []), strict=True):
            assert_bitwise_equal(one, two, "a tensor of a step with another state")
        for one, two in zip(gradients(layer, x, []), own, strict=True):
            assert_bitwise_equal(one, two, "a tensor of a step with its own state again")

    def test_positions_that_are_written_to(self, name):
        """As averages and copies of models write: buffer for buffer, in place."""
        layer, other = LAYERS[name](), LAYERS[name]()
        x = example(layer)
        gradients(layer, x, [])
        with torch.no_grad():
            for own, new in zip(
                layer.state_dict().values(), other.state_dict().values(), strict=True
            ):
                own.copy_(new)
        for one, two in zip(gradients(layer, x, []), gradients(other, x, []), strict=True):
            assert_bitwise_equal(one, two, "a tensor of a step")


REFUSED = (
    "sparse layers and ops have no vmap, torch.func or forward-mode derivatives: use the dense"
)


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.vmap(layer)(torch.stack([x, x])),
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
        lambda layer, x: torch.func.jacrev(layer)(x),
        lambda layer, x: torch.autograd.functional.jacobian(layer, x, vectorize=True),
    ],
    ids=["vmap", "grad", "jvp", "jacrev", "vectorized jacobian"],
)
def test_transforms_of_torch_func_are_refused_in_one_sentence(layer, transform):
    with pytest.raises(NotImplementedError, match=REFUSED):
        transform(layer, example(layer))


@pytest.mark.parametrize("grad", [False, True])
def test_no_tangent_is_dropped_in_silence(layer, grad):
    x = example(layer)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=REFUSED):
            layer(forward_ad.make_dual(x, x))
        assert layer(x).shape[0] == 2  # without a tangent: as ever


class TestTracing:
    def test_a_sparse_layer_is_a_leaf_of_torch_fx(self, layer):
        model = nn.Sequential(nn.ReLU(), layer)
        layer.register_forward_hook(lambda module, args, y: y + 1)
        traced = symbolic_trace(model)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
        x = example(layer)
        assert_bitwise_equal(traced(x), model(x), "the traced model's result")  # the hook ran once

    def test_a_leaf_with_a_residual_and_names(self, layer):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x, y):
                return self.layer(input=x, residual=y)

        x = example(layer)
        y = torch.randn_like(layer(x))
        assert_bitwise_equal(symbolic_trace(Block())(x, y), Block()(x, y), "the traced result")

    @pytest.mark.parametrize("script", [False, True])
    def test_torch_jit_gets_dense_layers_and_says_so(self, layer, script):
        model = nn.Sequential(layer)
        with pytest.warns(RuntimeWarning, match="get sparse layers as dense ones, with zeros"):
            traced = torch.jit.script(model) if script else torch.jit.trace(model, example(layer))
        assert "issp::" not in str(traced.inlined_graph)
        x = torch.randn(3, 8, 20, 17) if hasattr(layer, "kernel_size") else torch.randn(4, 8)
        torch.testing.assert_close(traced(x), layer(x))


def test_positions_stay_integers_whatever_is_converted(layer):
    layer.type(torch.float64)
    x = example(layer).double()
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert {t.dtype for t in layer.buffers()} <= {torch.int32}


def test_reset_keeps_as_many_weights(name):
    layer = LAYERS[name]()
    layer.load_state_dict(LAYERS[name]().state_dict())
    before, count = layer.weight.detach().clone(), len(layer.col_indices)
    x = example(layer)
    gradients(layer, x, [])
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before) and len(layer.col_indices) == count
    actual, expected = (gradients(m, x, []) for m in (layer, layer.to_dense()))
    torch.testing.assert_close(actual, expected)
    rows = SparseLinear.from_dense(nn.Linear(8, 6), v=2)
    rows.reset_parameters()
    assert rows.weight.ne(0).all()


@pytest.mark.parametrize("x", [[1.0], torch.zeros(2, 8).numpy()], ids=["list", "array"])
def test_what_is_no_tensor_is_named(layer, x):
    with pytest.raises(TypeError, match=f"x must be a tensor, not {type(x).__name__}"):
        layer(x)


def test_input_by_name_and_without_a_batch(layer):
    x = example(layer)
    expected = layer(x)
    assert_bitwise_equal(layer(input=x), expected, "the result of an input by name")
    assert_bitwise_equal(layer(x[0]), layer(x[:1])[0], "the result of one sample")
    if hasattr(layer, "kernel_size"):
        torch.testing.assert_close(layer(x[0]), layer.to_dense()(x[0]))
        y = torch.randn_like(expected)
        assert_bitwise_equal(
            layer(x[0], y[0]), layer(x[:1], y[:1])[0], "the result with a residual"
        )


def test_a_replica_of_data_parallel(layer):
    """torch's replicas hold tensors with a graph in place of parameters."""
    replica = layer._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1)
    if layer.bias is None:
        replica.bias = None
    x = example(layer)
    y = replica(x)
    assert_bitwise_equal(y, layer(x), "the replica's result")
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_layers_built_or_used_in_inference_mode(layer):
    x = example(layer)
    with torch.inference_mode():
        inferred = layer(x)
        built = copy.deepcopy(layer)
        assert_bitwise_equal(built(x), inferred, "the result of a copy")
    assert_bitwise_equal(layer(x), inferred, "the result")
    gradients(layer, x, list(layer.parameters()))


def test_gradients_of_the_input_alone(layer):
    layer.requires_grad_(False)
    x = example(layer).requires_grad_()
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad(layer.to_dense()(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        assert not layer(x).requires_grad
