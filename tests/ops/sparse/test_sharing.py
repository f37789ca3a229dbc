"""What tensor cores may compute of the sparse ops goes to Triton, the rest stays native."""

from __future__ import annotations

PROGRAM = """
import torch
import issp
from issp import backends
from issp.ops import reference
from tests.ops.sparse.cases import CONVS, MATMULS

backends._share_with_triton("CPU")
assert "tensor cores" not in backends.problems(), backends.problems()
triton = backends._import_triton()
torch.backends.cuda.matmul.allow_tf32 = True
cases = sorted((*CONVS, *MATMULS), key=lambda c: c.work)
wanted = [c for v in (1, 16) for c in [c for c in cases if c.weight.v == v and c.work > 500][:4]]
assert [c.weight.v for c in wanted] == [1] * 4 + [16] * 4
for case in wanted:
    p = case.build(torch.float32)
    name = "sparse_matmul" if len(p.args()) == 7 else "sparse_conv2d"
    by_op = getattr(torch.ops.issp, name)(*p.args())
    by_triton = triton.implementations()[name](*p.args())
    same = torch.equal(by_op, by_triton)
    expected = getattr(reference, name)(*p.args())
    assert torch.allclose(by_op, expected, rtol=1e-2, atol=2e-2), case.name
    assert same == (case.weight.v == 16), case.name
    x = p.x.clone().requires_grad_()
    getattr(torch.ops.issp, name)(x, *p.args()[1:5], None, None, *p.tail).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
print("shared", len(wanted))
"""


def test_what_tensor_cores_may_compute_goes_to_triton_and_the_rest_stays_native(fresh_python):
    """On the CPU's key, with Triton interpreted: what a GPU's registration does."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = fresh_python.run(PROGRAM, warnings="error", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "shared" in done.stdout
