// soft_shrink_ in one launch: a tensor stays in shared memory between the count and the write.
//
// Traffic: 1 read and 1 write of the weights (8 bytes per float32 weight: 80 us for EDSR-L's 43 M
// at 4.3 TB/s), 1/8 byte of mask, and the candidates, a few per cent, which stay in L2. What a
// bracket misses is searched in shared memory, not read again.
//
// A part: as many tiles of one tensor as a block has slots for, 3 of 32 KB in float32 where two
// blocks share the 228 KB of an SM (sm_90, sm_100), 2 on sm_80, 1 on sm_120. A part costs a chain
// of latencies (ticket, count, arrival, the last block's selection, verdict: 5 to 6 us) that does
// not depend on its size, and 2 us of memory time per tile, so a part should be as large as fits.
// What hides the chain is the SM's other block, with twice 512 threads and 64 registers each; and a
// block asks for its next part while it writes this one: a slot that has been written is filled
// again at once, past the registers, so that reads and writes overlap within a block too. One block
// of 200 KB would leave the chain exposed, half the tile per block would pay it twice.
//
// A tensor of one part (24576 float32 weights; most of SwinIR-light's) is finished by its block
// alone. The blocks of a larger one, its group, count their parts, gather candidates, and wait at
// kOpen for the verdict of the last to arrive.
//
// Why it never waits for ever: all blocks run at the same time (a cooperative launch, as many as
// the queried occupancy allows), a group has no more parts than there are blocks, and parts are
// claimed in ticket order: the first by the block's number, then from a counter. A block claims
// only once it knows the verdict on what it holds, and from there to its next count it waits for
// nothing. Hence the blocks that wait each hold one counted part. Groups are claimed one after the
// other, so only the last can be partly claimed; every other one has its verdict as soon as its
// blocks have counted. If all blocks waited, they would all hold parts of that last group, which
// has not more parts than there are blocks: it would be claimed as a whole and have its verdict.
//
// The last block to leave resets the counters, so a captured graph can be replayed. Nothing waits
// on the host, nothing is uploaded, and the only memory between calls is the scratch buffer.
#pragma once

#include "bracket.cuh"
#include "prologue.cuh"

