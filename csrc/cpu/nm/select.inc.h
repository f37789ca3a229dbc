// N:M selection and shrink in one pass over the weights. prune_kernels.cpp includes this file once
// per instruction set, after prune/select.inc.h and optim/update.inc.h. shape.h defines how a
// tensor is traversed.
//
// A chunk of some hundred weights stays in L1 through all stages: scores; per group the n-th
// largest score (one lane per group); a bit per weight with a smaller score; the shrink of the
// weights with a bit. Traffic per float32 weight: 4 bytes read, 4 written; 1/8 byte of mask.

namespace issp::ISSP_ISA {

// A vector of a row. If fewer elements are left, it is a zero-padded copy.
template <typename T>
struct PaddedVector {
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

// v = c = 1: the scores are the keys. For 16-bit types the low bits hold the index in the group, so
// that no two scores of a group are equal.
template <typename T>
ISSP_TARGET void score(const typename T::Bits* w, int64_t count, const NmScratch<T>& scratch) {
  using S = Scores<T>;
  PaddedVector<T> padded;
  for (int64_t i = 0; i < count; i += S::width) {
    if (i % 64 == 0) prefetch(w + i, 64 * sizeof(*w));
    auto keys = S::keys(padded.at(w + i, count - i));
    if (sizeof(*w) == 2) keys = S::both(S::shifted(keys), S::load(scratch.index_in_group + i));
    S::store(scratch.scores + i, keys);
  }
}

// Adds the sums in `bounds` over the channels of each unit; leaves the keys in `scores`.
template <typename T>
ISSP_TARGET void add_channels(const NmShape& by, int64_t units, const NmScratch<T>& scratch) {
  using S = Scores<T>;
  using One = scalar::Scores<T>;
  if (by.inner == 1) {
    for (int64_t u = 0; u < units; ++u) {
      const Key<T>* const from = scratch.bounds + u * by.c;
      auto sum = One::as_sum(from[0]);
      for (int64_t j = 1; j < by.c; ++j) sum = One::sum(sum, One::as_sum(from[j]));
      scratch.scores[u] = One::key_of_sum(sum);
    }
    return;
  }
  // A store may extend beyond its unit's columns, and the next store overwrites that.
  for (int64_t first = 0; first < units; first += by.inner) {
    for (int64_t column = 0; column < by.inner; column += S::width) {
      const Key<T>* const from = scratch.bounds + first * by.c + column;
      auto sum = S::as_sum(S::load(from));
      for (int64_t j = 1; j < by.c; ++j) {
        sum = S::sum(sum, S::as_sum(S::load(from + j * by.inner)));
      }
      S::store(scratch.scores + first + column, S::key_of_sum(sum));
    }
  }
}

// v > 1 or c > 1: the scores are the keys of the sums of the magnitudes. First the rows of each
// channel are added, then the channels of a unit. `count`: elements of a row.
template <typename T>
ISSP_TARGET void score_units(const typename T::Bits* w, const NmShape& by, int64_t count,
                             const NmScratch<T>& scratch) {
  using S = Scores<T>;
  PaddedVector<T> padded;
  for (int64_t i = 0; i < count; i += S::width) {
    auto sum = S::magnitude(padded.at(w + i, count - i));
    for (int64_t r = 1; r < by.v; ++r) {
      const auto* const row = w + r * by.row + i;
      if (i % 64 == 0) prefetch(row, 64 * sizeof(*w));
      sum = S::sum(sum, S::magnitude(padded.at(row, count - i)));
    }
    by.c == 1 ? S::store(scratch.scores + i, S::key_of_sum(sum))
              : S::store(scratch.bounds + i, S::as_bits(sum));
  }
  if (by.c > 1) add_channels<T>(by, count / by.c, scratch);
}

// The rank-th largest (or smallest) of m vectors, lane by lane; rank <= kRanks. The best values so
// far are kept in registers, in order.
template <typename T, int kRanks, bool kLargest>
ISSP_TARGET inline typename Scores<T>::Vector among(const Key<T>* x, int64_t stride, int64_t m,
                                                    int64_t rank) {
  using S = Scores<T>;
  typename S::Vector best[kRanks];
  for (auto& b : best) b = S::all(kLargest ? 0 : Key<T>(-1) >> 1);
  for (int64_t j = 0; j < m; ++j) {
    auto next = S::score(x + j * stride);
    for (auto& b : best) {
      const auto better = kLargest ? S::larger(b, next) : S::smaller(b, next);
      next = S::other(b, next, better);
      b = better;
    }
  }
  auto result = best[0];
  for (int i = 1; i < kRanks; ++i) result = i < rank ? best[i] : result;
  return result;
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
  // Bit by bit: the largest number that at least n of the m scores reach.
  auto result = S::all(0);
  for (Key<T> bit = (Key<T>(-1) >> 2) + 1; bit; bit >>= 1) {
    const auto candidate = S::both(result, S::all(bit)), below = S::minus_one(candidate);
    auto reaching = S::all(0);
    for (int64_t j = 0; j < m; ++j) {
      reaching = S::plus(reaching, S::greater(S::score(x + j * stride), below));
    }
    result = S::pick(S::greater(reaching, S::all(Key<T>(n - 1))), candidate, result);
  }
  return result;
}

// Bounds of all elements of a chunk with inner > 1: a lane holds a column.
template <typename T>
ISSP_TARGET void bound_strided(const Key<T>* scores, const NmShape& by, int64_t count,
                               const NmScratch<T>& scratch) {
  using S = Scores<T>;
  constexpr int64_t lanes = S::width;
  const int64_t step = lanes % by.inner;
  for (int64_t begin = 0; begin < count; begin += by.block) {
    Key<T>* const to = scratch.bounds + begin;
    if (by.inner <= lanes) {
      // One vector holds all columns. Its rotations give every part of the block.
      const auto result = bound<T>(scores + begin, by.inner, by.m, by.n);
      for (int64_t i = 0, first = 0; i < by.block; i += lanes) {
        S::store(to + i,
                 S::permuted(result, S::load(scratch.lane_order + NmShape::kLanes * first)));
        first += step;
        first -= first >= by.inner ? by.inner : 0;
      }
      continue;
    }
    // From the last columns to the first: a store may extend beyond its columns, and the next store
    // overwrites that.
    for (int64_t column = (by.inner - 1) / lanes * lanes; column >= 0; column -= lanes) {
      const auto result = bound<T>(scores + begin + column, by.inner, by.m, by.n);
      for (int64_t j = 0; j < by.m; ++j) S::store(to + column + j * by.inner, result);
    }
  }
}

// The n-th largest of m adjacent scores, bit by bit as in `bound`.
template <typename T>
ISSP_TARGET Key<T> bound_of_one(const Key<T>* x, int64_t m, int64_t n) {
  using S = Scores<T>;
  Key<T> result = 0;
  for (Key<T> bit = (Key<T>(-1) >> 2) + 1; bit; bit >>= 1) {
    const auto below = S::all(Key<T>((result | bit) - 1));
    int64_t reaching = 0;
    for (int64_t j = 0; j < m; j += S::width) {
      const uint64_t bits = S::bits(S::greater(S::score(x + j), below));
      reaching += __builtin_popcountll(m - j < S::width ? bits & ((1u << (m - j)) - 1) : bits);
    }
    if (reaching >= n) result |= bit;
  }
  return result;
}

// Bounds of all elements of a chunk with inner = 1: a lane holds a group.
template <typename T>
ISSP_TARGET void bound_adjacent(const Key<T>* scores, const NmShape& by, int64_t count,
                                const NmScratch<T>& scratch) {
  using S = Scores<T>;
  constexpr int64_t lanes = S::width;
  const int64_t m = by.m;
  if (by.single_group()) {
    for (int64_t begin = 0; begin < count; begin += m) {
      const auto one = S::all(bound_of_one<T>(scores + begin, m, by.n));
      for (int64_t j = 0; j < m; j += lanes) S::store(scratch.bounds + begin + j, one);
    }
    return;
  }
  for (int64_t begin = 0; begin < count; begin += lanes * m) {
    for (int64_t j = 0; j < m; j += 4) {  // columns: [m][lanes], four rows at a time
      S::columns(scores + begin + j, m, scratch.columns + lanes * j);
    }
    const auto result = bound<T>(scratch.columns, lanes, m, by.n);
    Key<T>* const to = scratch.bounds + begin;
    if (m < lanes) {
      for (int64_t i = 0; i < lanes * m; i += lanes) {
        S::store(to + i, S::permuted(result, S::load(scratch.lane_order + i)));
      }
      continue;
    }
    alignas(64) Key<T> each[lanes];
    S::store(each, result);
    const int64_t groups = std::min(lanes, (count - begin) / m);
    for (int64_t g = 0; g < groups; ++g) {
      const auto one = S::all(each[g]);
      for (int64_t j = 0; j < m; j += lanes) S::store(to + g * m + j, one);
    }
  }
}

// Ties: where a group has fewer scores below its bound than it prunes, the first scores equal to
// the bound are dropped too. Returns the largest dropped score.
template <typename T>
Key<T> drop_ties(const Key<T>* scores, const NmShape& by, int64_t count,
                 const NmScratch<T>& scratch, Key<T> largest) {
  const auto score = [&](int64_t i) { return scores[i] & Key<T>(-1) >> 1; };
  for (int64_t begin = 0; begin < count; begin += by.block) {
    for (int64_t column = begin; column < begin + by.inner; ++column) {
      int64_t missing = by.m - by.n;
      const Key<T> least = scratch.bounds[column];
      for (int64_t i = column; i < begin + by.block; i += by.inner) missing -= score(i) < least;
      for (int64_t i = column; missing > 0; i += by.inner) {
        if (score(i) != least) continue;
        scratch.dropped[i / 64] |= uint64_t(1) << (i % 64);
        largest = std::max(largest, least);
        --missing;
      }
    }
  }
  return largest;
}

// Sets a bit for each element of the chunk that is dropped; returns the largest dropped score.
template <typename T>
ISSP_TARGET Key<T> drop(const Key<T>* from, const NmShape& by, int64_t count,
                        const NmScratch<T>& scratch) {
  using S = Scores<T>;
  const int64_t words = (count + 63) / 64;
  int64_t dropped = 0;
  auto largest = S::all(0);
  for (int64_t word = 0; word < words; ++word) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < 64; i += S::width) {
      const auto scores = S::score(from + 64 * word + i);
      const auto less = S::greater(S::load(scratch.bounds + 64 * word + i), scores);
      largest = S::larger_where(less, largest, scores);
      bits |= S::bits(less) << i;
    }
    if (count - 64 * word < 64) bits &= (uint64_t(1) << (count - 64 * word)) - 1;
    dropped += __builtin_popcountll(bits);
    scratch.dropped[word] = bits;
  }
  scratch.dropped[words] = 0;
  const Key<T> result = largest_lane<T>(largest);
  const bool complete = dropped == count / by.m * (by.m - by.n);
  return complete ? result : drop_ties<T>(from, by, count, scratch, result);
}

