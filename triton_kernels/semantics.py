"""The scalar rules as Triton functions: key, selected, shrunk.

The same rules, in the same order, stand in issp/ops/reference/pruning.py and
csrc/semantics.h. Kernels see a weight as its bits, a signed integer of its size; DTYPE names the
type of the weight.
"""

import triton
import triton.language as tl


@triton.jit
def key(bits):
    """The order of magnitudes as integers: +0 == -0, denormals ordered, NaN above infinity."""
    if bits.dtype == tl.int64:
        return bits & 0x7FFFFFFFFFFFFFFF
    elif bits.dtype == tl.int32:
        return bits & 0x7FFFFFFF
    else:
        return bits.to(tl.int32) & 0x7FFF


@triton.jit
def infinity(DTYPE: tl.constexpr):
    """The key of infinity; NaN keys lie above it."""
    if DTYPE == "float64":  # noqa: SIM116 (a kernel has no dictionaries)
        return 0x7FF0000000000000
    elif DTYPE == "float32":
        return 0x7F800000
    elif DTYPE == "bfloat16":
        return 0x7F80
    else:
        return 0x7C00


@triton.jit
def selected(key, tau, index, cutoff):
    """Of the k smallest keys: below the k-th, tau, or equal to it and no later than the cutoff.

    cutoff is the flat index of the last tie that is taken: lowest index first.
    """
    return (key < tau) | ((key == tau) & (index <= cutoff))


@triton.jit
def widen(bits, DTYPE: tl.constexpr):
    """The weight as float32 (float64 for float64): exact."""
    if DTYPE == "float64":
        return bits.to(tl.float64, bitcast=True)
    elif DTYPE == "float32":
        return bits.to(tl.float32, bitcast=True)
    elif DTYPE == "bfloat16":
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """Rounds to nearest even into the weight's bits; value is not NaN."""
    if DTYPE == "float64":
        return value.to(tl.int64, bitcast=True)
    elif DTYPE == "float32":
        return value.to(tl.int32, bitcast=True)
    elif DTYPE == "bfloat16":
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def shrunk(bits, shrink, DTYPE: tl.constexpr):
    """w * shrink, rounded; 16-bit types are widened to float32, then rounded again.

    shrink = 0 gives a zero of w's sign. A product below the smallest normal number becomes a zero
    of w's sign (bfloat16: judged in float32), except for float16. NaN stays as it is.
    """
    if DTYPE == "float64":
        zero = bits & -0x8000000000000000
        tiny: tl.constexpr = 2.2250738585072014e-308
    elif DTYPE == "float32":
        zero = bits & -0x80000000
        tiny: tl.constexpr = 1.1754943508222875e-38
    else:
        zero = (bits & -0x8000).to(tl.int16)
        tiny: tl.constexpr = 1.1754943508222875e-38 if DTYPE == "bfloat16" else 0.0
    product = widen(bits, DTYPE) * shrink
    result = tl.where((product < tiny) & (product > -tiny), zero, narrow(product, DTYPE))
    result = tl.where(shrink == 0, zero, result)
    return tl.where(key(bits) > infinity(DTYPE), bits, result)


@triton.jit
def factor(high, low, DTYPE: tl.constexpr):
    """The shrink factor from the two words of its float64 bits, at the precision of the product.

    A float argument of a Triton kernel is a float32, which would be too coarse for float64 weights.
    """
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    wide = bits.to(tl.float64, bitcast=True)
    if DTYPE == "float64":
        return wide
    else:
        return wide.to(tl.float32)
