"""Whether torch records a model for software that has none of issp's ops."""

import torch


def is_recorded_for_torch() -> bool:
    """Whether torch.jit or ONNX record what is computed now."""
    return torch._C._get_tracing_state() is not None or (
        torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    )
