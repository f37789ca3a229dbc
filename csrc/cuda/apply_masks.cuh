// apply_masks_: zero wherever the packed mask has a 0 bit, the whole model in one launch: weights,
// moments and moving average together.
// Traffic: 1/8 byte of mask per weight, whatever the number of sets, and the zeros; the tensors are
// not read. A lane holds the word of one row and hands it to its warp by a shuffle, so the mask is
// read once, coalesced.
#pragma once

#include "sets.cuh"

namespace issp {

template <typename Word>
ISSP_DEVICE void zero_rows(Word* data, uint32_t tile, uint32_t numel, uint32_t mask_word) {
  const uint32_t start = column(tile);
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const uint32_t kept = shuffle(mask_word, row) >> lane() & 1u;
    const uint32_t i = start + 32 * row;
    if (!kept && i < numel) store(data + i, Word(0));
  }
}

template <int Capacity>
ISSP_KERNEL(kThreads, 3)
mask_kernel(const ISSP_PARAM Table<Capacity> table, const uint32_t* masks, uint32_t sets) {
  const uint32_t found = locate_set(table, block(), sets);
  const uint32_t tile = block() - table.entries[found].first_tile;
  const uint32_t word = load_mask_word(table.entries[found], tile, masks);
  for (uint32_t set = 0; set < sets; ++set) {
    const Entry& entry = table.entries[found + set];
    if (entry.extra == 2) {  // extra: bytes per element
      zero_rows(static_cast<uint16_t*>(entry.data), tile, entry.numel, word);
    } else if (entry.extra == 4) {
      zero_rows(static_cast<uint32_t*>(entry.data), tile, entry.numel, word);
    } else {
      zero_rows(static_cast<uint64_t*>(entry.data), tile, entry.numel, word);
    }
  }
}

// places: data and bytes per element of every set's tensors.
inline void apply_masks(const std::vector<Item>& items, const std::vector<Place>& places,
                        const uint32_t* masks, Stream stream) {
  for_sets(items, places, [&](const auto& table, uint32_t sets) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(mask_kernel<capacity>, table.tiles, kThreads, 0, stream, table, masks, sets);
  });
}

}  // namespace issp
