// The exact k-th smallest key among a few candidates, and how many equal to it are selected.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/prune/prune_kernels.h"

namespace issp {

template <typename T>
struct Found {
  Key<T> tau;
  bool missed;                         // the hint did not serve
  std::vector<Selection<T>> per_part;  // one per member of the team
};

// What one member of a team kept of the keys inside a range. Of a range of a single key, the count
// says all: nothing is stored.
template <typename T>
struct Part {
  const Key<T>* keys;
  int64_t stored;
  int64_t inside;
};

template <typename T>
using Parts = std::vector<Part<T>>;

template <typename T>
int64_t count_less(const Parts<T>& parts, Key<T> bound) {
  int64_t less = 0;
  for (const Part<T>& part : parts) less += passes<T>().count_less(part.keys, part.stored, bound);
  return less;
}

// The rank-th smallest key (rank from 1), by halving the range: every halving counts the keys with
// vectors, out of the cache, which is faster than moving them about.
template <typename T>
Key<T> candidate(const Parts<T>& parts, KeyRange<T> range, int64_t rank) {
  while (range.lo < range.hi) {
    const Key<T> middle = range.lo + (range.hi - range.lo) / 2;
    if (count_less(parts, Key<T>(middle + 1)) >= rank) {
      range.hi = middle;
    } else {
      range.lo = middle + 1;
    }
  }
  return range.lo;
}

// k: the rank among all keys, `below` of which lie below the range.
template <typename T>
Found<T> decide(const Parts<T>& parts, KeyRange<T> range, int64_t k, int64_t below) {
  const bool single = range.lo == range.hi;
  Found<T> found{single ? range.lo : candidate(parts, range, k - below), false, {}};
  std::vector<int64_t> equal;
  int64_t all = 0;
  for (const Part<T>& part : parts) {
    const Parts<T> alone{part};
    const int64_t less = single ? 0 : count_less(alone, found.tau);
    const int64_t up_to = single ? part.inside : count_less(alone, Key<T>(found.tau + 1));
    below += less;
    equal.push_back(up_to - less);
    all += up_to - less;
  }
  int64_t ties = k - below;
  const bool whole = ties == all;
  for (const int64_t count : equal) {
    const int64_t here = std::min(ties, count);
    ties -= here;
    found.per_part.push_back(whole ? Selection<T>{Key<T>(found.tau + 1), false, 0}
                                   : Selection<T>{found.tau, true, here});
  }
  return found;
}

}  // namespace issp
