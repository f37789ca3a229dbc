// Vector operations of the N:M kernels, per instruction set. Scores are 32-bit lanes below 2^31, so
// that signed comparison orders them. A lane holds one group or one element.
#pragma once

#include "cpu/simd/scalar.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include "cpu/simd/avx2.h"
#include "cpu/simd/avx512.h"
#endif

namespace issp::scalar {

template <typename T>
struct Scores {
  using Bits = typename T::Bits;
  using Vector = Key<T>;
  using Wide = typename T::Wide;
  using Mask = bool;
  static constexpr int width = 1;

  static Vector load(const Key<T>* p) { return *p; }
  // Clears the sign, so that float32 weights can be used as scores.
  static Vector score(const Key<T>* p) { return *p & Key<T>(-1) >> 1; }
  static void store(Key<T>* p, Vector x) { *p = x; }
  static Vector all(Key<T> x) { return x; }
  static Vector larger(Vector a, Vector b) { return a > b ? a : b; }
  static Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
  static Vector other(Vector a, Vector b, Vector one) { return one == a ? b : a; }
  static Mask greater(Vector a, Vector b) { return a > b; }
  static uint64_t bits(Mask m) { return m; }
  static Mask mask(uint32_t bits) { return bits & 1; }
  static Vector plus(Vector x, Mask m) { return x + m; }
  static Vector larger_where(Mask m, Vector a, Vector b) { return m && b > a ? b : a; }
  static Vector pick(Mask m, Vector a, Vector b) { return m ? a : b; }
  static Vector both(Vector a, Vector b) { return a | b; }
  static Vector shifted(Vector x) { return x << 16; }
  static Vector minus_one(Vector x) { return x - 1; }
  static Vector permuted(Vector x, Vector) { return x; }
  static void columns(const Key<T>* from, int64_t, Key<T>* out) {
    for (int i = 0; i < 4; ++i) out[i] = from[i];
  }

  static Vector keys(const Bits* p) { return key<T>(*p); }
  static Wide magnitude(const Bits* p) { return widen(T{}, typename T::Bits(key<T>(*p))); }
  static Wide sum(Wide a, Wide b) { return a + b; }
  static Vector as_bits(Wide x) { return bit_as<Vector>(x); }
  static Wide as_sum(Vector bits) { return bit_as<Wide>(bits); }
  static Vector key_of_sum(Wide sum) {
    using Sum = std::conditional_t<sizeof(Wide) == 8, Float64, Float32>;
    const Vector k = key<Sum>(bit_as<typename Sum::Bits>(sum));
    return k > kInfinity<Sum> ? Limits<Sum>::magnitude : k;
  }
};

}  // namespace issp::scalar

#if defined(__x86_64__) && defined(__GNUC__)
namespace issp::avx2 {

template <typename T>
struct Scores {
  using Bits = typename T::Bits;
  using Vector = __m256i;
  using Wide = __m256;
  using Mask = __m256i;
  static constexpr int width = 8;

  ISSP_AVX2 static Vector load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  ISSP_AVX2 static Vector score(const uint32_t* p) {
    return _mm256_and_si256(load(p), _mm256_set1_epi32(0x7fffffff));
  }
  ISSP_AVX2 static void store(uint32_t* p, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }
  ISSP_AVX2 static Vector all(uint32_t x) { return _mm256_set1_epi32(int(x)); }
  ISSP_AVX2 static Vector larger(Vector a, Vector b) { return _mm256_max_epi32(a, b); }
  ISSP_AVX2 static Vector smaller(Vector a, Vector b) { return _mm256_min_epi32(a, b); }
  ISSP_AVX2 static Vector other(Vector a, Vector b, Vector one) {
    return _mm256_xor_si256(_mm256_xor_si256(a, b), one);
  }
  ISSP_AVX2 static Mask greater(Vector a, Vector b) { return _mm256_cmpgt_epi32(a, b); }
  ISSP_AVX2 static uint64_t bits(Mask m) { return Lanes32::bitmask(m); }
  ISSP_AVX2 static Mask mask(uint32_t bits) { return Lanes32::expand_mask(bits); }
  ISSP_AVX2 static Vector plus(Vector x, Mask m) { return _mm256_sub_epi32(x, m); }
  ISSP_AVX2 static Vector larger_where(Mask m, Vector a, Vector b) {
    return _mm256_max_epi32(a, _mm256_and_si256(m, b));
  }
  ISSP_AVX2 static Vector pick(Mask m, Vector a, Vector b) { return _mm256_blendv_epi8(b, a, m); }
  ISSP_AVX2 static Vector both(Vector a, Vector b) { return _mm256_or_si256(a, b); }
  ISSP_AVX2 static Vector shifted(Vector x) { return _mm256_slli_epi32(x, 16); }
  ISSP_AVX2 static Vector minus_one(Vector x) { return _mm256_sub_epi32(x, _mm256_set1_epi32(1)); }
  ISSP_AVX2 static Vector permuted(Vector x, Vector order) {
    return _mm256_permutevar8x32_epi32(x, order);
  }
  // out[i][g] = from[g * stride + i] for i < 4: 128 bits of a group in each half of a register.
  ISSP_AVX2 static void columns(const uint32_t* from, int64_t stride, uint32_t* out) {
    __m256i v[4];
    for (int i = 0; i < 4; ++i) {
      const auto* low = reinterpret_cast<const __m128i*>(from + i * stride);
      const auto* high = reinterpret_cast<const __m128i*>(from + (4 + i) * stride);
      v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                     _mm_loadu_si128(high), 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    store(out, _mm256_unpacklo_epi64(a, c));
    store(out + 8, _mm256_unpackhi_epi64(a, c));
    store(out + 16, _mm256_unpacklo_epi64(b, d));
    store(out + 24, _mm256_unpackhi_epi64(b, d));
  }

  ISSP_AVX2 static Vector keys(const Bits* p) { return Lanes<T>::keys(Lanes<T>::load(p)); }
  ISSP_AVX2 static Wide magnitude(const Bits* p) {
    if constexpr (std::is_same_v<T, Float16>) {
      return _mm256_cvtph_ps(Lanes16::pack16(keys(p)));
    } else {
      const int shift = sizeof(Bits) == 2 ? 16 : 0;
      return _mm256_castsi256_ps(_mm256_slli_epi32(keys(p), shift));
    }
  }
  ISSP_AVX2 static Wide sum(Wide a, Wide b) { return _mm256_add_ps(a, b); }
  ISSP_AVX2 static Vector as_bits(Wide x) { return _mm256_castps_si256(x); }
  ISSP_AVX2 static Wide as_sum(Vector bits) { return _mm256_castsi256_ps(bits); }
  ISSP_AVX2 static Vector key_of_sum(Wide sum) {
    const __m256i k = Lanes<Float32>::keys(_mm256_castps_si256(sum));
    return pick(greater(k, all(kInfinity<Float32>)), all(Limits<Float32>::magnitude), k);
  }
};

}  // namespace issp::avx2

namespace issp::avx512 {

template <typename T>
struct Scores {
  using Bits = typename T::Bits;
  using Vector = __m512i;
  using Wide = __m512;
  using Mask = __mmask16;
  static constexpr int width = 16;

