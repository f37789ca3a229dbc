"""What an iteration works on: the parts of a run themselves, or twins that `fully_shard` spreads.

With `train.parallel: fsdp` the ranks train shards, and rank 0 keeps the run's own parts, which are
whole: it logs, validates and saves them as in any other run, so a state says nothing of ranks. They
get the values of the shards whenever one of these is due.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from issp.nn.sharding import is_sharded, local
from issp.pruning.pruner import Pruner
from issp.sr import builders
from issp.sr.config import Config
from issp.sr.distributed import Ranks
from issp.sr.models import SuperResolver


class Trained:
    """What is trained: the model, its average, its optimizer and its pruner.

    Args:
        model, ema, optimizer, pruner: ema and pruner may be None.

    Attributes:
        forward: gives the output of a batch; its backward pass takes the mean over all ranks.
    """

    def __init__(
        self,
        model: SuperResolver,
        ema: SuperResolver | None,
        optimizer: Optimizer,
        pruner: Pruner | None,
    ) -> None:
        self.model, self.ema, self.optimizer, self.pruner = model, ema, optimizer, pruner
        self.forward: nn.Module = model

    def distribute(self, ranks: Ranks, find_unused: bool) -> None:
        """Lets the gradients of several ranks meet, by DistributedDataParallel."""
        if ranks.world == 1:
            return
        # The networks have no buffers that training changes; torch renames the option.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers"
        options = {name if name in known else "broadcast_buffers": False}
        with ranks.attended():
            self.forward = DistributedDataParallel(
                self.model, find_unused_parameters=find_unused, **options
            )

    def collect(self, iteration: int) -> None:
        """Brings the values of an iteration to rank 0; all ranks must call it."""

    def is_collected(self, iteration: int) -> bool:
        """Whether rank 0 has the values of the end of an iteration."""
        return True

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state on rank 0, in torch's form; that of the collected iteration."""
        return self.optimizer.state_dict()

    def finalize(self) -> None:
        """Ends the pruning; all ranks must call it."""
        if self.pruner is not None:
            self.pruner.finalize()


class ShardedTrained(Trained):
    """Twins of whole parts, of which every rank has its rows (FSDP2).

    Args:
        config: of the run.
        ranks: this process among those of the training.
        whole: parts with equal values on all ranks. On rank 0 they get those of the shards by
            `collect`; the state of their optimizer is dropped.
        iteration: the last one done.

    Raises:
        ValueError: what `attach` refuses of shards.
    """

    def __init__(self, config: Config, ranks: Ranks, whole: Trained, iteration: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        device = next(whole.model.parameters()).device
        self._ranks = ranks
        mesh = init_device_mesh(device.type, (ranks.world,))
        model = _shard(whole.model, mesh)
        ema = None if whole.ema is None else _shard(whole.ema, mesh)
        optimizer = builders.optimizer(config, model)
        with ranks.attended():
            pruner = builders.pruner(config, model, optimizer, ema, config.manual_seed)
            if pruner is not None and whole.pruner is not None:
                pruner.load_state_dict(whole.pruner.state_dict())
        for twin, one in ((model, whole.model), (ema, whole.ema)):
            if twin is not None and one is not None:
                _scatter(one, twin)  # the pruner may have masked it when it was attached
        state = whole.optimizer.state_dict()
        optimizer.load_state_dict({**state, "state": _with_shards(state["state"], optimizer)})
        super().__init__(model, ema, optimizer, pruner)
        self._whole = whole if ranks.is_main else None
        self._collected, self._optimizer_state = iteration, state
        whole.optimizer.state.clear()

    def collect(self, iteration: int) -> None:
        if iteration == self._collected:
            return
        whole = self._whole
        with self._ranks.attended():
            _gather(self.model, whole and whole.model)
            if self.ema is not None:
                _gather(self.ema, whole and whole.ema)
            state = self.optimizer.state_dict()
            state["state"] = {
                number: {name: self._gathered(x) for name, x in entries.items()}
                for number, entries in state["state"].items()
            }
            pruner = None if self.pruner is None else self.pruner.state_dict()
        self._collected, self._optimizer_state = iteration, state
        if whole is not None and whole.pruner is not None and pruner is not None:
            whole.pruner.load_state_dict(pruner)

    def _gathered(self, x: Any) -> Any:
        """A whole moment on the CPU of rank 0; other ranks only take part."""
        if not is_sharded(x):
            return x
        x = x.full_tensor()
        return x.cpu() if self._ranks.is_main else None

    def is_collected(self, iteration: int) -> bool:
        return iteration == self._collected

    def optimizer_state(self) -> dict[str, Any]:
        return self._optimizer_state

    def finalize(self) -> None:
        self._ranks.agree(0)  # rank 0 may validate for longer than the shards' group waits
        with self._ranks.attended():
            super().finalize()


def _shard(model: SuperResolver, mesh: Any) -> Any:
    """A copy whose blocks are gathered one by one, when they compute."""
    from torch.distributed.fsdp import fully_shard

    # FSDP takes no other order of memory.
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for block in twin.body_blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(twin, mesh=mesh)


def _with_shards(
    entries: dict[int, dict[str, Any]], optimizer: Optimizer
) -> dict[int, dict[str, Any]]:
    """The entries of whole parameters, by their numbers, with the rows of this rank alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        number: {name: _rows(x, parameters[number]) for name, x in own.items()}
        for number, own in entries.items()
    }


def _rows(x: Any, parameter: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(x, Tensor) or x.shape != parameter.shape:
        return x  # the number of steps
    x = x.to(parameter.device, memory_format=torch.contiguous_format)
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every rank has the whole; a copy, so that it is given free.
    return distribute_tensor(x, mesh, placements, src_data_rank=None).clone()


@torch.no_grad()
def _scatter(whole: nn.Module, sharded: nn.Module) -> None:
    """Writes the rows of whole parameters, which every rank has, into shards."""
    for x, own in zip(whole.parameters(), sharded.parameters(), strict=True):
        local(own).copy_(local(_rows(x.detach(), own)))


@torch.no_grad()
def _gather(sharded: nn.Module, whole: nn.Module | None) -> None:
    """Writes the values of all shards into a whole model, where there is one."""
    own = {} if whole is None else whole.state_dict()
    for name, x in sharded.state_dict().items():
        full = x.full_tensor() if is_sharded(x) else x
        if whole is not None:
            own[name].copy_(full)
