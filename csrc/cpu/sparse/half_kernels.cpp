#include "cpu/sparse/half_kernels.h"

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/prune/prune_kernels.h"
#include "cpu/simd/avx512fp16.h"

#if ISSP_AVX512FP16
#include <immintrin.h>

#define ISSP_ISA avx512fp16
#define ISSP_TARGET                                                                    \
  __attribute__((                                                                      \
      target("avx512fp16,avx512vbmi,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c," \
             "prefer-vector-width=512")))
#define ISSP_BYTES 64
#include "cpu/sparse/reorder.inc.h"

namespace issp::avx512fp16 {

ISSP_INLINE const uint32_t* next_row(const uint32_t* row, int64_t stride) {
  row += stride;
  asm("" : "+r"(row));  // see multiply.inc.h
  return row;
}

// Adds the entries begin..end - 1 to `sum`. A value is stored twice because a broadcast of 32 bits
// is a load, while one of 16 bits takes a shuffle, on a port of the multiply-adds.
template <int I, int S, int R>
ISSP_INLINE void add_entries(const uint32_t* tile, int64_t row_stride, const HalfParams& params,
                             int64_t begin, int64_t end, __m512h (&sum)[I][R][S]) {
  for (int64_t e = begin; e < end; ++e) {
    const uint32_t* row = tile + params.offsets[e];
    __m512h weight[I];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) {
      weight[i] = __m512h(_mm512_set1_epi32(int(params.values[e * params.v + i])));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const __m512h pixels = __m512h(_mm512_loadu_si512(row + s * kPairs));
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) sum[i][r][s] = _mm512_fmadd_ph(weight[i], pixels, sum[i][r][s]);
      }
      if (r + 1 < R) row = next_row(row, row_stride);
    }
  }
}

// Adds `count` vectors of sums to a row's totals, which begin with `initial`. Loads that convert
// need no shuffle, as the halves of a register would.
ISSP_INLINE void add_to_totals(const uint32_t* sums, int64_t count, bool is_first, float initial,
                               float* totals) {
  const __mmask16 kept = is_first ? 0 : 0xffff;
  const __m512 begin = _mm512_set1_ps(initial);
#pragma GCC unroll 4
  for (int64_t h = 0; h < 2 * count; ++h, totals += kPairs, sums += kPairs / 2) {
    const auto bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums));
    const __m512 before = _mm512_mask_load_ps(begin, kept, totals);
    _mm512_store_ps(totals, _mm512_add_ps(before, _mm512_cvtph_ps(bits)));
  }
}

// A mask instead of a branch decides whether sums begin at zero. With two ways to the loop over
// the entries, the compiler would keep them twice.
template <int I, int S, int R>
ISSP_TARGET void multiply(const uint32_t* tile, int64_t row_stride, const HalfParams& params) {
  constexpr int64_t size = R * S * kPairs;
  for (int64_t b = 0; b < params.blocks; ++b) {
    const int64_t start = params.starts[b], stop = params.ends[b], last = params.last[b];
    int64_t begin = params.first[b];
    if (begin == last && start != stop) continue;  // a row without entries has a total
    float* const totals = params.totals + b * params.v * 2 * size;
    do {
      const int64_t done = (begin - start) % kHalfSumBlock;
      const int64_t full = begin - done + kHalfSumBlock, end = full < last ? full : last;
      const __mmask16 begun = done ? 0xffff : 0;
      uint32_t* sums = params.sums + b * params.v * size;
      asm("" : "+r"(sums));  // see next_row
      __m512h sum[I][R][S];
#pragma GCC unroll 64
      for (int p = 0; p < I * R * S; ++p) {
        (&sum[0][0][0])[p] = __m512h(_mm512_maskz_load_epi32(begun, sums + p * kPairs));
      }
      add_entries<I, S, R>(tile, row_stride, params, begin, end, sum);
#pragma GCC unroll 64
      for (int p = 0; p < I * R * S; ++p) {
        _mm512_store_si512(sums + p * kPairs, __m512i((&sum[0][0][0])[p]));
      }
      const bool is_complete = end == full || end == stop, is_first = end - start <= kHalfSumBlock;
      for (int i = 0; is_complete && i < I; ++i) {
        const float bias = params.bias ? params.bias[b * params.v + i] : 0.0f;
        add_to_totals(sums + i * size, R * S, is_first, bias, totals + i * 2 * size);
      }
      begin = end;
    } while (begin < last);
  }
}

