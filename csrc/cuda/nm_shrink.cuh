// N:M tensors of a call in one launch: a block reads the groups of its cta_tile, updates them if
// there is an optimizer, selects, and writes, so that nothing is read or written twice.
//
// 1. load_scores: neighbouring threads read neighbouring weights; a score per column stays in
// shared
//    memory, and with it, where a unit is one weight, the weight.
// 2. mark_units: a thread per group, with the best in registers (nm_select.cuh), or a warp per
//    group. It marks the elements of the kept units, or of the pruned ones where these are fewer: a
//    bit each, at the place that it has in the mask's words.
// 3. write_masks, a thread per word, and write_weights, a warp per word.
//
// Traffic per float32 weight: 4 bytes read and 4 written, 1/8 byte of mask read and, where it
// changes, written; an optimizer adds its gradient and moments alone. Units of several weights are
// read a second time, out of the L1 or L2 cache.
//
// A cta_tile has 8192 elements where groups allow it: 34 KB of scores. While a block of an SM
// selects, another reads or writes. Nothing is known of the previous step.
#pragma once

#include "nm_select.cuh"
#include "prologue.cuh"
#include "tensor_view.cuh"

namespace issp {

// Weights of a thread that are on their way together, when they are read and when they are written.
constexpr uint32_t kLoads = 8, kStores = 8;

// nm_prune passes no k (all is selected from), no flips, and other weights to read from.
template <typename T>
struct GroupCall : Call<T> {
  const typename T::Bits* source;  // null: in place
};

// What a table knows of a tensor: what an update wants to know, and the pattern.
template <typename Base>
struct GroupEntry : Base {
  NmLayout layout;
};

// What has been selected.
template <typename K>
struct GroupTally {
  K largest = 0;  // key
  uint32_t flips = 0, padding = 0;
  ISSP_DEVICE void join(const GroupTally& other) {
    if (other.largest > largest) largest = other.largest;
    flips += other.flips;
  }
};

// A tensor as a block sees it. `selects`: not all is kept in this call.
// `Single`: a unit is one weight, whose key is its score.
template <typename Storage, typename PreOp, bool Single>
struct GroupView {
  using T = Storage;
  using Update = PreOp;
  using Bits = typename T::Bits;
  static constexpr bool kSingleWeight = Single;
  const GroupEntry<typename Update::Entry>& entry;
  const GroupCall<T>& call;
  const Update& update;
  Shared shared;
  bool selects, writes;  // writes: there is a mask to write

  // Read from the table each time: registers are scarce.
  ISSP_DEVICE Bits* data() const { return static_cast<Bits*>(entry.data); }
  ISSP_DEVICE const Bits* source() const { return call.source ? call.source : data(); }
  ISSP_DEVICE uint32_t* mask() const { return call.masks + uint64_t(entry.mask_line) * kLineWords; }
  ISSP_DEVICE Shared scores() const { return shared.from(kScoreArea); }
  ISSP_DEVICE Shared marks() const { return shared.from(kMarkArea); }
  // Marks stand for kept units, not for pruned ones.
  ISSP_DEVICE bool marks_kept() const { return 2 * entry.layout.pruned >= entry.layout.m; }
  ISSP_DEVICE uint32_t pruned_of(uint32_t marks) const { return marks_kept() ? ~marks : marks; }

  ISSP_DEVICE void shrink_to(uint32_t i, Bits bits, GroupTally<Key<T>>& found) const {
    store(data() + i, shrunk<T>(bits, call.shrink));
    const Key<T> magnitude = key<T>(bits);
    if (magnitude > found.largest) found.largest = magnitude;
  }
};

// A mask word of a cta_tile: the segment's elements first..end, and the word's number in the
// tensor.
struct TileWord {
  uint32_t first, end, number;

