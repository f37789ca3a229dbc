"""The processes of one training (`torchrun -m issp train`): who is who, and how they end together.

Rank 0 logs, validates and saves; the others compute gradients. Where one fails or is stopped, it
says so in the store that torchrun holds and ends; the others lose its connection, look there, and
end in silence: there is one error, whichever rank had it.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from issp.sr import builders
from issp.sr.config import Config
from issp.sr.data.sampler import hash64
from issp.sr.interrupt import Interrupted
from issp.utils.errors import ConfigError, LostRankError, UserError, one_line

_END = "issp/end"  # key of what the first rank that ended has to say
_FOREVER = timedelta(days=1000)  # others wait for rank 0, whose validation may take hours
_RANDOM_STREAM = 1 << 40  # of the seeds; the sampler's streams are epochs


class OtherRankEnded(Exception):
    """Another rank has failed or was stopped and has said so; this one ends in silence.

    Args:
        reason: what the other has said.
        status: its exit status.
    """

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Ranks:
    """This process among those of one training; by default it is alone.

    Attributes:
        rank, world: its number, and how many there are.
        local_rank, local_world: the same on this machine.
        store: of torchrun.
        control: group of CPU messages, in which a rank waits for as long as it takes.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: Any = None
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process logs, validates and saves."""
        return self.rank == 0

    @property
    def command(self) -> str:
        """How such processes are started: what comes before `train`."""
        if self.world == 1:
            return "issp"
        nodes = self.world // self.local_world
        several = f"--nnodes={nodes} " if nodes > 1 else ""
        return f"torchrun {several}--nproc_per_node={self.local_world} -m issp"

    def check(self, config: Config) -> None:
        """Refuses settings that ask for another number of processes.

        Raises:
            ConfigError: `num_gpu`, `dist` or `device` contradict what was started.
        """
        gpus, crops = config.num_gpu, config.train_data.batch_size_per_gpu
        count = gpus if isinstance(gpus, int) else 0
        if self.world == 1 and count > 1:
            raise ConfigError(
                f"num_gpu is {count}, but one process was started: start torchrun "
                f"--nproc_per_node={count} -m issp train, or, for the same batch, set num_gpu to 1 "
                f"and datasets.train.batch_size_per_gpu to {count * crops}"
            )
        if self.world == 1 and config.dist:
            raise ConfigError(
                "dist is true, but one process was started: start torchrun --nproc_per_node=N -m "
                "issp train, or set dist to false"
            )
        if self.world > 1 and count and count not in (self.world, self.local_world):
            raise ConfigError(
                f"num_gpu is {count}, but {self.world} processes were started: make them equal"
            )

    def device(self, name: str) -> torch.device:
        """`builders.device`; of several processes each takes the GPU of its number.

        Raises:
            ConfigError: no such device, or too few of them.
        """
        chosen = builders.device(name)
        if self.world == 1 or chosen.type != "cuda":
            return chosen
        if chosen.index is not None:
            raise ConfigError(
                f"device is {name}, but each of the {self.world} processes takes its own: set it "
                "to cuda"
            )
        count = torch.cuda.device_count()
        if self.local_world > count:
            raise ConfigError(
                f"{self.local_world} processes were started on a machine with {count} GPUs: use "
                f"--nproc_per_node={count}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def seed(self, seed: int, iteration: int) -> None:
        """Seeds an iteration of this rank; alone the generators just go on.

        So a state needs no generators of the other ranks, which may be gone when it is saved.
        """
        if self.world > 1:
            counter = np.array([iteration * self.world + self.rank], np.uint64)
            builders.seed_everything(int(hash64(seed, counter, _RANDOM_STREAM)[0]) >> 1)

    def agree(self, number: int) -> int:
        """The largest of the numbers that the ranks pass, once all have come; alone, its own.

        Raises:
            OtherRankEnded, LostRankError: one of them has ended.
        """
        if self.world == 1:
            return number
        value = torch.tensor([number], dtype=torch.int64, device="cpu")
        with self.attended():
            dist.all_reduce(value, dist.ReduceOp.MAX, self.control)
        return int(value)

    def gather(self, value: Tensor) -> Tensor:
        """[world] on the CPU: a scalar of each rank.

        Raises:
            OtherRankEnded, LostRankError: one of them has ended.
        """
        own = value.detach().cpu().reshape(1)
        values = [torch.empty_like(own) for _ in range(self.world)]
        if self.world == 1:
            return own
        with self.attended():
            dist.all_gather(values, own, self.control)
        return torch.cat(values)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Names the reason where a collective inside fails because a rank has ended.

        Raises:
            OtherRankEnded, LostRankError: one of them has.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1:
                raise
            if said := self._said():
                raise OtherRankEnded(said["reason"], said["status"]) from None
            # gloo has no class of its own for a connection that is lost.
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise LostRankError(
                    "another rank has ended without a word: see what torchrun reports of it"
                ) from error
            raise

    def _said(self) -> dict[str, Any] | None:
        """What the first rank that ended has said."""
        with contextlib.suppress(RuntimeError):  # torchrun, and its store, may be gone
            return json.loads(self.store.get(_END)) if self.store.check([_END]) else None
        return None

    def announce(self, error: BaseException) -> None:
        """Says why this rank ends.

        Raises:
            OtherRankEnded: another one was first.
        """
        said = {"rank": self.rank, "status": _status(error)}
        said["reason"] = f"rank {self.rank}: {type(error).__name__}: {one_line(error)}"
        with contextlib.suppress(RuntimeError):
            first = json.loads(self.store.compare_set(_END, "", json.dumps(said)))
            if first["rank"] != self.rank:
                raise OtherRankEnded(first["reason"], first["status"]) from None


_joined = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started, joined by process groups until the end.

    An error in here is announced to the others. Alone, and within another `joined`, it does
    nothing.

    Raises:
        OtherRankEnded: another rank had an error first, and says it.
        ConfigError: the environment is not that of torchrun.
    """
    global _joined
    if _joined.world > 1 or os.environ.get("WORLD_SIZE", "1") == "1":
        yield _joined
        return
    _joined = _join()
    with warnings.catch_warnings():
        if not _joined.is_main:
            warnings.simplefilter("ignore")  # rank 0 has the same
        try:
            yield _joined
        except OtherRankEnded:
            raise
        except BaseException as error:
            _joined.announce(error)
            raise
        finally:
            _joined = Ranks()
    dist.destroy_process_group()  # not after an error, when the others may be gone


def _join() -> Ranks:
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ["LOCAL_RANK"])
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {error} is not as torchrun sets it: "
            "start torchrun --nproc_per_node=N -m issp train"
        ) from None
    if not (dist.is_available() and dist.is_gloo_available()):
        raise ConfigError("this torch has no gloo, by which the processes talk: start one process")
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    # gloo for the CPU, nccl for GPUs where there are any.
    dist.init_process_group(store=dist.PrefixStore("group", store), rank=rank, world_size=world)
    control = dist.new_group(timeout=_FOREVER, backend="gloo")
    return Ranks(rank, world, local_rank, local_world, store, control)


def _status(error: BaseException) -> int:
    """The exit status that the command ends with after an error."""
    if isinstance(error, Interrupted):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError | ValueError | OSError) else 1
