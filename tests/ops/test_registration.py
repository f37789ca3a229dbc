"""The ops as torch sees them: schemas, fakes, functionalisation, compilation, versions."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import issp
from issp.ops import ShrinkState
from issp.ops.arguments import AdamArgs, Conv2dArgs, FusedConv2dArgs, MatmulArgs, PruneArgs, SGDArgs
from tests.asserts import assert_bitwise_equal

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def weights_on(device):
    source = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=source).to(device) for s in ((12, 20), (7,), (4, 3, 3, 3))]


K = (200, 3, 60)
ARGUMENTS = {
    "adam_soft_shrink_": (AdamArgs, PruneArgs),
    "sgd_soft_shrink_": (SGDArgs, PruneArgs),
    "sparse_conv2d": (Conv2dArgs,),
    "sparse_conv2d_fused": (FusedConv2dArgs,),
    "sparse_matmul": (MatmulArgs,),
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_arguments_have_the_order_and_defaults_of_the_schema(op):
    schema = getattr(torch.ops.issp, op).default._schema.arguments
    kinds = ARGUMENTS[op]
    assert [x.name for x in schema] == [name for kind in kinds for name in kind._fields]
    defaults = {name: value for kind in kinds for name, value in kind._field_defaults.items()}
    if "patterns" in defaults:
        defaults["patterns"] = list(defaults["patterns"])
    assert defaults == {x.name: x.default_value for x in schema if x.has_default_value()}


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_soft_shrink(device):
    weights = weights_on(device)
    state = ShrinkState(weights, K)
    state_args = (state.thresholds, state.packed, state.flips, state.scratch)
    opcheck(torch.ops.issp.soft_shrink_.default, (weights, state.k, 0.95, *state_args))
    found_inf = torch.zeros(1, device=device)
    opcheck(
        torch.ops.issp.soft_shrink_.default,
        (weights, state.k, 0.0, *state_args, found_inf, False),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_magnitude_threshold(device):
    opcheck(torch.ops.issp.magnitude_threshold.default, (weights_on(device), list(K)))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_apply_masks(device):
    weights = weights_on(device)
    masks = ShrinkState(weights, K).packed
    opcheck(torch.ops.issp.apply_masks_.default, (weights, masks))
    sets = [*weights, *[torch.ones_like(w) for w in weights], *[w.half() for w in weights]]
    opcheck(torch.ops.issp.apply_masks_.default, (sets, masks, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_regularize(device):
    weights, grads = weights_on(device), weights_on(device)
    factors = torch.ones(len(weights), device=device)
    masks = ShrinkState(weights, K).packed
    opcheck(torch.ops.issp.regularize_.default, (grads, weights, factors, masks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["magnitude_statistics", "count_zeros"])
def test_opcheck_readers(device, op):
    opcheck(getattr(torch.ops.issp, op).default, (weights_on(device),))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_nm_prune(device):
    weight = torch.randn(8, 20, 3, 3, device=device)
    opcheck(torch.ops.issp.nm_prune.default, (weight, 1, 10, 2, "channels", 0.95))
    opcheck(torch.ops.issp.nm_prune.default, (weight, 2, 20, 1, "flat"))


def update_arguments(device, frozen=False):
    """The arguments of both optimizer ops, for the first two of three weights to be pruned."""
    weights = weights_on(device)
    grads, *moments = ([w.abs() * factor for w in weights] for factor in (0.3, 0.2, 0.1))
    steps = [torch.zeros((), device=device) for _ in weights]
    state = ShrinkState(weights[:2], K[:2])
    tail = (state.k, 0.95, state.thresholds, state.packed, state.flips, state.scratch)
    tail = (None, None, *tail, torch.zeros((), device=device), frozen)
    adam = (weights, grads, *moments, steps, 1e-3, 0.9, 0.99, 1e-8, 0.1, True, False, *tail)
    sgd = (weights, grads, moments[0], [False] * 3, 1e-3, 0.9, 0.0, 0.1, True, False, *tail)
    return {"adam_soft_shrink_": adam, "sgd_soft_shrink_": sgd}


@pytest.mark.parametrize("frozen", [False, True], ids=["shrinking", "frozen"])
@pytest.mark.parametrize("op", ["adam_soft_shrink_", "sgd_soft_shrink_"])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_optimizer_ops(device, op, frozen):
    opcheck(getattr(torch.ops.issp, op).default, update_arguments(device, frozen)[op])


@pytest.mark.parametrize("op", ["adam_soft_shrink_", "sgd_soft_shrink_"])
@pytest.mark.parametrize("device", DEVICES)
def test_optimizer_ops_compile_to_one_graph(device, op):
    call = getattr(torch.ops.issp, op)
    eager, compiled = update_arguments(device)[op], update_arguments(device)[op]
    step = torch.compile(lambda *args: call(*args), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        call(*eager)
        step(*compiled)
    for a, b in zip(compiled, eager, strict=True):
        for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
            if isinstance(x, torch.Tensor):
                assert_bitwise_equal(x, y, f"a tensor of {op} under compile")


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_with_the_op_compiles_to_one_graph(device):
    """forward, loss, update and fused step: fullgraph, and the same bits as eager."""

    def train_step(weights, x, state):
        y = torch.relu(x @ weights[0].T)
        loss = y.square().mean()
        update = torch.ones_like(weights[0]) * loss.detach() * 1e-3
        weights[0].sub_(update)
        issp.ops.soft_shrink_(weights, state, shrink=0.95)
        issp.ops.apply_masks_([w * 1.0 for w in weights], state)
        return loss, issp.ops.magnitude_threshold(weights, list(K))

    x = torch.randn(5, 20, device=device)
    eager, compiled = weights_on(device), weights_on(device)
    eager_state, compiled_state = ShrinkState(eager, K), ShrinkState(compiled, K)
    step = torch.compile(train_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            expected = train_step(eager, x, eager_state)
            actual = step(compiled, x, compiled_state)
            assert_bitwise_equal(actual[1], expected[1], "thresholds under compile")
    for a, b in zip(compiled, eager, strict=True):
        assert_bitwise_equal(a, b, "weights under compile")
    assert_bitwise_equal(compiled_state.packed, eager_state.packed, "masks under compile")
    assert compiled_state.masks()[0].sum() == 240 - 200


def auxiliary_ops(weights, grads, moments, factors, state):
    """The auxiliary ops as a training loop would call them."""
    issp.ops.regularize_(grads, weights, factors, state)
    issp.ops.apply_masks_([*weights, *moments], state)
    return issp.ops.magnitude_statistics(grads), issp.ops.count_zeros(weights)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_auxiliary_ops_compile_to_one_graph(device, backend):
    step = torch.compile(auxiliary_ops, fullgraph=True, backend=backend)
    results = []
    for call in (auxiliary_ops, step):
        weights, grads, moments = (weights_on(device) for _ in range(3))
        state = ShrinkState(weights, K)
        issp.ops.soft_shrink_(weights, state)
        factors = torch.full((len(weights),), 0.5, device=device)
        with torch.no_grad():
            readings = call(weights, grads, moments, factors, state)
        results.append([*weights, *grads, *moments, *readings])
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        assert_bitwise_equal(x, y, f"result {i} under compile")
    assert results[1][-1].tolist() == list(K)


def test_inductor_compiles_the_op():
    weights = weights_on("cpu")
    state = ShrinkState(weights, K)
    expected = [w.clone() for w in weights]
    expected_state = ShrinkState(expected, K)
    torch.compile(lambda: issp.ops.soft_shrink_(weights, state), fullgraph=True)()
    issp.ops.soft_shrink_(expected, expected_state)
    for a, b in zip(weights, expected, strict=True):
        assert_bitwise_equal(a, b, "weights under inductor")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; none here")
def test_cuda_graph_capture():
    weights, expected = weights_on("cuda"), weights_on("cuda")
    state, expected_state = ShrinkState(weights, K), ShrinkState(expected, K)
    for s, w in ((state, weights), (expected_state, expected)):
        issp.ops.soft_shrink_(w, s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        issp.ops.soft_shrink_(weights, state)
    for _ in range(5):
        graph.replay()
        issp.ops.soft_shrink_(expected, expected_state)
    for a, b in zip(weights, expected, strict=True):
        assert_bitwise_equal(a, b, "weights after five replays")


def test_autograd_notices_a_changed_gradient():
    g = torch.randn(4, 4, requires_grad=True)
    loss = (g * g).sum()
    w = torch.randn(4, 4)
    issp.ops.regularize_([g], [w], torch.ones(1), ShrinkState([w], [8]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_notices_a_shrink_between_forward_and_backward():
    w = torch.randn(4, 4, requires_grad=True)
    loss = (w * w).sum()
    issp.ops.soft_shrink_([w], ShrinkState([w], [8]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_require_grad_are_shrunk_without_a_graph():
    w = torch.nn.Parameter(torch.randn(10, 10))
    before = w.detach().clone()
    issp.ops.soft_shrink_([w], ShrinkState([w], [90]))
    assert w.grad_fn is None and w.requires_grad
    assert (w != before).sum() == 90


def test_default_thread_count_in_a_fresh_process(fresh_python):
    """Before anybody has set the number of threads, workers and caller disagree about it."""
    code = (
        "import torch, issp\n"
        "w = [torch.randn(n) for n in [40_000] * 20]\n"
        "s = issp.ops.ShrinkState(w, [36_000] * 20)\n"
        "for _ in range(20): issp.ops.soft_shrink_(w, s)\n"
        "print([int(m.sum()) for m in s.masks()] == [4_000] * 20)"
    )
    done = fresh_python.run(code)
    assert done.stdout.strip() == "True", done.stderr
