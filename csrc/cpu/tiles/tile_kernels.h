// The kernels of convolutions in the tile layout, and the table of the kernels that the CPU has.
//
// A K tile is 16 entries of a block of v rows: an A tile, 16 rows x 16 pairs of weights, and a B
// tile, the lines of 16 pixels that the entries read. Per K tile,
//     even = fma(weight, pixel, even) over the first channels of the 16 pairs, in order, from 0,
//     odd  = the same over the second channels,
//     sum  = sum + (even + odd),
// in float32, rounded to nearest even, denormal operands and results taken as zero: this is what
// TDPBF16PS computes. Where the CPU has no AMX the same is computed without it, bit for bit.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "cpu/tiles/layout.h"

namespace issp {

constexpr int kMaxGroup = 4;   // pixel tiles that one pass over the weight computes
constexpr int kMaxBlock = 32;  // rows of a block
constexpr int kReadAhead = 1;  // K tiles of offsets behind the last one

enum class TileActivation { kNone, kRelu, kGelu };

// Up to 16 pixels of one row of the convolution.
struct PixelTile {
  const char* input;  // the first pixel, in plane 0
  int64_t output;     // bytes to the first pixel of the result, in plane 0
  int count;
};

// y = activation(sum + bias) * scale + residual, shuffled; see tiled_conv2d in
// issp/ops/schemas/tiles.py.
struct TileEpilogue {
  int64_t planes, plane_bytes, row_bytes;  // of the result
  char* out;
  const char* residual;  // in the layout of `out`; null: none
  const float* bias;     // for every row of every block
  TileActivation activation;
  float scale;
  int64_t rows;  // of the weight
  int64_t shuffle;
  bool sums = false;  // writes the float32 sums alone, a plane for every row of the weight
};

struct TiledConv {
  TileLayout from;
  const uint16_t* values;  // [K tiles, v / 16, 16 rows, 16 pairs, 2]
  const int32_t* offsets;  // [K tiles + kReadAhead, 16], in bytes from the first pixel's plane 0
  const int32_t* starts;   // [blocks + 1]: the K tiles of each block
  int64_t blocks;
  int v;  // rows of a block, 16 or 32
  TileEpilogue epilogue;
};

// One row of y = sum over the taps + bias, see tiled_conv2d_by_taps in issp/ops/schemas/tiles.py.
// Each row of the weight has `pitch` sums for a row of pixels, with kernel / 2 zeros before the
// first pixel and at least as many behind the last.
struct TapRow {
  const float* sums[3];  // for every row of the kernel; null: it lies outside of the image
  int64_t pitch;
  const float* bias;
  int64_t channels, kernel, width;
  float* out;
  int64_t plane;  // elements between two channels of `out`
};

// Strides of an image, in elements.
struct PlainImage {
  char* data;
  int64_t image, channel, row, pixel;
  torch::headeronly::ScalarType dtype;
};

struct TileKernels {
  const char* name;
  int group[2];  // the most pixel tiles of a call of `convolve`, for v = 16 and 32
  // Around the calls of a thread.
  void (*begin)();
  void (*end)();
  void (*convolve)(const TiledConv& conv, const PixelTile* tiles, int count);
  void (*add_taps)(const TapRow& row);
  // One row of an image, all channels, into or from the tile layout; the zeros included.
  void (*to_tiles)(const PlainImage& x, const TileLayout& to, int64_t image, int64_t y, char* out);
  void (*from_tiles)(const char* data, const TileLayout& from, int64_t image, int64_t y,
                     const PlainImage& y_image);
  // offsets[i] of positions[i]; whether every position lies in the image. See translate.h.
  bool (*translate)(const int32_t* positions, int64_t count, int64_t planes, int64_t taps,
                    int32_t plane_bytes, int32_t row_bytes, int32_t* offsets);
};

const TileKernels& tile_kernels();

// Returns the name of the kernels in use: amx, avx512 or scalar. A non-empty `want` first selects
// others that the CPU supports.
std::string tile_capability(std::string want);

}  // namespace issp