  ISSP_AVX512 static Vector load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  ISSP_AVX512 static Vector score(const uint32_t* p) {
    return _mm512_and_si512(load(p), _mm512_set1_epi32(0x7fffffff));
  }
  ISSP_AVX512 static void store(uint32_t* p, Vector x) { _mm512_storeu_si512(p, x); }
  ISSP_AVX512 static Vector all(uint32_t x) { return _mm512_set1_epi32(int(x)); }
  ISSP_AVX512 static Vector larger(Vector a, Vector b) { return _mm512_max_epi32(a, b); }
  ISSP_AVX512 static Vector smaller(Vector a, Vector b) { return _mm512_min_epi32(a, b); }
  // Of two vectors the one that `larger` or `smaller` did not return. An xor of all three: a second
  // comparison would compete for the single port that compares.
  ISSP_AVX512 static Vector other(Vector a, Vector b, Vector one) {
    return _mm512_ternarylogic_epi32(a, b, one, 0x96);
  }
  ISSP_AVX512 static Mask greater(Vector a, Vector b) { return _mm512_cmpgt_epi32_mask(a, b); }
  ISSP_AVX512 static uint64_t bits(Mask m) { return _cvtmask16_u32(m); }
  ISSP_AVX512 static Mask mask(uint32_t bits) { return _cvtu32_mask16(bits); }
  ISSP_AVX512 static Vector plus(Vector x, Mask m) {
    return _mm512_mask_sub_epi32(x, m, x, _mm512_set1_epi32(-1));
  }
  ISSP_AVX512 static Vector larger_where(Mask m, Vector a, Vector b) {
    return _mm512_mask_max_epi32(a, m, a, b);
  }
  ISSP_AVX512 static Vector pick(Mask m, Vector a, Vector b) {
    return _mm512_mask_mov_epi32(b, m, a);
  }
  ISSP_AVX512 static Vector both(Vector a, Vector b) { return _mm512_or_si512(a, b); }
  ISSP_AVX512 static Vector shifted(Vector x) { return _mm512_slli_epi32(x, 16); }
  ISSP_AVX512 static Vector minus_one(Vector x) {
    return _mm512_sub_epi32(x, _mm512_set1_epi32(1));
  }
  ISSP_AVX512 static Vector permuted(Vector x, Vector order) {
    return _mm512_permutexvar_epi32(order, x);
  }
  // out[i][g] = from[g * stride + i] for i < 4: 128 bits of a group in each quarter of a register.
  ISSP_AVX512 static void columns(const uint32_t* from, int64_t stride, uint32_t* out) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int quarter) ISSP_AVX512 {
        const uint32_t* p = from + (4 * quarter + i) * stride;
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      };
      v[i] = _mm512_castsi128_si512(at(0));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x00f0, at(1));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x0f00, at(2));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0xf000, at(3));
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    store(out, _mm512_unpacklo_epi64(a, c));
    store(out + 16, _mm512_unpackhi_epi64(a, c));
    store(out + 32, _mm512_unpacklo_epi64(b, d));
    store(out + 48, _mm512_unpackhi_epi64(b, d));
  }

  ISSP_AVX512 static Vector keys(const Bits* p) { return Lanes<T>::keys(Lanes<T>::load(p)); }
  ISSP_AVX512 static Wide magnitude(const Bits* p) {
    if constexpr (std::is_same_v<T, Float16>) {
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(keys(p)));
    } else {
      const int shift = sizeof(Bits) == 2 ? 16 : 0;
      return _mm512_castsi512_ps(_mm512_slli_epi32(keys(p), shift));
    }
  }
  ISSP_AVX512 static Wide sum(Wide a, Wide b) { return _mm512_add_ps(a, b); }
  ISSP_AVX512 static Vector as_bits(Wide x) { return _mm512_castps_si512(x); }
  ISSP_AVX512 static Wide as_sum(Vector bits) { return _mm512_castsi512_ps(bits); }
  ISSP_AVX512 static Vector key_of_sum(Wide sum) {
    const __m512i k = Lanes<Float32>::keys(_mm512_castps_si512(sum));
    return pick(greater(k, all(kInfinity<Float32>)), all(Limits<Float32>::magnitude), k);
  }
};

}  // namespace issp::avx512
#endif
