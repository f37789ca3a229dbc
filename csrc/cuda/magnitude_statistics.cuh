// magnitude_statistics: norm, variance, mean and deviation of |x| per tensor, in two launches.
// 1. Every warp takes the 512 elements that it holds in registers: their mean, then the deviations
//    from it, 32 bytes to memory. No barrier, no atomic.
// 2. One block per tensor merges its warps' sums, each thread in the same order every time.
// Traffic: one read, and 1/16 byte per element written and read again. Arithmetic: five float64
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

ISSP_DEVICE double smallest_of_warp(double value) {
#pragma unroll
  for (uint32_t delta = 16; delta > 0; delta /= 2) {
    const double other = shuffle_double(value, lane() ^ delta);
    value = other < value ? other : value;
  }
  return value;
}

// What a warp has found, for the whole block: calls visit(value) with the value of every warp. The
// same order in every thread. Two barriers.
template <typename Visit>
ISSP_DEVICE void each_warp(double value, Shared shared, const Visit& visit) {
  const uint64_t bits = bit_as<uint64_t>(value);
  if (lane() == 0) {
    shared.set(2 * warp(), uint32_t(bits));
    shared.set(2 * warp() + 1, uint32_t(bits >> 32));
  }
  barrier();
  for (uint32_t w = 0; w < kWarps; ++w) {
    visit(bit_as<double>(shared.get(2 * w) | uint64_t(shared.get(2 * w + 1)) << 32));
  }
  barrier();
}

// The same bits in every thread.
ISSP_DEVICE double sum_block(double value, Shared shared) {
  double total = 0;
  each_warp(sum_warp(value), shared, [&](double of_warp) { total += of_warp; });
  return total;
}

ISSP_DEVICE double smallest_of_block(double value, Shared shared) {
  double smallest = value;
  each_warp(smallest_of_warp(value), shared,
            [&](double of_warp) { smallest = of_warp < smallest ? of_warp : smallest; });
  return smallest;
}

template <typename T>
ISSP_DEVICE double magnitude(typename T::Bits bits, double scale) {
  const double wide = double(widen(T{}, typename T::Bits(key<T>(bits))));
  return sizeof(bits) == 8 ? wide * scale : wide;
}

// Of the elements that a warp holds. The scales are powers of two that fall with the magnitude.
template <typename T>
ISSP_DEVICE double scale_of(const typename T::Bits (&bits)[kRows], uint32_t start, uint32_t numel) {
  Key<T> largest = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const bool inside = sizeof(bits[0]) == 8 && start + 32 * row < numel;
    if (inside && key<T>(bits[row]) > largest) largest = key<T>(bits[row]);
  }
  return smallest_of_warp(scale_for(T{}, largest));
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
  const double scale = scale_of<T>(bits, start, entry.numel);
  const double first = shuffle_double(magnitude<T>(bits[0], scale), 0);
  double apart = 0, rest = 0, squares = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    if (start + 32 * row < entry.numel) apart += magnitude<T>(bits[row], scale) - first;
  }
  const double n = part_numel(entry.numel, part);
  const double guess = finite_or_zero(first + sum_warp(apart) / n);
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const double d = magnitude<T>(bits[row], scale) - guess;
    if (start + 32 * row < entry.numel) rest += d, squares += d * d;
  }
  rest = sum_warp(rest);
  squares = about_mean(sum_warp(squares), rest, n);
  double* const mine = sums + 4 * (uint64_t(entry.extra) * kWarps + part);  // extra: tiles before
  const double own = lane() == 0 ? guess : lane() == 1 ? rest : lane() == 2 ? squares : scale;
  if (lane() < 4) store(mine + lane(), own);
}

ISSP_DEVICE PartialSums load_part(const double* sums, uint32_t i) {
  const double* const part = sums + 4 * uint64_t(i);
  return {load(part), load(part + 1), load(part + 2), load(part + 3)};
}

template <int Capacity>
ISSP_KERNEL(kThreads, 1)
merge_kernel(const ISSP_PARAM Table<Capacity> table, const double* sums, double* found) {
  const Entry& entry = table.entries[block()];
  const double* const mine = sums + 4 * uint64_t(entry.extra) * kWarps;
  const uint32_t parts = parts_of(entry.numel);
  double scale = load_part(mine, 0).scale;
  for (uint32_t i = thread(); i < parts; i += kThreads) {
    const double of_part = load_part(mine, i).scale;
    scale = of_part < scale ? of_part : scale;
  }
  scale = smallest_of_block(scale, shared_memory());
  const double pivot = rescaled(load_part(mine, 0), scale).guess;
  double sum = 0, mean = 0, squares = 0;
  for (uint32_t i = thread(); i < parts; i += kThreads) {
    const double n = part_numel(entry.numel, i);
    const PartialSums part = rescaled(load_part(mine, i), scale);
    sum += sum_of(part, n);
    mean += n * from_pivot(part, n, pivot);
  }
  sum = sum_block(sum, shared_memory());
  mean = sum_block(mean, shared_memory()) / double(entry.numel);
  for (uint32_t i = thread(); i < parts; i += kThreads) {
    const PartialSums part = rescaled(load_part(mine, i), scale);
    squares += squares_about(part, part_numel(entry.numel, i), pivot, mean);
  }
  squares = sum_block(squares, shared_memory());
  if (thread() > 0) return;
  const Statistics row = statistics(sum / double(entry.numel), squares, entry.numel, scale);
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
  return 4 * int64_t(before.back()) * kWarps;
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
