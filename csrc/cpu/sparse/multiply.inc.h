// The kernels of sparse_kernels.h for one instruction set. sparse_kernels.cpp includes this file
// once per set, with these defined: ISSP_ISA (a namespace), ISSP_TARGET (its function attribute),
// ISSP_BYTES (of a vector), ISSP_REGISTERS (accumulators besides the operands) and fma(a, b, c) in
// ISSP_ISA.

#include "cpu/sparse/reorder.inc.h"

namespace issp::ISSP_ISA {

// Keeps the address of the next row in one register. Otherwise the compiler computes row plus
// column for every load, and those additions compete with the multiply-adds for ports.
template <typename Real>
ISSP_INLINE const Real* next_row(const Real* row, int64_t stride) {
  row += stride;
#ifdef __GNUC__
  asm("" : "+r"(row));
#endif
  return row;
}

// Adds the entries begin..end - 1 to `sum`. Per entry: I broadcasts, R * S loads and I * R * S
// multiply-adds; all accumulators are in registers. With I = 1 loads are the bottleneck (two per
// cycle, as many as multiply-adds), with I = 4 multiply-adds.
template <typename Real, int I, int S, int R>
ISSP_INLINE void add_entries(const Real* tile, int64_t row_stride, const int32_t* offsets,
                             const Real* values, int64_t value_stride, int64_t begin, int64_t end,
                             typename Simd<Real>::Vector (&sum)[I][R][S]) {
  using Vector = typename Simd<Real>::Vector;
  for (int64_t e = begin; e < end; ++e) {
    const Real* row = tile + offsets[e];
    Vector weight[I];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) weight[i] = values[e * value_stride + i] - Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        Vector pixels;
        load<Real>(row + s * Simd<Real>::lanes, pixels);
#pragma GCC unroll 4
        for (int i = 0; i < I; ++i) sum[i][r][s] = fma(weight[i], pixels, sum[i][r][s]);
      }
      if (r + 1 < R) row = next_row(row, row_stride);
    }
  }
}

// Horizontal sums of `lanes` vectors, one per lane of parts[0], in a fixed order: each level adds
// adjacent lanes and packs the results of two vectors into one.
template <typename Real>
ISSP_INLINE void add_lanes(typename Simd<Real>::Vector* parts) {
  constexpr int lanes = Simd<Real>::lanes;
  static constexpr auto kEven = lane_table<Real>([](int l) { return 2 * l; });
  static constexpr auto kOdd = lane_table<Real>([](int l) { return 2 * l + 1; });
  const auto even = indices<Real>(kEven), odd = indices<Real>(kOdd);
#pragma GCC unroll 8
  for (int left = lanes / 2; left; left /= 2) {
#pragma GCC unroll 16
    for (int p = 0; p < left; ++p) {
      const typename Simd<Real>::Vector a = parts[2 * p], b = parts[2 * p + 1];
      parts[p] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  }
}

// The pixels of the gradient stay in registers, and an entry loads its pixels once for I rows.
// Partial: clears the lanes of x beyond the result. The gradient is 0 in them, but 0 * NaN would be
// NaN.
template <typename Real, int I, int S, int R, bool Partial>
ISSP_TARGET void dot(const Real* tile, int64_t row_stride, const int32_t* offsets, int64_t count,
                     const Real* grad, const Real* within, double* sums, int64_t sum_stride) {
  using Vector = typename Simd<Real>::Vector;
  using Bits = typename LaneTable<Real>::Indices;
  constexpr int lanes = Simd<Real>::lanes, kBatch = lanes > I ? lanes / I : 1;
  Vector g[I][R][S], mask[S];
  memcpy(g, grad, sizeof(g));
  if (Partial) memcpy(mask, within, sizeof(mask));
  for (int64_t begin = 0; begin < count; begin += kBatch) {
    Vector parts[kBatch * I > lanes ? kBatch * I : lanes];
    for (int k = 0; k < kBatch; ++k) {
      const int64_t e = begin + k < count ? begin + k : count - 1;
      const Real* const at = tile + offsets[e];
      Vector sum[I] = {};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          Vector pixels;
          load<Real>(at + r * row_stride + s * lanes, pixels);
          if (Partial) pixels = Vector(Bits(pixels) & Bits(mask[s]));
#pragma GCC unroll 4
          for (int i = 0; i < I; ++i) sum[i] = fma(g[i][r][s], pixels, sum[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) parts[k * I + i] = sum[i];
    }
    for (int first = 0; first < kBatch * I; first += lanes) {
      add_lanes<Real>(parts + first);
      for (int l = 0; l < lanes; ++l) {
        const int64_t e = begin + (first + l) / I;
        if (e < count) sums[e * sum_stride + (first + l) % I] += double(parts[first][l]);
      }
    }
  }
}

// Stores a register block: in segment order, or with its pixels in image order.
template <typename Real, int S, int R>
ISSP_INLINE void store_sums(const typename Simd<Real>::Vector (&total)[R][S], int64_t line,
                            Real* to) {
  constexpr int lanes = Simd<Real>::lanes;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (line) {
      from_segment_order<Real, S>(total[r], to + r * line);
      continue;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) store<Real>(total[r][s], to + (r * S + s) * lanes);
  }
}

// Sums blocks of kSumBlock entries in registers and adds them to totals in memory, so that all
// registers are available for accumulators. One call processes all blocks of rows: with few entries
// per row, a call per block would cost as much as its multiply-adds.
template <typename Real, int I, int S, int R>
ISSP_TARGET void multiply(const Real* tile, int64_t row_stride,
                          const MultiplyParams<Real>& params) {
  using Vector = typename Simd<Real>::Vector;
  constexpr int lanes = Simd<Real>::lanes, size = R * S * lanes;
  alignas(ISSP_BYTES) Real partial[I * size];
  for (int64_t b = 0; b < params.blocks; ++b) {
    int64_t begin = params.first[b];
    const int64_t last = params.last[b];
    Real* const to = params.to + b * params.v * params.to_stride;
    const Real* from = params.from ? params.from + b * params.v * params.from_stride : nullptr;
    if (from == to && begin == last) continue;
    const Real* const bias = params.bias ? params.bias + b * params.v : nullptr;
    int64_t from_stride = params.from_stride;
    for (bool more = true; more;) {
      const int64_t end = begin + kSumBlock < last ? begin + kSumBlock : last;
      Vector sum[I][R][S] = {};
      add_entries<Real, I, S, R>(tile, row_stride, params.offsets, params.values, params.v, begin,
                                 end, sum);
      begin = end, more = begin < last;
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) {
#pragma GCC unroll 64
        for (int p = 0; p < R * S; ++p) {
          Vector total = bias ? bias[i] - Vector{} : Vector{};
          if (from) load<Real>(from + i * from_stride + p * lanes, total);
          Vector& accumulator = (&sum[i][0][0])[p];
          accumulator = total + accumulator;
        }
        store_sums<Real, S, R>(sum[i], more ? 0 : params.line,
                               more ? partial + i * size : to + i * params.to_stride);
      }
      from = partial, from_stride = size;
    }
  }
}

