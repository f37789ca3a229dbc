// How the N:M kernels traverse a tensor, and their working memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>

#include "layout.h"
#include "semantics.h"

namespace issp {

// A tensor is a sequence of row blocks. A row block has v rows of `row` elements, and all its rows
// share one mask. With v = 1 any division into rows is correct, and `row` suits the traversal. c
// consecutive channels, inner elements apart, share a bit of that mask: they are a unit, and row /
// c scores stand for a row block. A row of scores is a sequence of blocks of m * inner. In a block
// each of the `inner` columns (stride inner) is one N:M group, of n kept units among m. A kernel
// processes `chunk` elements of a row at a time: they stay in L1 from the scores to the shrink.
// Threads divide the work units: whole row blocks that start and end at a mask word.
struct NmShape {
  int64_t n, m, v, c, inner, block, row, chunk, work_unit;

  explicit NmShape(const Pattern& by)
      : n(by.n / by.c),
        m(by.m / by.c),
        v(by.v),
        c(by.c),
        inner(by.inner),
        block(by.m / by.c * by.inner) {
    const int64_t whole = by.v > 1 ? by.channels * by.inner : by.rows * by.channels * by.inner;
    const int64_t wanted = std::max<int64_t>(256, kChunk / v), elements = c * block;
    // Chunks consist of whole mask words and of whole vectors of columns, unless they become too
    // large.
    int64_t blocks = 64 / std::gcd<int64_t>(64, elements);
    if (inner == 1 && !single_group()) blocks = std::max<int64_t>(blocks, 16);
    if (blocks * elements > 8 * kChunk) blocks = inner == 1 && !single_group() ? 16 : 1;
    blocks *= std::max<int64_t>(1, wanted / (blocks * elements));
    chunk = std::min(blocks * elements, whole);
    row = v > 1 ? whole : chunk * (64 / std::gcd<int64_t>(64, chunk));
    work_unit = v * row * (64 / std::gcd<int64_t>(64, v * row));
  }

  // Whether a score is a sum: of the magnitudes of a unit of several elements.
  bool sums() const { return v > 1 || c > 1; }
  // Whether groups are so long that each is searched alone, with all lanes of the vectors.
  bool single_group() const { return inner == 1 && m > kChunk; }
  // Scores that the kernels read beyond a chunk.
  int64_t beyond() const { return 80 + (inner == 1 && !single_group() ? kLanes * m : 0); }
  // The number of the unit of an element in the first row of a row block, kernel positions
  // innermost.
  int64_t unit_of(int64_t at) const {
    const int64_t row_block = at / (v * row);
    return (row_block * row + at % (v * row)) / c;
  }
  int64_t work_units(int64_t numel) const { return (numel + work_unit - 1) / work_unit; }

 private:
  static constexpr int64_t kChunk = 512;

 public:
  static constexpr int64_t kLanes = 16;  // of the widest vector
};

// Working memory of one thread. The scores are the keys by which the units of a group are ranked:
// elements, or v * c of them.
template <typename T>
struct NmScratch {
  Key<T>* scores;   // of the units of the chunk
  Key<T>* bounds;   // per unit, the smallest score that its group keeps; before, sums of rows
  Key<T>* columns;  // [m][lanes]: scores of adjacent groups, one group per lane
  Key<T>* index_in_group;  // per element, its position in the group
  // inner > 1: [column][lanes], the columns from `column` on, modulo inner.
  // inner = 1: per unit of `lanes` groups, the number of its group.
  Key<T>* lane_order;
  uint64_t* dropped;           // a bit per unit, then one word of zeros
  uint64_t* dropped_elements;  // the same per element; c = 1: the same memory

  explicit NmScratch(const NmShape& by) {
    constexpr int64_t lanes = NmShape::kLanes;
    const bool transposed = by.inner == 1 && !by.single_group();
    const bool small = sizeof(typename T::Bits) == 2;
    const int64_t padded = round_to_lines(by.chunk + by.beyond());
    const int64_t columns_size = transposed ? lanes * (by.m + 4) : 0;
    const int64_t lane_order_size = lanes * (by.inner == 1 ? std::min(by.m, lanes) : by.inner);
    const int64_t words = round_to_lines(by.chunk / 64 + 2);
    const int64_t keys = (small ? 3 : 2) * padded + columns_size + lane_order_size;
    memory_.reset(new uint64_t[size_t(2 * words + keys * int64_t(sizeof(Key<T>)) / 8 + 16)]);
    dropped = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & -64);
    dropped_elements = by.c > 1 ? dropped + words : dropped;
    scores = reinterpret_cast<Key<T>*>(dropped + 2 * words);
    bounds = scores + padded;
    columns = bounds + padded;
    lane_order = columns + columns_size;
    index_in_group = lane_order + lane_order_size;
    for (int64_t i = 0; i < lane_order_size; ++i) {
      lane_order[i] = Key<T>(by.inner == 1 ? i / by.m : (i / lanes + i % lanes) % by.inner);
    }
    for (int64_t i = 0; small && i < padded; ++i) {
      index_in_group[i] = by.m > 1 << 16 ? 0 : Key<T>(i / by.inner % by.m);
    }
  }

 private:
  static int64_t round_to_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

  std::unique_ptr<uint64_t[]> memory_;
};

}  // namespace issp
