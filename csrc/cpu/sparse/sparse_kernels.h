// The vectorised parts of the sparse products and the run-time choice of their instruction set.
//
// Everything happens in a tile: some output pixels and all input channels they see, copied (and
// widened) into memory of the thread's in, so that padding, stride, dilation, upsampling and the
// order of the axes in x cost something once per tile instead of once per entry. What remains of an
// entry is an offset into the tile and a weight. Pixels lie in the tile in such an order that every
// vector an entry needs is aligned: lane l of a vector holds column segment * l + j, so the vector
// of the next column (j + 1) is the next one in memory, not one that straddles two cache lines. On
// Sapphire Rapids a straddling 64-byte load costs two; of a 3x3 kernel's loads two thirds would.
#pragma once

#include <cstdint>

namespace issp {

constexpr int kMaxSegment = 4;  // vectors per row of a register block
constexpr int kMaxRows = 16;    // rows of a register block

// Entries that are summed before the sum is added to the result: a single run over all of them
// would lose two to three times the precision of a dense convolution, which blocks its sums.
constexpr int64_t kSumBlock = 32;

// Most rows of a register block of `i` rows of the weight and `segment` vectors, where `registers`
// accumulators leave room for operands. Sixteen hide the latency of a multiply-add; more of them
// save loads where several rows of the weight share a pixel.
constexpr int max_rows(int i, int segment, int registers) {
  const int rows = (i == 1 ? registers * 2 / 3 : registers) / (i * segment);
  return rows < kMaxRows ? rows : kMaxRows;
}

// Blocks of rows of the weight that a kernel works through in one call, and where their sums go.
template <typename Real>
struct MultiplyParams {
  const int32_t* offsets;  // into the tile, per entry
  const Real* values;      // entry e: i numbers from values + e * v on
  int64_t v;
  const int32_t *first, *last;  // entries of a block
  int64_t blocks;
  const Real* bias;     // + v per block; null: none
  const Real* from;     // sums that the entries are added to, instead of bias; null: none
  int64_t from_stride;  // between rows of the weight, v of which are a block
  Real* to;
  int64_t to_stride;
  // 0: a register block is stored as it is, [rows][segment][lanes]. Otherwise pixels are put in
  // order and rows lie `line` apart.
  int64_t line;
};

// Real: float, or double for double.
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
  int segment[3];            // longest segment, by log2 of the weight's rows
  int rows[3][kMaxSegment];  // most rows of a register block, by segment - 1
  Multiply multiply[3][kMaxSegment][kMaxRows];
  Dot dot[3][kMaxSegment][kMaxRows];
  Dot partial_dot[3][kMaxSegment][kMaxRows];
  // Row r of out, [left + segment + right][lanes] from out_stride * r on: vector left + j holds in
  // lane l the pixel at column j + segment * l, -left <= j < segment + right, of the row that
  // begins at in + r * stride. before, after: whether columns below 0 and from segment * lanes on
  // are there; they are 0 otherwise. The same for each of `planes`, plane_stride and out_plane
  // apart. By segment - 1.
  using ToSegments = void (*)(const Real* in, int64_t stride, int64_t plane_stride, int64_t rows,
                              int64_t planes, int64_t left, bool before, int64_t right, bool after,
                              Real* out, int64_t out_stride, int64_t out_plane);
  ToSegments to_segments[kMaxSegment];
  // line[r * stride + j + segment * lane] = acc[r][j][lane], j < segment. By segment - 1.
  using FromSegments = void (*)(const Real* acc, int64_t rows, Real* line, int64_t stride);
  FromSegments from_segments[kMaxSegment];
  // out[c * out_stride + i] = in[c * in_stride + i], c < count, i < vectors * lanes.
  void (*copy)(const Real* in, int64_t in_stride, int64_t count, int64_t vectors, Real* out,
               int64_t out_stride);
  // out[c][lane] = in[lane * in_stride + c], c < count, lane < lanes; and back.
  void (*gather_tokens)(const Real* in, int64_t in_stride, int64_t count, Real* out,
                        int64_t out_stride);
  void (*scatter_tokens)(const Real* in, int64_t in_stride, int64_t count, Real* out,
                         int64_t out_stride);
  // line = activation(line) + residual (null: none); relu, gelu by erf.
  void (*activate)(Real* line, int64_t count, int activation, const Real* residual);
};

template <typename Real>
const SparseKernels<Real>& sparse_kernels();

}  // namespace issp
