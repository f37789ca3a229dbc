// N:M selection and shrink in one pass over the weights. Included once per instruction set by
// passes.cpp, behind passes.inc.h and update.inc.h; nm_shape.h says how a tensor is walked.
//
// Of a piece of some hundred weights, all in the first-level cache: scores; per group, the n-th
// largest of them (one lane per group); a bit per weight that scores less; the shrink by these
// bits. Traffic per float32 weight: 4 bytes read, 4 written; 1/8 byte of mask.

namespace issp::ISSP_ISA {

// A vector's worth of a row at `at`, by way of a copy where fewer are left.
template <typename T>
struct Piece {
  using Bits = typename T::Bits;
  Bits last[Scores<T>::width];

  const Bits* at(const Bits* w, int64_t left) {
    if (left >= Scores<T>::width) return w;
    std::fill(std::copy(w, w + left, last), last + Scores<T>::width, Bits(0));
    return last;
  }
};

template <typename T>
ISSP_TARGET inline Key<T> largest_lane(typename Scores<T>::Vector x) {
  Key<T> lanes[Scores<T>::width];
  Scores<T>::store(lanes, x);
  return *std::max_element(lanes, lanes + Scores<T>::width);
}

// v = 1: keys. 16-bit ones stand above their member's number: no two of a group are equal.
template <typename T>
ISSP_TARGET void score(const typename T::Bits* w, int64_t count, const NmDesk<T>& desk) {
  using S = Scores<T>;
  Piece<T> piece;
  for (int64_t i = 0; i < count; i += S::width) {
    if (i % 64 == 0) prefetch(w + i, 64 * sizeof(*w));
    auto keys = S::keys(piece.at(w + i, count - i));
    if (sizeof(*w) == 2) keys = S::both(S::shifted(keys), S::load(desk.members + i));
    S::store(desk.scores + i, keys);
  }
}

// v > 1: keys of the magnitudes summed over the rows.
template <typename T>
ISSP_TARGET void score_rows(const typename T::Bits* w, const NmShape& by, int64_t count,
                            const NmDesk<T>& desk) {
  using S = Scores<T>;
  Piece<T> piece;
  for (int64_t i = 0; i < count; i += S::width) {
    auto sum = S::magnitude(piece.at(w + i, count - i));
    for (int64_t r = 1; r < by.v; ++r) {
      const auto* const row = w + r * by.row + i;
      if (i % 64 == 0) prefetch(row, 64 * sizeof(*w));
      sum = S::sum(sum, S::magnitude(piece.at(row, count - i)));
    }
    S::store(desk.scores + i, S::key_of_sum(sum));
  }
}

// The rank-th largest (or smallest) of m vectors, lane by lane; rank <= kRanks. The best so far
// stay in registers, in order.
template <typename T, int kRanks, bool kLargest>
ISSP_TARGET inline typename Scores<T>::Vector among(const Key<T>* x, int64_t stride, int64_t m,
                                                    int64_t rank) {
  using S = Scores<T>;
  typename S::Vector best[kRanks];
  for (auto& b : best) b = S::all(kLargest ? 0 : Key<T>(-1) >> 1);
  for (int64_t j = 0; j < m; ++j) {
    auto fresh = S::score(x + j * stride);
    for (auto& b : best) {
      const auto better = kLargest ? S::larger(b, fresh) : S::smaller(b, fresh);
      fresh = S::other(b, fresh, better);
      b = better;
    }
  }
  auto found = best[0];
  for (int i = 1; i < kRanks; ++i) found = i < rank ? best[i] : found;
  return found;
}

template <typename T, bool kLargest>
ISSP_TARGET typename Scores<T>::Vector ranked(const Key<T>* x, int64_t stride, int64_t m,
                                              int64_t rank) {
  if (rank == 1) return among<T, 1, kLargest>(x, stride, m, rank);
  if (rank == 2) return among<T, 2, kLargest>(x, stride, m, rank);
  if (rank <= 4) return among<T, 4, kLargest>(x, stride, m, rank);
  return among<T, 8, kLargest>(x, stride, m, rank);
}

// The n-th largest of m vectors, lane by lane.
template <typename T>
ISSP_TARGET typename Scores<T>::Vector bound(const Key<T>* x, int64_t stride, int64_t m,
                                             int64_t n) {
  using S = Scores<T>;
  const int64_t rank = m - n + 1;  // counted from the smallest
  if (n <= 8 && n <= rank) return ranked<T, true>(x, stride, m, n);
  if (rank <= 8) return ranked<T, false>(x, stride, m, rank);
  // Bit by bit: the largest number that n of them reach.
  auto found = S::all(0);
  for (Key<T> bit = (Key<T>(-1) >> 2) + 1; bit; bit >>= 1) {
    const auto candidate = S::both(found, S::all(bit)), below = S::minus_one(candidate);
    auto reaching = S::all(0);
    for (int64_t j = 0; j < m; ++j) {
      reaching = S::plus(reaching, S::greater(S::score(x + j * stride), below));
    }
    found = S::pick(S::greater(reaching, S::all(Key<T>(n - 1))), candidate, found);
  }
  return found;
}

// Bounds of all elements of a piece with inner > 1: neighbouring columns in the lanes.
template <typename T>
ISSP_TARGET void bound_strided(const Key<T>* scores, const NmShape& by, int64_t count,
                               const NmDesk<T>& desk) {
  using S = Scores<T>;
  constexpr int64_t lanes = S::width;
  const int64_t step = lanes % by.inner;
  for (int64_t begin = 0; begin < count; begin += by.block) {
    Key<T>* const to = desk.bounds + begin;
    if (by.inner <= lanes) {
      // One vector holds all columns: rotated, it is any part of the block.
      const auto found = bound<T>(scores + begin, by.inner, by.m, by.n);
      for (int64_t i = 0, first = 0; i < by.block; i += lanes) {
        S::store(to + i, S::permuted(found, S::load(desk.places + NmShape::kLanes * first)));
        first += step;
        first -= first >= by.inner ? by.inner : 0;
      }
      continue;
    }
    // The last columns' stores reach over their end; the others, behind them, put that right.
    for (int64_t column = (by.inner - 1) / lanes * lanes; column >= 0; column -= lanes) {
      const auto found = bound<T>(scores + begin + column, by.inner, by.m, by.n);
      for (int64_t j = 0; j < by.m; ++j) S::store(to + column + j * by.inner, found);
    }
  }
}

// The n-th largest of m neighbours, bit by bit as above.
template <typename T>
ISSP_TARGET Key<T> bound_of_one(const Key<T>* x, int64_t m, int64_t n) {
  using S = Scores<T>;
  Key<T> found = 0;
  for (Key<T> bit = (Key<T>(-1) >> 2) + 1; bit; bit >>= 1) {
    const auto below = S::all(Key<T>((found | bit) - 1));
    int64_t reaching = 0;
    for (int64_t j = 0; j < m; j += S::width) {
      const uint64_t bits = S::bits(S::greater(S::score(x + j), below));
      reaching += __builtin_popcountll(m - j < S::width ? bits & ((1u << (m - j)) - 1) : bits);
    }
    if (reaching >= n) found |= bit;
  }
  return found;
}

// The same for inner = 1, where a group's members are neighbours: a group per lane.
template <typename T>
ISSP_TARGET void bound_adjacent(const Key<T>* scores, const NmShape& by, int64_t count,
                                const NmDesk<T>& desk) {
  using S = Scores<T>;
  constexpr int64_t lanes = S::width;
  const int64_t m = by.m;
  if (by.lone()) {
    for (int64_t begin = 0; begin < count; begin += m) {
      const auto one = S::all(bound_of_one<T>(scores + begin, m, by.n));
      for (int64_t j = 0; j < m; j += lanes) S::store(desk.bounds + begin + j, one);
    }
    return;
  }
  for (int64_t begin = 0; begin < count; begin += lanes * m) {
    for (int64_t j = 0; j < m; j += 4) {  // columns: [m][lanes], by fours
      S::columns(scores + begin + j, m, desk.columns + lanes * j);
    }
    const auto found = bound<T>(desk.columns, lanes, m, by.n);
    Key<T>* const to = desk.bounds + begin;
    if (m < lanes) {
      for (int64_t i = 0; i < lanes * m; i += lanes) {
        S::store(to + i, S::permuted(found, S::load(desk.places + i)));
      }
      continue;
    }
    alignas(64) Key<T> each[lanes];
    S::store(each, found);
    const int64_t groups = std::min(lanes, (count - begin) / m);
    for (int64_t g = 0; g < groups; ++g) {
      const auto one = S::all(each[g]);
      for (int64_t j = 0; j < m; j += lanes) S::store(to + g * m + j, one);
    }
  }
}

// Ties: where a group has fewer scores below its bound than it prunes, the first of those that
// equal it are dropped as well. Returns the largest score dropped so far.
template <typename T>
Key<T> drop_ties(const Key<T>* scores, const NmShape& by, int64_t count, const NmDesk<T>& desk,
                 Key<T> largest) {
  const auto score = [&](int64_t i) { return scores[i] & Key<T>(-1) >> 1; };
  for (int64_t begin = 0; begin < count; begin += by.block) {
    for (int64_t column = begin; column < begin + by.inner; ++column) {
      int64_t missing = by.m - by.n;
      const Key<T> least = desk.bounds[column];
      for (int64_t i = column; i < begin + by.block; i += by.inner) missing -= score(i) < least;
      for (int64_t i = column; missing > 0; i += by.inner) {
        if (score(i) != least) continue;
        desk.dropped[i / 64] |= uint64_t(1) << (i % 64);
        largest = std::max(largest, least);
        --missing;
      }
    }
  }
  return largest;
}

// A bit per element of the piece that is not kept; returns the largest score among them.
template <typename T>
ISSP_TARGET Key<T> drop(const Key<T>* from, const NmShape& by, int64_t count,
                        const NmDesk<T>& desk) {
  using S = Scores<T>;
  const int64_t words = (count + 63) / 64;
  int64_t dropped = 0;
  auto largest = S::all(0);
  for (int64_t word = 0; word < words; ++word) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < 64; i += S::width) {
      const auto scores = S::score(from + 64 * word + i);
      const auto less = S::greater(S::load(desk.bounds + 64 * word + i), scores);
      largest = S::larger_where(less, largest, scores);
      bits |= S::bits(less) << i;
    }
    if (count - 64 * word < 64) bits &= (uint64_t(1) << (count - 64 * word)) - 1;
    dropped += __builtin_popcountll(bits);
    desk.dropped[word] = bits;
  }
  desk.dropped[words] = 0;
  const Key<T> found = largest_lane<T>(largest);
  const bool complete = dropped == count / by.m * (by.m - by.n);
  return complete ? found : drop_ties<T>(from, by, count, desk, found);
}

