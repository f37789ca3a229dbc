// N:M patterns: where the groups of a tensor lie, what a block takes of them, and the selection in
// one group, which nm_prune and the fused step share.
#pragma once

#include <numeric>

#include "layout.h"
#include "select.cuh"

namespace issp {

// Up to this size a thread compares its score with all of its group; beyond, a warp finds where the
// group is cut by ballots, some 14 rounds of one read per element whatever the size: [est] equal at
// about 28, where lanes of a warp would lie idle.
#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kDirect = 8;
constexpr uint32_t kScoreWords = 1024;
#else
constexpr uint32_t kDirect = 24;
// With the areas of select.cuh in front of them the 48 KB that every GPU gives a block unasked:
// 10196 scores, a group of 1024 at 3x3 positions.
constexpr uint32_t kScoreWords = 48 * 256 - kSharedWords;
#endif

// Rows of a tensor of which v share a pattern are a band. c channels of a band at one position are
// a unit, or one column of scores: a row of `columns` elements has columns / c of those. A block
// takes a box: `width` columns of scores, all the groups that begin there, or several bands whole.
// With v == 1 rows do not matter: all elements are one row. width == 0: a group is too large for a
// box; a warp takes one.
struct Grouping {
  uint32_t columns, positions;  // elements of a row, and of a channel
  uint32_t m, v, c, pruned;     // m, pruned: units
  uint32_t width, bands;        // of a box
  uint32_t boxes;

  // Columns of scores of neighbouring groups, and of a row; elements to the next place of a group.
  ISSP_DEVICE uint32_t span() const { return m * positions; }
  ISSP_DEVICE uint32_t scores() const { return columns / c; }
  ISSP_DEVICE uint32_t stride() const { return c * positions; }
  // Whether a unit is one weight, whose key is its score.
  ISSP_DEVICE bool single() const { return v * c == 1; }
  // The first element of a column of scores, and the column of an element, counted from a channel
  // at which a unit begins.
  ISSP_DEVICE uint32_t element_of(uint32_t column) const {
    return c == 1 ? column : column / positions * stride() + column % positions;
  }
  ISSP_DEVICE uint32_t column_of(uint32_t element) const {
    return c == 1 ? element : element / stride() * positions + element % positions;
  }
};

// Words of shared memory: a bit per column that is selected, the cuts, and behind the areas of
// select.cuh a score per column.
template <typename T>
constexpr uint32_t kWordsOfScore = sizeof(Key<T>) / 4;
template <typename T>
constexpr uint32_t kWordsOfCut = kWordsOfScore<T> + 1;

inline uint32_t words_of_bits(uint32_t columns) {
  return (columns + 31) / 32;
}

template <typename T>
bool fits_box(uint64_t columns, uint32_t m) {
  const uint64_t cuts = m > kDirect ? columns / m * kWordsOfCut<T> : 0;
  return columns * kWordsOfScore<T> <= kScoreWords && (columns + 31) / 32 + cuts <= kBins;
}

// Boxes of a tile's size, of whole mask words where that is possible: two blocks that share a word
// cost two atomics.
template <typename T>
Grouping grouping_of(const Pattern& by, int64_t numel) {
  const uint64_t elements = uint64_t(by.v == 1 ? numel : by.channels * by.inner);
  const uint64_t v = uint64_t(by.v), c = uint64_t(by.c), columns = elements / c;
  const uint64_t span = uint64_t(by.m / by.c * by.inner);
  const uint64_t bands = uint64_t(numel) / elements / v, spans = columns / span;
  Grouping found = {uint32_t(elements),
                    uint32_t(by.inner),
                    uint32_t(by.m / by.c),
                    uint32_t(v),
                    uint32_t(c),
                    uint32_t((by.m - by.n) / by.c),
                    0,
                    1,
                    0};
  if (!fits_box<T>(span, found.m)) {
    const uint64_t groups = uint64_t(numel) / uint64_t(by.m) / v;
    found.boxes = uint32_t((groups + kWarps - 1) / kWarps);
    return found;
  }
  const uint64_t size = v * c * span, wanted = kTile / size ? kTile / size : 1;
  uint64_t own = wanted < spans ? wanted : spans;
  while (!fits_box<T>(own * span, found.m)) own = (own + 1) / 2;
  if (own < spans) {
    const uint64_t even = 32 / std::gcd(c * span, uint64_t(32));
    if (own >= even) own -= own % even;
  } else {
    while (found.bands < bands && (found.bands + 1) * elements * v <= kTile &&
           fits_box<T>((found.bands + 1) * columns, found.m)) {
      ++found.bands;
    }
  }
  found.width = uint32_t(own * span);
  found.boxes = uint32_t((spans + own - 1) / own * ((bands + found.bands - 1) / found.bands));
  return found;
}

template <typename T>
uint32_t shared_words_of(const Grouping& groups) {
  return kSharedWords + groups.width * groups.bands * kWordsOfScore<T>;
}

// A block's box: element of its first row's first column; columns of scores and bands that it has.
struct Box {
  uint32_t first, width, bands;

