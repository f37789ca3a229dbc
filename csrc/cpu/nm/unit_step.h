// The pruning step of a tensor whose weights are selected in units of v rows x c channels: optional
// optimizer update and scores, selection on the scores, shrink, mask and flips.
//
// Traffic per float32 weight: two reads and one write. The second read and the write follow as soon
// as the tensor is scored, so that a tensor of a core's L2 size comes from there. The scores and a
// bit for each are 33 / (v * c) bits per weight.
#pragma once

#include <memory>
#include <vector>

#include "cpu/nm/tensor_step.h"
#include "cpu/prune/search.h"
#include "cpu/prune/threshold_predictor.h"

namespace issp {

template <typename T>
class UnitTensorStep {
  using Bits = typename T::Bits;
  using Score = std::conditional_t<sizeof(Bits) == 8, Float64, Float32>;
  using ScoreKey = Key<Score>;

 public:
  // update: may be null.
  UnitTensorStep(const Item& item, const Pattern& by, double shrink, ThreadGroup threads,
                 Scratch scratch, const TensorUpdate* update)
      : w_(static_cast<Bits*>(item.data)),
        numel_(item.numel),
        // Groups of one unit: nothing is selected within a group.
        shape_(Pattern{by.c, by.c, by.v, by.rows, by.channels, by.inner, by.c}),
        units_(item.numel / (by.v * by.c)),
        shrink_(typename T::Wide(shrink + 0.0)),  // -0.0 would turn signs
        threads_(threads),
        scratch_(scratch),
        update_(update) {
    const int64_t words = (units_ + 511) / 512 * 8;
    const int64_t bytes = 8 * words + units_ * int64_t(sizeof(ScoreKey));
    if (scratch_.bytes < 2 * bytes) {
      memory_.reset(new uint64_t[size_t(bytes / 8 + 1)]);
      dropped_ = memory_.get();
    } else {
      dropped_ = reinterpret_cast<uint64_t*>(scratch_.data);
      scratch_ = scratch_.after((bytes + 7) / 8 * 8);
    }
    std::fill(dropped_, dropped_ + words, uint64_t(0));
    scores_ = reinterpret_cast<ScoreKey*>(dropped_ + words);
  }

  // k: how many weights are selected. mask: the words of this tensor.
  void run(int64_t k, int32_t* mask, Bits& threshold, int64_t& flips) {
    for_work_units([&](size_t, Range work_units, const NmScratch<T>& scratch) {
      prune_kernels<T>().unit_scores(w_, numel_, shape_, work_units, update_, scratch, scores_);
    });
    const bool exact = select(k * units_ / numel_);
    std::vector<int64_t> changed(size_t(threads_.size));
    std::vector<Key<T>> largest(size_t(threads_.size));
    for_work_units([&](size_t p, Range work_units, const NmScratch<T>& scratch) {
      changed[p] =
          prune_kernels<T>().shrink_units(w_, numel_, shape_, work_units, dropped_, shrink_, exact,
                                          scratch, reinterpret_cast<uint64_t*>(mask), &largest[p]);
    });
    flips = 0;
    for (const int64_t count : changed) flips += count;
    threshold = Bits(*std::max_element(largest.begin(), largest.end()));
  }

 private:
  template <typename F>
  void for_work_units(const F& body) const {
    const int64_t work_units = shape_.work_units(numel_);
    threads_.run([&](int64_t p) {
      const Range range{work_units * p / threads_.size, work_units * (p + 1) / threads_.size};
      if (range.begin < range.end) body(size_t(p), range, NmScratch<T>(shape_));
    });
  }

  // Sets the bits of the k units of the smallest scores, ties: the lowest unit first. Returns
  // whether the rules for infinity and NaN are needed.
  bool select(int64_t k) {
    KeyRange<Score> range{};
    auto* const keys = reinterpret_cast<ScoreKey*>(scratch_.data);
    const bool sampled =
        sample<Score>(scores_, units_, k, keys, scratch_.bytes / int64_t(sizeof(ScoreKey)), range);
    const SearchResult<Score> result = ThresholdSearch<Score>(scores_, units_, threads_, scratch_)
                                           .find(k, sampled ? &range : nullptr);
    const bool exact = result.tau >= kInfinity<Score>;
    threads_.run([&](int64_t p) {
      const Range blocks = threads_.range_of(p, units_);
      // The scores are multiplied by 1, as if they were weights: nobody needs them any more.
      prune_kernels<Score>(exact).apply(scores_, units_, blocks, dropped_,
                                        result.per_thread[size_t(p)], 1);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t left = units_ - 64 * b;
        dropped_[b] = ~dropped_[b] & (left < 64 ? (uint64_t(1) << left) - 1 : ~uint64_t(0));
      }
    });
    return exact;
  }

  Bits* w_;
  int64_t numel_;
  NmShape shape_;
  int64_t units_;
  typename T::Wide shrink_;
  ThreadGroup threads_;
  Scratch scratch_;
  const TensorUpdate* update_;
  std::unique_ptr<uint64_t[]> memory_;
  uint64_t* dropped_;  // a bit per unit
  ScoreKey* scores_;
};

}  // namespace issp
