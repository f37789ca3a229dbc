// What a thread holds of a chunk: 16 weights in vectors of 16 bytes, one of each row. A row of a
// block is a vector of each of its threads, so that its warps read and write whole lines.
#pragma once

#include "tensor_view.cuh"

namespace issp {

// Weights of a vector, vectors of a thread, weights of a row.
template <typename T>
constexpr uint32_t kWidth = 16 / sizeof(typename T::Bits);
template <typename T>
constexpr uint32_t kRowsOfChunk = 16 / kWidth<T>;
template <typename T>
constexpr uint32_t kRowSize = kStepThreads * kWidth<T>;
// Lanes whose vectors make a word of the mask.
template <typename T>
constexpr uint32_t kLanesOfWord = 32 / kWidth<T>;

template <typename T>
using WeightVector = Vector<typename T::Bits, kWidth<T>>;

// kWhole: all weights are there, at an address that allows vectors. Else elements behind the end
// read as the largest key; being last in index order too, they are never selected.
template <typename T, bool kWhole>
struct ThreadTile {
  using Bits = typename T::Bits;
  static constexpr bool kVectorized = kWhole;
  Bits* own;       // the first weight
  uint32_t first;  // its index
  uint32_t numel;

  ISSP_DEVICE ThreadTile(const TensorView<T>& tensor, uint32_t chunk)
      : first(chunk * kChunkSize + thread() * kWidth<T>), numel(tensor.numel) {
    own = tensor.data + first;
  }

  // The same threads' weights of the next chunk.
  ISSP_DEVICE void advance() {
    own += kChunkSize;
    first += kChunkSize;
  }
  ISSP_DEVICE uint32_t index(uint32_t row, uint32_t j = 0) const {
    return first + row * kRowSize<T> + j;
  }
  // Of weight e of the 16.
  ISSP_DEVICE uint32_t index_of(uint32_t e) const { return index(e / kWidth<T>, e % kWidth<T>); }

  template <bool kFresh = false>
  ISSP_DEVICE WeightVector<T> load_row(uint32_t row) const {
    const Bits* const from = own + row * kRowSize<T>;
    if constexpr (kWhole) {
      return kFresh ? load_vector_fresh<kWidth<T>>(from) : load_vector<kWidth<T>>(from);
    } else {
      WeightVector<T> to;
#pragma unroll
      for (uint32_t j = 0; j < kWidth<T>; ++j) {
        to.x[j] = Limits<T>::magnitude;
        if (index(row, j) < numel) to.x[j] = kFresh ? load_fresh(from + j) : load(from + j);
      }
      return to;
    }
  }
  ISSP_DEVICE void store_row(uint32_t row, const WeightVector<T>& weights) const {
    Bits* const to = own + row * kRowSize<T>;
    if constexpr (kWhole) {
      store_vector(to, weights);
    } else {
#pragma unroll
      for (uint32_t j = 0; j < kWidth<T>; ++j) {
        if (index(row, j) < numel) store(to + j, weights.x[j]);
      }
    }
  }
};

// How many chunks allow vectors. aligned: whether everything but the weights does.
template <typename T>
ISSP_DEVICE uint32_t whole_chunks(const TensorView<T>& tensor, bool aligned) {
  aligned &= reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  return aligned ? tensor.numel / kChunkSize : 0;
}

// Calls body(tile) with the kind of tile that the chunk allows.
template <typename T, typename Body>
ISSP_DEVICE void with_tile(const TensorView<T>& tensor, uint32_t chunk, const Body& body) {
  if (chunk < whole_chunks(tensor, true)) {
    body(ThreadTile<T, true>(tensor, chunk));
  } else {
    body(ThreadTile<T, false>(tensor, chunk));
  }
}

// Two bits of each of a thread's 16 weights, one set in the low half, one in the high half, become
// words in memory order: a thread gets the low word `WordOfThread` of its chunk, or the high one.
// Lanes that make a word transpose their 32 bits as a matrix of kWidth<T> bits an element.
template <typename T>
ISSP_DEVICE uint32_t transpose_bits(uint32_t bits) {
#pragma unroll
  for (uint32_t distance = kLanesOfWord<T> / 2; distance > 0; distance /= 2) {
    const uint32_t other = shuffle_xor(bits, distance), shift = distance * kWidth<T>;
    const bool upper = lane() & distance;
    if (shift == 16) {
      bits = select_bytes(bits, other, upper ? 0x3276 : 0x5410);
    } else if (shift == 8) {
      bits = select_bytes(bits, other, upper ? 0x3715 : 0x6240);
    } else {
      // Ones where the element's number has a zero at `distance`, or, in the upper lane, a one.
      const uint32_t keep = ~0u / ((1u << shift) + 1u) << (upper ? shift : 0);
      const uint32_t moved = upper ? other >> shift : other << shift;
      bits = (bits & keep) | (moved & ~keep);
    }
  }
  return bits;
}

template <typename T>
ISSP_DEVICE uint32_t word_of(uint32_t chunk, uint32_t row) {
  return chunk * (kChunkSize / 32) + row * (kRowSize<T> / 32) + thread() / kLanesOfWord<T>;
}

template <typename T>
struct WordOfThread {
  uint32_t row, number;  // number: in the tensor
  bool high;

  ISSP_DEVICE WordOfThread(uint32_t chunk) {
    row = thread() % kRowsOfChunk<T>;
    high = thread() & kRowsOfChunk<T>;
    number = word_of<T>(chunk, row);
  }
};

// A thread's 16 bits of `count` words that have a bit per weight of the tensor.
template <typename T>
ISSP_DEVICE uint32_t load_bits(const uint32_t* words, uint32_t count, uint32_t chunk) {
  uint32_t bits = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRowsOfChunk<T>; ++row) {
    const uint32_t i = word_of<T>(chunk, row);
    const uint32_t word = i < count ? load(words + i) : 0u;
    const uint32_t own = word >> (thread() % kLanesOfWord<T> * kWidth<T>);
    bits |= (own & ((1u << kWidth<T>)-1u)) << (row * kWidth<T>);
  }
  return bits;
}

// Writes a mask word without the bits `gone`; returns how many bits changed. valid: those of
// weights.
ISSP_DEVICE uint32_t refresh_mask(uint32_t* word, uint32_t valid, uint32_t old, uint32_t gone) {
  const uint32_t kept = valid & ~gone;
  if (old != kept) store(word, kept);
  return popcount((old ^ kept) & valid);
}

}  // namespace issp
