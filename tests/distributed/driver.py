"""`issp train` in the processes of `run_ranks`, as torchrun starts it."""

import os
import signal
from pathlib import Path

from issp.nn.sharding import local
from issp.sr import config, logging
from issp.sr.distributed import OtherRankEnded
from issp.sr.interrupt import Interrupted
from issp.sr.train import train
from issp.utils.errors import LostRankError
from tests.sr.runs import draw_photos, tree_of


def tree_in(folder):
    """The settings of a run in a folder, where its photographs are drawn."""
    tree = tree_of(draw_photos(folder / "hr"), folder / "experiments")
    tree["logger"]["print_freq"] = 5
    return tree


def start(tree, hook=None, resume=False):
    """One rank: the weights that it ends with, or its shards of them, or its error.

    Args:
        tree: of the run.
        hook: called as hook(rank, iteration) before each optimizer step's iteration is shown.
        resume: as of `train`.
    """
    rank = int(os.environ["RANK"])
    advance = logging.Progress.advance

    def advance_and_call(self, iteration):
        advance(self, iteration)
        if hook is not None:
            hook(rank, iteration)

    logging.Progress.advance = advance_and_call
    try:
        model = train(config.parse(tree), resume=resume, quiet=True)
    except (Interrupted, OtherRankEnded, LostRankError, ValueError, OSError) as error:
        return type(error).__name__, str(error)
    return {name: local(x) for name, x in model.state_dict().items()}


def folder_of(tree):
    return Path(tree["path"]["experiments_root"], tree["name"])


def states(tree):
    return sorted(int(path.stem) for path in folder_of(tree).glob("training_states/*.state"))


def stop_rank_1(rank, iteration):
    if rank == 1 and iteration == 4:
        os.kill(os.getpid(), signal.SIGTERM)


def fail_rank_1(rank, iteration):
    """The second image cannot be read any more, by rank 1 alone."""
    if rank == 1 and iteration == 7:
        from issp.sr.data import TrainDataset

        def refuse(self, draws):
            raise ValueError("image 1.png is damaged")

        TrainDataset.batch = refuse


def kill_rank_1(rank, iteration):
    if rank == 1 and iteration == 7:
        os.kill(os.getpid(), signal.SIGKILL)