// `count` <= 64 bits from bit `at` on.
inline uint64_t bits_at(const uint64_t* words, int64_t at, int64_t count) {
  uint64_t bits = words[at / 64] >> (at % 64);
  if (at % 64 + count > 64) bits |= words[at / 64 + 1] << (64 - at % 64);
  return count < 64 ? bits & ((uint64_t(1) << count) - 1) : bits;
}

// A bit per element of a row from a bit per unit: those from bit `first` on. A word of zeros
// follows.
inline void spread_bits(const uint64_t* of_units, int64_t first, int64_t count, const NmShape& by,
                        uint64_t* of_elements) {
  const int64_t units = count / by.c, words = (count + 63) / 64;
  std::fill(of_elements, of_elements + words + 1, uint64_t(0));
  if (by.inner == 1 && by.c == 2) {  // the usual pair of channels
    for (int64_t word = 0; word < words; ++word) {
      uint64_t bits =
          bits_at(of_units, first + 32 * word, std::min<int64_t>(32, units - 32 * word));
      for (const int shift : {16, 8, 4, 2, 1}) {
        bits = (bits | bits << shift) & (~uint64_t(0) / ((uint64_t(1) << shift) + 1));
      }
      of_elements[word] = bits | bits << 1;
    }
    return;
  }
  const int64_t run = by.c == 1 ? units : by.inner;
  for (int64_t unit = 0, at = 0; unit < units; unit += run) {
    for (int64_t j = 0; j < by.c; ++j) {
      for (int64_t column = 0; column < run; column += 64) {
        const int64_t taken = std::min<int64_t>(64, run - column);
        const uint64_t bits = bits_at(of_units, first + unit + column, taken);
        of_elements[at / 64] |= bits << (at % 64);
        if (at % 64 + taken > 64) of_elements[at / 64 + 1] |= bits >> (64 - at % 64);
        at += taken;
      }
    }
  }
}

