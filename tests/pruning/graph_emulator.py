"""Captures and replays steps as a CUDA graph does, on the CPU: by the ops that torch dispatches.

A capture records every op with the very tensors that it got, and lets none of the pruner's or the
optimizer's Python run again: a replay calls the ops alone. What would wait for a device, or come
from the host, is refused. Unlike on a GPU, the capture itself computes; `Graph.capture` undoes it.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from issp.pruning import capture

# Ops that read numbers on the host.
SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Graph(TorchDispatchMode):
    """What one capture has recorded."""

    def __init__(self):
        super().__init__()
        self._calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if name in SYNCHRONIZING:
            raise RuntimeError(f"{name} waits for the device while a graph is captured")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def capture(self, monkeypatch, tensors):
        """Records what is called within; `tensors` and what they hold are as before afterwards."""
        before = [(x, x.detach().clone()) for x in tensors]
        with monkeypatch.context() as patch:
            patch.setattr(capture, "is_capturing", lambda: True)
            with self:
                yield
        with torch.no_grad():
            for x, values in before:
                x.copy_(values)

    @torch.no_grad()
    def replay(self):
        """Calls the recorded ops on the recorded tensors."""
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and not old.is_set_to(new):
                    old.copy_(new)


def on_cpu(monkeypatch):
    """Lets the pruner take the CPU for a device with graphs."""
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
