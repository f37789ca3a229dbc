"""CUB's DeviceTopK as a baseline: compiled on the spot where the CUDA toolkit has it (CCCL 3.2)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = """
#include <cub/device/device_topk.cuh>
#include <cuda/stream_ref>

extern "C" int smallest(void* scratch, size_t* bytes, const float* in, float* out, long long n,
                        long long k, void* stream) {
  auto wanted = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                         cuda::execution::output_ordering::unsorted);
  cuda::stream_ref queue{static_cast<cudaStream_t>(stream)};
  auto env = cuda::std::execution::env{queue, wanted};
  return cub::DeviceTopK::MinKeys(scratch, *bytes, in, out, n, k, env);
}
"""


def missing() -> str | None:
    """Why it cannot be used here, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "not installed"
    include = Path(nvcc).resolve().parents[1] / "include"
    headers = [include / folder / "cub/device/device_topk.cuh" for folder in ("cccl", ".")]
    return None if any(map(Path.exists, headers)) else "not installed"


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="issp-cub-"))
    source, library = folder / "topk.cu", folder / "topk.so"
    source.write_text(_SOURCE)
    major, minor = torch.cuda.get_device_capability()
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{major}{minor}"]
    process = subprocess.run(
        ["nvcc", *options, "-o", library, source], capture_output=True, text=True, timeout=300
    )
    if process.returncode:
        first = next((x for x in process.stderr.splitlines() if "error" in x), "no message")
        raise RuntimeError(f"nvcc cannot compile it: {first}")
    return ctypes.CDLL(str(library))


def smallest(x: Tensor, k: int) -> Tensor:
    """The k smallest of a flat float32 tensor on a GPU, in no order."""
    if x.dtype != torch.float32:
        raise TypeError("the binding to DeviceTopK takes float32")
    call, out, bytes_ = _library().smallest, x.new_empty(k), ctypes.c_size_t()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
    sizes = ctypes.c_longlong(x.numel()), ctypes.c_longlong(k)
    # Without scratch memory the call only says how much it needs.
    status = call(None, ctypes.byref(bytes_), *pointers, *sizes, stream)
    scratch = torch.empty(max(1, bytes_.value), dtype=torch.uint8, device=x.device)
    scratch_ptr = ctypes.c_void_p(scratch.data_ptr())
    status = status or call(scratch_ptr, ctypes.byref(bytes_), *pointers, *sizes, stream)
    if status:
        raise RuntimeError(f"DeviceTopK failed with CUDA error {status}")
    return out