  ISSP_DEVICE TileWord(const NmLayout& layout, const CtaTile& tile, uint32_t word) {
    const uint32_t segment = layout.words.quotient(word);
    first = tile.first + segment * layout.row_length();
    end = first + tile.length;
    number = first / 32 + word - segment * layout.words.divisor;
  }
  // The bits that stand for elements of the segment.
  ISSP_DEVICE uint32_t own() const {
    const uint32_t below = first > 32 * number ? valid_bits(32 * number, first) : 0u;
    return valid_bits(32 * number, end) & ~below;
  }
};

// The sum of a unit's magnitudes: of the rows of each channel, then of the channels. `first`: its
// first element.
template <typename T, typename View, typename PreOp>
ISSP_DEVICE typename T::Wide sum_unit(const View& view, const PreOp& update, uint32_t first) {
  const NmLayout& layout = view.entry.layout;
  typename T::Wide sum = 0;
#pragma unroll 1
  for (uint32_t channel = 0; channel < layout.c; ++channel) {
    typename T::Wide rows = 0;
#pragma unroll 1
    for (uint32_t row = 0; row < layout.v; row += PreOp::kBatch) {
      const uint32_t start = first + channel * layout.positions.divisor + row * layout.row_length();
      const auto sink = [&](uint32_t i, typename T::Bits bits) {
        if (PreOp::kUpdates) store(view.data() + start + i * layout.row_length(), bits);
        rows += magnitude<T>(bits);
      };
      update.template update_strided<T>(view.entry, view.source(), start, layout.row_length(),
                                        layout.v - row, sink, view.shared);
    }
    sum += rows;
  }
  return sum;
}

// Weights from, from + kThreads, ... to slots kSlotStep apart: kLoads of them, those below `count`.
template <typename T, bool kAll>
ISSP_DEVICE void load_weights(const typename T::Bits* from, uint32_t count, Shared scores,
                              uint32_t slot) {
  typename T::Bits bits[kLoads];
#pragma unroll
  for (uint32_t i = 0; i < kLoads; ++i) {
    if (kAll || i * kThreads < count) bits[i] = load(from + i * kThreads);
  }
#pragma unroll
  for (uint32_t i = 0; i < kLoads; ++i) {
    if (!kAll && i * kThreads >= count) return;
    set_word(scores, slot + i * kSlotStep, to_word<T>(bits[i]));
  }
}

// Updates the weights of a cta_tile and leaves the scores of its columns, and no unit selected.
template <typename View>
ISSP_DEVICE void load_scores(const View& view, const CtaTile& tile) {
  using T = typename View::T;
  using Update = typename View::Update;
  using Bits = typename View::Bits;
  const NmLayout& layout = view.entry.layout;
  const uint32_t words = layout.segments() * layout.words.divisor;
  for (uint32_t word = thread(); word < words; word += kThreads) {
    view.marks().set(word, view.marks_kept() && !view.selects ? ~0u : 0u);
  }
  if constexpr (!View::kSingleWeight) {
#pragma unroll 1
    for (uint32_t column = thread(); column < tile.columns(); column += kThreads) {
      const uint32_t row_block = tile.row_block_of(layout, column);
      const uint32_t first = tile.first + row_block * layout.v * layout.row_length() +
                             layout.element_of(column - row_block * tile.width);
      const typename T::Wide sum = sum_unit<T>(view, view.update, first);
      set_word(view.scores(), slot_of(column), key_of_sum<T>(sum));
    }
    return;
  }
  constexpr uint32_t kStep = Update::kUpdates ? Update::kBatch : kLoads;
#pragma unroll 1
  for (uint32_t own = thread(); own < tile.width; own += kStep * kThreads) {
    const uint32_t slot = slot_of(own), left = tile.width - own;
    if constexpr (!Update::kUpdates) {
      const Bits* const from = view.source() + tile.first + own;
      if (left > (kStep - 1) * kThreads) {
        load_weights<T, true>(from, left, view.scores(), slot);
      } else {
        load_weights<T, false>(from, left, view.scores(), slot);
      }
    } else {
      const auto sink = [&](uint32_t i, Bits bits) {
        if (view.writes) {
          set_word(view.scores(), slot + i * kSlotStep, to_word<T>(bits));
        } else {
          store(view.data() + tile.first + own + i * kThreads, bits);
        }
      };
      view.update.template update_strided<T>(view.entry, view.data(), tile.first + own, kThreads,
                                             (left + kThreads - 1) / kThreads, sink, view.shared);
    }
  }
}

// Marks the elements of the unit at a column, in the words that their segments have.
template <typename View>
ISSP_DEVICE void mark_unit(const View& view, const CtaTile& tile, uint32_t column) {
  const NmLayout& layout = view.entry.layout;
  const auto mark = [&](uint32_t bit) { view.marks().add(bit / 32, 1u << bit % 32); };
  if (View::kSingleWeight) return mark(tile.first % 32 + column);
  const uint32_t row_block = tile.row_block_of(layout, column);
  const uint32_t first = layout.element_of(column - row_block * tile.width);
  for (uint32_t row = 0; row < layout.v; ++row) {
    const uint32_t start = (row_block * layout.v + row) * layout.row_length();
    const uint32_t bit = layout.segments() == 1
                             ? tile.first % 32 + start
                             : row * 32 * layout.words.divisor + (tile.first + start) % 32;
    for (uint32_t j = 0; j < layout.c; ++j) mark(bit + first + j * layout.positions.divisor);
  }
}

// The groups of a cta_tile in turn, `each` of them at a time.
template <typename K, typename Body>
ISSP_DEVICE void each_group(const NmLayout& layout, const CtaTile& tile, Shared scores,
                            uint32_t number, uint32_t each, const Body& body) {
  const uint32_t positions = layout.positions.divisor;
#pragma unroll 1
  for (;; number += each) {
    const uint32_t block = layout.positions.quotient(number);
    const uint32_t first = block * layout.group_block() + number - block * positions;
    if (first >= tile.columns()) return;
    body(SharedGroup<K>{scores, first, positions});
  }
}

// The kept units are the largest, of equal ones the last; the pruned are the smallest and the
// first.
template <typename View>
ISSP_DEVICE void mark_units(const View& view, const CtaTile& tile) {
  using T = typename View::T;
  using K = Key<T>;
  const NmLayout& layout = view.entry.layout;
  const bool kept = view.marks_kept();
  const uint32_t m = layout.m, pruned = layout.pruned, rank = kept ? m - pruned : pruned;
  const auto mark = [&](uint32_t column) { mark_unit(view, tile, column); };
  if (rank <= kMostBest && m <= kMostByThread) {
    each_group<K>(layout, tile, view.scores(), thread(), kThreads, [&](SharedGroup<K> group) {
      if (kept) {
        group = {group.scores, group.column(m - 1), 0u - group.stride};
      } else {
        group.complement = ~kSign<K>;
      }
      mark_best(group, m, bound_of(group, m, rank), mark);
    });
    return;
  }
  each_group<K>(layout, tile, view.scores(), warp(), kWarps, [&](const SharedGroup<K>& group) {
    const auto score = [&](uint32_t place) { return group.score_at(group.column(place)); };
    const Threshold<K> threshold =
        threshold_by_warp<K>(score, m, pruned, score_bits<T, View::kSingleWeight>);
    for (uint32_t place = lane(); place < m; place += 32) {
      if (threshold.selects(score(place), place) != kept) mark(group.column(place));
    }
  });
}

// Elements of a word may be several blocks': each flips its own bits. Returns how many it flips.
ISSP_DEVICE uint32_t refresh_bits(uint32_t* word, uint32_t own, uint32_t kept) {
  const uint32_t old = own == ~0u ? load(word) : load_acquire(word);
  const uint32_t changed = (old ^ kept) & own;
  if (!changed) return 0;
  if (own == ~0u) {
    store(word, kept);
  } else {
    flip(word, changed);
  }
  return popcount(changed);
}

template <typename View>
ISSP_DEVICE void write_masks(const View& view, const CtaTile& tile,
                             GroupTally<Key<typename View::T>>& found) {
  const NmLayout& layout = view.entry.layout;
  const uint32_t words = layout.segments() * layout.words.divisor;
  for (uint32_t i = thread(); i < words; i += kThreads) {
    const TileWord word(layout, tile, i);
    const uint32_t kept = ~view.pruned_of(view.marks().get(i));
    if (word.own()) found.flips += refresh_bits(view.mask() + word.number, word.own(), kept);
  }
}

template <typename T>
ISSP_DEVICE void put_weight(typename T::Bits* to, typename T::Bits bits, bool pruned,
                            typename T::Wide shrink, GroupTally<Key<T>>& found) {
  const Key<T> magnitude = pruned ? key<T>(bits) : Key<T>(0);
  if (magnitude > found.largest) found.largest = magnitude;
  store(to, pruned ? shrunk<T>(bits, shrink) : bits);
}

// Units of one weight, which lie in shared memory.
template <typename View>
ISSP_DEVICE void write_weights(const View& view, const CtaTile& tile,
                               GroupTally<Key<typename View::T>>& found) {
  using T = typename View::T;
  const uint32_t complement = view.marks_kept() ? ~0u : 0u, bit = 1u << lane();
  const uint32_t before = tile.first % 32;  // lanes of the first word
  typename T::Bits* const data = view.data() + tile.first;
  const auto write = [&](auto all, uint32_t own) {
    const uint32_t word = (own + before) / 32, slot = slot_of(own);
    typename T::Bits* const to = data + int64_t(int32_t(own));
#pragma unroll
    for (uint32_t i = 0; i < kStores; ++i) {
      if (!decltype(all)::value && own + i * kThreads >= tile.width) continue;
      const Key<T> bits = get_word(view.scores(), slot + i * kSlotStep, Key<T>(0));
      const bool pruned = ((view.marks().get(word + i * kWarps) ^ complement) & bit) != 0;
      put_weight<T>(to + i * kThreads, from_word<T>(bits), pruned, view.call.shrink, found);
    }
  };
#pragma unroll 1
  for (uint32_t start = 0; start < tile.width + before; start += kStores * kThreads) {
    const uint32_t own = start + thread() - before;
    if (own < tile.width && tile.width - own > (kStores - 1) * kThreads) {
      write(std::true_type(), own);
    } else {
      write(std::false_type(), own);
    }
  }
}

// Units of several weights, which are read again.
template <typename View>
ISSP_DEVICE void write_units(const View& view, const CtaTile& tile,
                             GroupTally<Key<typename View::T>>& found) {
  using T = typename View::T;
  constexpr uint32_t kWords = kStores / 2;
  const NmLayout& layout = view.entry.layout;
  const uint32_t complement = view.marks_kept() ? ~0u : 0u, bit = 1u << lane();
  const uint32_t words = layout.segments() * layout.words.divisor;
  const typename T::Bits* const source = view.source();
  typename T::Bits* const data = view.data();
#pragma unroll 1
  for (uint32_t start = warp(); start < words; start += kWords * kWarps) {
    typename T::Bits bits[kWords];
    uint32_t element[kWords];
    bool inside[kWords];
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      const TileWord word(layout, tile, start + i * kWarps);
      element[i] = 32 * word.number + lane();
      inside[i] = start + i * kWarps < words && element[i] - word.first < tile.length;
      if (inside[i]) bits[i] = load(source + element[i]);
    }
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      if (!inside[i]) continue;
      const bool pruned = ((view.marks().get(start + i * kWarps) ^ complement) & bit) != 0;
      put_weight<T>(data + element[i], bits[i], pruned, view.call.shrink, found);
    }
  }
}

