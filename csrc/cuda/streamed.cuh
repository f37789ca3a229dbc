// soft_shrink_ in two launches, for tensors that do not fit in the shared memory of the blocks that
// run at a time:
//
//   1. count_kernel: every tile is read once, counted and compacted (bracket.cuh) while other
//      tensors are still being read. A tensor of one tile is finished here, in registers.
//   2. apply_kernel: every tile is read again, in reverse order (the last tiles read are still in
//      the L2 cache), and written, with its mask. When a bracket missed, this launch first searches
//      that tensor in full.
//
// Traffic: 2 reads and 1 write of the weights (12 bytes per float32 weight, less what L2 holds: 123
// us for EDSR-L's 43 M weights at 4.3 TB/s), plus 1/8 byte of mask and the candidates. Nothing is
// written before a count has been verified, because fl(alpha * w) is many-to-one. An optimizer's
// update comes with the first launch, which then writes the weights as well.
//
// In the second launch a search reads the tensor again in every phase. Its work is claimed in
// ticket order: pass 0 of all tiles, pass 1 of all tiles, ..., ties; then every block applies its
// own tile, as always. A block waits only for work of earlier tickets, which blocks that already
// run have claimed, so there is no deadlock whatever number of blocks is resident, and no
// cooperative launch is needed. All tiles of the model stand between a tile's pass and its next
// one, so waits are rare except in a model of one tensor. A tensor too small to hold the bins in
// its scratch is searched by the block that claims its first tile.
#pragma once

#include "bracket.cuh"
#include "prologue.cuh"

