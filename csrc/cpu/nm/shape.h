// How the N:M passes walk through a tensor, and the memory they work in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>

#include "layout.h"
#include "semantics.h"

namespace issp {

// The tensor is a sequence of `strips`: v rows of `row` elements each, of which all rows share one
// mask. With v = 1 rows have no meaning, and a strip is cut as suits the walk. A row is a sequence
// of blocks of m * inner elements, in which every one of the `inner` columns (stride inner) is a
// group of m. Blocks are selected `piece` elements at a time, which stay in the first-level cache
// from the first look to the shrink. Threads share units: whole strips between two mask words.
struct NmShape {
  int64_t n, m, v, inner, block, row, piece, unit;

  explicit NmShape(const Pattern& by)
      : n(by.n), m(by.m), v(by.v), inner(by.inner), block(by.m * by.inner) {
    const int64_t whole = by.v > 1 ? by.channels * by.inner : by.rows * by.channels * by.inner;
    const int64_t wanted = std::max<int64_t>(256, kPiece / v);
    // Pieces of whole mask words, and of whole vectors of columns, unless they grew too large.
    int64_t blocks = 64 / std::gcd<int64_t>(64, block);
    if (inner == 1 && !lone()) blocks = std::max<int64_t>(blocks, 16);
    if (blocks * block > 8 * kPiece) blocks = inner == 1 && !lone() ? 16 : 1;
    blocks *= std::max<int64_t>(1, wanted / (blocks * block));
    piece = std::min(blocks * block, whole);
    row = v > 1 ? whole : piece * (64 / std::gcd<int64_t>(64, piece));
    unit = v * row * (64 / std::gcd<int64_t>(64, v * row));
  }

  // Groups so long that each is searched on its own, in all lanes.
  bool lone() const { return inner == 1 && m > kPiece; }
  // How far the passes read behind a piece.
  int64_t beyond() const { return 80 + (inner == 1 && !lone() ? kLanes * m : 0); }
  int64_t units(int64_t numel) const { return (numel + unit - 1) / unit; }

 private:
  static constexpr int64_t kPiece = 512;

 public:
  static constexpr int64_t kLanes = 16;  // of the widest vector
};

// One thread's working memory. Keys are scores: what the groups rank by.
template <typename T>
struct NmDesk {
  Key<T>* scores;     // of the piece's elements
  Key<T>* bounds;     // per element, the smallest score that its group keeps
  Key<T>* columns;    // [m][lanes]: scores of neighbouring groups side by side
  Key<T>* members;    // per element, its number in the group
  Key<T>* places;     // inner > 1: [column][lanes], the columns from there on, round and round;
                      //   inner = 1: per element of `lanes` groups, the number of its group
  uint64_t* dropped;  // a bit per element, and one word of zeros

  explicit NmDesk(const NmShape& by) {
    constexpr int64_t lanes = NmShape::kLanes;
    const bool transposed = by.inner == 1 && !by.lone(), small = sizeof(typename T::Bits) == 2;
    const int64_t padded = whole_lines(by.piece + by.beyond());
    const int64_t columns_room = transposed ? lanes * (by.m + 4) : 0;
    const int64_t places_room = lanes * (by.inner == 1 ? std::min(by.m, lanes) : by.inner);
    const int64_t words = whole_lines(by.piece / 64 + 2);
    const int64_t keys = (small ? 3 : 2) * padded + columns_room + places_room;
    room_.reset(new uint64_t[size_t(words + keys * int64_t(sizeof(Key<T>)) / 8 + 16)]);
    dropped = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(room_.get()) + 63) & -64);
    scores = reinterpret_cast<Key<T>*>(dropped + words);
    bounds = scores + padded;
    columns = bounds + padded;
    places = columns + columns_room;
    members = places + places_room;
    for (int64_t i = 0; i < places_room; ++i) {
      places[i] = Key<T>(by.inner == 1 ? i / by.m : (i / lanes + i % lanes) % by.inner);
    }
    for (int64_t i = 0; small && i < padded; ++i) {
      members[i] = by.m > 1 << 16 ? 0 : Key<T>(i / by.inner % by.m);
    }
  }

 private:
  static int64_t whole_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

  std::unique_ptr<uint64_t[]> room_;
};

}  // namespace issp
