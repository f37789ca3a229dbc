// The selection in one N:M group, by a thread or by a warp: the same units, whoever selects.
//
// The score of a unit is its weight's key, or the key of the sum of its magnitudes; of equal scores
// the one at the lowest place is pruned first.
#pragma once

#include "nm_layout.cuh"

namespace issp {

// The n best of a group, or its m - n worst, stay in a thread's registers up to this many, in
// groups that leave enough of them to a block.
#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kMostByThread = 40;
#else
constexpr uint32_t kMostByThread = 256;
#endif
constexpr uint32_t kMostBest = 8;

template <typename T>
using SumType = std::conditional_t<sizeof(typename T::Wide) == 8, Float64, Float32>;

template <typename T>
ISSP_DEVICE typename T::Wide magnitude(typename T::Bits bits) {
  return widen(T{}, typename T::Bits(key<T>(bits)));
}
// A NaN ranks largest, whatever its bits.
template <typename T>
ISSP_DEVICE Key<T> key_of_sum(typename T::Wide sum) {
  using S = SumType<T>;
  const Key<S> found = key<S>(bit_as<typename S::Bits>(sum));
  return found > kInfinity<S> ? Limits<S>::magnitude : found;
}

template <typename T, bool kSingleWeight>
constexpr int score_bits = kSingleWeight ? kKeyBits<T> : 8 * int(sizeof(Key<T>)) - 1;

// A weight in shared memory: its key, and its sign in the first bit of the key's word.
template <typename K>
constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
template <typename T>
ISSP_DEVICE Key<T> to_word(typename T::Bits bits) {
  return key<T>(bits) | (bits & Limits<T>::sign ? kSign<Key<T>> : Key<T>(0));
}
template <typename T>
ISSP_DEVICE typename T::Bits from_word(Key<T> word) {
  using Bits = typename T::Bits;
  return Bits(word & Limits<T>::magnitude) | (word & kSign<Key<T>> ? Limits<T>::sign : Bits(0));
}

ISSP_DEVICE void set_word(Shared scores, uint32_t slot, uint32_t word) {
  scores.set(slot, word);
}
ISSP_DEVICE void set_word(Shared scores, uint32_t slot, uint64_t word) {
  scores.set(2 * slot, uint32_t(word));
  scores.set(2 * slot + 1, uint32_t(word >> 32));
}
ISSP_DEVICE uint32_t get_word(Shared scores, uint32_t slot, uint32_t) {
  return scores.get(slot);
}
ISSP_DEVICE uint64_t get_word(Shared scores, uint32_t slot, uint64_t) {
  return scores.get(2 * slot) | uint64_t(scores.get(2 * slot + 1)) << 32;
}

// A group in shared memory, its place i at column first + i * stride. A complement of all bits but
// the sign turns the smallest scores into the largest.
template <typename K>
struct SharedGroup {
  Shared scores;
  uint32_t first, stride;
  K complement = 0;
  ISSP_DEVICE uint32_t column(uint32_t i) const { return first + i * stride; }
  ISSP_DEVICE K score_at(uint32_t column) const {
    return (get_word(scores, slot_of(column), K(0)) & ~kSign<K>)^complement;
  }
};

// The scores above `score` are among the best of a group, and the first `ties` of those equal to
// it.
template <typename K>
struct Bound {
  K score;
  uint32_t ties;
};

// kBest - rank slots hold what is never beaten, so that the last one has the rank-th largest.
template <uint32_t kBest, typename K>
ISSP_DEVICE Bound<K> bound_of(const SharedGroup<K>& group, uint32_t m, uint32_t rank) {
  K best[kBest];
#pragma unroll
  for (uint32_t b = 0; b < kBest; ++b) best[b] = b + rank < kBest ? ~K(0) : K(0);
  uint32_t column = group.first;
#pragma unroll(kBest * sizeof(K) > 16 ? 2 : 4)
  for (uint32_t i = 0; i < m; ++i, column += group.stride) {
    K next = group.score_at(column);
#pragma unroll
    for (uint32_t b = 0; b < kBest; ++b) {
      const K larger = next > best[b] ? next : best[b];
      next = next > best[b] ? best[b] : next;
      best[b] = larger;
    }
  }
  Bound<K> bound = {best[kBest - 1], 0};
#pragma unroll
  for (uint32_t b = 0; b < kBest; ++b) bound.ties += best[b] == bound.score;
  return bound;
}

template <typename K>
ISSP_DEVICE Bound<K> bound_of(const SharedGroup<K>& group, uint32_t m, uint32_t rank) {
  if (rank == 1) return bound_of<1>(group, m, rank);
  if (rank == 2) return bound_of<2>(group, m, rank);
  if (rank <= 4) return bound_of<4>(group, m, rank);
  return bound_of<kMostBest>(group, m, rank);
}

// Calls mark(column) for the best of a group.
template <typename K, typename Mark>
ISSP_DEVICE void mark_best(const SharedGroup<K>& group, uint32_t m, Bound<K> bound,
                           const Mark& mark) {
  for (uint32_t start = 0; start < m; start += 32) {
    const uint32_t end = m - start < 32 ? m : start + 32;
    uint32_t best = 0, equal = 0, bit = 1, column = group.column(start);
#pragma unroll 4
    for (uint32_t i = start; i < end; ++i, column += group.stride) {
      const K score = group.score_at(column);
      if (score >= bound.score) best |= bit;
      if (score == bound.score) equal |= bit;
      bit += bit;
    }
    for (; equal && bound.ties; --bound.ties) equal &= equal - 1;
    for (best &= ~equal; best; best &= best - 1) {
      mark(group.column(start + popcount((best & (0u - best)) - 1)));
    }
  }
}

// By a whole warp: halves the range of scores in which the rank-th smallest lies until a count hits
// it, or until a score is left whose ties are ranked. The index of a unit is its place in the
// group.
template <typename K, typename Score>
ISSP_DEVICE Threshold<K> threshold_by_warp(const Score& score, uint32_t m, uint32_t rank,
                                           int bits) {
  K base = 0;
  while (bits > 0) {
    const K half = K(1) << --bits;
    uint32_t count = 0;
    for (uint32_t start = 0; start < m; start += 32) {
      const uint32_t place = start + lane();
      count += popcount(ballot(place < m && K(score(place) - base) < half));
    }
    if (count == rank) return {K(base + half), 0};
    if (count < rank) {
      rank -= count;
      base += half;
    }
  }
  for (uint32_t start = 0; start < m; start += 32) {
    const uint32_t place = start + lane();
    const uint32_t equals = ballot(place < m && score(place) == base);
    if (popcount(equals) >= rank) {
      const bool last = popcount(equals << (31 - lane())) == rank && (equals >> lane() & 1u);
      return {base, start + uint32_t(bit_length(ballot(last)))};
    }
    rank -= popcount(equals);
  }
  return {base, m};
}

}  // namespace issp
