// One tensor of a soft_shrink_ call as a block sees it, and its words of the scratch buffer.
#pragma once

#include "select.cuh"
#include "table.cuh"

namespace issp {

template <typename T>
struct Call {
  const int64_t* k;
  typename T::Bits* thresholds;
  uint32_t* masks;
  int64_t* flips;
  uint32_t* scratch;
  const float* found_inf;  // may be null
  typename T::Wide shrink;
  uint32_t bracket;
  uint32_t undoable = 0;  // whether the pass of the first launch can be undone
  uint32_t patience = 0;  // rounds of a wait after which a block traps; 0: it waits for ever
};

// The first words of the scratch buffer.
constexpr uint32_t kMisses = 0;    // forecasts that did not hold, ever
constexpr uint32_t kSearched = 1;  // tensors of this launch that all blocks search
constexpr uint32_t kTicket = 2;    // the work counter of that search

// The first words of a tensor's region. Zero between calls: below, inside, arrived, flips. Between
// calls the predictor stays. What is searched is a key from `base` on, or an index.
constexpr uint32_t kBelow = 0, kInside = 1, kArrived = 2, kPhase = 3, kState = 4, kTau = 5,
                   kEnd = 7, kCandidates = 8, kBase = 9, kRank = 11, kBitsLeft = 12, kFlips = 13,
                   kPredictor = 14, kHeader = 16;
// kState. Missed: weights below `base` have been shrunk.
constexpr uint32_t kSettled = 1, kMissed = 2, kUnknown = 3;

// Entry::extra in a call with an optimizer: the tensor's number and, in the last bits, what it is.
constexpr uint32_t kUpdateOnly = 1u << 31;  // not pruned
constexpr uint32_t kTensorBits = (1u << 24) - 1;

ISSP_DEVICE void store_pair(uint32_t* words, uint64_t value) {
  store(words, uint32_t(value));
  store(words + 1, uint32_t(value >> 32));
}
ISSP_DEVICE uint64_t load_pair(const uint32_t* words) {
  return load_fresh(words) | uint64_t(load_fresh(words + 1)) << 32;
}

// A chunk is 16 weights for each thread of a block. A block of the first launch takes up to
// kMostChunks of them, one of the second launch a strip.
#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kStepWarps = 2, kMostChunks = 2, kStripChunks = 2;
#else
constexpr uint32_t kStepWarps = 8, kMostChunks = 4, kStripChunks = 16;
#endif
constexpr uint32_t kStepThreads = 32 * kStepWarps;
constexpr uint32_t kChunkSize = 16 * kStepThreads, kStripSize = kChunkSize * kStripChunks;
static_assert(kStripSize / 10 >= kBins, "scratch of a tensor of several strips holds the bins");

ISSP_RULE uint32_t pieces_of(uint32_t numel, uint32_t size) {
  return numel / size + (numel % size != 0);
}

template <typename T>
struct TensorView {
  typename T::Bits* data;
  uint32_t* mask;
  uint32_t* header;
  uint32_t numel, tensor, scratch_words;

  template <typename Entry>
  ISSP_DEVICE TensorView(const Entry& entry, const Call<T>& call)
      : data(static_cast<typename T::Bits*>(entry.data)),
        mask(call.masks + uint64_t(entry.mask_line) * kLineWords),
        header(call.scratch + uint64_t(entry.scratch_line) * kLineWords),
        numel(entry.numel),
        tensor(entry.extra & kTensorBits),
        scratch_words(entry.scratch_words) {}

  // check_sizes leaves room for these sums.
  ISSP_DEVICE uint32_t words() const { return (numel + 31) / 32; }
  ISSP_DEVICE uint32_t padded_words() const { return (numel + 511) / 512 * 16; }
  ISSP_DEVICE uint32_t chunks() const { return (numel + (kChunkSize - 1)) / kChunkSize; }
  ISSP_DEVICE uint32_t strips() const { return pieces_of(numel, kStripSize); }

  // The undo log: a bit per weight, its lowest one before the pass; the mask before the pass; a
  // word per chunk, whose bits are the rows of its warps that the pass has postponed.
  ISSP_DEVICE uint32_t* lsb() const { return header + kHeader; }
  ISSP_DEVICE uint32_t* old_mask() const { return lsb() + words(); }
  ISSP_DEVICE uint32_t* postponed() const { return old_mask() + words(); }
  // Indices of the candidates.
  ISSP_DEVICE uint32_t* candidates() const { return postponed() + chunks(); }
  ISSP_DEVICE uint32_t capacity() const {
    return scratch_words - (kHeader + 2 * words() + chunks());
  }
  // The bins of a search by several blocks, in place of the undo log.
  ISSP_DEVICE uint32_t* bins() const { return header + kHeader; }
};

// found_inf is the gradient scaler's: an optimizer step that is skipped shrinks nothing (NaN:
// same).
template <typename T>
ISSP_DEVICE bool stopped(const Call<T>& call) {
  return call.found_inf != nullptr && !(load(call.found_inf) == 0.0f);
}

ISSP_DEVICE bool in_range(int64_t k, uint32_t numel) {
  return k >= 0 && k <= int64_t(numel);
}

// True in the one block that arrives after all others; it sees what they wrote before arriving.
// One thread's fences serve the block: they are cumulative over what its barriers have ordered.
ISSP_DEVICE bool last_to_arrive(uint32_t* counter, uint32_t expected, Shared shared) {
  barrier();
  uint32_t arrived = 0;
  if (thread() == 0) {
    fence();
    arrived = add(counter, 1u) + 1;
    fence();
  }
  return broadcast_block(arrived, shared) == expected;
}

}  // namespace issp
