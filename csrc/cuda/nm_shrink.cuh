// N:M tensors of a call in one launch: a block reads whole groups, updates them if there is an
// optimizer, selects, and writes, so that nothing is read or written twice.
//
// Traffic per float32 weight: 4 bytes read and 4 written, 1/8 byte of mask read and, where it
// changes, written; an optimizer adds its gradient and moments alone, as in resident.cuh. With
// units of several weights a box's weights are read a second time, out of the L1 or L2 cache, since
// what stays in shared memory is a score per column.
//
// A box has a tile's size (tile.cuh: 8192 elements) where groups allow it: 33 KB of scores leave
// three blocks to an SM, one that reads while others select and write; every thread has 8 loads in
// flight. Nothing is known of the previous step, so there is no second way.
#pragma once

#include "nm_box.cuh"
#include "prologue.cuh"

namespace issp {

// A warp with a group that has no room in a box: a lane meets its own elements alone, so nothing
// has to wait for another, and masks change bit by bit.
template <typename T, typename Update>
ISSP_DEVICE void shrink_group(const GroupWork<T, Update>& work, uint32_t group, Tally<T>& tally) {
  using Bits = typename T::Bits;
  const Grouping& groups = work.entry.groups;
  const uint32_t first = first_of(groups, group), stride = 32 * groups.stride();
  // The elements of a unit, counted over the rows of its first channel, then of the next.
  const auto element = [&](uint32_t i) {
    return i % groups.v * groups.columns + i / groups.v * groups.positions;
  };
  const uint32_t size = groups.v * groups.c;
  for (uint32_t i = 0; Update::kUpdates && i < size; ++i) {
    for (uint32_t place = lane(); place < groups.m; place += 32 * Update::kBatch) {
      const uint32_t start = first + element(i) + place * groups.stride();
      const auto sink = [&](uint32_t j, Bits bits) {
        store(work.data() + start + j * stride, bits);
      };
      work.update.template update_strided<T>(work.entry, work.data(), start, stride,
                                             (groups.m - place + 31) / 32, sink, work.shared);
    }
  }
  if (!work.writes) return;
  const TensorScores<T> scores = {work.source(), groups, first};
  Cut<Key<T>> cut = {0, 0};
  if (work.pruned) {
    cut = cut_by_warp<Key<T>>(scores, groups.m, work.pruned, score_bits<T>(groups));
  }
#pragma unroll 1
  for (uint32_t place = lane(); place < groups.m; place += 32) {
    const bool gone = work.pruned && cut.takes(scores(place), place);
#pragma unroll 1
    for (uint32_t j = 0; j < size; ++j) {
      const uint32_t i = first + place * groups.stride() + element(j);
      const Bits bits = load(work.source() + i);
      if (gone) {
        work.shrink_to(i, bits, tally);
      } else if (work.call.source) {
        store(work.data() + i, bits);
      }
      const uint32_t bit = 1u << i % 32;
      tally.flips += refresh_bits(work.mask() + i / 32, bit, load_acquire(work.mask() + i / 32),
                                  gone ? 0u : bit);
    }
  }
}

// Bits of the last line behind the last element.
ISSP_DEVICE void clear_padding(uint32_t* mask, uint32_t numel) {
  const uint32_t word = numel / 32 + thread();
  if (word >= (numel + 511u) / 512u * 16u) return;
  const uint32_t padding = load_acquire(mask + word) & ~valid_bits(32 * word, numel);
  if (padding) flip(mask + word, padding);
}

// The largest of the block's, in thread 0.
template <typename K>
ISSP_DEVICE K max_block(K mine, Shared shared) {
  constexpr uint32_t kWords = sizeof(K) / 4;
#pragma unroll
  for (uint32_t distance = 16; distance > 0; distance /= 2) {
    K other = shuffle(uint32_t(mine), lane() ^ distance);
    if constexpr (kWords == 2) {
      other |= K(shuffle(uint32_t(mine >> 32), lane() ^ distance)) << 32;
    }
    if (other > mine) mine = other;
  }
  if (lane() == 0) share(shared.from(kBitArea + warp() * kWords), mine);
  barrier();
  for (uint32_t w = 1; thread() == 0 && w < kWarps; ++w) {
    const K other = shared_value<K>(shared.from(kBitArea + w * kWords));
    if (other > mine) mine = other;
  }
  return mine;
}

// Flips and threshold of a tensor, gathered in words of its scratch that are 0 between calls, and
// handed over by the last of its blocks, behind which nobody reads the optimizer's step.
template <typename T, typename Update>
ISSP_DEVICE void conclude(const GroupWork<T, Update>& work, const Tally<T>& tally) {
  const auto& entry = work.entry;
  const uint32_t tensor = entry.extra & kTensorBits;
  uint32_t flips = sum_block(tally.flips, work.shared);
  Key<T> largest = max_block(tally.largest, work.shared);
  if (entry.groups.boxes > 1) {
    uint32_t* const header = work.call.scratch + uint64_t(entry.scratch_line) * kLineWords;
    if (thread() == 0) {
      if (flips) add(header + kFlips, flips);
      if (largest) raise(reinterpret_cast<Key<T>*>(header + kBelow), largest);
    }
    if (!last_to_arrive(header + kArrived, entry.groups.boxes, work.shared)) return;
    if (thread() == 0) {
      flips = load_fresh(header + kFlips);
      largest = Key<T>(load_pair(header + kBelow));
      store(header + kFlips, 0u);
      store(reinterpret_cast<Key<T>*>(header + kBelow), Key<T>(0));
      store(header + kArrived, 0u);
    }
  }
  if (thread() != 0) return;
  if (work.writes) {
    store(work.call.flips + tensor, int64_t(flips));
    store(work.call.thresholds + tensor, typename T::Bits(largest));
  }
  work.update.finish(entry);
}

template <typename T, typename Update, int Capacity>
ISSP_KERNEL(kThreads, Update::kUpdates ? 2 : kBlocksPerSm<T> + 1)
group_kernel(const ISSP_PARAM Table<Capacity, GroupEntry<typename Update::Entry>> table,
             const ISSP_PARAM GroupCall<T> call, const ISSP_PARAM Update update) {
  if (stopped(call)) return;
  const auto& entry = table.entries[locate(table, block())];
  const Grouping& groups = entry.groups;
  const uint32_t number = block() - entry.first_tile;
  const int64_t all = int64_t(entry.numel / groups.m) * groups.pruned;
  const int64_t k = call.k ? load(call.k + (entry.extra & kTensorBits)) : all;
  const GroupWork<T, Update> work = {
      entry, call, update, shared_memory(), k > 0 ? groups.pruned : 0, k == 0 || k == all};
  if (!Update::kUpdates && !work.writes) return;
  if constexpr (Update::kUpdates) {
    update.prepare(entry, work.shared);
    barrier();
  }
  Tally<T> tally;
  if (groups.width == 0) {
    const uint32_t group = number * kWarps + warp();
    if (group < entry.numel / (groups.m * groups.c) / groups.v) shrink_group(work, group, tally);
  } else {
    const Box box(groups, entry.numel, number);
    read_box(work, box);
    barrier();
    if (work.writes) {
      select_columns(work, box);
      barrier();
      write_box(work, box, tally);
    }
  }
  if (number == 0 && work.writes) clear_padding(work.mask(), entry.numel);
  if (call.flips) conclude(work, tally);
}

// The chosen items, which have patterns; complete(entry, i) as in soft_shrink.cuh.
template <typename T, typename Update, typename Complete>
void launch_grouped(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                    const std::vector<uint32_t>& chosen, const GroupCall<T>& call,
                    const Update& update, const Complete& complete, Stream stream) {
  using E = GroupEntry<typename Update::Entry>;
  const auto write = [&](E& entry, size_t i, uint32_t first_box) {
    const uint32_t item = chosen[i];
    fill(entry, items[item], item, first_box);
    complete(entry, item);
    entry.groups = grouping_of<T>(patterns[item], items[item].numel);
    return entry.groups.boxes;
  };
  for_tables_of<E>(chosen.size(), write, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    uint32_t words = kSharedWords;
    for (uint32_t i = 0; i < table.count; ++i) {
      words = std::max(words, shared_words_of<T>(table.entries[i].groups));
    }
    launch(group_kernel<T, Update, capacity>, table.tiles, kThreads, 4 * words, stream, table, call,
           update);
  });
}

}  // namespace issp
