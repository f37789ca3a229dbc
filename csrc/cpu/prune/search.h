// The exact k-th smallest key of a tensor; the tensor is only read.
//
// `count_range` counts the keys below a range [lo, hi] and copies the keys inside, in one read of
// the weights. The k-th key is then found among these candidates. If the range does not contain
// rank k, or holds more candidates than fit, a histogram of 2048 bins narrows the range (at most 3
// times for 32-bit keys). The result does not depend on the path.
#pragma once

#include "cpu/prune/candidates.h"
#include "cpu/threads.h"

namespace issp {

// Working memory of a call or of one thread.
struct Scratch {
  char* data;
  int64_t bytes;

  Scratch slice(int64_t thread, int64_t num_threads) const {
    const int64_t each = bytes / num_threads / 8 * 8;
    return {data + each * thread, each};
  }
  Scratch after(int64_t used) const { return {data + used, bytes - used}; }
};

template <typename T>
class ThresholdSearch {
  using Bits = typename T::Bits;

 public:
  // scratch: for the candidates; every thread has an equal part.
  ThresholdSearch(const Bits* w, int64_t numel, ThreadGroup threads, Scratch scratch)
      : w_(w),
        numel_(numel),
        threads_(threads),
        scratch_(scratch),
        counts_(size_t(threads.size)),
        kernels_(prune_kernels<T>()) {}

  SearchResult<T> find(int64_t k, const KeyRange<T>* hint) {
    if (k == 0) return {0, false, std::vector<Threshold<T>>(counts_.size(), {0, false, 0})};
    KeyRange<T> range{0, Limits<T>::magnitude};
    int64_t below = 0;  // keys below range.lo
    if (hint) {
      count_range(*hint);
      const int64_t under = sum(&RangeCount<T>::below), inside = sum(&RangeCount<T>::inside);
      if (k <= under) {
        range.hi = hint->lo - 1;
      } else if (k > under + inside) {
        range.lo = hint->hi + 1;
        below = under + inside;
      } else {
        if (complete(*hint)) return find_threshold(lists(), *hint, k, under);
        range = *hint;
        below = under;
      }
    }
    while (narrow(range, k, below) > capacity() / 2 && range.lo < range.hi) {
    }
    count_range(range);
    while (!complete(range)) {  // one thread has more candidates than its scratch holds
      narrow(range, k, below);
      count_range(range);
    }
    SearchResult<T> result = find_threshold(lists(), range, k, below);
    result.missed = hint != nullptr;
    return result;
  }

 private:
  int64_t sum(int64_t RangeCount<T>::* field) const {
    int64_t total = 0;
    for (const RangeCount<T>& count : counts_) total += count.*field;
    return total;
  }

  Key<T>* keys(int64_t thread) const {
    return reinterpret_cast<Key<T>*>(scratch_.slice(thread, threads_.size).data);
  }
  int64_t capacity() const {
    return scratch_.slice(0, threads_.size).bytes / int64_t(sizeof(Key<T>));
  }

  CandidateLists<T> lists() const {
    CandidateLists<T> result;
    for (size_t p = 0; p < counts_.size(); ++p) {
      result.push_back({keys(int64_t(p)), counts_[p].stored, counts_[p].inside});
    }
    return result;
  }

  void count_range(KeyRange<T> range) {
    threads_.run([&](int64_t p) {
      counts_[size_t(p)] = kernels_.count_range(w_, numel_, threads_.range_of(p, numel_), range.lo,
                                                range.hi, keys(p), capacity());
    });
  }

  bool complete(KeyRange<T> range) const {
    return range.lo == range.hi || sum(&RangeCount<T>::stored) == sum(&RangeCount<T>::inside);
  }

  // Narrows the range to the bin that contains rank k; returns the number of keys in the bin.
  int64_t narrow(KeyRange<T>& range, int64_t k, int64_t& below) const {
    int shift = 0;
    while ((range.hi - range.lo) >> shift >= kBins) ++shift;
    std::vector<int64_t> bins(size_t(threads_.size) * kBins);
    threads_.run([&](int64_t p) {
      const Range blocks = threads_.range_of(p, numel_);
      const int64_t begin = 64 * blocks.begin, end = std::min(64 * blocks.end, numel_);
      kernels_.histogram(w_ + begin, end - begin, range.lo, range.hi, shift,
                         &bins[size_t(p) * kBins]);
    });
    for (int bin = 0;; ++bin) {
      int64_t population = 0;
      for (int64_t p = 0; p < threads_.size; ++p)
        population += bins[size_t(p) * kBins + size_t(bin)];
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
  ThreadGroup threads_;
  Scratch scratch_;
  std::vector<RangeCount<T>> counts_;
  const PruneKernels<T>& kernels_;
};

}  // namespace issp
