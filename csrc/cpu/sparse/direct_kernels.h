// Products straight from x, without a tile; see direct_avx512.h. For stride 1, in float.
#pragma once

#include <cstdint>

#include "cpu/sparse/sparse_kernels.h"

namespace issp {

struct DirectEntry {
  int32_t offset;        // into x, from the unit's first pixel in channel 0
  uint16_t column, row;  // of the tap: which masks it needs
};

// What a unit's taps see of its columns and rows: lanes of the first and of the last vector, and
// whether (all lanes or none) each row of the register block lies in the image.
struct DirectColumn {
  uint16_t first, last;
};

struct DirectParams {
  const DirectColumn* columns;  // [kernel width]
  const uint16_t* rows;         // [kernel height][kMaxRows]
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
  DirectMultiply edge[3][kMaxSegment][kMaxRows];  // also asks which rows lie in the image
};

// Null where the instruction set in use has no masked loads.
const DirectKernels* direct_kernels();

}  // namespace issp
