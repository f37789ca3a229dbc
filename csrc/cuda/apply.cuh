// The writing half of soft_shrink_: a tile whose threshold is known.
// Per weight 1 write (rows without a selected weight are not written), 1/8 byte of mask read, mask
// words written only where they change.
#pragma once

#include "held.cuh"
#include "select.cuh"

namespace issp {

// What the search found for a tensor.
template <typename K>
struct Verdict {
  K tau;
  uint32_t ties;  // how many of the elements equal to tau are selected: those of lowest index
  // Whether some are selected and some are not, so that ranks among them matter.
  ISSP_DEVICE bool split() const { return ties != 0 && ties != kAllTies; }
  static constexpr uint32_t kAllTies = ~0u;
};

template <typename K>
ISSP_DEVICE Verdict<K> verdict_of(const Search<K>& search) {
  return {search.base, search.rank == search.equal ? Verdict<K>::kAllTies : search.rank};
}

// Equal elements in this thread's warp's part of the tile, the same number in every lane.
template <typename T, typename Rows>
ISSP_DEVICE uint32_t count_equal_warp(const Rows& rows, Key<T> tau) {
  uint32_t mine = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) mine += popcount(ballot(key<T>(rows[row]) == tau));
  return mine;
}

// Sum over the block of a value that is the same in every lane of a warp.
ISSP_DEVICE Scan scan_warps(uint32_t value, Shared shared) {
  if (lane() == 0) shared.set(kScanArea + warp(), value);
  barrier();
  Scan scan = {0, 0};
#pragma unroll
  for (uint32_t w = 0; w < kWarps; ++w) {
    const uint32_t other = shared.get(kScanArea + w);
    if (w < warp()) scan.before += other;
    scan.total += other;
  }
  barrier();
  return scan;
}

// Where a tile is written to.
template <typename T>
struct Target {
  typename T::Bits* data;
  uint32_t* mask;
  uint32_t numel;
  uint32_t tile;
  typename T::Wide shrink;
};

// Shrinks the selected weights of a tile; returns which elements were selected in the
// row that this lane answers for: lane r has row r. `rank`: equal elements before the warp. Rows
// without a selected weight are not written, unless an update has changed them.
template <typename T, bool kEveryRow, typename Rows>
ISSP_DEVICE uint32_t shrink_rows(const Rows& rows, const Target<T>& to,
                                 const Verdict<Key<T>>& verdict, uint32_t rank) {
  const uint32_t start = column(to.tile);
  const uint32_t lanes_before = (1u << lane()) - 1u;
  uint32_t mine = 0;
#pragma unroll
  for (uint32_t row = 0; row < kRows; ++row) {
    const typename T::Bits bits = rows[row];
    const Key<T> magnitude = key<T>(bits);
    uint32_t before = 0;
    if (verdict.split()) {
      const uint32_t equals = ballot(magnitude == verdict.tau);
      before = rank + popcount(equals & lanes_before);
      rank += popcount(equals);
    }
    const bool inside = start + 32 * row < to.numel;
    const bool chosen = inside && selected(magnitude, verdict.tau, before, verdict.ties);
    const uint32_t gone = ballot(chosen);
    if ((kEveryRow || gone) && inside) {  // whole rows: a sector in part costs as much as a sector
      store(to.data + start + 32 * row, chosen ? shrunk<T>(bits, to.shrink) : bits);
    }
    if (lane() == row) mine = gone;
  }
  return mine;
}

// The mask word that this lane answers for, or null.
template <typename T>
ISSP_DEVICE uint32_t* mask_word(const Target<T>& to, uint32_t first) {
  const uint32_t end = (to.numel + 511u) / 512u * 512u;  // of the last line, padding included
  return lane() >= kRows || first >= end ? nullptr : to.mask + first / 32;
}
ISSP_DEVICE uint32_t mask_column(uint32_t tile) {
  return tile * kTile + warp() * kWarpTile + 32 * lane();
}

// This lane's mask word as it was: asked for early, since it comes from far.
template <typename T>
ISSP_DEVICE uint32_t load_mask(const Target<T>& to) {
  const uint32_t* word = mask_word(to, mask_column(to.tile));
  return word ? load(word) : 0;
}

// Writes this lane's mask word and returns how many of its valid bits changed.
template <typename T>
ISSP_DEVICE uint32_t refresh_mask(const Target<T>& to, uint32_t gone, uint32_t old) {
  const uint32_t first = mask_column(to.tile);
  uint32_t* word = mask_word(to, first);
  const uint32_t valid = valid_bits(first, to.numel), kept = valid & ~gone;
  if (!word || old == kept) return 0;
  store(word, kept);
  return popcount((old ^ kept) & valid);
}

// Shrinks a tile; what it returns is for refresh_mask. `rank`: equal elements before the tile, on
// return behind it.
template <typename T, bool kEveryRow = false, typename Rows>
ISSP_DEVICE uint32_t shrink_tile(const Rows& rows, const Target<T>& to,
                                 const Verdict<Key<T>>& verdict, uint32_t& rank, Shared shared) {
  uint32_t before = rank;
  if (verdict.split()) {
    const Scan scan = scan_warps(count_equal_warp<T>(rows, verdict.tau), shared);
    before += scan.before;
    rank += scan.total;
  }
  return shrink_rows<T, kEveryRow>(rows, to, verdict, before);
}

// Sum over the block, in thread 0.
ISSP_DEVICE uint32_t sum_flips(uint32_t flips, Shared shared) {
  if (thread() == 0) shared.set(kNoteArea, 0);
  barrier();
  if (flips) shared.add(kNoteArea, flips);
  barrier();
  return thread() == 0 ? shared.get(kNoteArea) : 0;
}

}  // namespace issp
