// The N:M pruning step of one tensor: optional optimizer update, selection in its groups, shrink,
// mask and flips. Threads divide the work units (shape.h).
#pragma once

#include <cstring>
#include <vector>

#include "cpu/threads.h"

namespace issp {

template <typename T>
class NmTensorStep {
  using Bits = typename T::Bits;

 public:
  // update: may be null.
  NmTensorStep(const Item& item, const Pattern& by, double shrink, ThreadGroup threads,
               const TensorUpdate* update)
      : w_(static_cast<Bits*>(item.data)),
        numel_(item.numel),
        shape_(by),
        shrink_(typename T::Wide(shrink + 0.0)),  // -0.0 would turn signs
        threads_(threads),
        update_(update) {}

  // from: the source of a copy that is made first, or null. mask: the words of this tensor.
  void run(const Bits* from, int32_t* mask, Bits& threshold, int64_t& flips) const {
    const auto num_threads = size_t(threads_.size);
    std::vector<int64_t> changed(num_threads);
    std::vector<Key<T>> largest(num_threads);
    const int64_t work_units = shape_.work_units(numel_);
    threads_.run([&](int64_t p) {
      const Range range{work_units * p / threads_.size, work_units * (p + 1) / threads_.size};
      if (range.begin == range.end) return;
      const NmScratch<T> scratch(shape_);
      const int64_t step = from ? 1 : range.end - range.begin;
      for (int64_t u = range.begin; u < range.end; u += step) {
        if (from) copy(from, u);
        changed[size_t(p)] += prune_kernels<T>().nm_shrink(
            w_, numel_, shape_, {u, u + step}, update_, shrink_, scratch,
            reinterpret_cast<uint64_t*>(mask), &largest[size_t(p)]);
      }
    });
    flips = 0;
    for (const int64_t count : changed) flips += count;
    threshold = Bits(*std::max_element(largest.begin(), largest.end()));
  }

 private:
  void copy(const Bits* from, int64_t work_unit) const {
    const int64_t begin = work_unit * shape_.work_unit;
    const int64_t end = std::min(numel_, begin + shape_.work_unit);
    std::memcpy(w_ + begin, from + begin, size_t(end - begin) * sizeof(Bits));
  }

  Bits* w_;
  int64_t numel_;
  NmShape shape_;
  typename T::Wide shrink_;
  ThreadGroup threads_;
  const TensorUpdate* update_;
};

}  // namespace issp
