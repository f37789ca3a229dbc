// N:M patterns: the groups of a tensor, and which of them a block takes.
//
// v rows that share a pattern are a row block, c channels of a row block at one kernel position a
// unit. The units of a row block, kernel positions innermost, are columns, each with a score. m
// channels of units are a group block: one group per kernel position. A cta_tile has neighbouring
// group blocks of one row block, or several row blocks whole. With v == 1 rows do not matter: all
// elements are one row.
#pragma once

#include <algorithm>
#include <numeric>

#include "layout.h"
#include "select.cuh"

namespace issp {

// x / divisor for x < 2^31, by a multiplication whose constants the host finds.
struct FastDivider {
  uint32_t divisor, multiplier, shift;
  ISSP_DEVICE uint32_t quotient(uint32_t x) const {
    return uint32_t(uint64_t(2 * x) * multiplier >> 32) >> shift;
  }
};

// multiplier = ceil(2^(31 + shift) / divisor), 2^shift >= divisor: the error stays below 1 /
// divisor (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
inline FastDivider fast_divider(uint64_t divisor) {
  uint32_t shift = 0;
  while (uint64_t(1) << shift < divisor) ++shift;
  const uint64_t power = uint64_t(1) << (31 + shift);
  return {uint32_t(divisor), uint32_t((power + divisor - 1) / divisor), shift};
}

// Words of shared memory of a cta_tile: a mark per element where select.cuh has its bins; behind
// the areas of select.cuh what each warp has found, then the scores.
constexpr uint32_t kMarkArea = 0, kMarkWords = kBins;
constexpr uint32_t kFoundArea = kSharedWords, kFoundWords = 4;
constexpr uint32_t kScoreArea = kFoundArea + kFoundWords * kWarps;
#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kScoreWords = 1056;
#else
// With all areas the 48 KB that every GPU gives a block unasked: a group of 1024 at 3x3 positions.
constexpr uint32_t kScoreWords = 48 * 256 - kScoreArea;
#endif
template <typename T>
constexpr uint32_t kWordsOfScore = sizeof(Key<T>) / 4;

// Where the score of a column stands. One slot in 33 is empty: threads whose groups begin a power
// of two apart read different banks. Columns kThreads apart have slots kSlotStep apart.
ISSP_DEVICE uint32_t slot_of(uint32_t column) {
  return column + uint32_t(int32_t(column) >> 5);
}
constexpr uint32_t kSlotStep = kThreads + kThreads / 32;

struct NmLayout {
  uint32_t columns;          // of a row block
  uint32_t m, v, c, pruned;  // m and pruned count units
  FastDivider positions;     // of the kernel
  FastDivider tile_width;    // columns of a cta_tile in each of its row blocks
  FastDivider tiles_across;  // cta_tiles of a row block
  FastDivider words;         // mask words that a segment of a cta_tile may touch
  uint32_t row_blocks, tile_row_blocks;
  uint32_t tiles, total_pruned;  // total_pruned: weights

