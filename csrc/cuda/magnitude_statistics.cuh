// magnitude_statistics: norm, variance, mean and deviation of |x| per tensor, in two launches.
// 1. Every warp takes the 512 elements that it holds in registers: their sum, then the squared
//    deviations from their own mean, 16 bytes to memory. No barrier, no atomic.
// 2. One block per tensor merges its warps' pairs, each thread in the same order every time.
// Traffic: one read, and 1/32 byte per element written and read again. Arithmetic: five float64
// operations per element, less than memory asks for where float64 runs at half the speed of
// float32, and the limit on parts where it runs at 1/64.
#pragma once

#include "select.cuh"
#include "statistics.h"
#include "table.cuh"

namespace issp {

ISSP_DEVICE double shuffle_double(double value, uint32_t from) {
  const uint64_t bits = bit_as<uint64_t>(value);
  const uint32_t low = shuffle(uint32_t(bits), from);
  return bit_as<double>(low | uint64_t(shuffle(uint32_t(bits >> 32), from)) << 32);
}

// The same bits in every lane: partners add the same two numbers.
ISSP_DEVICE double sum_warp(double value) {
#pragma unroll
  for (uint32_t delta = 16; delta > 0; delta /= 2) value += shuffle_double(value, lane() ^ delta);
  return value;
}

// The same bits in every thread. Two barriers.
ISSP_DEVICE double sum_block(double value, Shared shared) {
  const uint64_t bits = bit_as<uint64_t>(sum_warp(value));
  if (lane() == 0) {
    shared.set(2 * warp(), uint32_t(bits));
    shared.set(2 * warp() + 1, uint32_t(bits >> 32));
  }
  barrier();
  double total = 0;
  for (uint32_t w = 0; w < kWarps; ++w) {
    total += bit_as<double>(shared.get(2 * w) | uint64_t(shared.get(2 * w + 1)) << 32);
  }
  barrier();
  return total;
}

template <typename T>
ISSP_DEVICE double magnitude(typename T::Bits bits) {
  return double(widen(T{}, typename T::Bits(key<T>(bits))));
}

ISSP_DEVICE uint32_t parts_of(uint32_t numel) {
  return numel / kWarpTile + (numel % kWarpTile != 0);
}
ISSP_DEVICE uint32_t part_numel(uint32_t numel, uint32_t part) {
  const uint32_t left = numel - part * kWarpTile;
  return left < kWarpTile ? left : kWarpTile;
}

template <typename T, int Capacity>
ISSP_KERNEL(kThreads, kBlocksPerSm<T>)
part_kernel(const ISSP_PARAM Table<Capacity> table, double* sums) {
  const Entry& entry = table.entries[locate(table, block())];
  const uint32_t tile = block() - entry.first_tile, part = tile * kWarps + warp();
  if (part >= parts_of(entry.numel)) return;  // a whole warp, and no barrier follows
  const uint32_t start = column(tile);
  typename T::Bits bits[kRows];
  load_tile<T>(bits, static_cast<const typename T::Bits*>(entry.data), tile, entry.numel);
  double sum = 0, squares = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    if (start + 32 * row < entry.numel) sum += magnitude<T>(bits[row]);
  }
  sum = sum_warp(sum);
  const double mean = sum / double(part_numel(entry.numel, part));
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const double apart = magnitude<T>(bits[row]) - mean;
    if (start + 32 * row < entry.numel) squares += apart * apart;
  }
  squares = sum_warp(squares);
  double* const mine = sums + 2 * (uint64_t(entry.extra) * kWarps + part);  // extra: tiles before
  if (lane() < 2) store(mine + lane(), lane() == 0 ? sum : squares);
}

template <int Capacity>
ISSP_KERNEL(kThreads, 1)
merge_kernel(const ISSP_PARAM Table<Capacity> table, const double* sums, double* found) {
  const Entry& entry = table.entries[block()];
  const double* const mine = sums + 2 * uint64_t(entry.extra) * kWarps;
  const uint32_t parts = parts_of(entry.numel);
  double sum = 0, squares = 0;
  for (uint32_t i = thread(); i < parts; i += kThreads) sum += load(mine + 2 * uint64_t(i));
  sum = sum_block(sum, shared_memory());
  const double mean = sum / double(entry.numel);
  for (uint32_t i = thread(); i < parts; i += kThreads) {
    const double* const part = mine + 2 * uint64_t(i);
    squares += deviations(load(part), load(part + 1), part_numel(entry.numel, i), mean);
  }
  squares = sum_block(squares, shared_memory());
  if (thread() > 0) return;
  const Statistics row = statistics(sum, squares, entry.numel);
  double* const to = found + 4 * uint64_t(table.first_tensor + block());
  store(to, row.norm);
  store(to + 1, row.variance);
  store(to + 2, row.mean);
  store(to + 3, row.deviation);
}

// Tiles before each tensor, and of all tensors at the end.
inline std::vector<uint32_t> tiles_before(const std::vector<Item>& items) {
  std::vector<uint32_t> before = {0};
  for (const Item& item : items) before.push_back(before.back() + tiles_of(item.numel));
  return before;
}

inline int64_t statistics_words(const std::vector<uint32_t>& before) {
  return 2 * int64_t(before.back()) * kWarps;
}

// sums: statistics_words(before) doubles. found: [T, 4].
template <typename T>
void magnitude_statistics(const std::vector<Item>& items, const std::vector<uint32_t>& before,
                          double* sums, double* found, Stream stream) {
  for_tables(items, before, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(part_kernel<T, capacity>, table.tiles, kThreads, 0, stream, table, sums);
    launch(merge_kernel<capacity>, table.count, kThreads, 8 * kWarps, stream, table,
           static_cast<const double*>(sums), found);
  });
}

}  // namespace issp