// While a piece is shrunk, the weights of the next ones are fetched: the other stages touch no
// memory. EDSR-L at 2:32 without, in-place multiplication = 1: 1.84, the unstructured step 1.44.
// Pieces of 1024 weights 8 KiB ahead 1.33 (1.35), 2048 16 KiB 1.45 (1.40), 256 4 KiB 1.25 (1.42),
// 512 4 KiB 1.23 (1.41), which is also the fastest over CAT-R's smaller tensors: 1.27 (1.12).
inline void prefetch_piece(const void* from, size_t bytes) {
  const char* ahead = static_cast<const char*>(from) + 4096;
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
}

// Shrinks the dropped ones of the `count` elements from `at` on, refreshes the mask, and returns
// how many of its bits changed. largest (may be null): of the keys that are shrunk.
template <typename T>
ISSP_TARGET int64_t shrink_dropped(typename T::Bits* w, int64_t numel, int64_t at, int64_t count,
                                   const uint64_t* dropped, typename T::Wide shrink, bool exact,
                                   uint64_t* mask, Key<T>* largest) {
  using L = Lanes<T>;
  using S = Scores<T>;
  int64_t flips = 0;
  auto most = S::all(0);
  const int shift = int(at % 64);
  for (int64_t g = at / 64, i = 0; 64 * g < at + count; ++g, ++i) {
    prefetch_piece(w + 64 * g, 64 * sizeof(*w));
    uint64_t take = dropped[i] << shift;
    if (shift && i) take |= dropped[i - 1] >> (64 - shift);
    uint64_t open = ~uint64_t(0);
    if (i == 0) open <<= shift;
    if (64 * g + 64 > at + count) open &= (uint64_t(1) << (at + count - 64 * g)) - 1;
    const uint64_t old = mask[g], fresh = (old & ~open) | (open & ~take);
    if (old != fresh) {
      flips += __builtin_popcountll(old ^ fresh);
      mask[g] = fresh;
    }
    if (!take) continue;
    Group<T> group(w, g, numel);
    if (largest) {
      for (int lane = 0; lane < 64; lane += S::width) {
        const auto chosen = S::mask(lanes_of<S>(take, lane));
        most = S::larger_where(chosen, most, S::keys(group.data + lane));
      }
    }
    if (exact) {
      for (uint64_t left = take; left; left &= left - 1) {
        auto& bits = group.data[__builtin_ctzll(left)];
        bits = shrunk<T>(bits, shrink);
      }
    } else {
      for (int lane = 0; lane < 64; lane += L::width) {
        L::store_shrunk(group.data + lane, L::load(group.data + lane), lanes_of<L>(take, lane),
                        shrink);
      }
    }
    group.store(w, g);
  }
  if (largest) *largest = std::max(*largest, largest_lane<T>(most));
  return flips;
}

