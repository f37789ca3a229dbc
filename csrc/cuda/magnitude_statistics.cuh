// magnitude_statistics: norm, variance, mean and deviation of |x| per tensor, in two launches.
// 1. Every warp takes the 512 elements that it holds in registers: their mean, then the deviations
//    from it, 24 bytes to memory. No barrier, no atomic.
// 2. One block per tensor merges its warps' sums, each thread in the same order every time.
// Traffic: one read, and 1/20 byte per element written and read again. Arithmetic: five float64
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
  double sum = 0, rest = 0, squares = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    if (start + 32 * row < entry.numel) sum += magnitude<T>(bits[row]);
  }
  const double n = part_numel(entry.numel, part), guess = finite_or_zero(sum_warp(sum) / n);
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const double apart = magnitude<T>(bits[row]) - guess;
    if (start + 32 * row < entry.numel) rest += apart, squares += apart * apart;
  }
  rest = sum_warp(rest);
  squares = about_mean(sum_warp(squares), rest, n);
  double* const mine = sums + 3 * (uint64_t(entry.extra) * kWarps + part);  // extra: tiles before
  if (lane() < 3) store(mine + lane(), lane() == 0 ? guess : lane() == 1 ? rest : squares);
}

ISSP_DEVICE PartialSums load_part(const double* sums, uint32_t i) {
  const double* const part = sums + 3 * uint64_t(i);
  return {load(part), load(part + 1), load(part + 2)};
}

template <int Capacity>
ISSP_KERNEL(kThreads, 1)
merge_kernel(const ISSP_PARAM Table<Capacity> table, const double* sums, double* found) {
  const Entry& entry = table.entries[block()];
  const double* const mine = sums + 3 * uint64_t(entry.extra) * kWarps;
  const uint32_t parts = parts_of(entry.numel);
  const double pivot = load(mine);
  double sum = 0, mean = 0, squares = 0;
  for (uint32_t i = thread(); i < parts; i += kThreads) {
    const double n = part_numel(entry.numel, i);
    const PartialSums part = load_part(mine, i);
    sum += sum_of(part, n);
    mean += n * from_pivot(part, n, pivot);
  }
  sum = sum_block(sum, shared_memory());
  mean = sum_block(mean, shared_memory()) / double(entry.numel);
  for (uint32_t i = thread(); i < parts; i += kThreads) {
    squares += squares_about(load_part(mine, i), part_numel(entry.numel, i), pivot, mean);
  }
  squares = sum_block(squares, shared_memory());
  if (thread() > 0) return;
  const Statistics row = statistics(sum / double(entry.numel), squares, entry.numel);
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
  return 3 * int64_t(before.back()) * kWarps;
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
