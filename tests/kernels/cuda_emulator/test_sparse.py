"""The CUDA kernels of the sparse ops, thread by thread on the CPU: cases, designs, schedules.

tests/ops/sparse/test_parity.py runs a few cases; here are all of them, and those that know how the
kernels are built. Bits are compared across schedules, chunks, teams and tile sizes: they must not
depend on any of these.
"""

from __future__ import annotations

import pytest
import torch

from issp.ops.geometry import Geometry
from tests.asserts import assert_as_close_as_dense, assert_bitwise_equal
from tests.backends import BackEnd
from tests.cases import DTYPES
from tests.kernels import cuda_emulator
from tests.ops.sparse.cases import (
    CONVS,
    FEW_CONVS,
    FEW_MATMULS,
    MATMULS,
    ConvCase,
    MatmulCase,
    Weight,
    names,
)
from tests.ops.sparse.test_parity import (
    PLAIN_CONVS,
    PLAIN_MATMULS,
    calls_of,
    check,
    check_values_grad,
    dense_conv,
    dense_linear_conv,
    dense_matmul,
    padded_input,
)

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]
EMULATED = BackEnd("cuda-emulated", "cpu", cuda_emulator.implementations, slow=True)

# Machines of the small build: planes of inputs in a few chunks, one plane at a time, none (every
# column is gathered), and blocks with as many rows as there can be or as few.
DESIGNS = {
    "planes": {},
    "one plane": {"shared": 2600, "processors": 1},
    "gathered": {"shared": 1100},
    "many rows": {"shared": 60_000, "processors": 1},
    "many blocks": {"shared": 60_000, "processors": 400},
}


@pytest.fixture(autouse=True)
def _machine():
    yield
    cuda_emulator.machine()
    cuda_emulator.seed(0)


def use(design: str, seed: int = 1, removed: int = -1) -> None:
    """The machine and the schedule of the following calls, in the small build."""
    cuda_emulator.machine(**DESIGNS[design])
    cuda_emulator.seed(seed, removed=removed, small=True)


def grad_check(case, dtypes) -> None:
    dense = dense_linear_grad
    name = "conv2d" if isinstance(case, ConvCase) else "matmul"
    check_values_grad(EMULATED, case, dtypes, f"sparse_{name}_values_grad", dense)


def dense_linear_grad(p, case, dtype):
    """The dense gradient at the stored positions."""
    weight = p.weight.to(dtype).requires_grad_()
    if isinstance(case, ConvCase):
        y = dense_linear_conv(padded_input(p, case, dtype), weight, case)
    else:
        y = torch.nn.functional.linear(p.x.to(dtype), weight.flatten(1))
    grad = torch.autograd.grad(y, weight, p.grad.to(dtype))[0]
    blocks = torch.repeat_interleave(p.starts.diff().long())
    return grad.reshape(len(p.starts) - 1, case.weight.v, -1)[blocks, :, p.columns.long()]


@pytest.mark.parametrize("case", CONVS, ids=names(CONVS))
def test_conv2d(case):
    """In real shapes by float32, in small ones by another dtype in turn."""
    cuda_emulator.seed(len(case.name))
    check(EMULATED, case, (torch.float32,), "sparse_conv2d", dense_conv)
    use("planes", len(case.name))
    check(EMULATED, case, (DTYPES[len(case.name) % 4],), "sparse_conv2d", dense_conv)


@pytest.mark.parametrize("case", MATMULS, ids=names(MATMULS))
def test_matmul(case):
    cuda_emulator.seed(len(case.name))
    check(EMULATED, case, (torch.float32,), "sparse_matmul", dense_matmul)
    use("planes", len(case.name))
    check(EMULATED, case, (DTYPES[len(case.name) % 4],), "sparse_matmul", dense_matmul)


# Without the largest, which take seconds.
GRADS = [case for case in (*PLAIN_CONVS, *PLAIN_MATMULS) if case.work < 5e6]


@pytest.mark.parametrize("case", GRADS, ids=names(GRADS))
def test_values_grad(case):
    cuda_emulator.seed(len(case.name))
    grad_check(case, (torch.float32,))
    use("planes", len(case.name))
    grad_check(case, (DTYPES[len(case.name) % 4],))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("design", DESIGNS)
def test_designs(design, dtype):
    """Every way of staging and of sharing out the rows, for every dtype."""
    use(design)
    for case in FEW_CONVS:
        if design == "gathered" and case.work > 2e6:
            continue  # seconds, and smaller cases take the same way
        check(EMULATED, case, (dtype,), "sparse_conv2d", dense_conv)
        grad_check(case, (dtype,))
    for case in FEW_MATMULS:
        check(EMULATED, case, (dtype,), "sparse_matmul", dense_matmul)
        grad_check(case, (dtype,))


