// One tensor of a soft_shrink_ call as a block sees it, and what its blocks tell each other.
// A tensor is cut into parts: of one tile in the two launches (streamed.cuh), of as many tiles as a
// block has room for in the resident one (resident.cuh).
#pragma once

#include "apply.cuh"
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
};

// The first words of the scratch buffer.
constexpr uint32_t kFallbacks = 0;  // searches that the bracket missed, ever
constexpr uint32_t kMissed = 1;     // tensors of this call that the second launch must search
constexpr uint32_t kTicket = 2;     // the second launch's work counter
constexpr uint32_t kClaimed = 3;    // the resident launch's work counter
constexpr uint32_t kGone = 4;       // blocks of it that have left

// The first words of a tensor's region. Zero between calls: below, inside, arrived.
constexpr uint32_t kBelow = 0, kInside = 1, kArrived = 2, kState = 3, kTau = 4, kTies = 6,
                   kPhase = 8, kRank = 9, kBase = 10, kBitsLeft = 12, kOpen = 13, kHeader = 16;
constexpr uint32_t kSettled = 1, kSearching = 2;  // kState

// Entry::extra in a call with an optimizer: the tensor's number and, in the last bits, what it is.
constexpr uint32_t kUpdateOnly = 1u << 31;  // not pruned
constexpr uint32_t kTensorBits = (1u << 24) - 1;

// One block selects among the candidates while the rest of the GPU goes on counting; beyond this
// many (1 MB of float32 keys) the search by all blocks is faster.
constexpr uint32_t kCandidateLimit = 1u << 18;

ISSP_DEVICE void store_pair(uint32_t* words, uint64_t value) {
  store(words, uint32_t(value));
  store(words + 1, uint32_t(value >> 32));
}
ISSP_DEVICE uint64_t load_pair(const uint32_t* words) {
  return load_fresh(words) | uint64_t(load_fresh(words + 1)) << 32;
}

template <typename T>
struct Job {
  typename T::Bits* data;
  uint32_t* mask;
  uint32_t* header;
  uint32_t numel, tiles, tensor;
  uint32_t spare;        // words of scratch behind the records
  uint32_t part, parts;  // which of how many
  uint32_t tile, held;   // its first tile and how many

  template <typename Table>
  ISSP_DEVICE Job(const Table& table, const Call<T>& call, const Part& of) {
    const auto& entry = table.entries[of.entry];
    data = static_cast<typename T::Bits*>(entry.data);
    mask = call.masks + uint64_t(entry.mask_line) * kLineWords;
    header = call.scratch + uint64_t(entry.scratch_line) * kLineWords;
    numel = entry.numel;
    tiles = (numel + (kTile - 1)) / kTile;
    tensor = entry.extra & kTensorBits;
    spare = entry.scratch_words - kHeader - 2 * tiles;
    part = of.number;
    parts = of.parts;
    tile = of.tile;
    held = of.tiles;
  }
  // One tile.
  template <typename Table>
  ISSP_DEVICE Job(const Table& table, const Call<T>& call, uint32_t tile_of_model)
      : Job(table, call, part_of(table, tile_of_model, 1)) {}

  // Two words per part: base and number of its candidates, later the equal elements before it.
  ISSP_DEVICE uint32_t* record(uint32_t i) const { return header + kHeader + 2 * uint64_t(i); }
  // The candidates of the bracket, or the bins of the full search.
  ISSP_DEVICE uint32_t* candidates() const { return record(tiles); }
  ISSP_DEVICE uint32_t capacity() const {
    const uint32_t room = spare / (sizeof(Key<T>) / 4);
    return room < kCandidateLimit ? room : kCandidateLimit;
  }
  ISSP_DEVICE bool has_bins() const { return spare >= kBins; }
  // Bits of a pass for which there is room.
  ISSP_DEVICE int width() const { return has_bins() ? int(kRadixBits) : bit_length(spare) - 1; }
  ISSP_DEVICE Target<T> target(const Call<T>& call, uint32_t i = 0) const {
    return {data, mask, numel, tile + i, call.shrink};
  }
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

// The outcome of a tensor's search, for the blocks that will apply it. One thread calls this,
// before any of those blocks adds its flips.
template <typename T>
ISSP_DEVICE void publish(const Job<T>& job, const Call<T>& call, const Verdict<Key<T>>& verdict) {
  store_pair(job.header + kTau, verdict.tau);
  store(job.header + kTies, verdict.ties);
  store(call.thresholds + job.tensor, typename T::Bits(verdict.tau));
  store(call.flips + job.tensor, int64_t(0));
}

// Turns the parts' counts of equal elements into the number of equal elements before each part.
template <typename T>
ISSP_DEVICE void accumulate_records(const Job<T>& job, Shared shared) {
  uint32_t before = 0;
  barrier();
  for (uint32_t start = 0; start < job.parts; start += kThreads) {
    const uint32_t i = start + thread();
    const uint32_t equal = i < job.parts ? load_fresh(job.record(i)) : 0;
    const Scan scan = scan_block(equal, shared);
    if (i < job.parts) store(job.record(i), before + scan.before);
    before += scan.total;
  }
  barrier();
}

template <bool kEarly = false, typename T>
ISSP_DEVICE Verdict<Key<T>> load_verdict(const Job<T>& job) {
  const auto word = [&](uint32_t i) {
    return kEarly ? load_early(job.header + i) : load_fresh(job.header + i);
  };
  const Key<T> tau = Key<T>(word(kTau) | uint64_t(word(kTau + 1)) << 32);
  return {tau, word(kTies)};
}

// Equal elements before this part.
template <typename T>
ISSP_DEVICE uint32_t rank_before(const Job<T>& job, const Verdict<Key<T>>& verdict) {
  return verdict.split() && job.parts > 1 ? load_fresh(job.record(job.part)) : 0;
}

// A whole block adds up its lanes' flips. A tensor that has just one part had none to set to zero.
template <typename T>
ISSP_DEVICE void count_flips(const Job<T>& job, const Call<T>& call, uint32_t of_lane,
                             Shared shared) {
  const uint32_t flips = sum_flips(of_lane, shared);
  if (thread() != 0) return;
  if (job.parts == 1) {
    store(call.flips + job.tensor, int64_t(flips));
  } else if (flips) {
    add(call.flips + job.tensor, int64_t(flips));
  }
}

}  // namespace issp