// Prefetches the next chunks while a chunk is shrunk: the other stages touch no memory outside L1.
// Measured: a step of EDSR-L at 2:32, time relative to an in-place multiplication of the same
// memory (in brackets: the step of an unstructured layer). Without prefetch 1.84 (1.44); chunks of
// 1024 weights, 8 KiB ahead 1.33 (1.35); 2048, 16 KiB 1.45 (1.40); 256, 4 KiB 1.25 (1.42); 512, 4
// KiB 1.23 (1.41). The last is also the fastest for the smaller tensors of CAT-R: 1.27 (1.12).
inline void prefetch_chunk(const void* from, size_t bytes) {
  const char* ahead = static_cast<const char*>(from) + 4096;
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
}

// Shrinks the dropped elements among the `count` elements from `at` on, updates the mask, and
// returns how many mask bits changed. `largest` may be null; otherwise it receives the maximum of
// itself and the shrunk keys.
template <typename T>
ISSP_TARGET int64_t shrink_dropped(typename T::Bits* w, int64_t numel, int64_t at, int64_t count,
                                   const uint64_t* dropped, typename T::Wide shrink, bool exact,
                                   uint64_t* mask, Key<T>* largest) {
  using L = Lanes<T>;
  using S = Scores<T>;
  int64_t flips = 0;
  auto max_key = S::all(0);
  const int shift = int(at % 64);
  for (int64_t b = at / 64, i = 0; 64 * b < at + count; ++b, ++i) {
    prefetch_chunk(w + 64 * b, 64 * sizeof(*w));
    uint64_t take = dropped[i] << shift;
    if (shift && i) take |= dropped[i - 1] >> (64 - shift);
    uint64_t range = ~uint64_t(0);
    if (i == 0) range <<= shift;
    if (64 * b + 64 > at + count) range &= (uint64_t(1) << (at + count - 64 * b)) - 1;
    const uint64_t old = mask[b], new_mask = (old & ~range) | (range & ~take);
    if (old != new_mask) {
      flips += __builtin_popcountll(old ^ new_mask);
      mask[b] = new_mask;
    }
    if (!take) continue;
    Block64<T> block(w, b, numel);
    if (largest) {
      for (int lane = 0; lane < 64; lane += S::width) {
        const auto in = S::mask(lanes_of<S>(take, lane));
        max_key = S::larger_where(in, max_key, S::keys(block.data + lane));
      }
    }
    if (exact) {
      for (uint64_t left = take; left; left &= left - 1) {
        auto& bits = block.data[__builtin_ctzll(left)];
        bits = shrunk<T>(bits, shrink);
      }
    } else {
      for (int lane = 0; lane < 64; lane += L::width) {
        L::store_shrunk(block.data + lane, L::load(block.data + lane), lanes_of<L>(take, lane),
                        shrink);
      }
    }
    block.store(w, b);
  }
  if (largest) *largest = std::max(*largest, largest_lane<T>(max_key));
  return flips;
}

