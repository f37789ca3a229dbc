// AVX2, FMA, F16C: eight elements at a time, each in a 32-bit lane independent of its storage type.
// Keys are below 2^31, so signed comparison orders them: a bound must be below 2^31 as well, and
// what follows the largest NaN is not.
#pragma once

#include <immintrin.h>

#include <array>

#include "cpu/simd/scalar.h"

#define ISSP_AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi2")))

namespace issp::avx2 {

// AVX2 has no compress instruction. Row m of this table moves the lanes set in m to the front.
struct alignas(32) CompressOrder {
  uint32_t lane[8];
};

constexpr std::array<CompressOrder, 256> compress_orders() {
  std::array<CompressOrder, 256> orders{};
  for (uint32_t mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (uint32_t lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) orders[mask].lane[next++] = lane;
    }
  }
  return orders;
}

inline constexpr std::array<CompressOrder, 256> kCompressOrders = compress_orders();

struct Lanes32 {
  using Vector = __m256i;
  using Mask = uint32_t;
  static constexpr int width = 8;

  // Joins the masks of 64 elements to one word.
  ISSP_AVX2 static uint64_t join(const Mask* m) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= uint64_t(m[i]) << (8 * i);
    return word;
  }
  ISSP_AVX2 static uint32_t bitmask(__m256i lanes) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  }
  ISSP_AVX2 static Mask below(Vector keys, uint32_t bound) {
    return bitmask(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(bound)), keys));
  }
  ISSP_AVX2 static Mask not_above(Vector keys, uint32_t bound) {
    return 0xff ^ bitmask(_mm256_cmpgt_epi32(keys, _mm256_set1_epi32(int(bound))));
  }
  ISSP_AVX2 static Mask same(Vector keys, uint32_t bound) {
    return bitmask(_mm256_cmpeq_epi32(_mm256_set1_epi32(int(bound)), keys));
  }
  ISSP_AVX2 static Mask lsb(Vector bits) { return bitmask(_mm256_slli_epi32(bits, 31)); }
  // 0 < key < bound
  ISSP_AVX2 static Mask small(Vector keys, uint32_t bound) {
    const __m256i zero = _mm256_cmpeq_epi32(keys, _mm256_setzero_si256());
    const __m256i less = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(bound)), keys);
    return bitmask(_mm256_andnot_si256(zero, less));
  }
  ISSP_AVX2 static void put(uint32_t* out, Vector keys, uint32_t mask) {
    const __m256i order =
        _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompressOrders[mask].lane));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(keys, order));
  }
  // All ones in the lanes whose bit is set.
  ISSP_AVX2 static __m256i expand_mask(uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bit), bit);
  }
  // Replaces products below the smallest normal float by a zero of their sign.
  ISSP_AVX2 static __m256i flushed(__m256 product) {
    const __m256i bits = _mm256_castps_si256(product);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x00800000), magnitude);
    return _mm256_andnot_si256(_mm256_srli_epi32(tiny, 1), bits);
  }
};

using scalar::Words;

template <typename T>
struct Lanes;

template <>
struct Lanes<Float32> : Lanes32 {
  using Bits = uint32_t;
  ISSP_AVX2 static Vector load(const Bits* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  ISSP_AVX2 static Vector keys(Vector bits) {
    return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  }
  ISSP_AVX2 static Mask less(Vector bits, uint32_t bound) { return below(keys(bits), bound); }
  ISSP_AVX2 static Mask up_to(Vector bits, uint32_t bound) { return not_above(keys(bits), bound); }
  ISSP_AVX2 static Mask equal(Vector bits, uint32_t bound) { return same(keys(bits), bound); }
  ISSP_AVX2 static Mask tiny(Vector bits, uint32_t bound) { return small(keys(bits), bound); }
  ISSP_AVX2 static void compress(uint32_t* out, Vector bits, uint32_t mask) {
    put(out, keys(bits), mask);
  }
  ISSP_AVX2 static void store_shrunk(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m256 product = _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(shrink));
    const __m256i mixed = _mm256_blendv_epi8(bits, flushed(product), expand_mask(mask));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), mixed);
  }
  ISSP_AVX2 static void store_scaled(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m256 w = _mm256_castsi256_ps(bits);
    const __m256 product = _mm256_mul_ps(w, _mm256_set1_ps(shrink));
    _mm256_storeu_ps(reinterpret_cast<float*>(p),
                     _mm256_blendv_ps(w, product, _mm256_castsi256_ps(expand_mask(mask))));
  }
  ISSP_AVX2 static void clear(Bits* p, uint32_t mask) {
    _mm256_maskstore_epi32(reinterpret_cast<int*>(p), expand_mask(mask), _mm256_setzero_si256());
  }
};

