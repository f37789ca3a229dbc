// The exact k-th smallest key of a tensor without writing to it.
//
// A census over a key range [lo, hi] counts what lies below and keeps what lies inside (one read of
// the weights); among the few candidates kept the k-th is then found exactly. If the range misses
// the rank, or holds more candidates than fit, a histogram of 2048 bins narrows it (at most 3 times
// for 32-bit keys): the result is the same.
#pragma once

#include "cpu/prune/candidates.h"
#include "cpu/threads.h"

namespace issp {

// Working memory of a call or of one member.
struct Space {
  char* data;
  int64_t bytes;

  Space share(int64_t member, int64_t members) const {
    const int64_t each = bytes / members / 8 * 8;
    return {data + each * member, each};
  }
  Space from(int64_t used) const { return {data + used, bytes - used}; }
};

template <typename T>
class Searcher {
  using Bits = typename T::Bits;

 public:
  // space: for candidates, shared evenly by the team.
  Searcher(const Bits* w, int64_t numel, Team team, Space space)
      : w_(w),
        numel_(numel),
        team_(team),
        space_(space),
        seen_(size_t(team.size)),
        pass_(passes<T>()) {}

  Found<T> find(int64_t k, const KeyRange<T>* hint) {
    if (k == 0) return {0, false, std::vector<Selection<T>>(seen_.size(), {0, false, 0})};
    KeyRange<T> range{0, Limits<T>::magnitude};
    int64_t below = 0;  // keys below range.lo
    if (hint) {
      take_census(*hint);
      const int64_t under = sum(&Census<T>::below), inside = sum(&Census<T>::inside);
      if (k <= under) {
        range.hi = hint->lo - 1;
      } else if (k > under + inside) {
        range.lo = hint->hi + 1;
        below = under + inside;
      } else {
        if (complete(*hint)) return decide(parts(), *hint, k, under);
        range = *hint;
        below = under;
      }
    }
    while (narrow(range, k, below) > capacity() / 2 && range.lo < range.hi) {
    }
    take_census(range);
    while (!complete(range)) {  // the candidates lie unevenly over the team's shares
      narrow(range, k, below);
      take_census(range);
    }
    Found<T> found = decide(parts(), range, k, below);
    found.missed = hint != nullptr;
    return found;
  }

 private:
  int64_t sum(int64_t Census<T>::* field) const {
    int64_t total = 0;
    for (const Census<T>& part : seen_) total += part.*field;
    return total;
  }

  Key<T>* keys(int64_t member) const {
    return reinterpret_cast<Key<T>*>(space_.share(member, team_.size).data);
  }
  int64_t capacity() const { return space_.share(0, team_.size).bytes / int64_t(sizeof(Key<T>)); }

  Parts<T> parts() const {
    Parts<T> found;
    for (size_t p = 0; p < seen_.size(); ++p) {
      found.push_back({keys(int64_t(p)), seen_[p].stored, seen_[p].inside});
    }
    return found;
  }

  void take_census(KeyRange<T> range) {
    team_.each([&](int64_t p) {
      seen_[size_t(p)] =
          pass_.census(w_, numel_, team_.share(p, numel_), range.lo, range.hi, keys(p), capacity());
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

  const Bits* w_;
  int64_t numel_;
  Team team_;
  Space space_;
  std::vector<Census<T>> seen_;
  const Passes<T>& pass_;
};

}  // namespace issp
