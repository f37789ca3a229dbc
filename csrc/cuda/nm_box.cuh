// What a block does with its box (nm_groups.cuh): reads and updates it, scores its columns, selects
// in its groups, shrinks and writes. nm_shrink.cuh has the kernel around it.
//
// Mask words are ballots of rows in memory order; of a word that ends outside the box only the own
// bits are flipped.
#pragma once

#include "nm_groups.cuh"
#include "tensor_view.cuh"

namespace issp {

// Mask words that a warp reads together, and of how many it has the elements on their way.
constexpr uint32_t kChunk = 8, kWordsAtOnce = 2;
constexpr uint32_t kBitArea = 0;  // in the bins of select.cuh; behind the bits come the cuts

// nm_prune passes no k (all is selected from), no flips, and other weights to read from.
template <typename T>
struct GroupCall : Call<T> {
  const typename T::Bits* source;  // null: in place
};

// What a table knows of a tensor: what an update wants to know, and the pattern.
template <typename Base>
struct GroupEntry : Base {
  Grouping groups;
};

// What a thread has found.
template <typename T>
struct Tally {
  Key<T> largest = 0;  // of the selected
  uint32_t flips = 0;
};

// A tensor as a block sees it. `pruned`: how many of a group are selected in this call.
template <typename T, typename Update>
struct GroupWork {
  const GroupEntry<typename Update::Entry>& entry;
  const GroupCall<T>& call;
  const Update& update;
  Shared shared;
  uint32_t pruned;
  bool writes;  // there is a mask to write

  // Read from the table each time: pointers would take the registers of a third block.
  ISSP_DEVICE typename T::Bits* data() const { return static_cast<typename T::Bits*>(entry.data); }
  ISSP_DEVICE const typename T::Bits* source() const { return call.source ? call.source : data(); }
  ISSP_DEVICE uint32_t* mask() const { return call.masks + uint64_t(entry.mask_line) * kLineWords; }
  ISSP_DEVICE Shared scores() const { return shared.from(kSharedWords); }
  ISSP_DEVICE Shared cuts(const Box& box) const {
    return shared.from(kBitArea + (box.columns() + 31) / 32);
  }