SCHEDULED = (
    ConvCase("v=1", Weight(19, 7, (3, 3), 0.3), padding=(1, 1), image=(9, 21), residual=True),
    ConvCase("v=4", Weight(36, 7, (3, 3), 0.3, 4), padding=(1, 1), image=(9, 21), stride=(2, 1)),
    ConvCase("v=8", Weight(40, 9, (2, 3), 0.3, 8), image=(20, 10), batch=2, activation="relu"),
    MatmulCase("tokens, v=1", Weight(19, 50, pattern=0.3), lead=(150,), residual=True),
    MatmulCase("tokens, v=4", Weight(36, 40, pattern=0.3, v=4), lead=(2, 70)),
    MatmulCase("tokens, v=16", Weight(48, 40, pattern=0.3, v=16), lead=(90,), activation="gelu"),
)

# Rows of several runs (kRun of product.cuh), some of them of exactly one or two.
SEVERAL_RUNS = (
    ConvCase("runs, v=1", Weight(9, 48, (3, 3), 0.8), image=(5, 18), residual=True),
    ConvCase("runs, v=4", Weight(12, 150, (1, 3), "uneven", 4), image=(20, 5), stride=(1, 2)),
    ConvCase("runs, v=8", Weight(16, 256, (1, 1), "uneven", 8), image=(3, 40), batch=2),
    ConvCase("whole runs, v=2", Weight(6, 64, (1, 4), 1.0, 2), image=(4, 7), activation="gelu"),
    MatmulCase("runs of tokens, v=1", Weight(19, 300, pattern=0.9), lead=(75,), residual=True),
    MatmulCase("runs of tokens, v=4", Weight(76, 200, pattern=0.9, v=4), lead=(67,)),
    MatmulCase("runs of tokens, v=16", Weight(48, 256, pattern=1.0, v=16), lead=(3, 5)),
)

# The gradient's blocks have more than one tile each.
MANY_TILES = ConvCase("more tiles than parts", Weight(4, 3, (3, 3), 0.5, 4), image=(72, 130))


@pytest.mark.parametrize("dtype, schedules", [(torch.float32, 15), (torch.float64, 2)], ids=str)
@pytest.mark.parametrize(
    "case", (*SCHEDULED, *SEVERAL_RUNS, MANY_TILES), ids=lambda case: case.name
)
def test_schedules(case, dtype, schedules):
    """The same bits in any order of threads, for any machine, chunk and team."""
    for call in calls_of(EMULATED, case, dtype):
        use("planes", 0)
        expected = call()
        for seed in cuda_emulator.schedules(schedules):
            design = list(DESIGNS)[seed % len(DESIGNS)]
            if case is MANY_TILES and design == "gathered":
                continue  # seconds
            use(design, 100 + seed)
            assert_bitwise_equal(call(), expected, f"{case.name}, {design}, schedule {seed}")


@pytest.mark.parametrize("case", (*SCHEDULED, *SEVERAL_RUNS), ids=lambda case: case.name)
def test_the_bits_of_a_product_do_not_depend_on_the_tile(case):
    call = calls_of(EMULATED, case, torch.float32)[0]
    use("planes")
    expected = call()
    cuda_emulator.seed(2)
    cuda_emulator.machine()
    assert_bitwise_equal(call(), expected, case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SEVERAL_RUNS, ids=names(SEVERAL_RUNS))
def test_rows_of_several_runs(case, dtype):
    """In every design, and in real shapes."""
    kind, dense = ("conv2d", dense_conv) if isinstance(case, ConvCase) else ("matmul", dense_matmul)
    for design in DESIGNS:
        use(design)
        check(EMULATED, case, (dtype,), f"sparse_{kind}", dense)
    cuda_emulator.machine()
    cuda_emulator.seed(3)
    check(EMULATED, case, (dtype,), f"sparse_{kind}", dense)


@pytest.mark.parametrize("v", [1, 2, 4, 8, 16])
def test_long_rows_are_as_exact_as_those_of_a_dense_product(v):
    """A single chain over 2304 entries has up to five times the error."""
    use("planes")
    weight = Weight(16, 256, (3, 3), 1.0, v)
    case = ConvCase(f"long rows, v={v}", weight, padding=(1, 1), image=(12, 12), bias=False)
    check(EMULATED, case, (torch.float32,), "sparse_conv2d", dense_conv)
    case = MatmulCase(f"long rows, v={v}", Weight(16, 4608, pattern=1.0, v=v), False, lead=(64,))
    check(EMULATED, case, (torch.float32,), "sparse_matmul", dense_matmul)


