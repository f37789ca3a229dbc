"""torch's 2:4 path: the reasons against it, what is refused, and on a GPU that can, its results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from issp.ops import nm_prune, semi_structured
from issp.ops.keep import Keep
from tests.asserts import assert_as_close_as_dense

HALF = torch.bfloat16


def refused(words, shape=(32, 64), dtype=HALF, x=None):
    x = torch.zeros(3, 64, dtype=HALF) if x is None else x
    reason = semi_structured.unsupported_reason(x, shape, dtype)
    assert reason is not None and words in reason, reason


def test_the_reasons():
    refused("convolution", (32, 64, 3, 3))
    refused("float16 and bfloat16", dtype=torch.float32)
    refused("float32", x=torch.zeros(3, 64))
    for shape in ((60, 64), (32, 180), (180, 60), (8, 64), (0, 64)):
        refused("multiples of 16", shape)
    refused("64 inputs", x=torch.zeros(3, 48, dtype=HALF))
    refused("derivative", x=torch.zeros(3, 64, dtype=HALF, requires_grad=True))
    refused("cpu")


@pytest.fixture
def elsewhere(monkeypatch):
    """An input on a GPU that is not there: `elsewhere(capability, cusparselt)`."""

    def made(capability, available, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: available)
        monkeypatch.setattr(torch.version, "hip", hip)
        with FakeTensorMode():
            return torch.empty(3, 64, dtype=HALF, device="cuda")

    return made


def test_the_reasons_on_a_gpu(elsewhere):
    refused("sparse tensor cores", x=elsewhere((7, 5), True))
    refused("cuSPARSELt", x=elsewhere((9, 0), False))
    refused("cuSPARSELt", x=elsewhere((9, 0), True, "6.2"))
    assert semi_structured.unsupported_reason(elsewhere((9, 0), True), (32, 64), HALF) is None


def test_no_tokens_in_none_out(monkeypatch):
    """torch's matmul is not asked, which takes no empty input."""
    monkeypatch.setattr(semi_structured, "unsupported_reason", lambda x, shape, dtype: None)
    monkeypatch.setattr(semi_structured.F, "linear", None)
    for shape in ((0, 64), (3, 0, 64)):
        y = semi_structured.linear(torch.zeros(shape, dtype=HALF), torch.zeros(32, 64, dtype=HALF))
        assert y.shape == (*shape[:-1], 32) and y.dtype == HALF


def test_what_would_lose_weights_is_refused():
    """torch itself compresses any weight and keeps two of four of it."""
    weight = torch.zeros(32, 64, dtype=HALF)
    weight[3, 4:7] = 1
    with pytest.raises(ValueError, match="more than 2 of 4"):
        semi_structured.pack(weight)
    weight[3, 4] = 0
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cpu"):
            semi_structured.pack(weight)
        with pytest.raises(ValueError, match="cpu"):
            semi_structured.linear(torch.zeros(3, 64, dtype=HALF), weight)


@pytest.mark.parametrize("dtype", semi_structured.DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(128,), (3, 5), (1,)], ids=str)
def test_as_exact_as_dense(dtype, lead):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(*lead, 64).to(dtype).to(device)
    reason = semi_structured.unsupported_reason(x, (32, 64), dtype)
    if reason is not None:
        pytest.skip(reason)
    weight = nm_prune(torch.randn(32, 64, dtype=dtype, device=device), Keep(2, of=4))
    bias = torch.randn(32, dtype=dtype, device=device)
    packed = semi_structured.pack(weight)
    for b in (None, bias):
        y = semi_structured.linear(x, packed, b)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert_as_close_as_dense(y, exact, F.linear(x, weight, b), f"2:4 in {dtype}")
