"""Shared fixtures; chooses Triton's interpreter where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch

import issp
from issp.utils import denormals
from tests.deploy.networks import cache_fixture, net_fixture, timed_fixture
from tests.processes import ForkServer
from tests.tiers import mark_full

__all__ = ["cache_fixture", "net_fixture", "timed_fixture"]  # fixtures of several folders

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():  # before anybody imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(items):
    mark_full(items)


@pytest.fixture(autouse=True)
def _fixed_seed_and_poisoned_memory():
    """Every test starts from one seed, and torch.empty returns NaN: an unwritten output shows."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Benchmarks leave one of cuDNN's two flags changed, and torch.export refuses flags that differ.
    torch.backends.cudnn.allow_tf32 = True
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _restore_cpu_capability():
    """A test that lowers the instruction set of the CPU ops does not lower it for others."""
    best = torch.ops.issp._cpu_capability() if issp.backends.active("cpu") == "cpp" else None
    yield
    if best:
        torch.ops.issp._cpu_capability(best)


@pytest.fixture(autouse=True)
def _keep_denormals(monkeypatch):
    """Flushing denormals is for good: the worker threads of this process must not inherit it."""
    monkeypatch.setattr(denormals, "flush_denormals", lambda: True)


@pytest.fixture(scope="module")
def one_thread():
    """Two threads only wait for each other on small networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Sets the number of intra-op threads for one test: `threads(2)`."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden vectors and photographs beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (golden vectors, photographs) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def fresh_python():
    """`fresh_python.run(code)` runs a program in a fresh process with torch imported."""
    server = ForkServer()
    yield server
    server.close()
