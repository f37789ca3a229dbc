// Exact selection by one block: the threshold of the `rank` smallest of the keys that a source
// yields, ties by the lowest index.
// Radix search from the top, 11 bits at a time: 31 bits of a float32 are 3 passes over the source,
// the 20 bits of a forecast 2. A pass costs one read of the source, one shared atomic per key that
// is still in the running, and a scan of 2048 bins. Where only some of the keys equal to the
// threshold are selected, their indices are searched in the same way.
#pragma once

#include "tile.cuh"

namespace issp {

// Words of shared memory.
constexpr uint32_t kScanArea = kBins;               // one per warp
constexpr uint32_t kNoteArea = kScanArea + kWarps;  // what one thread tells the block
constexpr uint32_t kNotes = 8;
constexpr uint32_t kStepArea = kNoteArea + kNotes;  // an optimizer's numbers for this step
constexpr uint32_t kStepWords = 12;
constexpr uint32_t kSharedWords = (kStepArea + kStepWords + 3) / 4 * 4;
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

// One barrier; another one before the next scan.
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
  for (uint32_t w = 0; w < threads() / 32; ++w) {
    const uint32_t warp_sum = shared.get(kScanArea + w);
    if (w < warp()) scan.before += warp_sum;
    scan.total += warp_sum;
  }
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

// Sum over the block, in thread 0.
ISSP_DEVICE uint32_t sum_block(uint32_t value, Shared shared) {
  if (thread() == 0) shared.set(kNoteArea, 0);
  barrier();
  if (value) shared.add(kNoteArea, value);
  barrier();
  return thread() == 0 ? shared.get(kNoteArea) : 0;
}

struct Digit {
  uint32_t value;
  uint32_t below;  // keys in smaller bins
  uint32_t equal;  // keys in this bin
};

// The bin that holds the rank-th key (1 = smallest). The bins are filled and a barrier has passed.
ISSP_DEVICE Digit pick_digit(uint32_t rank, Shared shared) {
  const uint32_t own = kBins / threads(), first = thread() * own;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < own; ++i) sum += shared.get(first + i);
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
  for (uint32_t i = thread(); i < kBins; i += threads()) shared.set(i, 0);
  barrier();
}

// The state of a radix search: the key sought lies in [base, base + 2^bits), at `rank` among those.
template <typename K>
struct Search {
  K base;
  int bits;
  uint32_t rank;
  uint32_t equal;  // once bits == 0: how many keys equal base; `rank` of them are selected

  ISSP_DEVICE int shift() const { return bits > int(kRadixBits) ? bits - int(kRadixBits) : 0; }
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
  // Whether all keys that equal base are selected.
  ISSP_DEVICE bool takes_all() const { return rank == equal; }
};

// The selected elements: keys below tau, and of those equal to tau the ones of index below `end`.
template <typename K>
struct Threshold {
  K tau;
  uint32_t end;
  ISSP_DEVICE bool selects(K key, uint32_t index) const {
    return key < tau || (key == tau && index < end);
  }
};
constexpr uint32_t kAllTies = ~0u;

// each(visit) calls visit(key) for this thread's share of the keys.
template <typename K, typename Each>
ISSP_DEVICE Search<K> search_block(Search<K> search, const Each& each, Shared shared) {
  do {
    clear_bins(shared);
    each([&](K key) { search.count(key, shared); });
    barrier();
    search.narrow(pick_digit(search.rank, shared));
  } while (search.bits > 0);
  return search;
}

// Indices are searched as 64-bit keys, for tensors of more than 2^31 elements.
ISSP_DEVICE Search<uint64_t> search_of_indices(uint32_t numel, uint32_t rank) {
  return {0, bit_length(numel), rank, 0};
}

// source.each(visit) calls visit(key, index) for this thread's share of the elements.
template <typename K, typename Source>
ISSP_DEVICE Threshold<K> find_threshold(Search<K> search, const Source& source, uint32_t numel,
                                        Shared shared) {
  const auto keys = [&](const auto& visit) { source.each([&](K key, uint32_t) { visit(key); }); };
  search = search_block(search, keys, shared);
  if (search.takes_all()) return {search.base, kAllTies};
  const auto indices_of_equal = [&](const auto& visit) {
    source.each([&](K key, uint32_t index) {
      if (key == search.base) visit(uint64_t(index));
    });
  };
  const auto last = search_block(search_of_indices(numel, search.rank), indices_of_equal, shared);
  return {search.base, uint32_t(last.base) + 1};
}

// Calls visit(key, index) for the results of fetch(i), i in this thread's share of 0..count. kBatch
// loads are independent: one block alone has only its own to hide the latency of the L2 cache.
template <typename K, uint32_t kBatch, typename Fetch, typename Visit>
ISSP_DEVICE void each_strided(uint32_t count, const Fetch& fetch, const Visit& visit) {
  struct Element {
    K key;
    uint32_t index;
  };
  const uint32_t whole = count - count % (kBatch * threads());
  const auto visit_one = [&](uint32_t i) {
    K key;
    const uint32_t index = fetch(i, key);
    visit(key, index);
  };
  for (uint32_t start = 0; start < whole; start += kBatch * threads()) {
    Element elements[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      elements[i].index = fetch(start + i * threads() + thread(), elements[i].key);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) visit(elements[i].key, elements[i].index);
  }
  for (uint32_t i = whole + thread(); i < count; i += threads()) visit_one(i);
}

template <typename T>
struct TensorSource {  // a whole tensor in global memory
  const typename T::Bits* data;
  uint32_t numel;
  template <typename Visit>
  ISSP_DEVICE void each(const Visit& visit) const {
    const auto fetch = [&](uint32_t i, Key<T>& own) {
      own = key<T>(load(data + i));
      return i;
    };
    each_strided<Key<T>, 8>(numel, fetch, visit);
  }
};

template <typename T>
struct CandidateSource {  // elements that other blocks have listed
  const typename T::Bits* data;
  const uint32_t* indices;
  uint32_t count;
  template <typename Visit>
  ISSP_DEVICE void each(const Visit& visit) const {
    const auto fetch = [&](uint32_t i, Key<T>& own) {
      const uint32_t index = load_fresh(indices + i);
      own = key<T>(load_fresh(data + index));
      return index;
    };
    each_strided<Key<T>, 4>(count, fetch, visit);
  }
};

}  // namespace issp
