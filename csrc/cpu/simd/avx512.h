// AVX-512 F, BW, VL, DQ: sixteen elements at a time, each in a 32-bit lane independent of its
// storage type. Keys are below 2^31, so signed comparison orders them: a bound must be below 2^31
// as well, and what follows the largest NaN is not.
#pragma once

#include <immintrin.h>

#include "semantics.h"

#define ISSP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt,bmi2")))

namespace issp::avx512 {

struct Lanes32 {
  using Vector = __m512i;
  using Mask = __mmask16;
  static constexpr int width = 16;

  // Joins the masks of 64 elements to one word, in mask registers. With general registers each mask
  // would take a move, a shift and an or: most instructions of a pass.
  ISSP_AVX512 static uint64_t join(const Mask* m) {
    const __mmask32 low = _mm512_kunpackw(m[1], m[0]), high = _mm512_kunpackw(m[3], m[2]);
    return _cvtmask64_u64(_mm512_kunpackd(high, low));
  }
  ISSP_AVX512 static Mask below(Vector keys, uint32_t bound) {
    return _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(int(bound)));
  }
  ISSP_AVX512 static Mask not_above(Vector keys, uint32_t bound) {
    return _mm512_cmple_epi32_mask(keys, _mm512_set1_epi32(int(bound)));
  }
  ISSP_AVX512 static Mask same(Vector keys, uint32_t bound) {
    return _mm512_cmpeq_epi32_mask(keys, _mm512_set1_epi32(int(bound)));
  }
  ISSP_AVX512 static Mask lsb(Vector bits) {
    return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1));
  }
  // 0 < key < bound: as an unsigned number, zero minus one is the largest.
  ISSP_AVX512 static Mask small(Vector keys, uint32_t bound) {
    const __m512i less_one = _mm512_sub_epi32(keys, _mm512_set1_epi32(1));
    return _mm512_cmplt_epu32_mask(less_one, _mm512_set1_epi32(int(bound) - 1));
  }
  // Compress to a register, then a full store: vpcompressd to memory is microcoded on some CPUs.
  ISSP_AVX512 static void put(uint32_t* out, Vector keys, uint32_t mask) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(mask), keys));
  }
  // Replaces products below the smallest normal float by a zero of their sign.
  ISSP_AVX512 static __m512i flushed(__m512 product) {
    const __m512i bits = _mm512_castps_si512(product);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x00800000));
    return _mm512_mask_and_epi32(bits, tiny, bits, _mm512_set1_epi32(int(0x80000000u)));
  }
};

// A cache line of eight 64-bit words in a register.
struct Words {
  __m512i v;

  ISSP_AVX512 Words() : v(_mm512_setzero_si512()) {}
  ISSP_AVX512 static Words load(const uint64_t* p) {
    Words words;
    words.v = _mm512_loadu_si512(p);
    return words;
  }
  ISSP_AVX512 void set(int64_t i, uint64_t word) {
    v = _mm512_mask_set1_epi64(v, __mmask8(1u << i), int64_t(word));
  }
  ISSP_AVX512 void store(uint64_t* p) const { _mm512_storeu_si512(p, v); }
};

template <typename T>
struct Lanes;

template <>
struct Lanes<Float32> : Lanes32 {
  using Bits = uint32_t;
  ISSP_AVX512 static Vector load(const Bits* p) { return _mm512_loadu_si512(p); }
  ISSP_AVX512 static Vector keys(Vector bits) {
    return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  }
  ISSP_AVX512 static Mask less(Vector bits, uint32_t bound) { return below(keys(bits), bound); }
  ISSP_AVX512 static Mask up_to(Vector bits, uint32_t bound) {
    return not_above(keys(bits), bound);
  }
  ISSP_AVX512 static Mask equal(Vector bits, uint32_t bound) { return same(keys(bits), bound); }
  ISSP_AVX512 static Mask tiny(Vector bits, uint32_t bound) { return small(keys(bits), bound); }
  ISSP_AVX512 static void compress(uint32_t* out, Vector bits, uint32_t mask) {
    put(out, keys(bits), mask);
  }
  ISSP_AVX512 static void store_shrunk(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(shrink));
    _mm512_storeu_si512(p, _mm512_mask_mov_epi32(bits, __mmask16(mask), flushed(product)));
  }
  ISSP_AVX512 static void store_scaled(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m512 w = _mm512_castsi512_ps(bits);
    _mm512_storeu_ps(p, _mm512_mask_mul_ps(w, __mmask16(mask), w, _mm512_set1_ps(shrink)));
  }
  ISSP_AVX512 static void clear(Bits* p, uint32_t mask) {
    _mm512_mask_storeu_epi32(p, __mmask16(mask), _mm512_setzero_si512());
  }
};

