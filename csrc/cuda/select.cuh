// Exact selection by one block: the rank-th smallest of the keys that a source yields.
// Radix search from the top, 11 bits at a time: 31 bits of a float32 are 3 passes over the source,
// the 20 bits of a bracket 2. A pass costs one read of the source, one shared atomic per key that
// is still in the running, and a scan of 2048 bins (8 per thread).
#pragma once

#include "tile.cuh"

namespace issp {

// Words of shared memory.
constexpr uint32_t kScanArea = kBins;               // one per warp
constexpr uint32_t kNoteArea = kScanArea + kWarps;  // what one thread tells the block
constexpr uint32_t kNotes = 8;
constexpr uint32_t kStepArea = kNoteArea + kNotes;  // an optimizer's numbers for this step
constexpr uint32_t kStepWords = 12;
constexpr uint32_t kPartArea = kStepArea + kStepWords;
constexpr uint32_t kPartWords = 8;
constexpr uint32_t kSharedWords = (kPartArea + kPartWords + 3) / 4 * 4;  // slots start at 16 bytes
constexpr uint32_t kSharedBytes = 4 * kSharedWords;
static_assert(kSharedBytes <= 48 * 1024, "what every GPU gives a block without asking");

// A value of a few words that one thread leaves for the others, or for itself.
template <typename X>
ISSP_DEVICE void share(Shared at, const X& x) {
  uint32_t words[sizeof(X) / 4];
  memcpy(words, &x, sizeof(X));
#pragma unroll
  for (uint32_t i = 0; i < sizeof(X) / 4; ++i) at.set(i, words[i]);
}
template <typename X>
ISSP_DEVICE X shared_value(Shared at) {
  uint32_t words[sizeof(X) / 4];
#pragma unroll
  for (uint32_t i = 0; i < sizeof(X) / 4; ++i) words[i] = at.get(i);
  X x;
  memcpy(&x, words, sizeof(X));
  return x;
}

struct Scan {
  uint32_t before;  // sum over the threads before this one
  uint32_t total;
};

// Sums may pack several counts in one word. Two barriers.
ISSP_DEVICE Scan scan_block(uint32_t value, Shared shared) {
  uint32_t sum = value;
#pragma unroll
  for (uint32_t delta = 1; delta < 32; delta *= 2) {
    const uint32_t other = shuffle_up(sum, delta);
    if (lane() >= delta) sum += other;
  }
  if (lane() == 31) shared.set(kScanArea + warp(), sum);
  barrier();
  Scan scan = {sum - value, 0};
#pragma unroll
  for (uint32_t w = 0; w < kWarps; ++w) {
    const uint32_t warp_sum = shared.get(kScanArea + w);
    if (w < warp()) scan.before += warp_sum;
    scan.total += warp_sum;
  }
  barrier();
  return scan;
}

// Thread 0's value, for the whole block. Two barriers.
ISSP_DEVICE uint32_t broadcast_block(uint32_t value, Shared shared) {
  if (thread() == 0) shared.set(kNoteArea, value);
  barrier();
  const uint32_t told = shared.get(kNoteArea);
  barrier();
  return told;
}

struct Digit {
  uint32_t value;
  uint32_t below;  // keys in smaller bins
  uint32_t equal;  // keys in this bin
};

// The bin that holds the rank-th key (1 = smallest). The bins are filled and a barrier has passed.
ISSP_DEVICE Digit pick_digit(uint32_t rank, Shared shared) {
  constexpr uint32_t kOwn = kBins / kThreads;
  const uint32_t first = thread() * kOwn;
  uint32_t sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kOwn; ++i) sum += shared.get(first + i);
  const Scan scan = scan_block(sum, shared);
  if (rank > scan.before && rank - scan.before <= sum) {
    uint32_t below = scan.before, bin = first, equal = shared.get(first);
    while (rank - below > equal) {
      below += equal;
      equal = shared.get(++bin);
    }
    shared.set(kNoteArea, bin);
    shared.set(kNoteArea + 1, below);
    shared.set(kNoteArea + 2, equal);
  }
  barrier();
  const Digit digit = {shared.get(kNoteArea), shared.get(kNoteArea + 1), shared.get(kNoteArea + 2)};
  barrier();
  return digit;
}