// Shrinks the dropped elements of a chunk in all its rows, as `shrink_dropped`.
template <typename T>
ISSP_TARGET int64_t shrink_rows(typename T::Bits* w, int64_t numel, int64_t at, int64_t count,
                                const NmShape& by, const uint64_t* dropped, typename T::Wide shrink,
                                bool exact, uint64_t* mask, Key<T>* largest) {
  int64_t flips = 0;
  for (int64_t r = 0; r < by.v; ++r) {
    flips +=
        shrink_dropped<T>(w, numel, at + r * by.row, count, dropped, shrink, exact, mask, largest);
  }
  return flips;
}

// One chunk: `count` elements from `at` on and, for v > 1, the elements below them in the other
// rows.
template <typename T>
ISSP_TARGET int64_t shrink_chunk(typename T::Bits* w, int64_t numel, int64_t at, int64_t count,
                                 const NmShape& by, typename T::Wide shrink,
                                 const NmScratch<T>& scratch, uint64_t* mask, Key<T>& largest) {
  const bool sums = by.sums(), small = sizeof(*w) == 2;
  const int64_t units = count / by.c;
  const Key<T>* scores = scratch.scores;
  if constexpr (sizeof(*w) == sizeof(*scores)) {
    // The weights are used as scores if the kernels may read beyond the chunk without leaving the
    // tensor.
    if (!sums && count % 64 == 0 && numel - at >= count + by.beyond()) scores = w + at;
  }
  if (scores == scratch.scores) {
    sums ? score_units<T>(w + at, by, count, scratch) : score<T>(w + at, count, scratch);
    std::fill(scratch.scores + units, scratch.scores + units + 64, Key<T>(0));
  }
  by.inner > 1 ? bound_strided<T>(scores, by, units, scratch)
               : bound_adjacent<T>(scores, by, units, scratch);
  const Key<T> result = drop<T>(scores, by, units, scratch);
  if (by.c > 1) spread_bits(scratch.dropped, 0, count, by, scratch.dropped_elements);
  const Key<T> max_key = !sums && small ? result >> 16 : result;
  const bool exact = max_key >= (sums && small ? Key<T>(kInfinity<Float32>) : kInfinity<T>);
  if (!sums) largest = std::max(largest, max_key);
  return shrink_rows<T>(w, numel, at, count, by, scratch.dropped_elements, shrink, exact, mask,
                        sums ? &largest : nullptr);
}

