// soft_shrink_: exact per-tensor selection, shrinkage, packed mask and flips, in two launches for
// the whole model (issp/schemas.py has the semantics).
//
//   1. count_kernel: every tile is read once. Around the previous threshold lies a bracket: what is
//      below it is counted, what is inside is counted and compacted. The last block of a tensor to
//      arrive checks that the rank k falls inside and selects exactly among the candidates, while
//      other tensors are still being counted. A tensor of one tile is finished here, in registers.
//   2. apply_kernel: every tile is read again, in reverse order (the last tiles read are still in
//      the L2 cache), and written, with its mask. When a bracket missed, this launch first searches
//      that tensor in full (search.cuh): the bracket costs time, never exactness.
//
// Traffic: 2 reads and 1 write of the weights (12 bytes per float32 weight, less what L2 holds: 123
// us for EDSR-L's 43 M weights at 4.3 TB/s), plus 1/8 byte of mask and the candidates, a few per
// cent of the weights. Nothing is written before a count has been verified, because fl(alpha * w)
// is many-to-one. Nothing waits on the host: k, thresholds, found_inf are read on the device.
//
// The next step is one launch that keeps its tiles (1 read, 1 write), and Adam as its prologue;
// both would replace count_kernel's load_tile and keep everything from Bracket on.
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

// Both counts of a thread in one word: a tile has at most 8192 elements.
template <typename T>
ISSP_DEVICE uint32_t count_tile(const typename T::Bits (&bits)[kRows],
                                const Bracket<Key<T>>& bracket) {
  uint32_t counts = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const Key<T> magnitude = key<T>(bits[row]);
    counts += magnitude < bracket.low ? 1u << 16 : magnitude <= bracket.high ? 1u : 0u;
  }
  return counts;
}

ISSP_DEVICE bool holds(uint32_t below, uint32_t inside, uint32_t k) {
  return below < k && k - below <= inside;
}

// A tensor of one tile: search, shrink, mask and flips without leaving the block.
template <typename T>
ISSP_DEVICE void shrink_tile(const Job<T>& job, const Call<T>& call,
                             const typename T::Bits (&bits)[kRows], uint32_t k,
                             const Bracket<Key<T>>& bracket, Shared shared) {
  Verdict<Key<T>> verdict = {0, 0, 0};
  if (k > 0) {
    Search<Key<T>> search = {0, kKeyBits<T>, k, 0};
    if (bracket.usable) {
      const uint32_t counts = scan_block(count_tile<T>(bits, bracket), shared).total;
      const uint32_t below = counts >> 16;
      if (holds(below, counts & 0xffffu, k)) {
        search = {bracket.low, bracket.bits, k - below, 0};
      } else if (thread() == 0) {
        add(call.scratch + kFallbacks, 1u);
      }
    }
    search = select_block(search, TileSource<T>{bits}, shared);
    verdict = {search.base, search.rank, search.rank != search.equal};
  }
  const uint32_t flips = apply_tile<T>(bits, job.target(call), verdict, 0, shared);
  if (thread() == 0) {
    store(call.thresholds + job.tensor, typename T::Bits(verdict.tau));
    store(call.flips + job.tensor, int64_t(flips));
  }
}

// Counts the candidates that equal tau in every tile's segment; a warp takes a tile.
template <typename T>
ISSP_DEVICE void count_equal_candidates(const Job<T>& job, Key<T> tau) {
  for (uint32_t tile = warp(); tile < job.tiles; tile += kWarps) {
    // One lane reads what it will overwrite.
    const uint32_t own_base = lane() == 0 ? load_fresh(job.record(tile)) : 0;
    const uint32_t own_count = lane() == 0 ? load_fresh(job.record(tile) + 1) : 0;
    const uint32_t base = shuffle(own_base, 0), count = shuffle(own_count, 0);
    uint32_t equal = 0;
    for (uint32_t start = 0; start < count; start += 32) {
      const uint32_t i = start + lane();
      const bool same = i < count && load_key(job.candidates(), base + i, Key<T>(0)) == tau;
      equal += popcount(ballot(same));
    }
    if (lane() == 0) store(job.record(tile), equal);
  }
}

