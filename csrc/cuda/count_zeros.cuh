// count_zeros: exact zeros of either sign, the whole model in one launch.
// Traffic: one read. A block adds its sum with one atomic.
#pragma once

#include "select.cuh"
#include "table.cuh"

namespace issp {

// Zeros among this thread's elements of the tile.
template <typename T>
ISSP_DEVICE uint32_t zeros_of_thread(const Entry& entry, uint32_t tile) {
  typename T::Bits bits[kRows];
  load_tile<T>(bits, static_cast<const typename T::Bits*>(entry.data), tile, entry.numel);
  uint32_t zeros = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) zeros += key<T>(bits[row]) == 0;
  return zeros;
}

template <int Capacity>
ISSP_KERNEL(kThreads, 2)
zeros_kernel(const ISSP_PARAM Table<Capacity> table, int64_t* zeros) {
  const uint32_t t = locate(table, block());
  const Entry& entry = table.entries[t];
  const uint32_t tile = block() - entry.first_tile;
  uint32_t mine;
  if (entry.extra == 2) {  // extra: bytes per element; which 16-bit type makes no difference
    mine = zeros_of_thread<BFloat16>(entry, tile);
  } else if (entry.extra == 4) {
    mine = zeros_of_thread<Float32>(entry, tile);
  } else {
    mine = zeros_of_thread<Float64>(entry, tile);
  }
  const uint32_t found = sum_block(mine, shared_memory());
  if (found) add(zeros + table.first_tensor + t, int64_t(found));
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