  ISSP_DEVICE void shrink_to(uint32_t i, typename T::Bits bits, Tally<T>& tally) const {
    store(data() + i, shrunk<T>(bits, call.shrink));
    const Key<T> magnitude = key<T>(bits);
    if (magnitude > tally.largest) tally.largest = magnitude;
  }
};

// Reads a box, updates it, and leaves the scores of its columns.
template <typename T, typename Update>
ISSP_DEVICE void read_box(const GroupWork<T, Update>& work, const Box& box) {
  using Bits = typename T::Bits;
  const Grouping& groups = work.entry.groups;
  if (groups.single()) {
#pragma unroll 1
    for (uint32_t own = thread(); own < box.width; own += Update::kBatch * kThreads) {
      const auto sink = [&](uint32_t i, Bits bits) {
        const uint32_t column = own + i * kThreads;
        if (work.writes) {
          set_score(work.scores(), column, with_sign<T>(bits));
        } else {
          store(work.data() + box.first + column, bits);
        }
      };
      const uint32_t rest = (box.width - own + kThreads - 1) / kThreads;
      work.update.template update_strided<T>(work.entry, work.source(), box.first + own, kThreads,
                                             rest, sink, work.shared);
    }
    return;
  }
#pragma unroll 1
  for (uint32_t column = thread(); column < box.columns(); column += kThreads) {
    const uint32_t top = top_of(groups, box, column);
    typename T::Wide sum = 0;
#pragma unroll 1
    for (uint32_t channel = 0; channel < groups.c; ++channel) {
      typename T::Wide rows = 0;
#pragma unroll 1
      for (uint32_t row = 0; row < groups.v; row += Update::kBatch) {
        const uint32_t first = top + channel * groups.positions + row * groups.columns;
        const auto sink = [&](uint32_t i, Bits bits) {
          if (Update::kUpdates) store(work.data() + first + i * groups.columns, bits);
          rows += no_sign(widen(T{}, bits));
        };
        work.update.template update_strided<T>(work.entry, work.source(), first, groups.columns,
                                               groups.v - row, sink, work.shared);
      }
      sum += rows;
    }
    set_score(work.scores(), column, sum_key(sum));
  }
}

// Every group of the box by a warp; the cuts are for select_columns.
template <typename T, typename Update>
ISSP_DEVICE void cut_groups(const GroupWork<T, Update>& work, const Box& box) {
  using K = Key<T>;
  const Grouping& groups = work.entry.groups;
  const Shared cuts = work.cuts(box);
  for (uint32_t group = warp(); group < box.columns() / groups.m; group += kWarps) {
    const uint32_t position = group % groups.positions, span = group / groups.positions;
    const SharedScores<K> scores = {work.scores(), span * groups.span() + position,
                                    groups.positions};
    const Cut<K> cut = cut_by_warp<K>(scores, groups.m, work.pruned, score_bits<T>(groups));
    if (lane() == 0) {
      share(cuts.from(group * kWordsOfCut<T>), cut.tau);
      cuts.set(group * kWordsOfCut<T> + kWordsOfScore<T>, cut.end);
    }
  }
}

template <typename T, typename Update>
ISSP_DEVICE bool is_column_selected(const GroupWork<T, Update>& work, const Box& box,
                                    uint32_t column) {
  using K = Key<T>;
  const Grouping& groups = work.entry.groups;
  const uint32_t span = column / groups.span(), inside = column - span * groups.span();
  const uint32_t place = inside / groups.positions, position = inside % groups.positions;
  const SharedScores<K> scores = {work.scores(), column - place * groups.positions,
                                  groups.positions};
  if (groups.m <= kDirect) return is_selected<K>(scores, groups.m, work.pruned, place);
  const Shared own = work.cuts(box).from((span * groups.positions + position) * kWordsOfCut<T>);
  const Cut<K> cut = {shared_value<K>(own), own.get(kWordsOfScore<T>)};
  return cut.takes(scores(place), place);
}

// A bit per column.
template <typename T, typename Update>
ISSP_DEVICE void select_columns(const GroupWork<T, Update>& work, const Box& box) {
  if (work.pruned && work.entry.groups.m > kDirect) {
    cut_groups(work, box);
    barrier();
  }
  for (uint32_t start = 32 * warp(); start < box.columns(); start += kThreads) {
    const uint32_t column = start + lane();
    const uint32_t gone =
        ballot(column < box.columns() && work.pruned && is_column_selected(work, box, column));
    if (lane() == 0) work.shared.set(kBitArea + start / 32, gone);
  }
}

// The bits of a mask word that stand for elements first..end.
ISSP_DEVICE uint32_t bits_between(uint32_t word, uint32_t first, uint32_t end) {
  const uint32_t below = first > 32 * word ? valid_bits(32 * word, first) : 0u;
  return valid_bits(32 * word, end) & ~below;
}

// Elements of a word may be several blocks': each flips its own bits. Returns how many it flips.
ISSP_DEVICE uint32_t refresh_bits(uint32_t* word, uint32_t own, uint32_t old, uint32_t kept) {
  const uint32_t changed = (old ^ kept) & own;
  if (!changed) return 0;
  if (own == ~0u) {
    store(word, kept);
  } else {
    flip(word, changed);
  }
  return popcount(changed);
}

// Elements first..end of the tensor, which lie in the box one behind the other. `bands`: of whole
// bands of several rows, else of one row.
struct Piece {
  uint32_t first, end;
  bool bands;
};

// Shrinks and writes what belongs to kWordsAtOnce mask words; returns what was selected of the word
// that this lane answers for: lane r has word `row` + r of the chunk.
template <typename T, typename Update>
ISSP_DEVICE uint32_t write_rows(const GroupWork<T, Update>& work, const Box& box,
                                const Piece& piece, uint32_t word, uint32_t row, Tally<T>& tally) {
  const Grouping& groups = work.entry.groups;
  const uint32_t length = box.width * groups.c, start = 32 * (word + row) + lane();
  const bool single = groups.single();
  const auto inside = [&](uint32_t i) {
    return start + 32 * i >= piece.first && start + 32 * i < piece.end;
  };
  typename T::Bits bits[kWordsAtOnce];
#pragma unroll
  for (uint32_t i = 0; i < kWordsAtOnce; ++i) {
    bits[i] = !single && inside(i) ? load(work.source() + start + 32 * i) : typename T::Bits(0);
  }
  // An update of several rows has been written; without one, words that keep all need no write.
  const bool every = Update::kUpdates ? single : work.call.source != nullptr;
  uint32_t mine = 0;
#pragma unroll
  for (uint32_t i = 0; i < kWordsAtOnce; ++i) {
    uint32_t column = start + 32 * i - piece.first;
    if (!single) {
      const uint32_t band = piece.bands ? column / (groups.v * length) : 0;
      column = band * box.width + groups.column_of(piece.bands ? column % length : column);
    }
    const bool selected =
        inside(i) && (work.shared.get(kBitArea + column / 32) >> column % 32 & 1u) != 0;
    const uint32_t gone = ballot(selected);
    if (lane() == row + i) mine = gone;
    if (!inside(i)) continue;
    if (single) bits[i] = without_key<T>(get_score<Key<T>>(work.scores(), column));
    if (selected) {
      work.shrink_to(start + 32 * i, bits[i], tally);
    } else if (every || gone) {  // a sector in part costs as much as a sector
      store(work.data() + start + 32 * i, bits[i]);
    }
  }
  return mine;
}

// The kChunk mask words at `word`, as far as they are the piece's, and their elements.
template <typename T, typename Update>
ISSP_DEVICE void write_chunk(const GroupWork<T, Update>& work, const Box& box, const Piece& piece,
                             uint32_t word, Tally<T>& tally) {
  const uint32_t own = lane() < kChunk ? bits_between(word + lane(), piece.first, piece.end) : 0u;
  uint32_t* const mine = work.mask() + word + lane();
  const uint32_t old = own == ~0u ? load(mine) : own ? load_acquire(mine) : 0u;
  uint32_t gone = 0;
#pragma unroll 1
  for (uint32_t row = 0; row < kChunk; row += kWordsAtOnce) {
    gone |= write_rows(work, box, piece, word, row, tally);
  }
  if (own) tally.flips += refresh_bits(mine, own, old, own & ~gone);
}

template <typename T, typename Update>
ISSP_DEVICE void write_box(const GroupWork<T, Update>& work, const Box& box, Tally<T>& tally) {
  const Grouping& groups = work.entry.groups;
  const bool whole = box.width == groups.scores();  // rows are then one piece of memory
  const uint32_t pieces = whole ? 1 : groups.v;
  const uint32_t length = groups.c * (whole ? box.columns() * groups.v : box.width);
  const uint32_t chunks = (length / 32 + 1 + kChunk) / kChunk;
#pragma unroll 1
  for (uint32_t i = warp(); i < pieces * chunks; i += kWarps) {
    const uint32_t first = box.first + i / chunks * groups.columns;
    const Piece piece = {first, first + length, whole && groups.v > 1};
    const uint32_t word = first / 32 + i % chunks * kChunk;
    if (32 * word < piece.end) write_chunk(work, box, piece, word, tally);
  }
}

}  // namespace issp