namespace issp {

constexpr uint32_t kMostSlots = 7;  // counts of a part fit 16 bits
static_assert(kMostSlots * kTile < 1u << 16, "bracket.cuh packs two counts in a word");

struct Residency {
  uint32_t slots = 0;   // tiles that a block holds
  uint32_t blocks = 0;  // that run at the same time
  uint32_t shared_bytes = 0;
};

// What the kernel is told of it. `tidy`: there is something to reset at the end.
struct Plan {
  uint32_t slots, tidy;
};

template <typename T>
ISSP_DEVICE InShared<T> held_part(const Job<T>& job, Shared shared) {
  return {shared.from(kSharedWords), job.tile, job.held, job.numel};
}

// Tells a group's blocks that a phase has begun.
template <typename T>
ISSP_DEVICE void open_phase(const Job<T>& job, uint32_t phase) {
  barrier();
  if (thread() == 0) store_release(job.header + kOpen, phase);
}

// One part of a group: returns the verdict that all of its blocks have come to.
template <typename T>
ISSP_DEVICE Verdict<Key<T>> agree(const Job<T>& job, const Call<T>& call, uint32_t k,
                                  const Bracket<Key<T>>& bracket, Shared shared) {
  const InShared<T> held = held_part(job, shared);
  const Phases phases = resident_phases();
  if (k == 0) {
    if (select_nothing(job, call, shared)) open_phase(job, phases.ties + 1);
  } else if (bracket.usable) {
    if (compact(job, held, bracket, shared)) {
      open_phase(job, settle(job, call, k, bracket, shared) ? phases.ties + 1 : 1);
    }
  } else if (job.part == 0) {
    begin_search(job, k);
    open_phase(job, 1);
  }
  uint32_t phase = wait_for_phase(job, phases, 1, shared);
  while (phase <= phases.ties) {
    if (phase < phases.ties) {
      count_pass(job, call, phases, held, phase, shared);
    } else {
      tie_pass(job, phases, held, shared);
    }
    phase = wait_for_phase(job, phases, phase + 1, shared);
  }
  return load_verdict(job);
}

template <typename T>
ISSP_DEVICE Verdict<Key<T>> decide(const Job<T>& job, const Call<T>& call, Shared shared) {
  const uint32_t k = uint32_t(load(call.k + job.tensor));
  Bracket<Key<T>> bracket = {0, 0, 0, false};
  if (k > 0) bracket = bracket_around(load(call.thresholds + job.tensor), call);
  if (job.parts > 1) return agree(job, call, k, bracket, shared);
  return select_alone<T>(call, held_part(job, shared), k, bracket, shared);
}

// The part of a ticket. Where nothing is selected from it, `parts` is 0: an update finishes it at
// once, and without one it is left alone.
template <typename T, typename Update, typename Table>
ISSP_DEVICE Part begin_part(const Table& table, const Call<T>& call, const Update& update,
                            uint32_t ticket, uint32_t slots) {
  Part part = part_of(table, ticket, slots);
  const auto& entry = table.entries[part.entry];
  if constexpr (Update::kUpdates) {
    if (update.freezes(entry) && part.number == 0 && thread() == 0) {
      store(call.flips + (entry.extra & kTensorBits), int64_t(0));
    }
  }
  if (!update.selects(entry) ||
      !in_range(load(call.k + (entry.extra & kTensorBits)), entry.numel)) {
    part.parts = 0;
  }
  return part;
}

// Tile i of a part is on its way to its slot, unless nothing will be done with it.
template <typename T, typename Update, typename Table>
ISSP_DEVICE void fill_slot(const Table& table, const Part& part, uint32_t i, Shared shared) {
  if (!Update::kUpdates && !part.parts) return;
  const auto& entry = table.entries[part.entry];
  const auto data = static_cast<const typename T::Bits*>(entry.data);
  fetch_tile<T>(shared.from(kSharedWords + i * kSlotWords<T>), data, part.tile + i, entry.numel);
}

// The update of a part: its weights stay in their slots, or are written if none will be selected.
template <typename T, typename Update, typename Table>
ISSP_DEVICE void update_part(const Table& table, const Call<T>& call, const Update& update,
                             const Part& part, Shared shared) {
  const Job<T> job(table, call, part);
#pragma unroll 1
  for (uint32_t i = 0; i < part.tiles; ++i) {
    const SlotRows<T> rows = held_part(job, shared).rows(i);
    uint32_t* const column_of_tile = job.data + column(part.tile + i);
    const auto sink = [&](uint32_t row, uint32_t bits) {
      if (part.parts) {
        rows.slot.set(column(0) + 32 * row, bits);
      } else {
        store(column_of_tile + 32 * row, bits);
      }
    };
    update.update_tile(table.entries[part.entry], part.tile + i, job.mask, rows, sink, shared);
  }
}

// The last block to leave puts everything back for the next launch.
template <typename T, typename Update, typename Table>
ISSP_DEVICE void leave(const Table& table, const Call<T>& call, const Update& update,
                       Shared shared) {
  if (!last_to_arrive(call.scratch + kGone, blocks(), shared)) return;
  for (uint32_t t = thread(); t < table.count; t += kThreads) {
    const auto& entry = table.entries[t];
    if (update.selects(entry)) {
      store(call.scratch + uint64_t(entry.scratch_line) * kLineWords + kOpen, 0u);
    }
    update.finish(entry);
  }
  if (thread() == 0) {
    store(call.scratch + kClaimed, 0u);
    store(call.scratch + kGone, 0u);
  }
}

template <typename T, typename Update, int Capacity>
ISSP_KERNEL(kThreads, kBlocksPerSm<T>)
resident_kernel(const ISSP_PARAM Table<Capacity, typename Update::Entry> table,
                const ISSP_PARAM Call<T> call, const ISSP_PARAM Update update,
                const ISSP_PARAM Plan plan) {
  if (stopped(call)) return;
  const Shared shared = shared_memory();
  Part part = begin_part(table, call, update, block(), plan.slots);
  for (uint32_t i = 0; i < part.tiles; ++i) fill_slot<T, Update>(table, part, i, shared);
  while (part.tiles > 0) {
    wait_for_copies();
    if constexpr (Update::kUpdates) {
      // The part rests in shared memory while float64 takes the registers.
      if (thread() == 0) share(shared.from(kPartArea), part);
      update.prepare(table.entries[part.entry], shared);
      barrier();
      part = shared_value<Part>(shared.from(kPartArea));
      update_part(table, call, update, part, shared);
    } else {
      barrier();
    }
    const Job<T> job(table, call, part);
    Verdict<Key<T>> verdict = {0, 0};
    uint32_t old = 0, rank = 0, flips = 0, claimed = table.tiles;
    if (part.parts) {
      old = load_mask(job.target(call));
      verdict = decide(job, call, shared);
      rank = rank_before(job, verdict);
    }
    if (thread() == 0 && table.tiles > blocks()) {
      claimed = add(call.scratch + kClaimed, 1u) + blocks();
    }
    Part next = {};
#pragma unroll 1
    for (uint32_t i = 0; i < part.tiles || i < next.tiles; ++i) {
      if (part.parts && i < part.tiles) {
        const Target<T> target = job.target(call, i);
        const uint32_t own_old = old;
        if (i + 1 < part.tiles) old = load_mask(job.target(call, i + 1));
        const SlotRows<T> rows = held_part(job, shared).rows(i);
        const uint32_t gone = shrink_tile<T, Update::kUpdates>(rows, target, verdict, rank, shared);
        flips += refresh_mask(target, gone, own_old);
      }
      if (i == 0) {
        const uint32_t ticket = broadcast_block(claimed, shared);
        if (ticket < table.tiles) {
          next = begin_part(table, call, update, ticket, plan.slots);
        }
      } else {
        barrier();  // all warps have read the slot
      }
      if (i < next.tiles) fill_slot<T, Update>(table, next, i, shared);
    }
    if (part.parts) {
      count_flips(job, call, flips, shared);
      if (job.parts == 1 && thread() == 0) {
        store(call.thresholds + job.tensor, typename T::Bits(verdict.tau));
      }
    }
    part = next;
  }
  if (plan.tidy) leave(table, call, update, shared);
}

// As many slots as let the registers' number of blocks share a processor, or fewer blocks.
template <typename T, typename Kernel>
Residency probe_residency(Kernel kernel) {
  constexpr uint32_t kSlotBytes = 4 * kSlotWords<T>;
  const Room room = room_of_device();
  for (uint32_t together = kBlocksPerSm<T>; together > 0; --together) {
    const uint32_t own = room.per_processor / together;
    uint32_t bytes = own > room.reserved_per_block ? own - room.reserved_per_block : 0;
    if (bytes > room.per_block) bytes = room.per_block;
    if (bytes < kSharedBytes + kSlotBytes) continue;
    uint32_t slots = (bytes - kSharedBytes) / kSlotBytes;
    if (slots > kMostSlots) slots = kMostSlots;
    bytes = kSharedBytes + slots * kSlotBytes;
    const uint32_t blocks = blocks_per_processor(kernel, kThreads, bytes) * room.processors;
    if (blocks > 0) return {slots, blocks, bytes};
  }
  return {0, room.processors, kSharedBytes};  // for updates that select nothing
}

template <typename T, typename Update>
Residency residency() {
  const auto probe = [](auto kernel) { return probe_residency<T>(kernel); };
  using E = typename Update::Entry;
  const Residency small = once_per_device(resident_kernel<T, Update, kSmall<E>>, probe);
  const Residency large = once_per_device(resident_kernel<T, Update, kLarge<E>>, probe);
  return small.blocks * small.slots < large.blocks * large.slots ? small : large;
}

}  // namespace issp
