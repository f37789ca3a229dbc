// The whole model in one launch: a table of its tensors, passed by value as a kernel parameter.
// By value, because a table in device memory must be uploaded: a copy per call breaks CUDA graphs
// and a cached copy goes stale. 32 bytes a tensor; parameters may hold 32764 bytes from sm_70 and
// CUDA 12.1 on. The launch copies the declared size, hence the small variant (one page).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "device.cuh"
#include "launch.cuh"
#include "layout.h"
#include "tile.cuh"

namespace issp {

struct Entry {
  void* data;
  uint32_t numel;
  uint32_t first_tile;
  uint32_t mask_line;  // in lines of kLineWords words
  uint32_t scratch_line;
  uint32_t scratch_words;
  uint32_t extra;  // magnitude_threshold: k; apply_masks_: bytes per element
};
static_assert(sizeof(Entry) == 32, "1000 tensors must fit the kernel parameters");

#if defined(ISSP_SMALL_SHAPES)
constexpr int kSmallTable = 3, kLargeTable = 10;
#else
constexpr int kSmallTable = 120, kLargeTable = 1000;
#endif

template <int Capacity>
struct Table {
  static constexpr int kCapacity = Capacity;
  uint32_t count;
  uint32_t first_tensor;  // number of entry 0 in the whole model
  uint32_t tiles;
  uint32_t padding;
  Entry entries[Capacity];
};
static_assert(sizeof(Table<kLargeTable>) + 128 <= 32764, "the parameter space of a kernel");
static_assert(sizeof(Table<kSmallTable>) + 128 <= 4096, "the parameter space before CUDA 12.1");

// Which tensor a tile belongs to. Ten steps in the constant cache, the same for a whole block.
template <typename Table>
ISSP_DEVICE uint32_t locate(const Table& table, uint32_t tile) {
  uint32_t low = 0, high = table.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (table.entries[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

inline uint32_t tiles_of(int64_t numel) {
  return uint32_t((numel + kTile - 1) / kTile);
}

inline void fill(Entry& entry, const Item& item, uint32_t extra, uint32_t first_tile) {
  entry.data = item.data;
  entry.numel = uint32_t(item.numel);
  entry.first_tile = first_tile;
  entry.mask_line = uint32_t(item.mask_start / kLineWords);
  entry.scratch_line = uint32_t(item.scratch_start / kLineWords);
  entry.scratch_words = uint32_t(scratch_region(item.numel));
  entry.extra = extra;
}

template <int Capacity, typename Body>
void call_with_table(const std::vector<Item>& items, const std::vector<uint32_t>& extra,
                     size_t begin, size_t end, const Body& body) {
  Table<Capacity> table;
  table.count = uint32_t(end - begin);
  table.first_tensor = uint32_t(begin);
  table.tiles = 0;
  table.padding = 0;
  for (size_t i = begin; i < end; ++i) {
    fill(table.entries[i - begin], items[i], extra.empty() ? 0 : extra[i], table.tiles);
    table.tiles += tiles_of(items[i].numel);
  }
  body(table);
}

inline void check_sizes(const std::vector<Item>& items) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel > int64_t(UINT32_MAX) - kTile) {
      throw std::runtime_error("tensor " + std::to_string(i) + " has " +
                               std::to_string(items[i].numel) +
                               " elements: the CUDA kernels take fewer than 2**32, split it");
    }
  }
}

// Calls body(table) for as many tables as the model needs.
template <typename Body>
void for_tables(const std::vector<Item>& items, const std::vector<uint32_t>& extra,
                const Body& body) {
  check_sizes(items);
  for (size_t begin = 0; begin < items.size();) {
    const size_t rest = items.size() - begin;
    if (rest <= size_t(kSmallTable)) {
      call_with_table<kSmallTable>(items, extra, begin, begin + rest, body);
      return;
    }
    const size_t end = begin + (rest < size_t(kLargeTable) ? rest : size_t(kLargeTable));
    call_with_table<kLargeTable>(items, extra, begin, end, body);
    begin = end;
  }
}

}  // namespace issp
