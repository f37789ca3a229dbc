// The kernels of float16 convolutions whose sums are float16 (AVX512-FP16): a multiply-add takes 32
// numbers, twice as many as in float32.
//
// The rounding: the entries of a row of the weight are summed in stored order by float16
// multiply-adds that round once each. After every kHalfSumBlock entries, and after the last, the
// sum is added to the row's float32 total, which begins with the bias. So every bit of a result
// depends on positions alone, and not on tiles or threads.
//
// The layout of a tile is that of float32 tiles of AVX-512, with pairs of pixels in place of
// floats: an image of half the height, whose pixels are pairs. A pair consists of two pixels of one
// column, one in the upper and one in the lower half of the result. The 16 first pixels of the
// pairs of a vector are its lower half, their partners the upper half. So narrow images fill
// vectors of 32 lanes, and what tiling.h knows about tiles holds for float16 as well. A pointwise
// convolution has no rows: a vector of pairs is 32 consecutive pixels.
#pragma once

#include "cpu/sparse/sparse_kernels.h"

namespace issp {

constexpr int64_t kHalfSumBlock = 64;
constexpr int64_t kPairs = 16;  // in a vector

// Blocks of rows of the weight, and where the sums of a register block are. A row of the weight has
// [rows][segment][2][kPairs] floats of totals, then as many pairs of float16 sums that have not
// been added to the totals yet.
struct HalfParams {
  const int32_t* offsets;  // into the tile, in pairs, per entry
  const uint32_t* values;  // entry e: i numbers, each of them twice, from values + e * v on
  int64_t v;
  const int32_t *starts, *ends;  // [blocks]: all entries of block b
  const int32_t *first, *last;   // [blocks]: those to be summed now
  int64_t blocks;
  const float* bias;  // v per block; null: none
  float* totals;
  uint32_t* sums;
};

// Rows of pixels, at equal distances, of which rows of pairs are made. A row that does not exist is
// read from `zeros`.
struct HalfRows {
  const uint16_t *first, *second;  // row 0 of plane 0 of either half
  int64_t stride, plane_stride;
  int64_t first_begin, first_end, second_begin, second_end;  // rows that exist
  const uint16_t* zeros;
};

// The columns of a row of pairs that exist in the image.
struct HalfColumns {
  uint64_t inside;      // bit i: column i, i < segment * kPairs
  int64_t beyond, end;  // columns segment * kPairs + h exist for beyond <= h < end
};

// What is stored: activation(total) + residual, rounded.
struct HalfEpilogue {
  int activation;
  void (*activate)(float* line, int64_t count, int activation, float scale, const float* residual);
  int64_t first, second;  // pixels of the row of either half that are stored
  const uint16_t*
      residual;  // of the first half's row; the second's is as far away as its result; null: none
};

struct HalfKernels {
  using Multiply = void (*)(const uint32_t* tile, int64_t row_stride, const HalfParams& params);
  Multiply multiply[3][kMaxSegment][kMaxRows];
  // Row r of plane p, from out + p * out_plane + r * out_stride on, is [segment +
  // reach][2][kPairs]: vector j holds the columns j + segment * lane of both halves. Indexed by
  // segment - 1.
  void (*to_pairs[kMaxSegment])(const HalfRows& from, const HalfColumns& columns, int64_t rows,
                                int64_t planes, int64_t reach, uint32_t* out, int64_t out_stride,
                                int64_t out_plane);
  // Stores one row of a register block, [segment][2][kPairs], to a row of either half.
  void (*store_pairs[kMaxSegment])(const float* totals, const HalfEpilogue& epilogue,
                                   uint16_t* first, uint16_t* second);
};

// Null if the instruction set in use is not AVX512-FP16, or the compiler does not know it.
const HalfKernels* half_kernels();

}  // namespace issp