// A warp with a group that has no room in a cta_tile: a lane meets its own elements alone, so
// nothing has to wait for another, and masks change bit by bit.
template <typename View>
ISSP_DEVICE void shrink_single_group(const View& view, uint32_t number,
                                     GroupTally<Key<typename View::T>>& found) {
  using T = typename View::T;
  using Update = typename View::Update;
  using Bits = typename T::Bits;
  const NmLayout& layout = view.entry.layout;
  const uint32_t positions = layout.positions.divisor, stride = layout.c * positions;
  const uint32_t block = layout.positions.quotient(number);
  const uint32_t across = layout.columns / layout.group_block(), row_block = block / across;
  const uint32_t first = row_block * layout.v * layout.row_length() + number - block * positions +
                         (block - row_block * across) * layout.group_block() * layout.c;
  for (uint32_t place = lane(); Update::kUpdates && place < layout.m; place += 32) {
    sum_unit<T>(view, view.update, first + place * stride);
  }
  if (!view.writes) return;
  const auto score = [&](uint32_t place) {
    const uint32_t i = first + place * stride;
    return View::kSingleWeight ? key<T>(load(view.source() + i))
                               : key_of_sum<T>(sum_unit<T>(view, NoUpdate{}, i));
  };
  Threshold<Key<T>> threshold = {0, 0};
  if (view.selects) {
    threshold = threshold_by_warp<Key<T>>(score, layout.m, layout.pruned,
                                          score_bits<T, View::kSingleWeight>);
  }
#pragma unroll 1
  for (uint32_t place = lane(); place < layout.m; place += 32) {
    const bool pruned = view.selects && threshold.selects(score(place), place);
#pragma unroll 1
    for (uint32_t j = 0; j < layout.v * layout.c; ++j) {
      const uint32_t i =
          first + place * stride + j % layout.v * layout.row_length() + j / layout.v * positions;
      const Bits bits = load(view.source() + i);
      if (pruned) {
        view.shrink_to(i, bits, found);
      } else if (view.call.source) {
        store(view.data() + i, bits);
      }
      const uint32_t bit = 1u << i % 32;
      found.flips += refresh_bits(view.mask() + i / 32, bit, pruned ? 0u : bit);
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

// What the block has found, in thread 0.
template <typename K>
ISSP_DEVICE GroupTally<K> join_block(GroupTally<K> found, Shared area) {
#pragma unroll
  for (uint32_t distance = 16; distance > 0; distance /= 2) {
    GroupTally<K> other = {shuffle(uint32_t(found.largest), lane() ^ distance),
                           shuffle(found.flips, lane() ^ distance)};
    if constexpr (sizeof(K) == 8) {
      other.largest |= K(shuffle(uint32_t(found.largest >> 32), lane() ^ distance)) << 32;
    }
    found.join(other);
  }
  if (lane() == 0) share(area.from(warp() * kFoundWords), found);
  barrier();
  for (uint32_t w = 1; thread() == 0 && w < kWarps; ++w) {
    found.join(shared_value<GroupTally<K>>(area.from(w * kFoundWords)));
  }
  return found;
}

// Flips and threshold of a tensor, gathered in words of its scratch that are 0 between calls, and
// handed over by the last of its blocks, behind which nobody reads the optimizer's step.
template <typename View>
ISSP_DEVICE void finalize_tensor(const View& view, GroupTally<Key<typename View::T>> found) {
  using T = typename View::T;
  using K = Key<T>;
  const auto& entry = view.entry;
  const uint32_t tensor = entry.extra & kTensorBits;
  found = join_block(found, view.shared.from(kFoundArea));
  if (entry.layout.tiles > 1) {
    uint32_t* const header = view.call.scratch + uint64_t(entry.scratch_line) * kLineWords;
    if (thread() == 0) {
      if (found.flips) add(header + kFlips, found.flips);
      if (found.largest) raise(reinterpret_cast<K*>(header + kBelow), found.largest);
    }
    if (!last_to_arrive(header + kArrived, entry.layout.tiles, view.shared)) return;
    if (thread() == 0) {
      found = {K(load_pair(header + kBelow)), load_fresh(header + kFlips)};
      store(header + kFlips, 0u);
      store(reinterpret_cast<K*>(header + kBelow), K(0));
      store(header + kArrived, 0u);
    }
  }
  if (thread() != 0) return;
  if (view.writes) {
    store(view.call.flips + tensor, int64_t(found.flips));
    store(view.call.thresholds + tensor, typename T::Bits(found.largest));
  }
  view.update.finish(entry);
}

// 64 registers a thread; float64 and sums behind an update need more.
template <typename T, typename Update, bool kSingleWeight>
constexpr bool kTwoBlocks = sizeof(Key<T>) == 4 && (kSingleWeight || !Update::kUpdates);

template <typename T, typename Update, bool kSingleWeight, int Capacity>
ISSP_KERNEL(kThreads, (kTwoBlocks<T, Update, kSingleWeight>) ? 2 : 1)
group_kernel(const ISSP_PARAM Table<Capacity, GroupEntry<typename Update::Entry>> table,
             const ISSP_PARAM GroupCall<T> call, const ISSP_PARAM Update update) {
  if (stopped(call)) return;
  const auto& entry = table.entries[locate(table, block())];
  const NmLayout& layout = entry.layout;
  const uint32_t number = block() - entry.first_tile;
  const int64_t all = int64_t(layout.total_pruned);
  const int64_t k = call.k ? load(call.k + (entry.extra & kTensorBits)) : all;
  const GroupView<T, Update, kSingleWeight> view = {
      entry, call, update, shared_memory(), k > 0 && layout.pruned, k == 0 || k == all};
  if (!Update::kUpdates && !view.writes) return;
  if (number == 0 && view.writes) clear_padding(view.mask(), entry.numel);
  if constexpr (Update::kUpdates) {
    update.prepare(entry, view.shared);
    barrier();
  }
  GroupTally<Key<T>> found;
  if (layout.is_single_group()) {
    const uint32_t group = number * kWarps + warp();
    if (group < layout.row_blocks * (layout.columns / layout.m)) {
      shrink_single_group(view, group, found);
    }
  } else {
    const CtaTile tile(layout, number);
    load_scores(view, tile);
    barrier();
    if (view.writes) {
      if (view.selects) mark_units(view, tile);
      barrier();
      write_masks(view, tile, found);
      if constexpr (kSingleWeight) {
        write_weights(view, tile, found);
      } else {
        write_units(view, tile, found);
      }
    }
  }
  if (call.flips) finalize_tensor(view, found);
}

template <bool kSingleWeight, typename T, typename Update, typename Complete>
void launch_groups(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                   const std::vector<uint32_t>& chosen, const GroupCall<T>& call,
                   const Update& update, const Complete& complete, Stream stream) {
  using E = GroupEntry<typename Update::Entry>;
  const auto write = [&](E& entry, size_t i, uint32_t first_tile) {
    const uint32_t item = chosen[i];
    fill(entry, items[item], item, first_tile);
    complete(entry, item);
    entry.layout = nm_layout<T>(patterns[item], items[item].numel);
    return entry.layout.tiles;
  };
  for_tables_of<E>(chosen.size(), write, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    uint32_t words = 0;
    for (uint32_t i = 0; i < table.count; ++i) {
      words = std::max(words, shared_words_of<T>(table.entries[i].layout));
    }
    launch(group_kernel<T, Update, kSingleWeight, capacity>, table.tiles, kThreads, 4 * words,
           stream, table, call, update);
  });
}

// The chosen items, which have patterns; complete(entry, i) as in soft_shrink.cuh. One launch for
// those whose units are single weights, one for the others.
template <typename T, typename Update, typename Complete>
void launch_grouped(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                    const std::vector<uint32_t>& chosen, const GroupCall<T>& call,
                    const Update& update, const Complete& complete, Stream stream) {
  std::vector<uint32_t> weights, units;
  for (const uint32_t i : chosen)
    (patterns[i].v * patterns[i].c == 1 ? weights : units).push_back(i);
  launch_groups<true>(items, patterns, weights, call, update, complete, stream);
  launch_groups<false>(items, patterns, units, call, update, complete, stream);
}

}  // namespace issp
