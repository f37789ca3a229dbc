// Kernels of the direct sparse convolution, which read x without a tile. For stride 1, in float32.
#pragma once

#include <cstdint>

#include "cpu/sparse/sparse_kernels.h"

namespace issp {

struct DirectEntry {
  int32_t offset;        // into x, from the first pixel of the work unit in channel 0
  uint16_t column, row;  // of the tap: select its masks
};

// The lanes of the first and of the last vector of a row that lie in the image, for one column of
// taps.
struct DirectColumn {
  uint16_t first, last;
};

struct DirectParams {
  const DirectColumn* columns;  // [kernel width]
  const uint16_t* rows;         // [kernel height][kMaxRows]: all or no bits set
  int64_t row_stride;           // of x, in elements
  int64_t y_row, y_plane;
  uint16_t tail;  // lanes of the last vector that lie in the result
};

// y[i][r] = bias[i] + sum over e of values[e * value_stride + i] * x[entries[e] + row r], for i
// rows of the weight, r rows and s vectors of pixels.
using DirectMultiply = void (*)(const DirectParams& params, const float* x,
                                const DirectEntry* entries, const float* values,
                                int64_t value_stride, int64_t count, const float* bias, float* y);

struct DirectKernels {
  DirectMultiply inner[3][kMaxSegment][kMaxRows];
  DirectMultiply edge[3][kMaxSegment][kMaxRows];  // also masks rows outside the image
};

// Null if the instruction set in use is not AVX-512.
const DirectKernels* direct_kernels();

}  // namespace issp
