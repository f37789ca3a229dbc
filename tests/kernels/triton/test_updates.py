"""Triton only, in the optimizer ops: tiles per program, order of programs, cached tables."""

from __future__ import annotations

import functools
import random
import threading
import time

import pytest
import torch

from tests.cases import Case, tensors_like
from tests.ops.test_update_parity import REFERENCE, Training, assert_same

pytest.importorskip("triton")
import triton_kernels  # noqa: E402
from triton_kernels import tables, updates  # noqa: E402

pytestmark = pytest.mark.sampled(most=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 512
AROUND = Case(
    "around a tile", tuple((n,) for n in (1, 511, 512, 513, 1600)), (1, 200, 256, 400, 900)
)
REST = ((1024,), (513,), (3,))


def table(tiles_per_program):
    return {
        f"{kind}_soft_shrink_": functools.partial(
            getattr(triton_kernels, f"{kind}_soft_shrink_"),
            tile=TILE,
            tiles_per_program=tiles_per_program,
        )
        for kind in ("adam", "sgd")
    }


def check(kind, tiles_per_program, steps=3, case=AROUND, brackets=(True, True, False)):
    expected = Training(kind, "coupled decay" if kind == "adam" else "nesterov", case, rest=REST)
    actual = Training(
        kind, "coupled decay" if kind == "adam" else "nesterov", case, DEVICE, rest=REST
    )
    for number in range(steps):
        grads = tensors_like(expected.weights, "normal", number)
        frozen, bracket = number == steps - 1, brackets[number % len(brackets)]
        expected.step(REFERENCE, grads, frozen=frozen)
        moved = [g.to(DEVICE) for g in grads]
        actual.step(table(tiles_per_program), moved, frozen=frozen, bracket=bracket)
        assert_same("triton", actual, expected, f"after step {number}")


@pytest.mark.parametrize("tiles_per_program", [1, 2, 3])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_tiles_per_program_and_sizes_around_a_tile(kind, tiles_per_program):
    check(kind, tiles_per_program, steps=4)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the order of programs can be set in the interpreter only"
)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_order_of_the_programs_does_not_matter(monkeypatch, kind, seed):
    """Of a weight's programs the last one to arrive counts the step that all of them read."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    plain, draw, orders = builder.set_grid_idx, random.Random(seed), {}

    def shuffled(x, y, z):
        size = builder.grid_dim[0]
        if x == 0:
            orders[size] = draw.sample(range(size), size)
        plain(orders[size][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    check(kind, 1, steps=4)
    assert any(order != sorted(order) for order in orders.values())


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_repeated_call_uploads_nothing(monkeypatch, kind):
    training = Training(kind, "plain", AROUND, DEVICE, rest=REST)
    grads = tensors_like(training.weights, "normal", 1)
    for _ in range(2):  # SGD's first step has another table
        training.step(table(1), grads)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("a table was built"))
    training.step(table(1), grads)


class MovingGradients:
    """Two trainings, by the reference and by Triton, whose gradients never come back to an address.

    The first two steps are plain: SGD's first has another table.
    """

    def __init__(self, kind):
        self.expected = Training(kind, "plain", AROUND, rest=REST)
        self.actual = Training(kind, "plain", AROUND, DEVICE, rest=REST)
        self.kept = []
        for _ in range(2):
            self.step()

    def step(self):
        number = len(self.kept)
        grads = tensors_like(self.expected.weights, "normal", number)
        self.kept.append([g.to(DEVICE, copy=True) for g in grads])
        self.expected.step(REFERENCE, grads)
        self.actual.step(table(1), self.kept[-1])
        assert_same("triton", self.actual, self.expected, f"after step {number}")


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_gradients_that_move_upload_nothing(monkeypatch, kind):
    """Their addresses are arguments of a kernel: nothing waits for a copy."""
    training = MovingGradients(kind)
    monkeypatch.setattr(tables, "_build", lambda *_: pytest.fail("a layout was uploaded"))
    monkeypatch.setattr(updates, "uploaded", known_only(updates.uploaded))
    written = []
    plain = tables.write_addresses

    class Counted:
        def __getitem__(self, grid):
            written.append(grid)
            return plain[grid]

    monkeypatch.setattr(tables, "write_addresses", Counted())
    for _ in range(3):
        training.step()
    assert len(written) == 3  # one launch a step: fewer than 64 gradients


def known_only(plain):
    """`uploaded`, where it finds all it is asked for."""

    def call(rows, device):
        assert (device, *rows) in tables._cache, "a table was uploaded"
        return plain(rows, device)

    return call


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_graph_is_captured_with_gradients_of_its_own(monkeypatch, kind):
    """What is written while a graph is captured exists in its replays alone: it is not cached."""
    training = MovingGradients(kind)
    before = dict(tables._cache)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    captured = len(tables._captured)
    for _ in range(2):
        training.step()
    assert dict(tables._cache) == before
    assert len(tables._captured) > captured  # the layouts that the graph reads stay
    kept = [entry for entry in before.values() if id(entry) in tables._captured]
    for number in range(tables._CACHE_SIZE + 1):
        tables._remember(("other", number), ())
    assert all(tables._captured[id(entry)] is entry for entry in kept)


def test_a_graph_with_layouts_that_nobody_uploaded_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    weights = [torch.randn(77, device=DEVICE)]
    tables._cache.clear()
    with pytest.raises(RuntimeError, match="call the op once with these tensors before capturing"):
        triton_kernels.count_zeros(weights)


def test_more_gradients_than_one_launch_takes():
    count = 2 * tables.ADDRESSES + 3
    addresses = [2**40 + 8 * i for i in range(count)]
    layout = torch.arange(5 * count, device=DEVICE).reshape(count, 5)
    written = tables.addressed(("test", count), layout, addresses)
    assert written[:, 0].tolist() == addresses
    assert torch.equal(written[:, 1:], layout[:, 1:]) and layout[0, 0] == 0
    again = tables.addressed(("test", count), layout, addresses)
    assert again is written  # the very same: cached


def test_another_stream_gets_a_table_of_its_own(monkeypatch):
    """The stream that wrote the first may still be writing it."""
    layout = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    found = []
    for stream in (1, 1, 2, 2):
        monkeypatch.setattr(tables, "current_stream", lambda device, stream=stream: stream)
        found.append(tables.addressed(("streams",), layout, [2**40, 2**41]))
    assert found[0] is found[1] and found[2] is found[3] and found[0] is not found[2]


def test_threads_share_the_cache():
    """Each table is built once, and no thread sees the cache while another changes it."""
    built, failed = [], []

    def build(key):
        built.append(key)
        time.sleep(0.001)
        return (key,)

    def work():
        try:
            for number in range(200):
                key = ("thread", number % 50)
                assert tables.get_or_build(key, device, lambda key=key: build(key)) == (key,)
        except Exception as error:  # of a thread: told to the test
            failed.append(error)

    device = torch.device(DEVICE)
    tables._cache.clear()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(built) == 50


def test_the_cache_of_tables_stays_small():
    training = Training("sgd", "plain", AROUND, DEVICE, rest=REST)
    kept = []
    for number in range(70):
        kept.append(tensors_like(training.weights, "normal", number))
        tables.uploaded([(g.data_ptr(),) for g in kept[-1]], torch.device(DEVICE))
    assert len(tables._cache) <= tables._CACHE_SIZE
