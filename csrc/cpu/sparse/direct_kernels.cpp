#include "cpu/sparse/direct_kernels.h"

#include "cpu/prune/prune_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ISSP_X86 1
#include <immintrin.h>

// For AVX-512. Pixels are read directly from x; masked loads leave out what lies outside the image.
// Loads of taps beside the center cross cache lines. With dense channels both this kernel and the
// tiled one are limited by L2, which counts lines and not loads. Filling a tile and reordering its
// result costs as much as the multiply-adds of a 3x3 layer of 60 channels at 95 % sparsity.
#define ISSP_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))

namespace issp::avx512 {

template <int S, int R, bool Edge>
ISSP_AVX512 inline __attribute__((always_inline)) __m512 pixels(const float* row, int r, int s,
                                                                __mmask16 first, __mmask16 last,
                                                                const uint16_t* rows) {
  __mmask16 mask = s == 0 ? first : s == S - 1 ? last : __mmask16(0xffff);
  if (Edge) mask &= rows[r];
  if (!Edge && s > 0 && s < S - 1) return _mm512_loadu_ps(row + 16 * s);
  return _mm512_maskz_loadu_ps(mask, row + 16 * s);
}

template <int I, int S, int R, bool Edge>
ISSP_AVX512 void multiply_direct(const DirectParams& params, const float* x,
                                 const DirectEntry* entries, const float* values,
                                 int64_t value_stride, int64_t count, const float* bias, float* y) {
  __m512 total[I * R * S];
#pragma GCC unroll 64
  for (int p = 0; p < I * R * S; ++p) total[p] = _mm512_set1_ps(bias ? bias[p / (R * S)] : 0.0f);
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < count ? begin + kSumBlock : count;
    __m512 sum[I * R * S];
#pragma GCC unroll 64
    for (int p = 0; p < I * R * S; ++p) sum[p] = _mm512_setzero_ps();
    for (int64_t e = begin; e < end; ++e) {
      const DirectEntry entry = entries[e];
      const float* const at = x + entry.offset;
      const __mmask16 first = params.columns[entry.column].first;
      const __mmask16 last = params.columns[entry.column].last;
      const uint16_t* const rows = params.rows + entry.row * kMaxRows;
      __m512 weight[I];
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) weight[i] = _mm512_set1_ps(values[e * value_stride + i]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          const __m512 p = pixels<S, R, Edge>(at + r * params.row_stride, r, s, first, last, rows);
#pragma GCC unroll 4
          for (int i = 0; i < I; ++i) {
            const int n = (i * R + r) * S + s;
            sum[n] = _mm512_fmadd_ps(weight[i], p, sum[n]);
          }
        }
      }
    }
#pragma GCC unroll 64
    for (int p = 0; p < I * R * S; ++p) total[p] = _mm512_add_ps(total[p], sum[p]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* const to = y + i * params.y_plane + r * params.y_row;
#pragma GCC unroll 4
      for (int s = 0; s < S - 1; ++s) _mm512_storeu_ps(to + 16 * s, total[(i * R + r) * S + s]);
      _mm512_mask_storeu_ps(to + 16 * (S - 1), params.tail, total[(i * R + r) * S + S - 1]);
    }
  }
}

}  // namespace issp::avx512

#undef ISSP_AVX512
#endif

namespace issp {

#if ISSP_X86
namespace {

template <int I, int S, int R>
void fill(DirectKernels& kernels, int log) {
  if constexpr (R > 0) {
    kernels.inner[log][S - 1][R - 1] = avx512::multiply_direct<I, S, R, false>;
    kernels.edge[log][S - 1][R - 1] = avx512::multiply_direct<I, S, R, true>;
    fill<I, S, R - 1>(kernels, log);
  }
}

template <int I>
void fill(DirectKernels& kernels, int log) {
  fill<I, 1, max_rows(I, 1, 24)>(kernels, log);
  fill<I, 2, max_rows(I, 2, 24)>(kernels, log);
  fill<I, 3, max_rows(I, 3, 24)>(kernels, log);
  fill<I, 4, max_rows(I, 4, 24)>(kernels, log);
}

DirectKernels table() {
  DirectKernels kernels = {};
  fill<1>(kernels, 0), fill<2>(kernels, 1), fill<4>(kernels, 2);
  return kernels;
}

}  // namespace
#endif

const DirectKernels* direct_kernels() {
#if ISSP_X86
  static const DirectKernels kernels = table();
  const std::string in_use = cpu_capability({});
  if (in_use != "scalar" && in_use != "avx2") return &kernels;
#endif
  return nullptr;
}

}  // namespace issp
