// A tile: what one block of the auxiliary ops holds of a tensor in registers, 16 warps x 16 rows x
// 32 lanes. A warp reads 32 consecutive elements per row, so that a ballot is a word of the packed
// mask as it stands, and any element-aligned pointer will do. Every thread has 16 independent loads
// in flight: 64 KB of float32 per SM at two blocks, twice what the latency of HBM asks for. (The
// step has its own shape, thread_tile.cuh.)
#pragma once

#include "device.cuh"
#include "semantics.h"

namespace issp {

#if defined(ISSP_SMALL_SHAPES)  // the emulator's second build: many tiles from few weights
constexpr uint32_t kWarps = 2, kRows = 8, kRadixBits = 7;
#else
constexpr uint32_t kWarps = 16, kRows = 16, kRadixBits = 11;
#endif
constexpr uint32_t kThreads = 32 * kWarps;
constexpr uint32_t kWarpTile = 32 * kRows;
constexpr uint32_t kTile = kWarps * kWarpTile;
constexpr uint32_t kBins = 1u << kRadixBits;
static_assert(kTile % 512 == 0, "a tile's mask must end where a line of words ends");
static_assert(kBins % kThreads == 0, "every thread sums the same number of bins");

template <typename T>
constexpr int kBlocksPerSm = sizeof(typename T::Bits) == 8 ? 1 : 2;

template <typename T>
constexpr int kKeyBits = 8 * int(sizeof(typename T::Bits)) - 1;

// Where this thread's column of a tile starts.
ISSP_DEVICE uint32_t column(uint32_t tile) {
  return tile * kTile + warp() * kWarpTile + lane();
}

// Elements behind the end read as the largest key; being last in index order too, they are never
// among the k <= numel selected, so the counts need no bounds.
template <typename T>
ISSP_DEVICE void load_tile(typename T::Bits (&bits)[kRows], const typename T::Bits* data,
                           uint32_t tile, uint32_t numel) {
  const uint32_t start = column(tile);
  const typename T::Bits* mine = data + start;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    bits[row] = start + 32 * row < numel ? load(mine + 32 * row) : Limits<T>::magnitude;
  }
}

// Bits of a mask word that stand for elements of the tensor.
ISSP_DEVICE uint32_t valid_bits(uint32_t first, uint32_t numel) {
  if (first >= numel) return 0u;
  return numel - first >= 32u ? 0xffffffffu : (1u << (numel - first)) - 1u;
}

}  // namespace issp