// Where pairs are made: up to four vectors of pixels. Of up to 32 columns, one of each half; of 48,
// a third one with the last 16 of each; of 64, two of each.
template <int S>
constexpr int kSources = S <= 2 ? 2 : S;

struct Place {
  int source, lane;
};

// Where lane l of vector j of a row of pairs is.
template <int S>
constexpr Place place_of(int j, int l) {
  constexpr int lanes = int(kPairs);
  const int half = l / lanes, column = S * (l % lanes) + j;
  if (S == 4) return {2 * half + column / 32, column % 32};
  if (column < 32) return {half, column};
  return {2, column - 32 + lanes * half};
}

struct Bytes {
  alignas(64) uint8_t at[64];
};

template <int S, int J>
constexpr Bytes place_bytes() {
  Bytes bytes = {};
  for (int b = 0; b < 64; ++b) bytes.at[b] = uint8_t(2 * place_of<S>(J, b / 2).lane + b % 2);
  return bytes;
}

template <int S, int J, int Source>
constexpr uint64_t place_mask() {
  uint64_t mask = 0;
  for (int b = 0; b < 64; ++b) mask |= uint64_t(place_of<S>(J, b / 2).source == Source) << b;
  return mask;
}

// Vector J of a row of pairs. A shuffle of bytes is one operation; of 16-bit lanes it is two, or
// three if it has two sources.
template <int S, int J>
ISSP_INLINE __m512i pairs(const __m512i (&from)[4]) {
  static constexpr Bytes kBytes = place_bytes<S, J>();
  const __m512i bytes = _mm512_load_si512(kBytes.at);
  __m512i v = _mm512_permutexvar_epi8(bytes, from[0]);
  v = _mm512_mask_permutexvar_epi8(v, place_mask<S, J, 1>(), bytes, from[1]);
  if (S >= 3) v = _mm512_mask_permutexvar_epi8(v, place_mask<S, J, 2>(), bytes, from[2]);
  if (S == 4) v = _mm512_mask_permutexvar_epi8(v, place_mask<S, J, 3>(), bytes, from[3]);
  return v;
}

template <int S, int... J>
ISSP_INLINE void store_each_pair(const __m512i (&from)[4], uint32_t* out,
                                 std::integer_sequence<int, J...>) {
  (_mm512_store_si512(out + J * kPairs, (pairs<S, J>(from))), ...);
}

// Vectors S.. of a row of pairs: the column beyond is that of the next lane, and a new one in the
// last lane of each half.
template <int S>
ISSP_INLINE void store_beyond(const uint16_t* first, const uint16_t* second,
                              const HalfColumns& columns, int64_t reach, uint32_t* out) {
  static constexpr auto kDown =
      lane_table<uint16_t>([](int l) { return (2 * l + 2) | (2 * l + 3) << 8; });
  for (int64_t h = 0; h < reach; ++h) {
    __m512i v =
        _mm512_maskz_permutexvar_epi8(0x3fffffff3fffffffu, __m512i(indices<uint16_t>(kDown)),
                                      _mm512_load_si512(out + h * kPairs));
    if (columns.beyond <= h && h < columns.end) {
      v = _mm512_mask_set1_epi16(v, 0x8000u, short(first[S * kPairs + h]));
      v = _mm512_mask_set1_epi16(v, 0x80000000u, short(second[S * kPairs + h]));
    }
    _mm512_store_si512(out + (S + h) * kPairs, v);
  }
}

