"""A packed network as one program: exported or compiled once, for images of every size."""

import pytest
import torch
from torch.export import Dim

import issp
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import kinds, prune_
from tests.sr.networks import small_edsr

SIZES = [(1, 16, 12), (1, 17, 31), (2, 40, 9), (3, 8, 8), (1, 64, 48)]


@pytest.fixture(name="packed")
def packed_fixture(cache, timed):
    packed = issp.pack(prune_(small_edsr()).eval(), torch.rand(1, 3, 16, 16), cache=cache)
    assert kinds(packed)["conv_first"] == "SparseConv2d"
    return packed


@pytest.mark.parametrize("strict", [False, True])
def test_one_exported_program_serves_every_size(packed, strict, tmp_path):
    size = {0: Dim("n", max=64), 2: Dim("h", min=4, max=512), 3: Dim("w", min=4, max=512)}
    example = torch.rand(2, 3, 16, 12)
    program = torch.export.export(packed, (example,), dynamic_shapes=(size,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    with torch.no_grad():
        for n, height, width in SIZES:
            x = torch.rand(n, 3, height, width)
            for module in (program.module(), loaded.module()):
                assert_bitwise_equal(module(x), packed(x), f"a batch of {n}, {height}x{width}")


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_nothing_of_backward(packed, strict):
    """Also where gradients are on while it is exported: no lists are sorted in every call."""
    program = torch.export.export(packed, (torch.rand(2, 3, 16, 12),), strict=strict)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.issp.sparse_conv2d.default in called
    assert torch.ops.issp._sparse_transpose.default not in called


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_one_compilation_serves_every_size(packed, backend):
    torch._dynamo.reset()
    compiled = torch.compile(packed, dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _, height, width in SIZES:
            x = torch.rand(2, 3, height, width)
            torch.testing.assert_close(compiled(x), packed(x))


@pytest.mark.full
@pytest.mark.parametrize("form", [issp.unpack, lambda packed: packed], ids=["dense", "packed"])
@pytest.mark.filterwarnings("ignore:torch.jit and ONNX get sparse layers as dense ones")
def test_onnx_gets_the_dense_network_with_its_zeros(form, packed, tmp_path):
    """Of every size; onnxruntime rounds sums in another order than torch."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"torch's exporter for ONNX needs {name}")
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the exported network")
    size = {0: Dim("n", max=64), 2: Dim("h", min=4, max=512), 3: Dim("w", min=4, max=512)}
    example = torch.rand(2, 3, 16, 12)
    file = str(tmp_path / "m.onnx")
    network = form(packed)
    torch.onnx.export(network, (example,), file, dynamo=True, dynamic_shapes=(size,), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n, height, width in SIZES:
        x = torch.rand(n, 3, height, width)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), packed(x), rtol=0, atol=1e-5)


def test_torch_fx_traces_the_network(packed):
    traced = torch.fx.symbolic_trace(packed)
    leaves = {
        type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"
    }
    assert issp.nn.SparseConv2d in leaves
    with torch.no_grad():
        for n, height, width in SIZES:
            x = torch.rand(n, 3, height, width)
            assert_bitwise_equal(traced(x), packed(x), f"a batch of {n}, {height}x{width}")
