"""Prints the machine line, where it runs, and which back ends are there or missing and why."""

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")  # a missing back end is told below

from bench.harness.machine import machine_line  # noqa: E402
from issp.ops import backends  # noqa: E402  (found through the line above, also before installation)

if __name__ == "__main__":
    print(machine_line("cuda" if torch.cuda.is_available() else "cpu"))
    for name, problem in backends.problems().items():
        print(f"{name}: {problem}")