@pytest.mark.parametrize("inputs", [6, 60])
@pytest.mark.parametrize("v", [2, 3, 4, 8, 12, 16, 32])
def test_rows_that_share_positions_have_the_bits_of_rows_that_do_not(v, inputs):
    """Specialised strips, composed ones and the generic one take the same sums and runs."""
    weight = Weight(2 * v, inputs, (3, 3), 0.3, v)
    case = ConvCase(f"shared by {v}", weight, padding=(1, 1), bias=False)
    p = case.build()
    use("planes")
    table = cuda_emulator.implementations()
    y = table["sparse_conv2d"](*p.args())
    counts = p.starts.diff().repeat_interleave(v)
    alone = torch.cat(
        [p.columns[a:b].repeat(v) for a, b in zip(p.starts[:-1], p.starts[1:], strict=True)]
    )
    values = torch.cat(
        [p.values[a:b].t().flatten() for a, b in zip(p.starts[:-1], p.starts[1:], strict=True)]
    )
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    one = (p.x, values.view(-1, 1), alone, starts, [], None, None, *p.args()[7:])
    assert_bitwise_equal(y, table["sparse_conv2d"](*one), f"v={v}")


@pytest.mark.parametrize("name", ["stride 2", "stride, padding, dilation", "batch of 3, v=4"])
def test_gradient_of_the_input(name):
    """The product with the transposed lists, v = 1, and the strides as an upsampling."""
    case = next(c for c in CONVS if c.name == name)
    p, kernel = case.build(), case.weight.kernel
    use("planes")
    columns, starts, order = p.transposed
    values = p.values.flatten()[order.long()].view(-1, 1)
    padding = [case.dilation[i] * (kernel[i] - 1) - case.padding[i] for i in (0, 1)]
    actual = cuda_emulator.implementations()["sparse_conv2d"](
        *(p.grad, values, columns, starts, [], None, None),
        Geometry(kernel, (1, 1), padding, case.dilation, case.stride, case.image).for_conv2d(),
    )
    wanted = []
    for dtype in (torch.float64, torch.float32):
        x = p.x.to(dtype).requires_grad_()
        weight, options = p.weight.to(dtype), (None, case.stride, case.padding, case.dilation)
        y = torch.nn.functional.conv2d(x, weight, *options)
        wanted.append(torch.autograd.grad(y, x, p.grad.to(dtype))[0])
    assert_as_close_as_dense(actual, *wanted, name)


def test_a_stride_that_leaves_no_room_for_a_plane():
    """Patches of 16 x 16 at a stride of 16: in real shapes a plane takes 260 KiB."""
    cuda_emulator.seed(4)
    weight = Weight(8, 2, (16, 16), 0.05, 4)
    case = ConvCase("patches", weight, image=(35, 50), stride=(16, 16))
    check(EMULATED, case, (torch.float32, torch.bfloat16), "sparse_conv2d", dense_conv)
    grad_check(case, (torch.float32, torch.bfloat16))


def test_one_launch_and_no_other_memory():
    """The emulator knows the op's tensors alone: an unfolded input would be out of bounds."""
    cuda_emulator.seed(1, small=True)
    case = SCHEDULED[0]
    product, grad = calls_of(EMULATED, case, torch.float32)
    library = cuda_emulator.library(small=True, sparse=True)
    for call, launches in ((product, 1), (grad, 2)):
        before = library.emulator_launches()
        call()
        assert library.emulator_launches() - before == launches


