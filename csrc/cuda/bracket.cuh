// Selection by the previous threshold: one reading of a tensor's parts counts what lies below a
// bracket around it and gathers what lies inside, a few per cent; the last part's block selects
// exactly among these. What a bracket misses is searched in full (search.cuh): it costs time, never
// exactness.
#pragma once

#include "search.cuh"

namespace issp {

// Keys in [low, high] are candidates; high < low + 2^bits.
template <typename K>
struct Bracket {
  K low, high;
  int bits;
  bool usable;
};

// After a shrink the k-th magnitude is fl(shrink * tau) exactly, since rounded multiplication is
// monotone; until the next one the weights drift. Hard thresholding and strong shrinks leave a gap
// below tau, where the next k-th magnitude depends on what has grown back: a wider guess.
template <typename T>
ISSP_DEVICE Bracket<Key<T>> bracket_around(typename T::Bits previous, const Call<T>& call) {
  using Wide = typename T::Wide;
  const Key<T> tau = key<T>(previous);
  if (!call.bracket || tau > kInfinity<T>) return {0, 0, 0, false};
  const bool soft = call.shrink > Wide(0.5);
  const Wide magnitude = widen(T{}, typename T::Bits(tau));
  const Wide down = soft ? Wide(0.97) * call.shrink : Wide(0.7);
  const Wide up = soft ? Wide(1.03) : Wide(1.4);
  const Key<T> low = narrow(T{}, magnitude * down), high = narrow(T{}, magnitude * up);
  Bracket<Key<T>> bracket = {low ? low - 1 : 0, high + 1, 0, true};  // an ulp for the rounding
  if (bracket.high > kInfinity<T>) bracket.high = kInfinity<T>;
  bracket.bits = bit_length(Key<T>(bracket.high - bracket.low));
  return bracket;
}

// Both counts of a thread in one word: a part has fewer than 65536 elements.
template <typename T, typename Held>
ISSP_DEVICE uint32_t count_held(const Held& held, const Bracket<Key<T>>& bracket) {
  uint32_t counts = 0;
  HeldSource<T, Held>{held}.each([&](Key<T> magnitude) {
    counts += magnitude < bracket.low ? 1u << 16 : magnitude <= bracket.high ? 1u : 0u;
  });
  return counts;
}

ISSP_DEVICE bool holds(uint32_t below, uint32_t inside, uint32_t k) {
  return below < k && k - below <= inside;
}

// A tensor that one block holds as a whole: searched without leaving the block.
template <typename T, typename Held>
ISSP_DEVICE Verdict<Key<T>> select_alone(const Call<T>& call, const Held& held, uint32_t k,
                                         const Bracket<Key<T>>& bracket, Shared shared) {
  if (k == 0) return {0, 0};
  Search<Key<T>> search = {0, kKeyBits<T>, k, 0};
  if (bracket.usable) {
    const uint32_t counts = scan_block(count_held<T>(held, bracket), shared).total;
    const uint32_t below = counts >> 16;
    if (holds(below, counts & 0xffffu, k)) {
      search = {bracket.low, bracket.bits, k - below, 0};
    } else if (thread() == 0) {
      add(call.scratch + kFallbacks, 1u);
    }
  }
  search = select_block(search, HeldSource<T, Held>{held}, shared);
  return verdict_of(search);
}

// Counts the candidates that equal tau in every part's segment; a warp takes a part.
template <typename T>
ISSP_DEVICE void count_equal_candidates(const Job<T>& job, Key<T> tau) {
  for (uint32_t part = warp(); part < job.parts; part += kWarps) {
    // One lane reads what it will overwrite.
    const uint32_t own_base = lane() == 0 ? load_fresh(job.record(part)) : 0;
    const uint32_t own_count = lane() == 0 ? load_fresh(job.record(part) + 1) : 0;
    const uint32_t base = shuffle(own_base, 0), count = shuffle(own_count, 0);
    uint32_t equal = 0;
    for (uint32_t start = 0; start < count; start += 32) {
      const uint32_t i = start + lane();
      const bool same = i < count && load_key(job.candidates(), base + i, Key<T>(0)) == tau;
      equal += popcount(ballot(same));
    }
    if (lane() == 0) store(job.record(part), equal);
  }
}

// The last block of a tensor: all its parts are counted. Publishes the verdict and returns true, or
// begins a search.
template <typename T>
ISSP_DEVICE bool settle(const Job<T>& job, const Call<T>& call, uint32_t k,
                        const Bracket<Key<T>>& bracket, Shared shared) {
  const uint32_t below = load_fresh(job.header + kBelow);
  const uint32_t inside = load_fresh(job.header + kInside);
  barrier();
  if (thread() == 0) {
    store(job.header + kBelow, 0u);
    store(job.header + kInside, 0u);
    store(job.header + kArrived, 0u);
  }
  if (!holds(below, inside, k) || inside > job.capacity()) {
    begin_search(job, k);
    if (thread() == 0) add(call.scratch + kFallbacks, 1u);
    return false;
  }
  Search<Key<T>> search = {bracket.low, bracket.bits, k - below, 0};
  search = select_block(search, CandidateSource<Key<T>>{job.candidates(), inside}, shared);
  const Verdict<Key<T>> verdict = verdict_of(search);
  if (verdict.split()) {
    count_equal_candidates(job, search.base);
    accumulate_records(job, shared);
  }
  if (thread() == 0) {
    store(job.header + kState, kSettled);
    publish(job, call, verdict);
  }
  return true;
}

// Counts a part and gathers its candidates; true in the block of the last part to do so.
template <typename T, typename Held>
ISSP_DEVICE bool compact(const Job<T>& job, const Held& held, const Bracket<Key<T>>& bracket,
                         Shared shared) {
  const Scan scan = scan_block(count_held<T>(held, bracket), shared);
  const uint32_t inside = scan.total & 0xffffu;
  uint32_t base = 0;
  if (thread() == 0) {
    base = add(job.header + kInside, inside);
    add(job.header + kBelow, scan.total >> 16);
    store(job.record(job.part), base);
    store(job.record(job.part) + 1, inside);
  }
  uint32_t next = broadcast_block(base, shared) + (scan.before & 0xffffu);
  const uint32_t capacity = job.capacity();
  HeldSource<T, Held>{held}.each([&](Key<T> magnitude) {
    if (magnitude >= bracket.low && magnitude <= bracket.high) {
      if (next < capacity) store_key(job.candidates(), next, magnitude);
      ++next;
    }
  });
  return last_to_arrive(job.header + kArrived, job.parts, shared);
}

// A tensor of several parts that keeps everything. Its threshold is written by the last block to
// arrive, since all of them may read it on entry; true in that block.
template <typename T>
ISSP_DEVICE bool select_nothing(const Job<T>& job, const Call<T>& call, Shared shared) {
  if (!last_to_arrive(job.header + kArrived, job.parts, shared)) return false;
  if (thread() == 0) {
    store(job.header + kArrived, 0u);
    store(job.header + kState, kSettled);
    publish(job, call, {0, 0});
  }
  return true;
}

}  // namespace issp