template <int S>
ISSP_TARGET void to_pairs(const HalfRows& from, const HalfColumns& columns, int64_t rows,
                          int64_t planes, int64_t reach, uint32_t* out, int64_t out_stride,
                          int64_t out_plane) {
  const auto low = __mmask32(columns.inside), high = __mmask32(columns.inside >> 32);
  for (int64_t p = 0; p < planes; ++p) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = p * from.plane_stride + r * from.stride;
      const bool has_first = from.first_begin <= r && r < from.first_end;
      const bool has_second = from.second_begin <= r && r < from.second_end;
      const uint16_t* const first = has_first ? from.first + at : from.zeros;
      const uint16_t* const second = has_second ? from.second + at : from.zeros;
      uint32_t* const to = out + p * out_plane + r * out_stride;
      __m512i pixels[4];
      pixels[0] = _mm512_maskz_loadu_epi16(low, first);
      pixels[S == 4 ? 2 : 1] = _mm512_maskz_loadu_epi16(low, second);
      if (S == 3) {
        const __m256i last = _mm256_maskz_loadu_epi16(__mmask16(high), second + 32);
        pixels[2] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(__mmask16(high), first + 32)), last, 1);
      }
      if (S == 4) {
        pixels[1] = _mm512_maskz_loadu_epi16(high, first + 32);
        pixels[3] = _mm512_maskz_loadu_epi16(high, second + 32);
      }
      store_each_pair<S>(pixels, to, std::make_integer_sequence<int, S>{});
      store_beyond<S>(first, second, columns, reach, to);
    }
  }
}

// Stores the first `count` pixels of a row; all, if IsWhole.
template <int S, bool IsWhole>
ISSP_INLINE void store_row(const float* totals, const HalfEpilogue& epilogue,
                           const uint16_t* residual, int64_t count, uint16_t* to) {
  typename Simd<float>::Vector v[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) load<float>(totals + s * 2 * kPairs, v[s]);
  alignas(64) float line[S * kPairs];
  from_segment_order<float, S>(v, line);
  if (epilogue.activation == 2)
    epilogue.activate(line, S * kPairs, epilogue.activation, 1, nullptr);
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    const int64_t left = count - s * kPairs;
    const auto mask = __mmask16(IsWhole || left >= kPairs ? 0xffff
                                : left > 0                ? (1 << left) - 1
                                                          : 0);
    __m512 y = _mm512_load_ps(line + s * kPairs);
    if (epilogue.activation == 1) y = _mm512_max_ps(_mm512_setzero_ps(), y);  // NaN stays
    if (residual) {
      const __m256i bits = _mm256_maskz_loadu_epi16(mask, residual + s * kPairs);
      y = _mm512_add_ps(y, _mm512_cvtph_ps(bits));
    }
    const __m256i bits =
        _mm512_maskz_cvtps_ph(0xffff, y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (IsWhole) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + s * kPairs), bits);
    } else {
      _mm256_mask_storeu_epi16(to + s * kPairs, mask, bits);
    }
  }
}

template <int S>
ISSP_TARGET void store_pairs(const float* totals, const HalfEpilogue& epilogue, uint16_t* first,
                             uint16_t* second) {
  const uint16_t* const residual = epilogue.residual;
  const uint16_t* const partners = residual ? residual + (second - first) : nullptr;
  constexpr int64_t whole = S * kPairs;
  if (epilogue.first >= whole && epilogue.second >= whole) {
    store_row<S, true>(totals, epilogue, residual, whole, first);
    return store_row<S, true>(totals + kPairs, epilogue, partners, whole, second);
  }
  store_row<S, false>(totals, epilogue, residual, epilogue.first, first);
  if (epilogue.second <= 0) return;
  store_row<S, false>(totals + kPairs, epilogue, partners, epilogue.second, second);
}

template <int I, int S, int R>
void fill(HalfKernels& kernels, int log) {
  if constexpr (R > 0) {
    kernels.multiply[log][S - 1][R - 1] = multiply<I, S, R>;
    fill<I, S, R - 1>(kernels, log);
  }
}

template <int S>
void fill(HalfKernels& kernels) {
  fill<1, S, max_rows(1, S, 24)>(kernels, 0);
  fill<2, S, max_rows(2, S, 24)>(kernels, 1);
  fill<4, S, max_rows(4, S, 24)>(kernels, 2);
  kernels.to_pairs[S - 1] = to_pairs<S>;
  kernels.store_pairs[S - 1] = store_pairs<S>;
}

HalfKernels table() {
  HalfKernels kernels = {};
  fill<1>(kernels), fill<2>(kernels), fill<3>(kernels), fill<4>(kernels);
  return kernels;
}

}  // namespace issp::avx512fp16
#endif

namespace issp {

const HalfKernels* half_kernels() {
#if ISSP_AVX512FP16
  static const HalfKernels kernels = avx512fp16::table();
  if (cpu_capability({}) == "avx512fp16") return &kernels;
#endif
  return nullptr;
}

}  // namespace issp
