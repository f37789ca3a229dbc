// The full radix search of tensors that the bracket missed, inside the second launch of
// soft_shrink_: 3 more reads for float32 (11 bits each; the sign is free), 4 when ties must be
// ranked across tiles. The host launches nothing for it and never learns of it.
//
// Work is claimed in ticket order: pass 0 of all tiles, pass 1 of all tiles, ..., ties; then every
// block applies its own tile, as always. A block waits only for work of earlier tickets, which
// blocks that already run have claimed, so there is no deadlock whatever number of blocks is
// resident, and no cooperative launch is needed. All tiles of the model stand between a tile's pass
// and its next one, so waits are rare except in a model of one tensor. A tensor too small to hold
// the bins in its scratch is searched by the block that claims its first tile.
#pragma once

#include "job.cuh"

namespace issp {

template <typename T>
constexpr uint32_t kPasses = (uint32_t(kKeyBits<T>) + kRadixBits - 1) / kRadixBits;

// A whole block marks its tensor as missed; the tensor's other blocks do not use the scratch now.
template <typename T>
ISSP_DEVICE void begin_search(const Job<T>& job, const Call<T>& call, uint32_t k) {
  if (job.has_bins()) {
    for (uint32_t i = thread(); i < kBins; i += kThreads) store(job.candidates() + i, 0u);
  }
  if (thread() != 0) return;
  store(job.header + kState, kSearching);
  store(job.header + kPhase, 0u);
  store(job.header + kRank, k);
  store_pair(job.header + kBase, 0);
  store(job.header + kBitsLeft, uint32_t(kKeyBits<T>));
  add(call.scratch + kMissed, 1u);
}

template <typename T>
ISSP_DEVICE Search<Key<T>> load_search(const Job<T>& job) {
  return {Key<T>(load_pair(job.header + kBase)), int(load_fresh(job.header + kBitsLeft)),
          load_fresh(job.header + kRank), 0};
}

// One thread: everything before `phase` is complete, for blocks that wait for it.
template <typename T>
ISSP_DEVICE void enter_phase(const Job<T>& job, uint32_t phase) {
  store(job.header + kArrived, 0u);
  store_release(job.header + kPhase, phase);
}

// Returns the phase that the tensor has reached, at least `phase`.
template <typename T>
ISSP_DEVICE uint32_t wait_for_phase(const Job<T>& job, uint32_t phase, Shared shared) {
  uint32_t reached = 0;
  if (thread() == 0) {
    reached = load_acquire(job.header + kPhase);
    while (reached < phase) {
      relax();
      reached = load_acquire(job.header + kPhase);
    }
  }
  return broadcast_block(reached, shared);
}

template <typename T>
ISSP_DEVICE void search_alone(const Job<T>& job, const Call<T>& call, Shared shared) {
  Search<Key<T>> search = load_search(job);
  search = select_block(search, TensorSource<T>{job.data, job.numel}, shared);
  const bool split = search.rank != search.equal;
  for (uint32_t tile = 0; split && tile < job.tiles; ++tile) {
    typename T::Bits bits[kRows];
    load_tile<T>(bits, job.data, tile, job.numel);
    const Scan scan = scan_warps(count_equal_warp<T>(bits, search.base), shared);
    if (thread() == 0) store(job.record(tile), scan.total);
  }
  if (split) accumulate_records(job, shared);
  if (thread() == 0) {
    publish(job, call, {search.base, search.rank, split});
    enter_phase(job, kPasses<T> + 1);
  }
}

// The last block of a pass picks the digit and opens the next phase.
template <typename T>
ISSP_DEVICE void end_pass(const Job<T>& job, const Call<T>& call, Search<Key<T>> search,
                          uint32_t phase, Shared shared) {
  for (uint32_t i = thread(); i < kBins; i += kThreads) {
    shared.set(i, load_fresh(job.candidates() + i));
    store(job.candidates() + i, 0u);
  }
  barrier();
  search.narrow(pick_digit(search.rank, shared));
  if (thread() != 0) return;
  store(job.header + kRank, search.rank);
  store_pair(job.header + kBase, search.base);
  store(job.header + kBitsLeft, uint32_t(search.bits));
  if (search.bits > 0) {
    enter_phase(job, phase + 1);
  } else {
    const bool split = search.rank != search.equal;
    publish(job, call, {search.base, search.rank, split});
    enter_phase(job, kPasses<T> + (split ? 0 : 1));
  }
}

template <typename T>
ISSP_DEVICE void count_pass(const Job<T>& job, const Call<T>& call,
                            const typename T::Bits (&bits)[kRows], uint32_t phase, Shared shared) {
  const Search<Key<T>> search = load_search(job);
  clear_bins(shared);
  TileSource<T>{bits}.each([&](Key<T> key) { search.count(key, shared); });
  barrier();
  for (uint32_t i = thread(); i < kBins; i += kThreads) {
    const uint32_t count = shared.get(i);
    if (count) add(job.candidates() + i, count);
  }
  if (last_to_arrive(job.header + kArrived, job.tiles, shared)) {
    end_pass(job, call, search, phase, shared);
  }
}

template <typename T>
ISSP_DEVICE void tie_pass(const Job<T>& job, const typename T::Bits (&bits)[kRows], Shared shared) {
  const Key<T> tau = Key<T>(load_pair(job.header + kTau));
  const Scan scan = scan_warps(count_equal_warp<T>(bits, tau), shared);
  if (thread() == 0) store(job.record(job.tile), scan.total);
  if (last_to_arrive(job.header + kArrived, job.tiles, shared)) {
    accumulate_records(job, shared);
    if (thread() == 0) enter_phase(job, kPasses<T> + 1);
  }
}

// One tile's share of one phase.
template <typename T>
ISSP_DEVICE void search_tile(const Job<T>& job, const Call<T>& call, uint32_t phase,
                             Shared shared) {
  if (load(job.header + kState) != kSearching) return;
  if (!job.has_bins()) {
    if (phase == 0 && job.tile == 0) search_alone(job, call, shared);
    return;
  }
  if (wait_for_phase(job, phase, shared) > phase) return;  // no ties to rank
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  if (phase == kPasses<T>) {
    tie_pass(job, bits, shared);
  } else {
    count_pass(job, call, bits, phase, shared);
  }
}

// Every block works through tickets until none is left.
template <typename T, typename Table>
ISSP_DEVICE void search_missed(const Table& table, const Call<T>& call, Shared shared) {
  const uint32_t tickets = table.tiles * (kPasses<T> + 1);
  barrier();  // no claim before the whole block has read kMissed, which the last claim resets
  if (thread() == 0) fence();
  while (true) {
    const uint32_t claimed = thread() == 0 ? add(call.scratch + kTicket, 1u) : 0;
    const uint32_t ticket = broadcast_block(claimed, shared);
    if (ticket >= tickets) {
      if (ticket == tickets + blocks() - 1 && thread() == 0) {  // nobody will claim after this
        fence();
        store(call.scratch + kTicket, 0u);
        store(call.scratch + kMissed, 0u);
      }
      return;
    }
    const Job<T> job(table, call, ticket % table.tiles);
    if (job.tiles > 1 && in_range(load(call.k + job.tensor), job.numel)) {
      search_tile(job, call, ticket / table.tiles, shared);
    }
  }
}

// In reverse, since the tiles that the count read last are still in the L2 cache.
template <typename Table>
ISSP_DEVICE uint32_t tile_to_apply(const Table& table) {
  return table.tiles - 1 - block();
}

template <typename T, typename Table>
ISSP_DEVICE void search_and_apply(const Table& table, const Call<T>& call, Shared shared) {
  search_missed(table, call, shared);
  const Job<T> job(table, call, tile_to_apply(table));
  if (job.tiles == 1 || !in_range(load(call.k + job.tensor), job.numel)) return;
  if (load(job.header + kState) == kSearching) wait_for_phase(job, kPasses<T> + 1, shared);
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  apply_job(job, call, load_verdict(job), bits, shared);
}

}  // namespace issp
