// The exact k-th smallest key among a few candidates, and how many keys equal to it are selected.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/prune/prune_kernels.h"

namespace issp {

template <typename T>
struct SearchResult {
  Key<T> tau;
  bool missed;                           // the threshold was not in the predicted range
  std::vector<Threshold<T>> per_thread;  // what each thread shrinks
};

// The keys in a range that one thread has found. If the range is a single key, only their number
// `inside` is recorded.
template <typename T>
struct ThreadCandidates {
  const Key<T>* keys;
  int64_t stored;
  int64_t inside;
};

template <typename T>
using CandidateLists = std::vector<ThreadCandidates<T>>;

template <typename T>
int64_t count_less(const CandidateLists<T>& lists, Key<T> bound) {
  int64_t less = 0;
  for (const ThreadCandidates<T>& list : lists)
    less += prune_kernels<T>().count_less(list.keys, list.stored, bound);
  return less;
}

// The rank-th smallest key (rank from 1), by bisection of the range. Every step counts the keys
// with vector instructions in cache, which is faster than partitioning the keys.
template <typename T>
Key<T> kth_candidate(const CandidateLists<T>& lists, KeyRange<T> range, int64_t rank) {
  while (range.lo < range.hi) {
    const Key<T> middle = range.lo + (range.hi - range.lo) / 2;
    if (count_less(lists, Key<T>(middle + 1)) >= rank) {
      range.hi = middle;
    } else {
      range.lo = middle + 1;
    }
  }
  return range.lo;
}

// k: the rank among all keys, of which `below` lie below the range.
template <typename T>
SearchResult<T> find_threshold(const CandidateLists<T>& lists, KeyRange<T> range, int64_t k,
                               int64_t below) {
  const bool single = range.lo == range.hi;
  SearchResult<T> result{single ? range.lo : kth_candidate(lists, range, k - below), false, {}};
  std::vector<int64_t> equal;
  int64_t all = 0;
  for (const ThreadCandidates<T>& list : lists) {
    const CandidateLists<T> alone{list};
    const int64_t less = single ? 0 : count_less(alone, result.tau);
    const int64_t up_to = single ? list.inside : count_less(alone, Key<T>(result.tau + 1));
    below += less;
    equal.push_back(up_to - less);
    all += up_to - less;
  }
  int64_t ties = k - below;
  const bool whole = ties == all;
  for (const int64_t count : equal) {
    const int64_t taken = std::min(ties, count);
    ties -= taken;
    result.per_thread.push_back(whole ? Threshold<T>{Key<T>(result.tau + 1), false, 0}
                                      : Threshold<T>{result.tau, true, taken});
  }
  return result;
}

}  // namespace issp