ISSP_DEVICE void clear_bins(Shared shared) {
  for (uint32_t i = thread(); i < kBins; i += kThreads) shared.set(i, 0);
  barrier();
}

// The state of a radix search: the key sought lies in [base, base + 2^bits), at `rank` among those.
template <typename K>
struct Search {
  K base;
  int bits;
  uint32_t rank;
  uint32_t equal;          // once bits == 0: how many keys equal base; `rank` of them are selected
  int width = kRadixBits;  // bits of a pass

  ISSP_DEVICE int shift() const { return bits > width ? bits - width : 0; }
  ISSP_DEVICE void count(K key, Shared shared) const {
    const K distance = key - base;  // wraps to a huge number below the base
    if ((distance >> bits) == 0) shared.add(uint32_t(distance >> shift()), 1);
  }
  ISSP_DEVICE void narrow(const Digit& digit) {
    base += K(digit.value) << shift();
    rank -= digit.below;
    equal = digit.equal;
    bits = shift();
  }
};

// source.each(f) calls f(key) for this thread's share of the keys.
template <typename K, typename Source>
ISSP_DEVICE Search<K> select_block(Search<K> search, const Source& source, Shared shared) {
  do {
    clear_bins(shared);
    source.each([&](K key) { search.count(key, shared); });
    barrier();
    search.narrow(pick_digit(search.rank, shared));
  } while (search.bits > 0);
  return search;
}

// Sources.
template <typename T, typename Held>
struct HeldSource {  // what this block holds of a tensor, see held.cuh
  const Held& held;
  template <typename Visit>
  ISSP_DEVICE void each(const Visit& visit) const {
    held.each_tile([&](const auto& rows) {
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) visit(key<T>(rows[row]));
    });
  }
};

// Calls visit(fetch(i)) for this thread's share of 0..count, kBatch independent loads at a time:
// one block alone has only its own loads to hide the latency of the L2 cache.
template <typename K, typename Fetch, typename Visit>
ISSP_DEVICE void each_strided(uint32_t count, const Fetch& fetch, const Visit& visit) {
  constexpr uint32_t kBatch = sizeof(K) == 8 ? 8 : 16;
  const uint32_t whole = count - count % (kBatch * kThreads);
  for (uint32_t start = 0; start < whole; start += kBatch * kThreads) {
    K keys[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) keys[i] = fetch(start + i * kThreads + thread());
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) visit(keys[i]);
  }
  for (uint32_t i = whole + thread(); i < count; i += kThreads) visit(fetch(i));
}

template <typename T>
struct TensorSource {  // a whole tensor in global memory
  const typename T::Bits* data;
  uint32_t numel;
  template <typename Visit>
  ISSP_DEVICE void each(const Visit& visit) const {
    each_strided<Key<T>>(numel, [&](uint32_t i) { return key<T>(load(data + i)); }, visit);
  }
};

ISSP_DEVICE uint32_t load_key(const uint32_t* words, uint32_t i, uint32_t) {
  return load_fresh(words + i);
}
ISSP_DEVICE uint64_t load_key(const uint32_t* words, uint32_t i, uint64_t) {
  return load_fresh(words + 2 * uint64_t(i)) | uint64_t(load_fresh(words + 2 * uint64_t(i) + 1))
                                                   << 32;
}
ISSP_DEVICE void store_key(uint32_t* words, uint32_t i, uint32_t key) {
  store(words + i, key);
}
ISSP_DEVICE void store_key(uint32_t* words, uint32_t i, uint64_t key) {
  store(words + 2 * uint64_t(i), uint32_t(key));
  store(words + 2 * uint64_t(i) + 1, uint32_t(key >> 32));
}

template <typename K>
struct CandidateSource {  // keys compacted by other blocks
  const uint32_t* words;
  uint32_t count;
  template <typename Visit>
  ISSP_DEVICE void each(const Visit& visit) const {
    each_strided<K>(count, [&](uint32_t i) { return load_key(words, i, K(0)); }, visit);
  }
};

}  // namespace issp