// The optimizer update of a work unit, if there is one.
template <typename T>
ISSP_TARGET void update_work_unit(typename T::Bits* w, int64_t numel, int64_t begin, int64_t end,
                                  const TensorUpdate* update) {
  if constexpr (std::is_same_v<T, Float32>) {
    if (update)
      ISSP_ISA::update(reinterpret_cast<float*>(w), numel, {begin / 64, (end + 63) / 64}, *update,
                       nullptr);
  }
}

// Calls visit(at, count) for every chunk of a work unit: `count` elements from `at` on, in the
// first row of a row block.
template <typename F>
ISSP_TARGET inline void for_each_chunk(const NmShape& by, int64_t begin, int64_t end,
                                       const F& visit) {
  for (int64_t row_block = begin; row_block < end; row_block += by.v * by.row) {
    const int64_t row = std::min(by.row, end - row_block);
    for (int64_t at = 0; at < row; at += by.chunk) {
      visit(row_block + at, std::min(by.chunk, row - at));
    }
  }
}

// Prunes the given work units of a tensor, each after its optimizer update if there is one.
template <typename T>
ISSP_TARGET int64_t nm_shrink(typename T::Bits* w, int64_t numel, const NmShape& by,
                              Range work_units, const TensorUpdate* update, typename T::Wide shrink,
                              const NmScratch<T>& scratch, uint64_t* mask, Key<T>* largest) {
  int64_t flips = 0;
  for (int64_t work_unit = work_units.begin; work_unit < work_units.end; ++work_unit) {
    const int64_t begin = work_unit * by.work_unit, end = std::min(numel, begin + by.work_unit);
    update_work_unit<T>(w, numel, begin, end, update);
    for_each_chunk(by, begin, end, [&](int64_t at, int64_t count) ISSP_TARGET {
      flips += shrink_chunk<T>(w, numel, at, count, by, shrink, scratch, mask, *largest);
    });
  }
  return flips;
}

// The scores of the units of the given work units, after the optimizer update if there is one. The
// unit of element `at` of a row block's first row is number at / (v * c), counted in whole blocks.
template <typename T>
ISSP_TARGET void unit_scores(typename T::Bits* w, int64_t numel, const NmShape& by,
                             Range work_units, const TensorUpdate* update,
                             const NmScratch<T>& scratch, Key<T>* scores) {
  for (int64_t work_unit = work_units.begin; work_unit < work_units.end; ++work_unit) {
    const int64_t begin = work_unit * by.work_unit, end = std::min(numel, begin + by.work_unit);
    update_work_unit<T>(w, numel, begin, end, update);
    for_each_chunk(by, begin, end, [&](int64_t at, int64_t count) ISSP_TARGET {
      score_units<T>(w + at, by, count, scratch);
      std::copy_n(scratch.scores, count / by.c, scores + by.unit_of(at));
    });
  }
}

// Shrinks the units whose bit is set in `dropped`; otherwise as nm_shrink.
template <typename T>
ISSP_TARGET int64_t shrink_units(typename T::Bits* w, int64_t numel, const NmShape& by,
                                 Range work_units, const uint64_t* dropped, typename T::Wide shrink,
                                 bool exact, const NmScratch<T>& scratch, uint64_t* mask,
                                 Key<T>* largest) {
  int64_t flips = 0;
  for (int64_t work_unit = work_units.begin; work_unit < work_units.end; ++work_unit) {
    const int64_t begin = work_unit * by.work_unit, end = std::min(numel, begin + by.work_unit);
    for_each_chunk(by, begin, end, [&](int64_t at, int64_t count) ISSP_TARGET {
      spread_bits(dropped, by.unit_of(at), count, by, scratch.dropped_elements);
      flips += shrink_rows<T>(w, numel, at, count, by, scratch.dropped_elements, shrink, exact,
                              mask, largest);
    });
  }
  return flips;
}

}  // namespace issp::ISSP_ISA