// The 16-bit types: their bits are zero-extended to 32-bit lanes.
struct Lanes16 : Lanes32 {
  using Bits = uint16_t;
  ISSP_AVX2 static Vector load(const Bits* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  ISSP_AVX2 static Vector keys(Vector bits) {
    return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fff));
  }
  ISSP_AVX2 static Mask less(Vector bits, uint32_t bound) { return below(keys(bits), bound); }
  ISSP_AVX2 static Mask up_to(Vector bits, uint32_t bound) { return not_above(keys(bits), bound); }
  ISSP_AVX2 static Mask equal(Vector bits, uint32_t bound) { return same(keys(bits), bound); }
  ISSP_AVX2 static Mask tiny(Vector bits, uint32_t bound) { return small(keys(bits), bound); }
  ISSP_AVX2 static void compress(uint32_t* out, Vector bits, uint32_t mask) {
    put(out, keys(bits), mask);
  }
  ISSP_AVX2 static __m128i pack16(__m256i lanes) {
    return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  }
  ISSP_AVX2 static void store_mixed(Bits* p, Vector bits, uint32_t mask, __m128i value) {
    const __m128i chosen = _mm_packs_epi32(_mm256_castsi256_si128(expand_mask(mask)),
                                           _mm256_extracti128_si256(expand_mask(mask), 1));
    const __m128i mixed = _mm_blendv_epi8(pack16(bits), value, chosen);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), mixed);
  }
  ISSP_AVX2 static void clear(Bits* p, uint32_t mask) {
    store_mixed(p, load(p), mask, _mm_setzero_si128());
  }
};

template <>
struct Lanes<BFloat16> : Lanes16 {
  ISSP_AVX2 static void store_shrunk(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    const __m256i product = flushed(_mm256_mul_ps(wide, _mm256_set1_ps(shrink)));
    const __m256i low_bit = _mm256_and_si256(_mm256_srli_epi32(product, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(low_bit, _mm256_set1_epi32(0x7fff));
    store_mixed(p, bits, mask, pack16(_mm256_srli_epi32(_mm256_add_epi32(product, half), 16)));
  }
  ISSP_AVX2 static void store_scaled(Bits* p, Vector bits, uint32_t mask, float shrink) {
    store_shrunk(p, bits, mask, shrink);
  }
};

template <>
struct Lanes<Float16> : Lanes16 {
  ISSP_AVX2 static void store_shrunk(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m256 wide = _mm256_cvtph_ps(pack16(bits));
    const __m256 product = _mm256_mul_ps(wide, _mm256_set1_ps(shrink));
    store_mixed(p, bits, mask, _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
  }
  ISSP_AVX2 static void store_scaled(Bits* p, Vector bits, uint32_t mask, float shrink) {
    store_shrunk(p, bits, mask, shrink);
  }
};

// Eight floats with the arithmetic of update.h.
struct Floats {
  __m256 v;
  static constexpr int width = 8;

  ISSP_AVX2 explicit Floats(float x) : v(_mm256_set1_ps(x)) {}
  ISSP_AVX2 Floats(__m256 x) : v(x) {}
  ISSP_AVX2 static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  ISSP_AVX2 static Floats load_bfloat16(const uint16_t* p) {
    const __m128i bits16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits16), 16));
  }
  ISSP_AVX2 void store(float* p) const { _mm256_storeu_ps(p, v); }
};
ISSP_AVX2 inline Floats operator+(Floats a, Floats b) {
  return _mm256_add_ps(a.v, b.v);
}
ISSP_AVX2 inline Floats operator-(Floats a, Floats b) {
  return _mm256_sub_ps(a.v, b.v);
}
ISSP_AVX2 inline Floats operator-(Floats a) {
  return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f));
}
ISSP_AVX2 inline Floats fused(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a.v, b.v, c.v);
}
ISSP_AVX2 inline Floats times(Floats a, Floats b) {
  return _mm256_mul_ps(a.v, b.v);
}
ISSP_AVX2 inline Floats over(Floats a, Floats b) {
  return _mm256_div_ps(a.v, b.v);
}
ISSP_AVX2 inline Floats root(Floats a) {
  return _mm256_sqrt_ps(a.v);
}
ISSP_AVX2 inline Floats flushed(Floats a) {
  return _mm256_castsi256_ps(Lanes32::flushed(a.v));
}

}  // namespace issp::avx2
