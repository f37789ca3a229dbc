"""Prints the machine line, and which back ends are missing and why: `python -m bench.describe`."""

import warnings

import torch

from bench.harness.machine import machine_line
from issp.ops import backends

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # about a missing back end, which is printed below
    print(machine_line("cuda" if torch.cuda.is_available() else "cpu"))
    for name, problem in backends.problems().items():
        print(f"{name}: {problem}")
