"""A network with uneven and empty shards, next to the same one in a single process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from issp.pruning.attach import attach


def net() -> nn.Sequential:
    """5, 7, 1 and 3 rows: no shards are even, and with 4 ranks some are empty."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.Conv2d(7, 1, 3, padding=1),
        nn.Linear(6, 3),
    )


def aligned_net() -> nn.Sequential:
    """Rows of 32 weights: torch's fused kernels round the rest of 8 in another way."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 13, bias=False), nn.Linear(32, 3, bias=False))


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    """`fully_shard` as a user calls it: an inner module, then the whole."""
    kwargs = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **kwargs}
    fully_shard(model[0], **kwargs)
    return fully_shard(model, **kwargs)


def forward(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 3, 6, 6)).square().mean()


class Twins:
    """A sharded network and a whole one, with optimizers and pruners of the same settings.

    Args:
        optimizer: gets parameters, returns the optimizer.
        make: returns the network.
        whole_optimizer: that of the whole network, if it is another one.
        **kwargs: of `attach`.
    """

    def __init__(
        self,
        optimizer: Callable[..., Any],
        make: Callable[[], nn.Module] = net,
        whole_optimizer: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.whole = make()
        self.sharded = shard(copy.deepcopy(self.whole))
        self.opts = [
            optimizer(self.sharded.parameters()),
            (whole_optimizer or optimizer)(self.whole.parameters()),
        ]
        self.pruners = [
            attach(m, opt, **kwargs)
            for m, opt in zip((self.sharded, self.whole), self.opts, strict=True)
        ]
        self.generator = torch.Generator().manual_seed(2)

    def set_grads(self) -> None:
        """Equal gradients, random with ties."""
        for a, b in zip(self.sharded.parameters(), self.whole.parameters(), strict=True):
            b.grad = torch.randint(-3, 4, b.shape, generator=self.generator).to(b.dtype) / 8
            a.grad = distribute_tensor(b.grad, a.device_mesh, a.placements)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.set_grads()
            for opt in self.opts:
                opt.step()

    def prune_and_freeze(self) -> None:
        """Three steps and the freeze, compared after each."""
        for _ in range(3):
            self.step()
            self.assert_equal()
        for pruner in self.pruners:
            pruner.freeze()
        self.assert_equal()

    def assert_equal(self) -> None:
        """Weights, moments, masks, thresholds, flips, counts and states have the same bits."""
        self.sharded.reshard()
        for a, b in zip(self.sharded.parameters(), self.whole.parameters(), strict=True):
            assert_same_bits(a, b)
            for name, x in self.opts[1].state[b].items():
                assert_same_bits(self.opts[0].state[a][name], x)
        a, b = self.pruners
        assert a.masks().keys() == b.masks().keys()
        for name, mask in b.masks().items():
            assert_same_bits(a.masks()[name], mask)
        assert repr((a.thresholds(), a.flips())) == repr((b.thresholds(), b.flips()))  # NaN as well
        assert str(a.summary()) == str(b.summary())
        assert a.step_count == b.step_count
        assert_same_states(a.state_dict(), b.state_dict())


def assert_same_bits(a: Any, b: Any) -> None:
    if not isinstance(b, Tensor):
        assert a == b
        return
    if isinstance(a, DTensor):
        a = a.detach().full_tensor()
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert torch.equal(a.flatten().view(torch.uint8), b.detach().flatten().view(torch.uint8))


def assert_same_states(a: Any, b: Any) -> None:
    """Two states of pruners, tensors compared by their bits."""
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for name in b:
            assert_same_states(a[name], b[name])
    else:
        assert_same_bits(a, b)