  // A group has no room in a cta_tile: a warp takes one.
  ISSP_DEVICE bool is_single_group() const { return tile_row_blocks == 0; }
  ISSP_DEVICE uint32_t row_length() const { return columns * c; }  // elements
  ISSP_DEVICE uint32_t group_block() const { return m * positions.divisor; }
  // The rows of a whole row block lie one behind the other: a single segment.
  ISSP_DEVICE uint32_t segments() const { return tiles_across.divisor == 1 ? 1 : v; }
  // The first element of a column's unit in its row.
  ISSP_DEVICE uint32_t element_of(uint32_t column) const {
    return c == 1 ? column : column + positions.quotient(column) * (c - 1) * positions.divisor;
  }
};

inline uint64_t words_of_segment(uint64_t length) {
  return (length + 62) / 32;
}

// Whether the marks of `segments` segments and the scores of `columns` columns have room.
template <typename T>
bool fits_tile(uint64_t columns, uint64_t segments, uint64_t length) {
  return (columns + columns / 32) * kWordsOfScore<T> <= kScoreWords &&
         segments * words_of_segment(length) <= kMarkWords;
}

// cta_tiles of about kTile elements, of whole mask words where that is possible: two blocks that
// share a word need atomics.
template <typename T>
NmLayout nm_layout(const Pattern& by, int64_t numel) {
  const uint64_t v = uint64_t(by.v), c = uint64_t(by.c), m = uint64_t(by.m / by.c);
  const uint64_t row_length = uint64_t(by.v == 1 ? numel : by.channels * by.inner);
  const uint64_t row_blocks = uint64_t(numel) / row_length / v;
  const uint64_t group_block = m * uint64_t(by.inner), across = row_length / c / group_block;
  NmLayout layout = {};
  layout.columns = uint32_t(row_length / c);
  layout.m = uint32_t(m);
  layout.v = uint32_t(v);
  layout.c = uint32_t(c);
  layout.pruned = uint32_t((by.m - by.n) / by.c);
  layout.positions = fast_divider(uint64_t(by.inner));
  layout.row_blocks = uint32_t(row_blocks);
  layout.total_pruned = uint32_t(by.pruned());
  // Group blocks of a row block, row blocks.
  const auto fits = [&](uint64_t own, uint64_t own_row_blocks) {
    const uint64_t columns = own * group_block * own_row_blocks, segments = own == across ? 1 : v;
    return fits_tile<T>(columns, segments, columns * c * v / segments);
  };
  if (!fits(1, 1)) {
    const uint64_t groups = row_blocks * across * uint64_t(by.inner);
    layout.tiles = uint32_t((groups + kWarps - 1) / kWarps);
    return layout;
  }
  const uint64_t wanted = std::max<uint64_t>(1, kTile / (v * c * group_block));
  uint64_t own = std::min(wanted, across), own_row_blocks = 1;
  while (!fits(own, 1)) own = (own + 1) / 2;
  if (own < across) {
    const uint64_t even = 32 / std::gcd(c * group_block, uint64_t(32));
    if (own >= even) own -= own % even;
  } else {
    const uint64_t most = std::min<uint64_t>(row_blocks, kTile / (row_length * v));
    while (own_row_blocks < most && fits(own, own_row_blocks + 1)) ++own_row_blocks;
  }
  const uint64_t width = own * group_block, tiles_across = (across + own - 1) / own;
  layout.tile_width = fast_divider(width);
  layout.tiles_across = fast_divider(tiles_across);
  layout.words =
      fast_divider(words_of_segment(width * c * (tiles_across == 1 ? v * own_row_blocks : 1)));
  layout.tile_row_blocks = uint32_t(own_row_blocks);
  layout.tiles = uint32_t(tiles_across * ((row_blocks + own_row_blocks - 1) / own_row_blocks));
  return layout;
}

template <typename T>
uint32_t shared_words_of(const NmLayout& layout) {
  const uint32_t columns = layout.tile_width.divisor * layout.tile_row_blocks;
  return kScoreArea + (columns + columns / 32) * kWordsOfScore<T>;
}

// What a block takes. A segment is a piece of memory: all of a whole row block, else one row's.
struct CtaTile {
  uint32_t first;              // element
  uint32_t width, row_blocks;  // width: columns in each row block
  uint32_t length;             // elements of a segment

  ISSP_DEVICE CtaTile(const NmLayout& layout, uint32_t number) {
    const uint32_t line = layout.tiles_across.quotient(number);
    const uint32_t column =
        (number - line * layout.tiles_across.divisor) * layout.tile_width.divisor;
    const uint32_t row_block = line * layout.tile_row_blocks;
    const uint32_t right = layout.columns - column, below = layout.row_blocks - row_block;
    width = right < layout.tile_width.divisor ? right : layout.tile_width.divisor;
    row_blocks = below < layout.tile_row_blocks ? below : layout.tile_row_blocks;
    first = row_block * layout.v * layout.row_length() + column * layout.c;
    length = width * layout.c * (layout.segments() == 1 ? layout.v * row_blocks : 1);
  }
  ISSP_DEVICE uint32_t columns() const { return width * row_blocks; }
  ISSP_DEVICE uint32_t row_block_of(const NmLayout& layout, uint32_t column) const {
    return row_blocks == 1 ? 0 : layout.tile_width.quotient(column);
  }
};

}  // namespace issp
