// The scalar rules of pruning, for host and device: key, selected, shrunk.
// issp/ops/reference/pruning.py and triton_kernels/semantics.py implement the same rules in the
// same order.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ISSP_RULE __host__ __device__ __forceinline__
#else
#define ISSP_RULE inline
#endif

namespace issp {

template <typename To, typename From>
ISSP_RULE To bit_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage types: the kernels process the bits of a weight.
struct Float32 {
  using Bits = uint32_t;
  using Wide = float;
};
struct Float16 {
  using Bits = uint16_t;
  using Wide = float;
};
struct BFloat16 {
  using Bits = uint16_t;
  using Wide = float;
};
struct Float64 {
  using Bits = uint64_t;
  using Wide = double;
};

template <typename T>
struct Limits {
  using Bits = typename T::Bits;
  static constexpr Bits sign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  static constexpr Bits magnitude = Bits(~sign);
};

template <typename T>
constexpr typename T::Bits kInfinity = 0;
template <>
constexpr uint32_t kInfinity<Float32> = 0x7f800000u;
template <>
constexpr uint16_t kInfinity<Float16> = 0x7c00u;
template <>
constexpr uint16_t kInfinity<BFloat16> = 0x7f80u;
template <>
constexpr uint64_t kInfinity<Float64> = 0x7ff0000000000000ull;

// The keys of the 16-bit types are 32-bit integers.
template <typename Bits>
struct KeyOf {
  using Key = uint32_t;
};
template <>
struct KeyOf<uint64_t> {
  using Key = uint64_t;
};
template <typename T>
using Key = typename KeyOf<typename T::Bits>::Key;

// key: an integer that orders magnitudes; +0 == -0, denormals are ordered, NaN is above infinity.
template <typename T>
ISSP_RULE Key<T> key(typename T::Bits bits) {
  return bits & Limits<T>::magnitude;
}

// selected: whether an element belongs to the k smallest keys. tau is the k-th smallest key. Of the
// elements equal to tau, the `ties` elements of lowest flat index are selected; `rank` counts the
// equal elements before this one.
template <typename Key>
ISSP_RULE bool selected(Key key, Key tau, int64_t rank, int64_t ties) {
  return key < tau || (key == tau && rank < ties);
}

ISSP_RULE float widen(Float32, uint32_t bits) {
  return bit_as<float>(bits);
}
ISSP_RULE double widen(Float64, uint64_t bits) {
  return bit_as<double>(bits);
}
ISSP_RULE float widen(BFloat16, uint16_t bits) {
  return bit_as<float>(uint32_t(bits) << 16);
}
ISSP_RULE float widen(Float16, uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude < 0x400u) {  // zero or denormal: an integer multiple of 2^-24, exact in float
    return bit_as<float>(sign | bit_as<uint32_t>(float(magnitude) * 0x1p-24f));
  }
  const uint32_t bias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;
  return bit_as<float>(sign | ((magnitude << 13) + bias));
}

ISSP_RULE uint32_t narrow(Float32, float value) {
  return bit_as<uint32_t>(value);
}
ISSP_RULE uint64_t narrow(Float64, double value) {
  return bit_as<uint64_t>(value);
}
ISSP_RULE uint16_t narrow(BFloat16, float value) {  // to nearest even; value is not NaN
  const uint32_t bits = bit_as<uint32_t>(value);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
ISSP_RULE uint16_t narrow(Float16, float value) {  // to nearest even; |value| <= 65504 or infinite
  const uint32_t bits = bit_as<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // denormal result: adding 0.5 aligns its last bit with float bits
    const float aligned = bit_as<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_as<uint32_t>(aligned) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// shrunk: w * shrink, rounded to nearest even. 16-bit types are widened to float and rounded again.
// shrink = 0 gives a zero with the sign of w. A product below the smallest normal number becomes a
// zero with the sign of w, except for float16; for bfloat16 the float product is compared. NaN is
// unchanged. The rule needs gradual underflow (no flush-to-zero): see FloatMode in cpu/threads.h.
template <typename T>
ISSP_RULE typename T::Bits shrunk(typename T::Bits bits, typename T::Wide shrink) {
  using Wide = typename T::Wide;
  if (key<T>(bits) > kInfinity<T>) return bits;
  const typename T::Bits zero = bits & Limits<T>::sign;
  if (shrink == Wide(0)) return zero;
  const Wide product = widen(T{}, bits) * shrink;
  if (sizeof(typename T::Bits) != 2 || kInfinity<T> == kInfinity<BFloat16>) {
    constexpr Wide tiny = sizeof(Wide) == 8 ? Wide(2.2250738585072014e-308) : Wide(0x1p-126);
    if (product < tiny && product > -tiny) return zero;
  }
  return narrow(T{}, product);
}

}  // namespace issp
