"""Layers with sparse weights, in place of torch's: NMLinear, NMConv2d, SparseLinear, SparseConv2d.

Their constructors take the arguments of torch's layer (a convolution with groups = 1 and
padding_mode "zeros" alone), initialise as it does and then prune by magnitude; `from_dense` copies
a layer that exists, and `convert` replaces those of a model. All of them take:
    mask        how the layer trains. "fixed": the stored values are the parameter, their positions
                are buffers. "ste", "sr-ste": the dense weight is the parameter; each forward keeps
                its largest magnitudes and multiplies by those alone, and the gradient reaches all
                of it, see issp/nn/ste.py.
    activation  "none", "relu" or "gelu", applied to the result; fused outside training.
    decay       of "sr-ste": how strongly weights that are not kept are pulled to zero.
"""

from issp.nn.convert import convert
from issp.nn.layers import NMConv2d, NMLinear, SparseConv2d, SparseLinear

__all__ = ["NMConv2d", "NMLinear", "SparseConv2d", "SparseLinear", "convert"]
