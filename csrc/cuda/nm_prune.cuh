// nm_prune: keep n of every m, out of place, with the packed mask.
//
// One thread per element in memory order, so that a ballot is a mask word and writes are coalesced.
// A thread ranks its element among the m of its group: m * v loads, which neighbouring threads
// share in the L1 cache; nothing is staged, at 2:4 the traffic is one read and one write. Groups of
// more than kDirect elements are selected by a block each in a launch before, which leaves (tau,
// cut): an element goes when its score is below tau, or equals tau at a position up to cut.
#pragma once

#include "launch.cuh"
#include "layout.h"
#include "select.cuh"

namespace issp {

#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kDirect = 8;
#else
constexpr uint32_t kDirect = 64;
#endif
constexpr uint32_t kCutWords = 4;  // tau (2 words), cut, unused

// "channels": weight [rows, channels, positions]; "flat": rows = positions = 1.
struct Groups {
  uint32_t channels, positions;
  uint32_t m, v, pruned;  // pruned = m - n
  uint32_t numel;
};

// An element's group: flat index of its first element, number, and the element's place in it.
struct Member {
  uint32_t first, group, place;
};

ISSP_DEVICE Member member_of(const Groups& groups, uint32_t i) {
  const uint32_t position = i % groups.positions, rest = i / groups.positions;
  const uint32_t channel = rest % groups.channels, row = rest / groups.channels;
  const uint32_t place = channel % groups.m, top = row - row % groups.v;
  const uint32_t first = (top * groups.channels + channel - place) * groups.positions + position;
  const uint32_t per_row = groups.channels / groups.m;
  const uint32_t group =
      (row / groups.v * per_row + channel / groups.m) * groups.positions + position;
  return {first, group, place};
}

ISSP_DEVICE uint32_t first_of(const Groups& groups, uint32_t group) {
  const uint32_t position = group % groups.positions, rest = group / groups.positions;
  const uint32_t per_row = groups.channels / groups.m;
  const uint32_t channel = rest % per_row * groups.m, top = rest / per_row * groups.v;
  return (top * groups.channels + channel) * groups.positions + position;
}

ISSP_DEVICE float no_sign(float x) {
  return bit_as<float>(bit_as<uint32_t>(x) & 0x7fffffffu);
}
ISSP_DEVICE double no_sign(double x) {
  return bit_as<double>(bit_as<uint64_t>(x) & 0x7fffffffffffffffull);
}
ISSP_DEVICE uint32_t sum_key(float x) {
  return x != x ? 0x7fffffffu : bit_as<uint32_t>(x);
}
ISSP_DEVICE uint64_t sum_key(double x) {
  return x != x ? 0x7fffffffffffffffull : bit_as<uint64_t>(x);
}

// The score of a place: its key, or the key of the |w| summed over v rows in row order.
template <typename T>
ISSP_DEVICE Key<T> score(const typename T::Bits* weight, const Groups& groups, uint32_t first,
                         uint32_t place) {
  const uint32_t i = first + place * groups.positions;
  if (groups.v == 1) return key<T>(load(weight + i));
  const uint32_t stride = groups.channels * groups.positions;
  typename T::Wide sum = no_sign(widen(T{}, load(weight + i)));
  for (uint32_t row = 1; row < groups.v; ++row) {
    sum += no_sign(widen(T{}, load(weight + i + row * stride)));
  }
  return sum_key(sum);
}

// Keys of sums are 31 bits wide even for 16-bit weights.
template <typename T>
constexpr int kScoreBits = 8 * int(sizeof(Key<T>)) - 1;

template <typename T>
struct GroupSource {
  const typename T::Bits* weight;
  const Groups& groups;
  uint32_t first;
  template <typename Visit>
  ISSP_DEVICE void each(const Visit& visit) const {
    each_strided<Key<T>>(
        groups.m, [&](uint32_t i) { return score<T>(weight, groups, first, i); }, visit);
  }
};

// The place of the `ties`-th element that equals tau.
template <typename T>
ISSP_DEVICE void find_cut(const GroupSource<T>& source, Key<T> tau, uint32_t ties, uint32_t* cut,
                          Shared shared) {
  uint32_t before = 0;
  for (uint32_t start = 0; before < ties; start += kThreads) {
    const uint32_t i = start + thread();
    const bool equal =
        i < source.groups.m && score<T>(source.weight, source.groups, source.first, i) == tau;
    const Scan scan = scan_block(equal, shared);
    if (equal && before + scan.before + 1 == ties) store(cut, i);
    before += scan.total;
  }
}

template <typename T>
ISSP_KERNEL(kThreads, 1)
cut_kernel(const typename T::Bits* weight, const ISSP_PARAM Groups groups, uint32_t* cuts) {
  const Shared shared = shared_memory();
  const GroupSource<T> source = {weight, groups, first_of(groups, block())};
  uint32_t* mine = cuts + uint64_t(block()) * kCutWords;
  Search<Key<T>> search = {0, kScoreBits<T>, groups.pruned, 0};
  search = select_block(search, source, shared);
  find_cut(source, search.base, search.rank, mine + 2, shared);
  if (thread() == 0) {
    store(mine, uint32_t(search.base));
    store(mine + 1, uint32_t(uint64_t(search.base) >> 32));
  }
}

template <typename T>
ISSP_DEVICE bool is_pruned(const typename T::Bits* weight, const Groups& groups, uint32_t i,
                           const uint32_t* cuts) {
  const Member member = member_of(groups, i);
  const Key<T> mine = score<T>(weight, groups, member.first, member.place);
  if (cuts != nullptr) {
    const uint32_t* cut = cuts + uint64_t(member.group) * kCutWords;
    const Key<T> tau = Key<T>(load(cut) | uint64_t(load(cut + 1)) << 32);
    return mine < tau || (mine == tau && member.place <= load(cut + 2));
  }
  uint32_t rank = 0;
  for (uint32_t place = 0; place < groups.m; ++place) {
    const Key<T> other = score<T>(weight, groups, member.first, place);
    rank += other < mine || (other == mine && place < member.place);
  }
  return rank < groups.pruned;
}

// Blocks cover the mask, padding included.
template <typename T>
ISSP_KERNEL(kThreads, 3)
prune_kernel(const typename T::Bits* weight, const ISSP_PARAM Groups groups, const uint32_t* cuts,
             typename T::Wide shrink, typename T::Bits* pruned_weight, uint32_t* mask) {
  const uint32_t i = block() * kThreads + thread();
  const bool inside = i < groups.numel;
  const bool pruned = inside && groups.pruned > 0 && is_pruned<T>(weight, groups, i, cuts);
  const uint32_t kept = ballot(inside && !pruned);
  if (lane() == 0 && i / 32 < (groups.numel + 511u) / 512u * 16u) store(mask + i / 32, kept);
  if (!inside) return;
  const typename T::Bits bits = load(weight + i);
  store(pruned_weight + i, pruned ? shrunk<T>(bits, shrink) : bits);
}

inline bool needs_cuts(const Groups& groups) {
  return groups.m > kDirect && groups.pruned > 0;
}

inline uint32_t group_count(const Groups& groups) {
  return groups.numel / groups.m / groups.v;
}

// cuts: kCutWords words per group when needs_cuts, else null.
template <typename T>
void nm_prune(const typename T::Bits* weight, const Groups& groups, double shrink,
              typename T::Bits* pruned_weight, uint32_t* mask, uint32_t* cuts, Stream stream) {
  if (cuts != nullptr) {
    launch(cut_kernel<T>, group_count(groups), kThreads, kSharedBytes, stream, weight, groups,
           cuts);
  }
  const uint32_t elements = uint32_t(mask_words(groups.numel)) * 32;
  launch(prune_kernel<T>, (elements + kThreads - 1) / kThreads, kThreads, 0, stream, weight, groups,
         static_cast<const uint32_t*>(cuts), typename T::Wide(shrink), pruned_weight, mask);
}

}  // namespace issp
