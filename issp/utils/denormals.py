"""Denormal numbers are slow on CPUs, and soft shrinkage, multiplying again and again, makes many.

The control register that flushes them to zero belongs to a thread and is inherited when a thread is
created. PyTorch's worker threads are created by the first parallel operation, so the register must
be set before it; data workers, being forked, inherit it too. Set by the training driver only, never
by `import issp`: kernels give the same bits in either mode as long as no denormal occurs.
"""

from __future__ import annotations

import torch

_GRAIN = 32768  # at::internal::GRAIN_SIZE: one more chunk than this per thread occupies them all


def flush_denormals() -> bool:
    """Makes this thread, and every worker thread it creates from now on, flush denormals to zero.

    Returns:
        Whether all threads that compute for this one do so: False if they were started earlier, or
        the processor cannot.
    """
    return torch.set_flush_denormal(True) and mode() == "flushed to zero"


def mode() -> str:
    """What the threads that compute for this one do with denormal numbers, found by trying.

    Returns:
        "flushed to zero", "kept", or "mixed" when worker threads differ.
    """
    size = 4 * _GRAIN * torch.get_num_threads()
    product = torch.full((size,), 1e-30, dtype=torch.float32, device="cpu").mul_(1e-10)
    flushed = int((product == 0).sum())
    return "flushed to zero" if flushed == size else "mixed" if flushed else "kept"
