"""torch's Adam, AdamW and SGD whose step prunes as well: update and shrink in one pass.

Arguments, defaults, `param_groups` and `state_dict` are torch's; states load both ways. With a
pruner attached, a parameter group costs one op call per step. Without one, and for what the op does
not take (other dtypes, sparse gradients, amsgrad, ...), the step is that of torch's class with the
same options, and `report` says why: torch's default, or its fused or foreach kernels where the
parameter group asks for them.

Differences from torch's fused optimizers: gradients scaled by a GradScaler are unscaled on the fly,
not in place; float32 weights may have bfloat16 gradients (`p.grad_dtype = torch.bfloat16`); moments
below the smallest normal number become zero; tensors whose size is no multiple of a vector's length
may differ from torch's CPU kernels, and all from its CUDA kernels, by rounding. Hooks registered on
the optimizer before the pruner see weights that are shrunk already.
"""

from issp.optim.adam import Adam, AdamW
from issp.optim.sgd import SGD
from issp.optim.step import GroupStepInfo

__all__ = ["SGD", "Adam", "AdamW", "GroupStepInfo"]
