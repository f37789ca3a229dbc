"""Logs of a training run: CSV and text files, TensorBoard, the progress display, loss and time."""

from issp.sr.logging.columns import COLUMNS
from issp.sr.logging.meter import AverageMeter, StepTimer
from issp.sr.logging.progress import Progress
from issp.sr.logging.scores import is_soft, soft_psnr, sparse_psnr
from issp.sr.logging.tensorboard import TensorBoardLog
from issp.utils.csv_log import CsvLog, read_csv

__all__ = [
    "COLUMNS",
    "AverageMeter",
    "CsvLog",
    "Progress",
    "StepTimer",
    "TensorBoardLog",
    "is_soft",
    "read_csv",
    "soft_psnr",
    "sparse_psnr",
]