def outside(p, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same weight with positions outside it in every block: first, in the middle, last."""
    columns, values, counts = [], [], []
    for a, b in zip(p.starts[:-1].tolist(), p.starts[1:].tolist(), strict=True):
        middle = (a + b) // 2
        strange = torch.tensor([-5]), torch.tensor([inputs, 2**31 - 1]), torch.tensor([inputs + 7])
        columns += [strange[0], p.columns[a:middle], strange[1], p.columns[middle:b], strange[2]]
        bad = p.values.new_full((2, p.values.shape[1]), float("nan"))
        values += [bad[:1], p.values[a:middle], bad, p.values[middle:b], bad[:1]]
        counts.append(b - a + 4)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return torch.cat(values), torch.cat(columns).int(), starts


@pytest.mark.parametrize("case", SCHEDULED, ids=names(SCHEDULED))
def test_positions_outside_the_weight_count_as_zero(case):
    """A GPU's lists are not checked by the host."""
    p = case.build()
    p.x[..., :1] = float("inf")  # what is not there is not multiplied either
    kind = "conv2d" if isinstance(case, ConvCase) else "matmul"
    table = cuda_emulator.implementations()
    for design in ("planes", "gathered"):
        use(design)
        expected = table[f"sparse_{kind}"](*p.args(), case.activation)
        values, columns, starts = outside(p, case.weight.length)
        rest = p.args()[4:]
        with cuda_emulator.unchecked():
            actual = table[f"sparse_{kind}"](p.x, values, columns, starts, *rest, case.activation)
            grad = table[f"sparse_{kind}_values_grad"](
                *(p.x.nan_to_num(), p.grad, columns, starts, case.weight.v, *case.grad_tail())
            )
        assert_bitwise_equal(actual, expected, design)
        there = (columns >= 0) & (columns < case.weight.length)
        assert not grad[~there].any() and grad[there].any()


def test_lists_that_make_no_sense_read_nothing_outside():
    case = SCHEDULED[0]
    p = case.build()
    table = cuda_emulator.implementations()
    source = torch.Generator().manual_seed(1)
    for seed in cuda_emulator.schedules(10):
        use("planes", seed)
        columns = torch.randint(-99, 99, p.columns.shape, generator=source, dtype=torch.int32)
        starts = torch.randint(-999, 999, p.starts.shape, generator=source, dtype=torch.int32)
        with cuda_emulator.unchecked():
            table["sparse_conv2d"](p.x, p.values, columns, starts, *p.args()[4:])
            starts = starts.sort().values  # a value of two blocks would get two gradients
            table["sparse_conv2d_values_grad"](p.x, p.grad, columns, starts, 1, *case.grad_tail())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_too_large_and_what_is_no_number(dtype):
    """Infinities and NaN arrive, and rounding to storage is torch's."""
    inputs = [1.0, 65519.0, 65520.0, 65504.0, -70000.0, 1e-8, 3e-5, 6e4, float("inf"), float("nan")]
    weight = torch.tensor([[1.0], [1.0], [-1.5]]).to(dtype)
    x = torch.tensor(inputs).to(dtype)[:, None]
    starts = torch.arange(4, dtype=torch.int32)
    columns = torch.zeros(3, dtype=torch.int32)
    bias = torch.tensor([0.0, 17.0, -0.1]).to(dtype)
    use("planes")
    actual = cuda_emulator.implementations()["sparse_matmul"](
        x, weight, columns, starts, [], bias, None
    )
    wide = torch.promote_types(dtype, torch.float32)
    expected = (x.to(wide) * weight.to(wide).t() + bias.to(wide)).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_positions_beyond_31_bits_are_refused():
    case = SCHEDULED[0]
    p = case.build()
    geometry = Geometry((3, 3), (2**30, 1), (1, 1), (1, 1), (1, 1), (4, 4)).for_conv2d()
    with pytest.raises(RuntimeError, match="2\\^31: cut the image into parts"):
        cuda_emulator.implementations()["sparse_conv2d"](*p.args()[:5], None, None, geometry)


def _works(seed: int, removed: int) -> None:
    """Every kernel once, with several chunks of channels, tiles and rounds."""
    for case in (SCHEDULED[1], SCHEDULED[3], MANY_TILES):
        use("one plane", seed, removed)
        product, grad = calls_of(EMULATED, case, torch.float32)
        p = case.build()
        dense = dense_conv if isinstance(case, ConvCase) else dense_matmul
        exact, near = (dense(p, case, dtype) for dtype in (torch.float64, torch.float32))
        assert_as_close_as_dense(product(), exact, near, case.name)
        exact, near = (dense_linear_grad(p, case, d) for d in (torch.float64, torch.float32))
        assert_as_close_as_dense(grad(), exact, near, case.name)


def test_every_barrier_is_needed():
    """Without it some schedule notices."""
    _works(0, -1)
    library = cuda_emulator.library(small=True, sparse=True)
    sites = [library.emulator_site_name(i).decode() for i in range(library.emulator_sites())]
    assert {name.split(".")[0] for name in sites} == {"product_forward", "product_grad"}
    unnoticed = []
    for site, name in enumerate(sites):
        for seed in range(12):
            try:
                _works(seed, site)
            except (RuntimeError, AssertionError):
                break
        else:
            unnoticed.append(name)
    assert unnoticed == []
