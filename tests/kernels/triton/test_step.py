"""Triton only: tiles, tiles per program, candidates, tables, 64-bit offsets, the compiler.

tests/ops has the common cases (test_parity.py) and the golden vectors (test_golden.py).
Tiles of 512 weights keep the interpreter quick and put boundaries everywhere.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from issp.ops import ShrinkState, reference
from issp.ops.schemas import mask_layout, scratch_region
from tests.asserts import assert_bitwise_equal

triton = pytest.importorskip("triton")
import triton_kernels  # noqa: E402
from triton_kernels import tables, target  # noqa: E402

pytestmark = pytest.mark.sampled(most=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 512
SIZES = (1, 31, 511, 512, 513, 1024, 1600)


class Pair:
    """The same weights and state for the reference and for Triton."""

    def __init__(self, weights, k, thresholds=None):
        self.expected = [w.clone() for w in weights]
        self.weights = [w.to(DEVICE) for w in weights]
        self.expected_state = ShrinkState(self.expected, k)
        self.state = ShrinkState(self.weights, k)
        if thresholds is not None:
            self.state.thresholds.copy_(torch.tensor(thresholds))

    def step(self, shrink=0.95, bracket=True, found_inf=None, tiles_per_program=1):
        s = self.expected_state
        reference.soft_shrink_(
            self.expected, s.k, shrink, s.thresholds, s.packed, s.flips, s.scratch, found_inf
        )
        s = self.state
        triton_kernels.soft_shrink_(
            *(self.weights, s.k, shrink, s.thresholds, s.packed, s.flips, s.scratch),
            *(None if found_inf is None else found_inf.to(DEVICE), bracket),
            tile=TILE,
            tiles_per_program=tiles_per_program,
        )
        for i, (x, y) in enumerate(zip(self.weights, self.expected, strict=True)):
            assert_bitwise_equal(x.cpu(), y, f"weights[{i}]")
        for name in ("thresholds", "packed", "flips"):
            expected = getattr(self.expected_state, name)
            assert_bitwise_equal(getattr(self.state, name).cpu(), expected, name)

    def move(self, scale=1e-4):
        for x, y in zip(self.weights, self.expected, strict=True):
            y += (torch.randn(y.shape) * scale).to(y.dtype)
            x.copy_(y)

    @property
    def missed(self):
        return self.state.scratch[0].item()


def normal(sizes, dtype=torch.float32):
    return [(torch.randn(n) * 0.05).to(dtype) for n in sizes]


@pytest.mark.parametrize("tiles_per_program", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sizes_around_a_tile(dtype, tiles_per_program):
    pair = Pair(normal(SIZES, dtype), [n // 2 for n in SIZES])
    for _ in range(2):
        pair.step(tiles_per_program=tiles_per_program)
        pair.move()


def test_the_bracket_holds_while_weights_drift():
    """20 steps: the two cold searches are the only ones that read a whole tensor."""
    pair = Pair(normal((1000, 400)), [800, 200])
    for _ in range(20):
        pair.step()
        pair.move(1e-5)
    assert pair.missed == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_the_bracket(dtype):
    pair = Pair(normal((1300, 512, 7), dtype), [1200, 256, 7])
    for _ in range(3):
        pair.step(bracket=False, tiles_per_program=2)
        pair.move()
    assert pair.missed == 0


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_candidates_up_to_the_capacity_of_their_region(excess):
    """One more than fit: the whole tensor is searched, the neighbour's region is not written."""
    n = 1500
    inside = scratch_region(n) - tables.LINE + excess
    order = torch.randperm(n)
    w = torch.full((n,), 4.0)
    w[order[:700]] = 0.001
    w[order[700 : 700 + inside]] = torch.linspace(0.99, 1.01, inside)
    pair = Pair([w, torch.ones(9)], [700 + inside // 2, 0], thresholds=[1.0, 1.0])
    pair.step()
    assert pair.missed == (excess > 0)
    neighbour = pair.state.scratch[tables.SCRATCH_HEADER + scratch_region(n) + tables.LINE :]
    assert not neighbour.any()


@pytest.mark.full
def test_the_last_tie_lies_in_a_group_of_tiles():
    """A wide bracket leaves 7 bits of a candidate for 140 tiles: two tiles share a number."""
    n = 140 * TILE
    w = torch.where(torch.rand(n) < 0.5, 0.001, 4.0)
    ties = torch.randperm(n)[:5000]
    w[ties] = torch.where(torch.rand(5000) < 0.5, 1.0, -1.0)
    below = int((w.abs() < 1).sum())
    pair = Pair([w], [below + 2345], thresholds=[1.0])
    pair.step(shrink=0.3)
    assert pair.missed == 0


def test_equal_keys_need_no_candidates():
    """Far more zeros than candidates fit, and the previous threshold was zero."""
    w = torch.zeros(1500)
    w[::3] = torch.randn(500)
    pair = Pair([w], [777], thresholds=[0.0])
    pair.step()
    assert pair.missed == 0


def test_a_jump_of_k_misses_the_bracket_and_is_exact():
    pair = Pair(normal((1500,)), [300])
    pair.step()
    for state in (pair.state, pair.expected_state):
        state.set_k([1400])
    pair.step()
    assert pair.missed == 2


def test_none_and_all_selected_after_any_mask():
    """Bits behind a tensor's last element may hold anything before; they are no flips."""
    pair = Pair(normal((700, 700, 1)), [0, 700, 0])
    before = torch.randint(-(2**31), 2**31 - 1, pair.state.packed.shape, dtype=torch.int32)
    for state in (pair.state, pair.expected_state):
        state.packed.copy_(before)
    for _ in range(2):
        pair.step()
        pair.move()


def test_found_inf_leaves_everything_unmodified():
    pair = Pair(normal((600,)), [300])
    pair.step()
    pair.move()
    before = pair.state.scratch.clone()
    pair.step(found_inf=torch.tensor([1.0]))
    pair.step(found_inf=torch.tensor([1.0]), bracket=False)
    assert torch.equal(pair.state.scratch, before)
    pair.step(found_inf=torch.tensor([0.0]))


@pytest.mark.parametrize("bracket", [True, False])
@pytest.mark.parametrize("k", [-1, 601])
def test_a_count_out_of_range_leaves_its_tensor_unmodified(k, bracket):
    """Of the device's making; the checks before a call cannot see it without waiting."""
    pair = Pair(normal((600, 600)), [300, 300])
    pair.step()
    pair.move()
    for state in (pair.state, pair.expected_state):
        state.k[1] = k
    pair.expected_state.k[0] = 300
    before = pair.weights[1].clone()
    s, state = pair.state, pair.state.thresholds.clone()
    triton_kernels.soft_shrink_(
        *(pair.weights, s.k, 0.95, s.thresholds, s.packed, s.flips, s.scratch, None, bracket),
        tile=TILE,
    )
    assert_bitwise_equal(pair.weights[1], before, "weights[1]")
    assert_bitwise_equal(s.thresholds[1:], state[1:], "thresholds[1]")
    assert not torch.equal(pair.weights[0].cpu(), pair.expected[0])


def test_tensors_that_start_at_any_element():
    """Parts of one flat buffer, as sharded parameters are: no 16-byte alignment."""
    buffer = torch.randn(3001)
    pair = Pair([buffer[1:700].clone(), buffer[700:3001].clone()], [600, 1150])
    home = torch.empty(3003, device=DEVICE)
    parts = [home[1:700], home[701:3002]]
    for part, w in zip(parts, pair.weights, strict=True):
        part.copy_(w)
    pair.weights = parts
    assert not tables.tables(parts, TILE).aligned
    for bracket in (True, False):
        pair.step(bracket=bracket)
        pair.move()


def test_a_repeated_call_uploads_nothing(monkeypatch):
    pair = Pair(normal((600, 30)), [300, 3])
    pair.step()
    monkeypatch.setattr(tables, "_build", None)
    pair.step()
    with pytest.raises(TypeError):
        Pair(normal((600, 31)), [300, 3]).step()


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the order of programs can be set in the interpreter only"
)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_the_programs_does_not_matter(monkeypatch, seed):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    plain, draw, orders = builder.set_grid_idx, random.Random(seed), {}

    def shuffled(x, y, z):
        size = builder.grid_dim[0]
        if x == 0:
            orders[size] = draw.sample(range(size), size)
        plain(orders[size][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    weights = normal((1600, 1600, 90))
    weights[1] = weights[1].mul(64).round() / 64  # many ties
    pair = Pair(weights, [800, 1200, 45])
    for bracket in (True, True, False):
        pair.step(bracket=bracket)
        pair.move(1e-5)
    assert any(order != sorted(order) for order in orders.values())


def test_offsets_beyond_32_bits(monkeypatch):
    """A tensor said to start 2**33 elements earlier, of which only the last tiles are launched."""
    far, n = 2**33, 1300
    pair = Pair(normal((n,)), [650], thresholds=None)
    pair.step()
    pair.move(1e-5)
    launched = -(-n // TILE)
    plain, plain_addressed = tables._build, tables.addressed

    def moved_addresses(key, table, addresses):
        return plain_addressed(key, table, [address - far * 4 for address in addresses])

    def moved(*args):
        moved_table = plain(*args)
        row = moved_table.rows[0]
        row[1] += far
        row[2] -= far // TILE
        row[3] += far // TILE
        row[4] -= far // 32
        return moved_table

    tables._cache.clear()
    monkeypatch.setattr(tables, "_build", moved)
    monkeypatch.setattr(tables, "addressed", moved_addresses)
    counters = pair.state.scratch[tables.SCRATCH_HEADER :].view(torch.int64)
    counters[0] = far // TILE  # the programs that are not launched have arrived
    counters[1] = far  # and all they read lay below the bracket
    pair.state.k += far
    assert launched == 3
    pair.step()
    assert pair.missed == 1  # the cold search of the first step
    tables._cache.clear()


def test_thresholds_and_masks_by_tiles():
    dtypes = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
    weights = normal(SIZES)
    k = [n // 3 for n in SIZES]
    actual = triton_kernels.magnitude_threshold([w.to(DEVICE) for w in weights], k, tile=TILE)
    assert_bitwise_equal(actual.cpu(), reference.magnitude_threshold(weights, k), "thresholds")
    mixed = [w.to(dtypes[i % 4]) for i, w in enumerate(weights)]
    masks = torch.randint(-(2**31), 2**31 - 1, (mask_layout(SIZES)[1],), dtype=torch.int32)
    moved = [x.to(DEVICE) for x in mixed]
    triton_kernels.apply_masks_(moved, masks.to(DEVICE), tile=TILE)
    reference.apply_masks_(mixed, masks)
    for i, (x, y) in enumerate(zip(moved, mixed, strict=True)):
        assert_bitwise_equal(x.cpu(), y, f"tensors[{i}]")


@pytest.mark.parametrize(
    ("n", "m", "v", "layout", "c"),
    [(2, 5, 3, "channels", 1), (4, 20, 4, "channels", 2), (1, 20, 1, "flat", 1)],
)
def test_nm_patterns_across_tiles(n, m, v, layout, c):
    weight = torch.randn(12, 20, 3, 3)
    actual, mask = triton_kernels.nm_prune(weight.to(DEVICE), n, m, v, layout, 0.5, c, tile=TILE)
    expected, expected_mask = reference.nm_prune(weight, n, m, v, layout, 0.5, c)
    assert_bitwise_equal(actual.cpu(), expected, "pruned")
    assert_bitwise_equal(mask.cpu(), expected_mask, "mask")


@pytest.mark.full
def test_every_kernel_compiles_for_amd():
    """With the options and instructions that target.py has for a ROCm build of torch."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    rocm = (
        "import json, torch; torch.version.hip = '6.4'; from triton_kernels import compile; "
        "rows = compile.compile_all(['gfx942'], ['float32']); print(json.dumps(rows))"
    )
    run = subprocess.run(
        [sys.executable, "-c", rocm],
        cwd=Path(triton_kernels.__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(run.stdout)
    names = {row["kernel"] for row in rows}
    assert names >= {"count", "apply", "radix_pass", "shrink_groups", "adam", "sgd", "convolve"}
    assert "write_addresses" in names and {row.get("PRECISION") for row in rows} >= {"tf32"}
    assert {row["target"] for row in rows} == {"gfx942"}


@pytest.mark.full
def test_every_kernel_compiles_without_spills(capsys):
    """For sm_80, sm_90 and sm_100, with no GPU: in a process without the interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_kernels.compile"]
    run = subprocess.run(
        [*command, "--kernels", "step", "--dtypes", "float32", "bfloat16"],
        cwd=Path(triton_kernels.__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["target"] for row in rows} == {80, 90, 100}
    names = {row["kernel"] for row in rows}
    assert names >= {"count", "apply", "radix_pass", "shrink_groups", "score", "shrink_selected"}
    assert names >= {"apply_masks", "regularize", "zeros", "parts", "merge", "adam", "sgd"}
    assert "write_addresses" in names
    table = {
        f"{row['kernel']} {row['dtype']} sm_{row['target']}": (
            row["registers"],
            row["shared_bytes"],
        )
        for row in rows
    }
    with capsys.disabled():
        print(f"\nregisters, shared bytes: {table}")
    for row in rows:
        assert row["local_bytes"] == 0, f"spills: {row}"
        updates = row["kernel"] in ("adam", "sgd")  # where the rule itself has fused operations
        assert row["ftz"] == 0, f"denormals would be flushed: {row}"
        assert row["fma"] == 0 or updates, f"not the reference's arithmetic: {row}"
        if row["kernel"] in ("count", "apply", "radix_pass"):
            # One conversion through shared memory would take the tile's size, 8 KB.
            assert row["shared_bytes"] <= 1024, f"a tile passes through shared memory: {row}"
        if row["kernel"] in ("apply", "radix_pass", "zeros", "parts"):
            assert row["wide_loads"] > 0, f"narrow loads: {row}"


def test_compiling_under_the_interpreter_is_refused():
    from triton_kernels.compile import compile_all

    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the compiler is active in this process")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_all([90], ["float32"])


@pytest.mark.parametrize("vendor, options", [("NVIDIA", {"maxnreg": 64}), ("AMD", {})])
def test_options_of_one_vendor_stand_in_one_place(monkeypatch, vendor, options):
    monkeypatch.setattr(target, "NVIDIA", triton.language.constexpr(vendor == "NVIDIA"))
    assert target.registers(64) == options and target.registers(None) == {}
    folder = Path(triton_kernels.__file__).parent
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    for word in ("maxnreg", "inline_asm", "libdevice"):
        # compile_sparse.py only tells options from constants.
        places = [x for x, text in sources.items() if word in text and x != "compile_sparse.py"]
        assert places in (["target.py"], []), word


def test_tiles_per_program_grow_with_the_model():
    for numels, tiles_per_program in (((3600,), 1), ((2**24, 60), 8)):
        assert tables._tiles_per_program(numels, tables.TILE) == tiles_per_program