// The 16-bit types: their bits are zero-extended to 32-bit lanes.
struct Lanes16 : Lanes32 {
  using Bits = uint16_t;
  ISSP_AVX512 static Vector load(const Bits* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  ISSP_AVX512 static Vector keys(Vector bits) {
    return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff));
  }
  ISSP_AVX512 static Mask less(Vector bits, uint32_t bound) { return below(keys(bits), bound); }
  ISSP_AVX512 static Mask up_to(Vector bits, uint32_t bound) {
    return not_above(keys(bits), bound);
  }
  ISSP_AVX512 static Mask equal(Vector bits, uint32_t bound) { return same(keys(bits), bound); }
  ISSP_AVX512 static Mask tiny(Vector bits, uint32_t bound) { return small(keys(bits), bound); }
  ISSP_AVX512 static void compress(uint32_t* out, Vector bits, uint32_t mask) {
    put(out, keys(bits), mask);
  }
  ISSP_AVX512 static void clear(Bits* p, uint32_t mask) {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm256_setzero_si256());
  }
};

template <>
struct Lanes<BFloat16> : Lanes16 {
  ISSP_AVX512 static void store_shrunk(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    const __m512i product = flushed(_mm512_mul_ps(wide, _mm512_set1_ps(shrink)));
    const __m512i low_bit = _mm512_and_si512(_mm512_srli_epi32(product, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(low_bit, _mm512_set1_epi32(0x7fff));
    const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(product, half), 16);
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm512_cvtepi32_epi16(even));
  }
  ISSP_AVX512 static void store_scaled(Bits* p, Vector bits, uint32_t mask, float shrink) {
    store_shrunk(p, bits, mask, shrink);
  }
};

template <>
struct Lanes<Float16> : Lanes16 {
  ISSP_AVX512 static void store_shrunk(Bits* p, Vector bits, uint32_t mask, float shrink) {
    const __m512 wide = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
    const __m512 product = _mm512_mul_ps(wide, _mm512_set1_ps(shrink));
    const __m256i even = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, __mmask16(mask), even);
  }
  ISSP_AVX512 static void store_scaled(Bits* p, Vector bits, uint32_t mask, float shrink) {
    store_shrunk(p, bits, mask, shrink);
  }
};

// Sixteen floats with the arithmetic of update.h.
struct Floats {
  __m512 v;
  static constexpr int width = 16;

  ISSP_AVX512 explicit Floats(float x) : v(_mm512_set1_ps(x)) {}
  ISSP_AVX512 Floats(__m512 x) : v(x) {}
  ISSP_AVX512 static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  ISSP_AVX512 static Floats load_bfloat16(const uint16_t* p) {
    const __m256i bits16 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits16), 16));
  }
  ISSP_AVX512 void store(float* p) const { _mm512_storeu_ps(p, v); }
};
ISSP_AVX512 inline Floats operator+(Floats a, Floats b) {
  return _mm512_add_ps(a.v, b.v);
}
ISSP_AVX512 inline Floats operator-(Floats a, Floats b) {
  return _mm512_sub_ps(a.v, b.v);
}
ISSP_AVX512 inline Floats operator-(Floats a) {
  return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f));
}
ISSP_AVX512 inline Floats fused(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a.v, b.v, c.v);
}
ISSP_AVX512 inline Floats times(Floats a, Floats b) {
  return _mm512_mul_ps(a.v, b.v);
}
ISSP_AVX512 inline Floats over(Floats a, Floats b) {
  return _mm512_div_ps(a.v, b.v);
}
ISSP_AVX512 inline Floats root(Floats a) {
  return _mm512_sqrt_ps(a.v);
}
ISSP_AVX512 inline Floats flushed(Floats a) {
  return _mm512_castsi512_ps(Lanes32::flushed(a.v));
}

}  // namespace issp::avx512
