"""Triton only, in the optimizer ops: tiles per program, order of programs, cached tables."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from tests.cases import Case, tensors_like
from tests.ops.test_update_parity import REFERENCE, Training, assert_same

pytest.importorskip("triton")
import triton_kernels  # noqa: E402
from triton_kernels import tables  # noqa: E402

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


def test_gradients_that_move_get_a_table_of_their_own():
    expected = Training("adam", "plain", AROUND, rest=REST)
    actual = Training("adam", "plain", AROUND, DEVICE, rest=REST)
    kept = []
    for number in range(4):
        grads = tensors_like(expected.weights, "normal", number)
        kept.append([g.to(DEVICE, copy=True) for g in grads])  # alive: no address comes twice
        expected.step(REFERENCE, grads)
        actual.step(table(1), kept[-1])
        assert_same("triton", actual, expected, f"after step {number}")


def test_the_cache_of_tables_stays_small():
    training = Training("sgd", "plain", AROUND, DEVICE, rest=REST)
    kept = []
    for number in range(70):
        kept.append(tensors_like(training.weights, "normal", number))
        tables.uploaded([(g.data_ptr(),) for g in kept[-1]], torch.device(DEVICE))
    assert len(tables._cache) <= tables._CACHE_SIZE
