// regularize_: ISS-R's g += factor * w where the packed mask has a 0 bit, the whole model in one
// launch. Traffic per float32 weight: 4 bytes of gradient and 4 of weight read, 4 of gradient
// written, where the bit is 0; 1/8 byte of mask.
#pragma once

#include "regularize.h"
#include "sets.cuh"

namespace issp {

// Half the rows at a time: 16 loads in flight per thread from the two tensors, as many as a whole
// tile of one has, and two blocks fit an SM.
template <typename T>
ISSP_DEVICE void regularize_rows(const Entry& grad, const Entry& weight, uint32_t tile,
                                 uint32_t first_row, uint32_t mask_word, typename T::Wide factor) {
  using Bits = typename T::Bits;
  constexpr uint32_t kHalf = kRows / 2;
  Bits* const to = static_cast<Bits*>(grad.data);
  const Bits* const from = static_cast<const Bits*>(weight.data);
  const uint32_t start = column(tile) + 32 * first_row;
  Bits g[kHalf], w[kHalf];
  uint32_t chosen = 0;
#pragma unroll
  for (uint32_t row = 0; row < kHalf; ++row) {
    const uint32_t kept = shuffle(mask_word, first_row + row) >> lane() & 1u;
    const uint32_t i = start + 32 * row;
    const bool mine = !kept && i < grad.numel;
    chosen |= uint32_t(mine) << row;
    g[row] = mine ? load(to + i) : Bits(0);
    w[row] = mine ? load(from + i) : Bits(0);
  }
#pragma unroll
  for (uint32_t row = 0; row < kHalf; ++row) {
    if (chosen >> row & 1u) store(to + start + 32 * row, regularized<T>(g[row], w[row], factor));
  }
}

template <typename T, int Capacity>
ISSP_KERNEL(kThreads, kBlocksPerSm<T>)
regularize_kernel(const ISSP_PARAM Table<Capacity> table, const typename T::Wide* factors,
                  const uint32_t* masks) {
  const uint32_t found = locate_set(table, block(), 2);
  const Entry& grad = table.entries[found];
  const uint32_t tile = block() - grad.first_tile;
  const uint32_t word = load_mask_word(grad, tile, masks);
  const typename T::Wide factor = load(factors + table.first_tensor + found / 2);
  regularize_rows<T>(grad, table.entries[found + 1], tile, 0, word, factor);
  regularize_rows<T>(grad, table.entries[found + 1], tile, kRows / 2, word, factor);
}

// places: the gradients, then the weights.
template <typename T>
void regularize(const std::vector<Item>& items, const std::vector<Place>& places,
                const typename T::Wide* factors, const uint32_t* masks, Stream stream) {
  for_sets(items, places, [&](const auto& table, uint32_t) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(regularize_kernel<T, capacity>, table.tiles, kThreads, 0, stream, table, factors, masks);
  });
}

}  // namespace issp
