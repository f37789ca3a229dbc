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

// v = 1: the scores are the keys. For 16-bit types the low bits hold the index in the group, so
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

// v > 1: the scores are the keys of the sums of the magnitudes over the rows.
template <typename T>
ISSP_TARGET void score_rows(const typename T::Bits* w, const NmShape& by, int64_t count,
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
    S::store(scratch.scores + i, S::key_of_sum(sum));
  }
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

// One chunk: `count` elements from `at` on and, for v > 1, the elements below them in the other
// rows.
template <typename T>
ISSP_TARGET int64_t shrink_chunk(typename T::Bits* w, int64_t numel, int64_t at, int64_t count,
                                 const NmShape& by, typename T::Wide shrink,
                                 const NmScratch<T>& scratch, uint64_t* mask, Key<T>& largest) {
  const bool rows = by.v > 1, small = sizeof(*w) == 2;
  const Key<T>* scores = scratch.scores;
  if constexpr (sizeof(*w) == sizeof(*scores)) {
    // The weights are used as scores if the kernels may read beyond the chunk without leaving the
    // tensor.
    if (!rows && count % 64 == 0 && numel - at >= count + by.beyond()) scores = w + at;
  }
  if (scores == scratch.scores) {
    rows ? score_rows<T>(w + at, by, count, scratch) : score<T>(w + at, count, scratch);
    std::fill(scratch.scores + count, scratch.scores + count + 64, Key<T>(0));
  }
  by.inner > 1 ? bound_strided<T>(scores, by, count, scratch)
               : bound_adjacent<T>(scores, by, count, scratch);
  const Key<T> result = drop<T>(scores, by, count, scratch);
  const Key<T> max_key = !rows && small ? result >> 16 : result;
  const bool exact = max_key >= (rows && small ? Key<T>(kInfinity<Float32>) : kInfinity<T>);
  if (!rows) largest = std::max(largest, max_key);
  int64_t flips = 0;
  for (int64_t r = 0; r < by.v; ++r) {
    flips += shrink_dropped<T>(w, numel, at + r * by.row, count, scratch.dropped, shrink, exact,
                               mask, rows ? &largest : nullptr);
  }
  return flips;
}

// Prunes the given work units of a tensor, each after its optimizer update if there is one.
template <typename T>
ISSP_TARGET int64_t nm_shrink(typename T::Bits* w, int64_t numel, const NmShape& by,
                              Range work_units, const TensorUpdate* update, typename T::Wide shrink,
                              const NmScratch<T>& scratch, uint64_t* mask, Key<T>* largest) {
  int64_t flips = 0;
  for (int64_t work_unit = work_units.begin; work_unit < work_units.end; ++work_unit) {
    const int64_t begin = work_unit * by.work_unit, end = std::min(numel, begin + by.work_unit);
    if constexpr (std::is_same_v<T, Float32>) {
      if (update)
        ISSP_ISA::update(reinterpret_cast<float*>(w), numel, {begin / 64, (end + 63) / 64}, *update,
                         nullptr);
    }
    for (int64_t row_block = begin; row_block < end; row_block += by.v * by.row) {
      const int64_t row = std::min(by.row, end - row_block);
      for (int64_t at = 0; at < row; at += by.chunk) {
        flips += shrink_chunk<T>(w, numel, row_block + at, std::min(by.chunk, row - at), by, shrink,
                                 scratch, mask, *largest);
      }
    }
  }
  return flips;
}

}  // namespace issp::ISSP_ISA