namespace issp {

template <typename T>
ISSP_DEVICE void search_alone(const Job<T>& job, const Call<T>& call, Shared shared) {
  Search<Key<T>> search = load_search(job);
  search = select_block(search, TensorSource<T>{job.data, job.numel}, shared);
  const Verdict<Key<T>> verdict = verdict_of(search);
  for (uint32_t tile = 0; verdict.split() && tile < job.tiles; ++tile) {
    typename T::Bits bits[kRows];
    load_tile<T>(bits, job.data, tile, job.numel);
    const Scan scan = scan_warps(count_equal_warp<T>(bits, search.base), shared);
    if (thread() == 0) store(job.record(tile), scan.total);
  }
  if (verdict.split()) accumulate_records(job, shared);
  if (thread() == 0) {
    publish(job, call, verdict);
    enter_phase(job, streamed_phases<T>(), kPasses<T> + 1);
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
  if (wait_for_phase(job, streamed_phases<T>(), phase, shared) > phase) return;  // no ties to rank
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  const InRegisters<T> held = {bits};
  if (phase == kPasses<T>) {
    tie_pass(job, streamed_phases<T>(), held, shared);
  } else {
    count_pass(job, call, streamed_phases<T>(), held, phase, shared);
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

// Applies the published verdict to this block's tile.
template <typename T>
ISSP_DEVICE void apply_job(const Job<T>& job, const Call<T>& call, const Verdict<Key<T>>& verdict,
                           const typename T::Bits (&bits)[kRows], Shared shared) {
  const Target<T> target = job.target(call);
  uint32_t rank = rank_before(job, verdict);
  const uint32_t gone = shrink_tile<T>(bits, target, verdict, rank, shared);
  count_flips(job, call, refresh_mask(target, gone, load_mask(target)), shared);
}

template <typename T, typename Table>
ISSP_DEVICE void search_and_apply(const Table& table, const Call<T>& call, Shared shared) {
  search_missed(table, call, shared);
  const Job<T> job(table, call, tile_to_apply(table));
  if (job.tiles == 1 || !in_range(load(call.k + job.tensor), job.numel)) return;
  if (load(job.header + kState) == kSearching) {
    wait_for_phase(job, streamed_phases<T>(), kPasses<T> + 1, shared);
  }
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  apply_job(job, call, load_verdict(job), bits, shared);
}

// A tensor of one tile: search, shrink, mask and flips without leaving the block.
template <typename T>
ISSP_DEVICE void shrink_alone(const Job<T>& job, const Call<T>& call,
                              const typename T::Bits (&bits)[kRows], uint32_t k,
                              const Bracket<Key<T>>& bracket, Shared shared) {
  const Verdict<Key<T>> verdict = select_alone<T>(call, InRegisters<T>{bits}, k, bracket, shared);
  apply_job(job, call, verdict, bits, shared);
  if (thread() == 0) store(call.thresholds + job.tensor, typename T::Bits(verdict.tau));
}

// A tile of a tensor of several: all its blocks together find the verdict, or that there is none.
template <typename T>
ISSP_DEVICE void count_tile(const Job<T>& job, const Call<T>& call,
                            const typename T::Bits (&bits)[kRows], uint32_t k,
                            const Bracket<Key<T>>& bracket, Shared shared) {
  bool missed = false;
  if (k == 0) {
    select_nothing(job, call, shared);
  } else if (!bracket.usable) {
    missed = job.tile == 0;
    if (missed) begin_search(job, k);
  } else if (compact(job, InRegisters<T>{bits}, bracket, shared)) {
    missed = !settle(job, call, k, bracket, shared);
  }
  if (missed && thread() == 0) add(call.scratch + kMissed, 1u);
}

// The update of a tile that is not kept.
template <typename T, typename Update>
ISSP_DEVICE void update_through(const Job<T>& job, const typename Update::Entry& entry,
                                const Update& update, Shared shared) {
  uint32_t* const column_of_tile = job.data + column(job.tile);
  const auto sink = [&](uint32_t row, uint32_t bits) { store(column_of_tile + 32 * row, bits); };
  const GlobalRows<T> rows = {job.data, column(job.tile), job.numel};
  update.update_tile(entry, job.tile, job.mask, rows, sink, shared);
}

template <typename T, typename Update, int Capacity>
ISSP_KERNEL(kThreads, Update::kUpdates ? 1 : kBlocksPerSm<T>)
count_kernel(const ISSP_PARAM Table<Capacity, typename Update::Entry> table,
             const ISSP_PARAM Call<T> call, const ISSP_PARAM Update update) {
  const Shared shared = shared_memory();
  Part part = part_of(table, block(), 1);
  if constexpr (Update::kUpdates) {
    if (stopped(call)) return;
    if (thread() == 0) share(shared.from(kPartArea), part);  // as in resident.cuh
    update.prepare(table.entries[part.entry], shared);
    barrier();
    update_through(Job<T>(table, call, part), table.entries[part.entry], update, shared);
    part = shared_value<Part>(shared.from(kPartArea));
  }
  const Job<T> job(table, call, part);
  typename T::Bits bits[kRows];
  // All loads are on their way before the first is waited for; a thread sees what it has stored.
  load_tile<T>(bits, job.data, job.tile, job.numel);
  const typename T::Bits previous = load(call.thresholds + job.tensor);
  const int64_t k = load(call.k + job.tensor);
  if (stopped(call) || !in_range(k, job.numel)) return;
  const Bracket<Key<T>> bracket = bracket_around(previous, call);
  if (job.tiles == 1) {
    shrink_alone(job, call, bits, uint32_t(k), bracket, shared);
  } else {
    count_tile(job, call, bits, uint32_t(k), bracket, shared);
  }
}

template <typename T, typename Update, int Capacity>
ISSP_KERNEL(kThreads, kBlocksPerSm<T>)
apply_kernel(const ISSP_PARAM Table<Capacity, typename Update::Entry> table,
             const ISSP_PARAM Call<T> call, const ISSP_PARAM Update update) {
  const Shared shared = shared_memory();
  const Part part = part_of(table, tile_to_apply(table), 1);
  const Job<T> job(table, call, part);
  typename T::Bits bits[kRows];
  load_tile<T>(bits, job.data, job.tile, job.numel);
  const Verdict<Key<T>> verdict = load_verdict<true>(job);
  const int64_t k = load(call.k + job.tensor);
  const bool missed = load(call.scratch + kMissed) != 0;
  if (stopped(call)) return;
  if (job.tile == 0 && thread() == 0) update.finish(table.entries[part.entry]);
  if (missed) {  // the verdict just read may be half written, and is not used
    search_and_apply<T>(table, call, shared);
  } else if (job.tiles > 1 && in_range(k, job.numel)) {
    apply_job(job, call, verdict, bits, shared);
  }
}

}  // namespace issp
