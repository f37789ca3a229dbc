"""What `issp.pack` puts in a layer's place: torch's 2:4, and the way back to torch's own layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import issp
from issp.ops import semi_structured
from tests.deploy.networks import (
    EXAMPLE,
    kinds,
    prune_,
)
from tests.sr.networks import small_edsr


class TestTwoFour:
    """torch's 2:4 matmul needs a GPU: the layer around it, with a stand-in for the matmul."""

    @pytest.fixture
    def stand_in(self, monkeypatch):
        calls = []

        def pack(weight):
            calls.append(weight.shape)
            return weight.detach().clone()

        monkeypatch.setattr(semi_structured, "unsupported_reason", lambda x, shape, dtype: None)
        monkeypatch.setattr(semi_structured, "pack", pack)
        monkeypatch.setattr(semi_structured, "linear", F.linear)
        return calls

    def layer(self):
        layer = nn.Linear(16, 16)
        layer.weight.data = issp.ops.nm_prune(layer.weight.data, issp.Keep(2, of=4))
        return layer

    def test_is_chosen_where_it_is_fastest(self, cache, timed, stand_in):
        timed["torch 2:4"] = 0.5
        layer, x = self.layer(), torch.randn(4, 16)
        packed = issp.pack(layer, x, cache=cache)
        assert packed.report.lines[0].choice == "torch 2:4"
        with torch.no_grad():
            assert torch.equal(packed(x), layer(x))
        assert packed.state_dict().keys() == layer.state_dict().keys()

    def test_is_compressed_once_and_never_saved(self, cache, timed, stand_in):
        timed["torch 2:4"] = 0.5
        packed = issp.pack(self.layer(), x := torch.randn(4, 16), cache=cache)
        with torch.no_grad():
            packed(x)
            before = len(stand_in)
            packed(x)
            assert len(stand_in) == before
            for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
                assert twin.__dict__["_compressed"] is None
                assert torch.equal(twin(x), packed(x))
            packed.load_state_dict(other := self.layer().state_dict())
            torch.testing.assert_close(packed(x), F.linear(x, other["weight"], other["bias"]))

    def test_has_no_derivative_and_says_so(self, cache, timed, stand_in):
        timed["torch 2:4"] = 0.5
        packed = issp.pack(self.layer(), torch.randn(4, 16), cache=cache)
        with pytest.raises(RuntimeError, match="has no derivative: call the packed model under"):
            packed(torch.randn(4, 16))

    def test_is_no_candidate_for_other_weights_or_machines(self, cache, timed, stand_in):
        issp.pack(prune_(nn.Linear(16, 16), 0.5), torch.randn(4, 16), cache=cache)
        assert timed["measured"][0] == ("dense", "rows")

    def test_is_no_candidate_without_its_gpu(self, cache, timed):
        issp.pack(self.layer(), torch.randn(4, 16), cache=cache)
        assert timed["measured"][0] == ("dense", "rows")


class TestUnpack:
    @pytest.mark.parametrize("fastest", ["rows", "dense channels_last"])
    def test_is_the_dense_model_again(self, net, cache, timed, fastest):
        timed[fastest] = 0.1
        packed = issp.pack(net, torch.randn(EXAMPLE), cache=cache)
        names = kinds(packed)
        dense = issp.unpack(packed)
        assert kinds(dense) == kinds(net) and kinds(packed) == names != kinds(net)
        assert not hasattr(dense, "report") and hasattr(packed, "report")
        before = net.state_dict()
        assert dense.state_dict().keys() == before.keys()
        for name, value in dense.state_dict().items():
            assert torch.equal(value, before[name]) and value.is_contiguous(), name

    def test_a_shared_layer_stays_shared(self, cache, timed):
        shared = prune_(nn.Linear(8, 8))
        net = nn.Sequential(shared, nn.ReLU(), shared)
        dense = issp.unpack(issp.pack(net, torch.randn(4, 8), cache=cache))
        assert dense[0] is dense[2] and type(dense[0]) is nn.Linear

    def test_is_saved_and_loaded(self, cache, timed, tmp_path):
        net = prune_(small_edsr())
        packed = issp.pack(net, torch.rand(1, 3, 16, 16), cache=cache)
        issp.save(issp.unpack(packed), tmp_path / "m.safetensors")
        loaded = issp.load(tmp_path / "m.safetensors")
        for name, value in net.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
