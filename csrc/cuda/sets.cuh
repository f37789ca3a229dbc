// Tables for kernels that read or write several tensors of one size per weight: a gradient and its
// weight, a weight and its moments. Their entries lie one behind the other and share their tiles.
#pragma once

#include "table.cuh"

namespace issp {

// Where one tensor of a set lies, and what the kernel is told of it.
struct Place {
  void* data;
  uint32_t extra;
};

// A launch of 8 sets reads its mask words once; more sets than that are unheard of.
constexpr uint32_t kMostSets = 8;

// The first of the entries that share a tile: `locate` finds the last.
template <typename Table>
ISSP_DEVICE uint32_t locate_set(const Table& table, uint32_t tile, uint32_t sets) {
  return locate(table, tile) / sets * sets;
}

// The mask word that this lane holds: lane r that of row r.
ISSP_DEVICE uint32_t load_mask_word(const Entry& entry, uint32_t tile, const uint32_t* masks) {
  const uint32_t first = tile * kTile + warp() * kWarpTile + 32 * lane();
  const bool mine = lane() < kRows && first < entry.numel;
  return mine ? load(masks + uint64_t(entry.mask_line) * kLineWords + first / 32) : 0;
}

template <int Capacity, typename Body>
void call_with_sets(const std::vector<Item>& items, const std::vector<Place>& places,
                    size_t first_set, uint32_t sets, size_t begin, size_t end, const Body& body) {
  Table<Capacity> table;
  table.count = uint32_t(end - begin) * sets;
  table.first_tensor = uint32_t(begin);
  table.tiles = 0;
  table.chunks = 1;
  Entry* entry = table.entries;
  for (size_t i = begin; i < end; ++i) {
    for (size_t set = first_set; set < first_set + sets; ++set) {
      const Place& place = places[set * items.size() + i];
      fill(*entry, items[i], place.extra, table.tiles);
      (entry++)->data = place.data;
    }
    table.tiles += tiles_of(items[i].numel);
  }
  body(table, sets);
}

// Calls body(table, sets) for as many tables as the model needs. places: of the first set's
// tensors, then of the second's, ...; first_tensor counts weights, not entries.
template <typename Body>
void for_sets(const std::vector<Item>& items, const std::vector<Place>& places, const Body& body) {
  check_sizes(items);
  const size_t total = places.size() / items.size();
  for (size_t first = 0; first < total; first += kMostSets) {
    const uint32_t sets = uint32_t(total - first < kMostSets ? total - first : kMostSets);
    const size_t most = size_t(kLargeTable) / sets;
    for (size_t begin = 0; begin < items.size();) {
      const size_t rest = items.size() - begin;
      const size_t end = begin + (rest < most ? rest : most);
      if (rest * sets <= size_t(kSmallTable)) {
        call_with_sets<kSmallTable>(items, places, first, sets, begin, end, body);
      } else {
        call_with_sets<kLargeTable>(items, places, first, sets, begin, end, body);
      }
      begin = end;
    }
  }
}

}  // namespace issp
