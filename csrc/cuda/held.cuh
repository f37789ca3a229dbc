// What a block holds of a tensor between the count and the write: a tile in registers, or several
// in shared memory. Both offer each_tile(f), which calls f(rows) for every tile, rows[r] being this
// lane's element of row r of its warp; select.cuh, bracket.cuh and search.cuh work on either.
#pragma once

#include "tile.cuh"

namespace issp {

template <typename T>
struct InRegisters {
  const typename T::Bits (&bits)[kRows];
  template <typename Visit>
  ISSP_DEVICE void each_tile(const Visit& visit) const {
    visit(bits);
  }
};

// A slot of shared memory has a tile in the order of global memory, so that copies need no
// registers. A warp's 32 lanes read 32 consecutive elements: no bank conflicts.
template <typename T>
constexpr uint32_t kSlotWords = kTile * sizeof(typename T::Bits) / 4;

// Element own + 32 * row of a slot.
ISSP_DEVICE uint32_t get_bits(Shared slot, uint32_t own, uint32_t row, uint32_t) {
  return slot.get(own + 32 * row);
}
ISSP_DEVICE uint16_t get_bits(Shared slot, uint32_t own, uint32_t row, uint16_t) {
  return uint16_t(slot.get(own / 2 + 16 * row) >> (16 * (own & 1u)));
}
ISSP_DEVICE uint64_t get_bits(Shared slot, uint32_t own, uint32_t row, uint64_t) {
  return slot.get(2 * own + 64 * row) | uint64_t(slot.get(2 * own + 64 * row + 1)) << 32;
}

template <typename T>
struct SlotRows {  // read when asked for: registers are scarce
  Shared slot;
  uint32_t start, numel;  // start: this lane's first element in the tensor
  ISSP_DEVICE typename T::Bits operator[](uint32_t row) const {
    if (start + 32 * row >= numel) return Limits<T>::magnitude;  // as load_tile does
    return get_bits(slot, column(0), row, typename T::Bits(0));
  }
};

// The same for a tile that is not held.
template <typename T>
struct GlobalRows {
  const typename T::Bits* data;
  uint32_t start, numel;
  ISSP_DEVICE typename T::Bits operator[](uint32_t row) const {
    return start + 32 * row < numel ? load(data + start + 32 * row) : Limits<T>::magnitude;
  }
};

template <typename T>
struct InShared {
  Shared slots;
  uint32_t tile, tiles, numel;

  ISSP_DEVICE SlotRows<T> rows(uint32_t i) const {
    return {slots.from(i * kSlotWords<T>), column(tile + i), numel};
  }
  template <typename Visit>
  ISSP_DEVICE void each_tile(const Visit& visit) const {
    for (uint32_t i = 0; i < tiles; ++i) visit(rows(i));
  }
};

// A word of a tensor at any element's address; elements behind the end are not read.
template <typename T>
ISSP_DEVICE uint32_t load_word(const typename T::Bits* data, uint32_t word, uint32_t numel) {
  if constexpr (sizeof(typename T::Bits) == 4) {
    return load(data + word);
  } else if constexpr (sizeof(typename T::Bits) == 8) {
    return uint32_t(load(data + word / 2) >> (32 * (word & 1u)));
  } else {
    const uint32_t second = 2 * word + 1 < numel ? load(data + 2 * word + 1) : 0;
    return load(data + 2 * word) | second << 16;
  }
}

// Starts to fill a slot with a tile: 16 bytes a lane, every warp its own rows. Registers carry only
// what is not aligned to 16 bytes: the end of a tensor, or all of an unaligned one.
template <typename T>
ISSP_DEVICE void fetch_tile(Shared slot, const typename T::Bits* data, uint32_t tile,
                            uint32_t numel) {
  using Bits = typename T::Bits;
  constexpr uint32_t kPer16 = 16 / sizeof(Bits), kWords = kWarpTile * sizeof(Bits) / 4;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const uint32_t first_word = warp() * kWords;
  for (uint32_t word = 4 * lane(); word < kWords; word += 128) {
    const uint32_t own = first_word + word;
    const uint32_t i = tile * kTile + own * 4 / sizeof(Bits);
    if (aligned && i < numel && numel - i >= kPer16) {
      copy_async(slot.from(own), data + i);
      continue;
    }
    const Bits* start = data + uint64_t(tile) * kTile;
    for (uint32_t w = own; w < own + 4 && tile * kTile + w * 4 / sizeof(Bits) < numel; ++w) {
      slot.set(w, load_word<T>(start, w, numel - tile * kTile));
    }
  }
}

}  // namespace issp
