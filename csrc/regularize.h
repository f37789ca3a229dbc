// The scalar rule of regularize_, for host and device. issp/ops/reference/auxiliary.py and
// triton_kernels/regularize.py implement the same rule.
#pragma once

#include "update.h"

namespace issp {

// The bits of a NaN result on every back end; processors generate different NaNs.
template <typename T>
constexpr typename T::Bits kNan = 0;
template <>
constexpr uint32_t kNan<Float32> = 0x7fc00000u;
template <>
constexpr uint16_t kNan<Float16> = 0x7e00u;
template <>
constexpr uint16_t kNan<BFloat16> = 0x7fc0u;
template <>
constexpr uint64_t kNan<Float64> = 0x7ff8000000000000ull;

// g + factor * w: the product is rounded, then the sum, both in float (double for float64). 16-bit
// types are widened before and rounded once at the end.
template <typename T>
ISSP_RULE typename T::Bits regularized(typename T::Bits g, typename T::Bits w,
                                       typename T::Wide factor) {
  using Wide = typename T::Wide;
  const Wide sum = widen(T{}, g) + times(factor, widen(T{}, w));
  typename T::Bits bits = narrow(T{}, sum);
  if (kInfinity<T> == kInfinity<Float16>) {  // `narrow` needs |value| <= 65504
    const Wide limit = Wide(65520);  // 65504 plus half a step: from here on rounds to infinity
    bits = sum >= limit ? kInfinity<T> : sum <= -limit ? kInfinity<T> | Limits<T>::sign : bits;
  }
  return sum == sum ? bits : kNan<T>;
}

}  // namespace issp