// One piece: `count` elements from `at` on and, for v > 1, those below them in the other rows.
template <typename T>
ISSP_TARGET int64_t shrink_piece(typename T::Bits* w, int64_t numel, int64_t at, int64_t count,
                                 const NmShape& by, typename T::Wide shrink, const NmDesk<T>& desk,
                                 uint64_t* mask, Key<T>& largest) {
  const bool rows = by.v > 1, small = sizeof(*w) == 2;
  const Key<T>* scores = desk.scores;
  if constexpr (sizeof(*w) == sizeof(*scores)) {
    // Weights are their own scores, where reading some vectors further stays within the tensor.
    if (!rows && count % 64 == 0 && numel - at >= count + by.beyond()) scores = w + at;
  }
  if (scores == desk.scores) {
    rows ? score_rows<T>(w + at, by, count, desk) : score<T>(w + at, count, desk);
    std::fill(desk.scores + count, desk.scores + count + 64, Key<T>(0));
  }
  by.inner > 1 ? bound_strided<T>(scores, by, count, desk)
               : bound_adjacent<T>(scores, by, count, desk);
  const Key<T> found = drop<T>(scores, by, count, desk);
  const Key<T> plain = !rows && small ? found >> 16 : found;
  const bool exact = plain >= (rows && small ? Key<T>(kInfinity<Float32>) : kInfinity<T>);
  if (!rows) largest = std::max(largest, plain);
  int64_t flips = 0;
  for (int64_t r = 0; r < by.v; ++r) {
    flips += shrink_dropped<T>(w, numel, at + r * by.row, count, desk.dropped, shrink, exact, mask,
                               rows ? &largest : nullptr);
  }
  return flips;
}

// The units `units` of a tensor, each behind its update if there is one.
template <typename T>
ISSP_TARGET int64_t shrink_groups(typename T::Bits* w, int64_t numel, const NmShape& by,
                                  Range units, const TensorUpdate* update, typename T::Wide shrink,
                                  const NmDesk<T>& desk, uint64_t* mask, Key<T>* largest) {
  int64_t flips = 0;
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t begin = unit * by.unit, end = std::min(numel, begin + by.unit);
    if constexpr (std::is_same_v<T, Float32>) {
      if (update)
        ISSP_ISA::update(reinterpret_cast<float*>(w), numel, {begin / 64, (end + 63) / 64}, *update,
                         nullptr);
    }
    for (int64_t strip = begin; strip < end; strip += by.v * by.row) {
      const int64_t row = std::min(by.row, end - strip);
      for (int64_t at = 0; at < row; at += by.piece) {
        flips += shrink_piece<T>(w, numel, strip + at, std::min(by.piece, row - at), by, shrink,
                                 desk, mask, *largest);
      }
    }
  }
  return flips;
}

}  // namespace issp::ISSP_ISA