  ISSP_DEVICE Box(const Grouping& groups, uint32_t numel, uint32_t number) {
    const uint32_t per_band = (groups.scores() + groups.width - 1) / groups.width;
    const uint32_t band = number / per_band * groups.bands;
    const uint32_t column = number % per_band * groups.width;
    const uint32_t left = numel / groups.columns / groups.v - band;
    first = band * groups.v * groups.columns + column * groups.c;
    width = groups.scores() - column < groups.width ? groups.scores() - column : groups.width;
    bands = left < groups.bands ? left : groups.bands;
  }
  ISSP_DEVICE uint32_t columns() const { return width * bands; }
};

// The first element of a column's unit.
ISSP_DEVICE uint32_t top_of(const Grouping& groups, const Box& box, uint32_t column) {
  if (groups.single()) return box.first + column;
  const uint32_t band = column / box.width;
  return box.first + band * groups.v * groups.columns + groups.element_of(column % box.width);
}

// Element of a group's first place in its first row; groups are numbered as they begin in memory.
ISSP_DEVICE uint32_t first_of(const Grouping& groups, uint32_t group) {
  const uint32_t position = group % groups.positions, span = group / groups.positions;
  const uint32_t per_band = groups.scores() / groups.span();
  return span / per_band * groups.v * groups.columns + span % per_band * groups.span() * groups.c +
         position;
}

// Scores. With v == c == 1 a place's score is its key; otherwise the key of |w| summed over the
// rows of each channel, and then over the channels, in their orders; it has 31 bits for 16-bit
// weights too.
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

template <typename T>
ISSP_DEVICE int score_bits(const Grouping& groups) {
  return groups.single() ? kKeyBits<T> : 8 * int(sizeof(Key<T>)) - 1;
}

// A weight in shared memory: its key, and its sign in the first bit of the key's word.
template <typename K>
constexpr K kSign = K(1) << (8 * sizeof(K) - 1);

template <typename T>
ISSP_DEVICE Key<T> with_sign(typename T::Bits bits) {
  return key<T>(bits) | (bits & Limits<T>::sign ? kSign<Key<T>> : Key<T>(0));
}
template <typename T>
ISSP_DEVICE typename T::Bits without_key(Key<T> word) {
  using Bits = typename T::Bits;
  return Bits(word & Limits<T>::magnitude) | (word & kSign<Key<T>> ? Limits<T>::sign : Bits(0));
}

ISSP_DEVICE void set_score(Shared scores, uint32_t i, uint32_t word) {
  scores.set(i, word);
}
ISSP_DEVICE void set_score(Shared scores, uint32_t i, uint64_t word) {
  scores.set(2 * i, uint32_t(word));
  scores.set(2 * i + 1, uint32_t(word >> 32));
}
template <typename K>
ISSP_DEVICE K get_score(Shared scores, uint32_t i) {
  return shared_value<K>(scores.from(i * (sizeof(K) / 4)));
}

// The scores of a group in a box.
template <typename K>
struct SharedScores {
  Shared scores;
  uint32_t first, stride;
  ISSP_DEVICE K operator()(uint32_t place) const {
    return get_score<K>(scores, first + place * stride) & ~kSign<K>;
  }
};

// The scores of a group as it lies in the tensor.
template <typename T>
struct TensorScores {
  const typename T::Bits* weights;
  const Grouping& groups;
  uint32_t first;
  ISSP_DEVICE Key<T> operator()(uint32_t place) const {
    const uint32_t i = first + place * groups.stride();
    if (groups.single()) return key<T>(load(weights + i));
    typename T::Wide sum = 0;
    for (uint32_t channel = 0; channel < groups.c; ++channel) {
      typename T::Wide rows = 0;
      for (uint32_t row = 0; row < groups.v; ++row) {
        const uint32_t own = i + channel * groups.positions + row * groups.columns;
        rows += no_sign(widen(T{}, load(weights + own)));
      }
      sum += rows;
    }
    return sum_key(sum);
  }
};

// Where a group is cut: below tau, or equal to it at a place before `end`, scores are selected.
template <typename K>
struct Cut {
  K tau;
  uint32_t end;
  ISSP_DEVICE bool takes(K score, uint32_t place) const {
    return score < tau || (score == tau && place < end);
  }
};

// Whether a place is among the `pruned` smallest of its group; ties: the lowest place first.
template <typename K, typename Scores>
ISSP_DEVICE bool is_selected(const Scores& scores, uint32_t m, uint32_t pruned, uint32_t place) {
  const K mine = scores(place);
  uint32_t rank = 0;
  for (uint32_t other = 0; other < m; ++other) rank += scores(other) < mine + K(other < place);
  return rank < pruned;
}

// The same for all places at once, by a whole warp: halves the range of scores in which the
// pruned-th smallest lies until a count hits it, or until a score is left whose ties are ranked.
template <typename K, typename Scores>
ISSP_DEVICE Cut<K> cut_by_warp(const Scores& scores, uint32_t m, uint32_t pruned, int bits) {
  K base = 0;
  uint32_t rank = pruned;
  while (bits > 0) {
    const K half = K(1) << --bits;
    uint32_t count = 0;
    for (uint32_t start = 0; start < m; start += 32) {
      const uint32_t place = start + lane();
      count += popcount(ballot(place < m && K(scores(place) - base) < half));
    }
    if (count == rank) return {K(base + half), 0};
    if (count < rank) {
      rank -= count;
      base += half;
    }
  }
  for (uint32_t start = 0; start < m; start += 32) {
    const uint32_t place = start + lane();
    const uint32_t equals = ballot(place < m && scores(place) == base);
    if (popcount(equals) >= rank) {
      const bool last = popcount(equals << (31 - lane())) == rank && (equals >> lane() & 1u);
      return {base, start + uint32_t(bit_length(ballot(last)))};
    }
    rank -= popcount(equals);
  }
  return {base, m};
}

}  // namespace issp
