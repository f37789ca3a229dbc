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
  uint32_t extra;  // what the op wants to know of the tensor: its k, its number, its element size
};
static_assert(sizeof(Entry) == 32, "1000 tensors must fit the kernel parameters");

// Entries of a table: an op may add its own words to Entry. Beside the largest table 700 bytes are
// left for the other parameters, beside the small one 200.
#if defined(ISSP_SMALL_SHAPES)
template <typename EntryType>
constexpr int kSmall = 3;
template <typename EntryType>
constexpr int kLarge = 10;
#else
template <typename EntryType>
constexpr int kSmall = 3840 / sizeof(EntryType);
template <typename EntryType>
constexpr int kLarge = 32000 / sizeof(EntryType);
#endif
constexpr int kSmallTable = kSmall<Entry>, kLargeTable = kLarge<Entry>;

template <int Capacity, typename EntryType = Entry>
struct Table {
  static constexpr int kCapacity = Capacity;
  uint32_t count;
  uint32_t first_tensor;  // number of entry 0 in the list that the table was made from
  uint32_t tiles;         // or blocks: what first_tile counts
  uint32_t chunks;        // of a block, see speculate.cuh
  EntryType entries[Capacity];
};
static_assert(sizeof(Table<kLargeTable>) + 700 <= 32764, "the parameter space of a kernel");
static_assert(sizeof(Table<kSmallTable>) + 200 <= 4096, "the parameter space before CUDA 12.1");

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

inline void check_sizes(const std::vector<Item>& items) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel > int64_t(UINT32_MAX) - kTile) {
      throw std::runtime_error("tensor " + std::to_string(i) + " has " +
                               std::to_string(items[i].numel) +
                               " elements: the CUDA kernels take fewer than 2**32, split it");
    }
  }
}

// tensors[i] as the list sees it: write(entry, i, first_tile) fills an entry and returns how many
// tiles, or blocks, it takes.
template <int Capacity, typename EntryType, typename Write, typename Body>
void call_with_table(size_t begin, size_t end, const Write& write, const Body& body) {
  Table<Capacity, EntryType> table;
  table.count = uint32_t(end - begin);
  table.first_tensor = uint32_t(begin);
  table.tiles = 0;
  table.chunks = 1;
  for (size_t i = begin; i < end; ++i) {
    table.tiles += write(table.entries[i - begin], i, table.tiles);
  }
  body(table);
}

// Calls body(table) for as many tables as `count` entries need.
template <typename EntryType, typename Write, typename Body>
void for_tables_of(size_t count, const Write& write, const Body& body) {
  constexpr int kFew = kSmall<EntryType>, kMany = kLarge<EntryType>;
  for (size_t begin = 0; begin < count;) {
    const size_t rest = count - begin;
    if (rest <= size_t(kFew)) {
      call_with_table<kFew, EntryType>(begin, begin + rest, write, body);
      return;
    }
    const size_t end = begin + (rest < size_t(kMany) ? rest : size_t(kMany));
    call_with_table<kMany, EntryType>(begin, end, write, body);
    begin = end;
  }
}

// One ticket per tile of every tensor.
template <typename Body>
void for_tables(const std::vector<Item>& items, const std::vector<uint32_t>& extra,
                const Body& body) {
  check_sizes(items);
  const auto write = [&](Entry& entry, size_t i, uint32_t first_tile) {
    fill(entry, items[i], extra.empty() ? 0 : extra[i], first_tile);
    return tiles_of(items[i].numel);
  };
  for_tables_of<Entry>(items.size(), write, body);
}

}  // namespace issp
