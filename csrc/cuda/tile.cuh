// A tile: the piece of a tensor that one block holds in registers.
//
// Shape: 8 warps x 32 rows x 32 lanes = 8192 elements. A warp reads 32 consecutive elements per row,
// so that a ballot is a word of the packed mask as it stands, ranks of ties are popcounts, and any
// element-aligned pointer will do. 32 independent loads per thread are in flight: 32 KB per block
// and 128 KB per SM at four blocks, five times what the latency of HBM asks for (Little: about
// 25 KB per SM at 4.3 TB/s and 700 ns); 64 registers a thread (32 of them the tile) give those four
// blocks. A larger tile leaves SMs idle on small models (SwinIR-light: 0.88 M weights), a smaller
// one pays the two barriers and two atomics of a tile more often.
// 16-bit types use the same shape with half the bytes; float64 needs 64 registers for the tile and
// runs at two blocks per SM.
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

template <typename T> constexpr int kKeyBits = 8 * int(sizeof(typename T::Bits)) - 1;

// Where this thread's column of a tile starts.
ISSP_DEVICE uint32_t column(uint32_t tile) { return tile * kTile + warp() * kWarpTile + lane(); }

// Elements behind the end read as the largest key; being last in index order too, they are never
// among the k <= numel selected, so the counts need no bounds.
// kEarly: see load_early.
template <typename T, bool kEarly = false>
ISSP_DEVICE void load_tile(typename T::Bits (&bits)[kRows], const typename T::Bits* data,
                           uint32_t tile, uint32_t numel) {
  const uint32_t start = column(tile);
  const typename T::Bits* mine = data + start;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    if (start + 32 * row >= numel) {
      bits[row] = Limits<T>::magnitude;
    } else {
      bits[row] = kEarly ? load_early(mine + 32 * row) : load(mine + 32 * row);
    }
  }
}

// Bits of a mask word that stand for elements of the tensor.
ISSP_DEVICE uint32_t valid_bits(uint32_t first, uint32_t numel) {
  if (first >= numel) return 0u;
  return numel - first >= 32u ? 0xffffffffu : (1u << (numel - first)) - 1u;
}

}  // namespace issp
