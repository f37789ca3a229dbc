// One tensor's N:M step: selection in its groups, shrink, mask and flips, behind an optimizer's
// update if there is one; every thread of a team has its own units (nm_shape.h).
#pragma once

#include <cstring>
#include <vector>

#include "cpu/threads.h"

namespace issp {

template <typename T>
class NmItem {
  using Bits = typename T::Bits;

 public:
  // update: may be null.
  NmItem(const Item& item, const Pattern& by, double shrink, Team team, const TensorUpdate* update)
      : w_(static_cast<Bits*>(item.data)),
        numel_(item.numel),
        shape_(by),
        shrink_(typename T::Wide(shrink)),
        team_(team),
        update_(update) {}

  // from: where the weights are copied from first, or null. mask: the tensor's own.
  void run(const Bits* from, int32_t* mask, Bits& threshold, int64_t& flips) const {
    const auto members = size_t(team_.size);
    std::vector<int64_t> changed(members);
    std::vector<Key<T>> largest(members);
    const int64_t units = shape_.units(numel_);
    team_.each([&](int64_t p) {
      const Range mine{units * p / team_.size, units * (p + 1) / team_.size};
      if (mine.begin == mine.end) return;
      const NmDesk<T> desk(shape_);
      const int64_t piece = from ? 1 : mine.end - mine.begin;
      for (int64_t u = mine.begin; u < mine.end; u += piece) {
        if (from) copy(from, u);
        changed[size_t(p)] +=
            passes<T>().shrink_groups(w_, numel_, shape_, {u, u + piece}, update_, shrink_, desk,
                                      reinterpret_cast<uint64_t*>(mask), &largest[size_t(p)]);
      }
    });
    flips = 0;
    for (const int64_t count : changed) flips += count;
    threshold = Bits(*std::max_element(largest.begin(), largest.end()));
  }

 private:
  void copy(const Bits* from, int64_t unit) const {
    const int64_t begin = unit * shape_.unit, end = std::min(numel_, begin + shape_.unit);
    std::memcpy(w_ + begin, from + begin, size_t(end - begin) * sizeof(Bits));
  }

  Bits* w_;
  int64_t numel_;
  NmShape shape_;
  typename T::Wide shrink_;
  Team team_;
  const TensorUpdate* update_;
};

}  // namespace issp
