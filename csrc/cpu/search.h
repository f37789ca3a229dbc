// The exact k-th smallest key of a tensor, and how many equal to it are selected.
//
// A census over a key range [lo, hi] counts what lies below and keeps what lies inside (one read of
// the weights); among the few candidates kept the k-th is then found exactly. A good range comes
// from the previous threshold. If the range missed the rank, or holds more candidates than fit, a
// histogram of 2048 bins narrows it (at most 3 times for 32-bit keys): the result is the same.
#pragma once

#include <algorithm>
#include <vector>

#include "team.h"

namespace issp {

template <typename T>
struct Found {
  Key<T> tau;
  bool missed;                         // the hint did not serve
  int64_t inside;                      // keys in the range that served
  std::vector<Selection<T>> per_part;  // one per member of the team
};

template <typename T>
struct KeyRange {
  Key<T> lo;
  Key<T> hi;
};

// Space for candidate keys.
template <typename T>
struct Room {
  Key<T>* keys;
  int64_t capacity;

  Room share(int64_t member, int64_t members) const {
    return {keys + capacity / members * member, capacity / members};
  }
};

template <typename T>
class Searcher {
  using Bits = typename T::Bits;

 public:
  // room: shared evenly by the team.
  Searcher(const Bits* w, int64_t numel, Team team, Room<T> room)
      : w_(w),
        numel_(numel),
        team_(team),
        room_(room),
        seen_(size_t(team.size)),
        pass_(passes<T>()) {}

  Found<T> find(int64_t k, const KeyRange<T>* hint) {
    if (k == 0) return {0, false, 0, std::vector<Selection<T>>(seen_.size(), {0, false, 0})};
    KeyRange<T> range{0, Limits<T>::magnitude};
    int64_t below = 0;  // keys below range.lo
    bool missed = hint != nullptr;
    if (hint) {
      take_census(*hint);
      const int64_t under = sum(&Census<T>::below), inside = sum(&Census<T>::inside);
      if (k <= under) {
        range.hi = hint->lo - 1;
      } else if (k > under + inside) {
        range.lo = hint->hi + 1;
        below = under + inside;
      } else {
        if (complete(*hint)) return resolve(*hint, k, under, false);
        range = *hint;
        below = under;
      }
    }
    while (narrow(range, k, below) > room_.capacity / team_.size / 2 && range.lo < range.hi) {
    }
    take_census(range);
    while (!complete(range)) {  // the candidates lie unevenly over the team's shares
      narrow(range, k, below);
      take_census(range);
    }
    return resolve(range, k, below, missed);
  }

 private:
  int64_t sum(int64_t Census<T>::* field) const {
    int64_t total = 0;
    for (const Census<T>& part : seen_) total += part.*field;
    return total;
  }

  void take_census(KeyRange<T> range) {
    team_.each([&](int64_t p) {
      const Room<T> mine = room_.share(p, team_.size);
      seen_[size_t(p)] = pass_.census(w_, numel_, team_.share(p, numel_), range.lo, range.hi,
                                      mine.keys, mine.capacity);
    });
  }

  bool complete(KeyRange<T> range) const {
    return range.lo == range.hi || sum(&Census<T>::stored) == sum(&Census<T>::inside);
  }

  // Cuts the range down to the bin that holds rank k; returns its population.
  int64_t narrow(KeyRange<T>& range, int64_t k, int64_t& below) const {
    int shift = 0;
    while ((range.hi - range.lo) >> shift >= kBins) ++shift;
    std::vector<int64_t> bins(size_t(team_.size) * kBins);
    team_.each([&](int64_t p) {
      const Range groups = team_.share(p, numel_);
      const int64_t begin = 64 * groups.begin, end = std::min(64 * groups.end, numel_);
      pass_.histogram(w_ + begin, end - begin, range.lo, range.hi, shift, &bins[size_t(p) * kBins]);
    });
    for (int bin = 0;; ++bin) {
      int64_t population = 0;
      for (int64_t p = 0; p < team_.size; ++p) population += bins[size_t(p) * kBins + size_t(bin)];
      if (below + population >= k) {
        range.lo += Key<T>(bin) << shift;
        range.hi = std::min(range.hi, Key<T>(range.lo + ((Key<T>(1) << shift) - 1)));
        return population;
      }
      below += population;
    }
  }

  // The rank-th smallest of the candidates (rank from 1).
  Key<T> candidate(KeyRange<T> range, int64_t rank) const {
    int shift = 0;
    while ((range.hi - range.lo) >> shift >= kBins) ++shift;
    int64_t below = 0;
    Key<T> lo = range.lo, hi = range.hi;
    if (sum(&Census<T>::stored) > 1024) {  // fewer: sorting them costs less than the bins
      std::vector<int32_t> bins(kBins);
      for_candidates([&](Key<T> c, size_t) { ++bins[(c - range.lo) >> shift]; });
      size_t bin = 0;
      while (below + bins[bin] < rank) below += bins[bin++];
      lo = range.lo + (Key<T>(bin) << shift);
      hi = lo + ((Key<T>(1) << shift) - 1);
      if (shift == 0) return lo;
    }
    std::vector<Key<T>> few;
    for_candidates([&](Key<T> c, size_t) {
      if (c >= lo && c <= hi) few.push_back(c);
    });
    std::nth_element(few.begin(), few.begin() + (rank - below - 1), few.end());
    return few[size_t(rank - below - 1)];
  }

  template <typename F>
  void for_candidates(const F& visit) const {
    for (size_t p = 0; p < seen_.size(); ++p) {
      const Key<T>* keys = room_.share(int64_t(p), team_.size).keys;
      for (int64_t i = 0; i < seen_[p].stored; ++i) visit(keys[i], p);
    }
  }

  Found<T> resolve(KeyRange<T> range, int64_t k, int64_t below, bool missed) const {
    const bool single = range.lo == range.hi;
    const Key<T> tau = single ? range.lo : candidate(range, k - below);
    std::vector<int64_t> equal(seen_.size());
    if (single) {
      for (size_t p = 0; p < seen_.size(); ++p) equal[p] = seen_[p].inside;
    } else {
      for_candidates([&](Key<T> c, size_t p) {
        below += c < tau;
        equal[p] += c == tau;
      });
    }
    int64_t ties = k - below, all = 0;
    for (const int64_t count : equal) all += count;
    Found<T> found{tau, missed, sum(&Census<T>::inside), {}};
    for (const int64_t count : equal) {
      const int64_t here = std::min(ties, count);
      ties -= here;
      if (k - below == all) {
        found.per_part.push_back({Key<T>(tau + 1), false, 0});
      } else {
        found.per_part.push_back({tau, true, here});
      }
    }
    return found;
  }

  const Bits* w_;
  int64_t numel_;
  Team team_;
  Room<T> room_;
  std::vector<Census<T>> seen_;
  const Passes<T>& pass_;
};

}  // namespace issp
