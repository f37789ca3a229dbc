// count_zeros: exact zeros of either sign, the whole model in one launch.
// Traffic: one read. A row's zeros are a popcount of a ballot, a block adds its sum with one
// atomic.
#pragma once

#include "apply.cuh"
#include "table.cuh"

namespace issp {

// Zeros in this thread's warp's part of the tile, the same number in every lane.
template <typename T>
ISSP_DEVICE uint32_t zeros_of_warp(const Entry& entry, uint32_t tile) {
  typename T::Bits bits[kRows];
  load_tile<T>(bits, static_cast<const typename T::Bits*>(entry.data), tile, entry.numel);
  return count_equal_warp<T>(bits, 0);
}

template <int Capacity>
ISSP_KERNEL(kThreads, 2)
zeros_kernel(const ISSP_PARAM Table<Capacity> table, int64_t* zeros) {
  const uint32_t t = locate(table, block());
  const Entry& entry = table.entries[t];
  const uint32_t tile = block() - entry.first_tile;
  uint32_t mine;
  if (entry.extra == 2) {  // extra: bytes per element; which 16-bit type makes no difference
    mine = zeros_of_warp<BFloat16>(entry, tile);
  } else if (entry.extra == 4) {
    mine = zeros_of_warp<Float32>(entry, tile);
  } else {
    mine = zeros_of_warp<Float64>(entry, tile);
  }
  const uint32_t found = scan_warps(mine, shared_memory()).total;
  if (thread() == 0 && found) add(zeros + table.first_tensor + t, int64_t(found));
}

// bytes: per element of every tensor. zeros: [T], zero before.
inline void count_zeros(const std::vector<Item>& items, const std::vector<uint32_t>& bytes,
                        int64_t* zeros, Stream stream) {
  for_tables(items, bytes, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(zeros_kernel<capacity>, table.tiles, kThreads, kSharedBytes, stream, table, zeros);
  });
}

}  // namespace issp