template <typename Real>
ISSP_TARGET void activate(Real* line, int64_t count, int activation, Real scale,
                          const Real* residual) {
  if (activation == 1) {
    for (int64_t i = 0; i < count; ++i) line[i] = line[i] < 0 ? 0 : line[i];
  } else if (activation == 2) {
    for (int64_t i = 0; i < count; ++i) line[i] = gelu(line[i]);
  }
  if (scale != 1) {
    for (int64_t i = 0; i < count; ++i) line[i] *= scale;
  }
  if (!residual) return;
  for (int64_t i = 0; i < count; ++i) line[i] += residual[i];
}

template <typename Real, int I, int S, int R>
void fill_rows(SparseKernels<Real>& kernels, int log) {
  if constexpr (R > 0) {
    kernels.multiply[log][S - 1][R - 1] = multiply<Real, I, S, R>;
    kernels.dot[log][S - 1][R - 1] = dot<Real, I, S, R, false>;
    kernels.partial_dot[log][S - 1][R - 1] = dot<Real, I, S, R, true>;
    fill_rows<Real, I, S, R - 1>(kernels, log);
  }
}

template <typename Real, int I, int S = 1>
void fill(SparseKernels<Real>& kernels, int log) {
  constexpr int rows = max_rows(I, S, ISSP_REGISTERS);
  if constexpr (rows > 0) {
    kernels.segment[log] = S;
    kernels.rows[log][S - 1] = rows;
    fill_rows<Real, I, S, rows>(kernels, log);
    if constexpr (S < kMaxSegment) fill<Real, I, S + 1>(kernels, log);
  }
}

template <typename Real>
SparseKernels<Real> kernels() {
  SparseKernels<Real> table = {};
  table.lanes = Simd<Real>::lanes;
  fill<Real, 1>(table, 0), fill<Real, 2>(table, 1), fill<Real, 4>(table, 2);
  table.to_segments[0] = rows_to_segments<Real, 1>;
  table.to_segments[1] = rows_to_segments<Real, 2>;
  table.to_segments[2] = rows_to_segments<Real, 3>;
  table.to_segments[3] = rows_to_segments<Real, 4>;
  table.from_segments[0] = segments_to_rows<Real, 1>;
  table.from_segments[1] = segments_to_rows<Real, 2>;
  table.from_segments[2] = segments_to_rows<Real, 3>;
  table.from_segments[3] = segments_to_rows<Real, 4>;
  table.copy = copy<Real>;
  table.gather_tokens = gather_tokens<Real>;
  table.scatter_tokens = scatter_tokens<Real>;
  table.activate = activate<Real>;
  return table;
}

#undef ISSP_INLINE

}  // namespace issp::ISSP_ISA