// The last block of a tensor: all its tiles are counted.
template <typename T>
ISSP_DEVICE void settle(const Job<T>& job, const Call<T>& call, uint32_t k,
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
    begin_search(job, call, k);
    if (thread() == 0) add(call.scratch + kFallbacks, 1u);
    return;
  }
  Search<Key<T>> search = {bracket.low, bracket.bits, k - below, 0};
  search = select_block(search, CandidateSource<Key<T>>{job.candidates(), inside}, shared);
  const bool split = search.rank != search.equal;
  if (split) {
    count_equal_candidates(job, search.base);
    accumulate_records(job, shared);
  }
  if (thread() == 0) {
    store(job.header + kState, kSettled);
    publish(job, call, {search.base, search.rank, split});
  }
}

// One tile of a tensor of several: count, compact, and settle the tensor if it was the last.
template <typename T>
ISSP_DEVICE void compact_tile(const Job<T>& job, const Call<T>& call,
                              const typename T::Bits (&bits)[kRows], uint32_t k,
                              const Bracket<Key<T>>& bracket, Shared shared) {
  const Scan scan = scan_block(count_tile<T>(bits, bracket), shared);
  const uint32_t inside = scan.total & 0xffffu;
  uint32_t base = 0;
  if (thread() == 0) {
    base = add(job.header + kInside, inside);
    add(job.header + kBelow, scan.total >> 16);
    store(job.record(job.tile), base);
    store(job.record(job.tile) + 1, inside);
  }
  uint32_t next = broadcast_block(base, shared) + (scan.before & 0xffffu);
  const uint32_t capacity = job.capacity();
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const Key<T> magnitude = key<T>(bits[row]);
    if (magnitude >= bracket.low && magnitude <= bracket.high) {
      if (next < capacity) store_key(job.candidates(), next, magnitude);
      ++next;
    }
  }
  if (last_to_arrive(job.header + kArrived, job.tiles, shared)) {
    settle(job, call, k, bracket, shared);
  }
}

// A tensor of several tiles that keeps everything. Its threshold is written by the last block to
// arrive, since all of them read it on entry.
template <typename T>
ISSP_DEVICE void select_nothing(const Job<T>& job, const Call<T>& call, Shared shared) {
  if (!last_to_arrive(job.header + kArrived, job.tiles, shared) || thread() != 0) return;
  store(job.header + kArrived, 0u);
  store(job.header + kState, kSettled);
  publish(job, call, {0, 0, 0});
}

template <typename T, int Capacity>
ISSP_KERNEL(kThreads, kBlocksPerSm<T>)
count_kernel(const ISSP_PARAM Table<Capacity> table, const ISSP_PARAM Call<T> call) {
  const Shared shared = shared_memory();
  const Job<T> job(table, call, block());
  // All loads are on their way before the first is waited for.
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  const typename T::Bits previous = load(call.thresholds + job.tensor);
  const int64_t k = load(call.k + job.tensor);
  if (stopped(call) || !in_range(k, job.numel)) return;
  const Bracket<Key<T>> bracket = bracket_around(previous, call);
  if (job.tiles == 1) {
    shrink_tile(job, call, bits, uint32_t(k), bracket, shared);
  } else if (k == 0) {
    select_nothing(job, call, shared);
  } else if (!bracket.usable) {
    if (job.tile == 0) begin_search(job, call, uint32_t(k));
  } else {
    compact_tile(job, call, bits, uint32_t(k), bracket, shared);
  }
}

template <typename T, int Capacity>
ISSP_KERNEL(kThreads, kBlocksPerSm<T>)
apply_kernel(const ISSP_PARAM Table<Capacity> table, const ISSP_PARAM Call<T> call) {
  const Shared shared = shared_memory();
  const Job<T> job(table, call, tile_to_apply(table));
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  const Verdict<Key<T>> verdict = load_verdict<true>(job);
  const int64_t k = load(call.k + job.tensor);
  const bool missed = load(call.scratch + kMissed) != 0;
  if (stopped(call)) return;
  if (missed) {  // the verdict just read may be half written, and is not used
    search_and_apply<T>(table, call, shared);
  } else if (job.tiles > 1 && in_range(k, job.numel)) {
    apply_job(job, call, verdict, bits, shared);
  }
}

// Two launches; one when every tensor is a single tile.
template <typename T>
void soft_shrink(const std::vector<Item>& items, const Call<T>& call, Stream stream) {
  for_tables(items, {}, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(count_kernel<T, capacity>, table.tiles, kThreads, kSharedBytes, stream, table, call);
    if (table.tiles > table.count) {
      launch(apply_kernel<T, capacity>, table.tiles, kThreads, kSharedBytes, stream, table, call);
    }
  });
}

}  // namespace issp
