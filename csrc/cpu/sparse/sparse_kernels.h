// The vectorized kernels of sparse convolutions and matrix products, and the table of the kernels
// that the CPU supports.
//
// The kernels work on tiles. A tile holds the input of some output pixels: all pixels of all
// input channels that their taps read, copied (and widened) to memory of the thread. So padding,
// stride, dilation, upsampling and the axis order of x are handled once per tile and not once per
// entry. An entry of the weight is then an offset into the tile and a value.
//
// The order of pixels in a tile keeps all vectors of an entry aligned: lane l of vector j holds
// column segment * l + j. The vector of the next column is thus the next vector in memory, not a
// vector that crosses a cache line. On Sapphire Rapids a 64-byte load that crosses a line costs two
// loads, and two thirds of the loads of a 3x3 kernel would.
#pragma once

#include <cstdint>

namespace issp {

constexpr int kMaxSegment = 4;  // vectors per row of a register block
constexpr int kMaxRows = 16;    // rows of a register block

// Entries that are summed in registers before the sum is added to the total (blocked summation).
// Without blocks the result loses two to three times the precision of a dense convolution, which
// also sums in blocks.
constexpr int64_t kSumBlock = 32;

// The maximum rows of a register block for `i` rows of the weight and `segment` vectors, with
// `registers` accumulators besides the operands. Sixteen accumulators hide the latency of a
// multiply-add. More of them save loads only where several rows of the weight share a pixel.
constexpr int max_rows(int i, int segment, int registers) {
  const int rows = (i == 1 ? registers * 2 / 3 : registers) / (i * segment);
  return rows < kMaxRows ? rows : kMaxRows;
}

// The blocks of rows of the weight that one kernel call processes, and where the sums are stored.
template <typename Real>
struct MultiplyParams {
  const int32_t* offsets;  // into the tile, per entry
  const Real* values;      // entry e: i numbers from values + e * v on
  int64_t v;
  const int32_t *first, *last;  // [blocks]: the entries first[b]..last[b] - 1 of block b
  int64_t blocks;
  const Real* bias;     // v per block; null: none
  const Real* from;     // initial sums, instead of bias; null: none
  int64_t from_stride;  // between rows of the weight, v of which are a block
  Real* to;
  int64_t to_stride;
  // 0: a register block is stored as [rows][segment][lanes]. Otherwise its pixels are stored in
  // image order, with `line` elements between rows.
  int64_t line;
};

// Real: the type of the sums; double for float64, otherwise float.
template <typename Real>
struct SparseKernels {
  // For each block, i rows of the weight (1, 2 or 4), r rows and s vectors of pixels: bias[i] + sum
  // over e of values[e][i] * tile[offsets[e] + r * row_stride + s * lanes + lane].
  using Multiply = void (*)(const Real* tile, int64_t row_stride,
                            const MultiplyParams<Real>& params);
  // sums[e * sum_stride + i] += sum over r, s, lanes of grad[i][r][s] * tile[offsets[e] + ...].
  // within: [s][lanes], all bits set where a lane lies in the result; read by partial_dot.
  using Dot = void (*)(const Real* tile, int64_t row_stride, const int32_t* offsets, int64_t count,
                       const Real* grad, const Real* within, double* sums, int64_t sum_stride);

  int lanes;
  int segment[3];            // maximum segment, by log2 of the weight's rows
  int rows[3][kMaxSegment];  // maximum rows of a register block, by segment - 1
  Multiply multiply[3][kMaxSegment][kMaxRows];
  Dot dot[3][kMaxSegment][kMaxRows];
  Dot partial_dot[3][kMaxSegment][kMaxRows];
  // Converts rows of pixels to segment order. Row r of `out` is [left + segment + right][lanes]
  // from out_stride * r on. Its vector left + j, -left <= j < segment + right, holds in lane l the
  // pixel at column j + segment * l of the row that begins at in + r * stride. `before` and `after`
  // say whether the columns below 0 and from segment * lanes on exist; otherwise they are 0. The
  // same for each of `planes` planes, with strides plane_stride and out_plane. Indexed by segment -
  // 1.
  using ToSegments = void (*)(const Real* in, int64_t stride, int64_t plane_stride, int64_t rows,
                              int64_t planes, int64_t left, bool before, int64_t right, bool after,
                              Real* out, int64_t out_stride, int64_t out_plane);
  ToSegments to_segments[kMaxSegment];
  // Converts back: line[r * stride + j + segment * lane] = acc[r][j][lane], j < segment. Indexed by
  // segment - 1.
  using FromSegments = void (*)(const Real* acc, int64_t rows, Real* line, int64_t stride);
  FromSegments from_segments[kMaxSegment];
  // out[c * out_stride + i] = in[c * in_stride + i], c < count, i < vectors * lanes.
  void (*copy)(const Real* in, int64_t in_stride, int64_t count, int64_t vectors, Real* out,
               int64_t out_stride);
  // out[c][lane] = in[lane * in_stride + c], c < count, lane < lanes; scatter_tokens is the
  // inverse.
  void (*gather_tokens)(const Real* in, int64_t in_stride, int64_t count, Real* out,
                        int64_t out_stride);
  void (*scatter_tokens)(const Real* in, int64_t in_stride, int64_t count, Real* out,
                         int64_t out_stride);
  // line = activation(line) + residual (null: none). gelu is the one with erf.
  void (*activate)(Real* line, int64_t count, int activation, Real scale, const Real* residual);
};

template <typename Real>
const SparseKernels<Real>& sparse_kernels();

}  // namespace issp
