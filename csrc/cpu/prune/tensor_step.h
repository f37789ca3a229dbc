// The pruning step of one tensor: optional optimizer update, selection, shrink, mask and flips. One
// speculative pass if the shrink can be undone; otherwise a search and then a second pass that
// shrinks.
#pragma once

#include <atomic>
#include <optional>

#include "cpu/prune/search.h"
#include "cpu/prune/threshold_predictor.h"

namespace issp {

// The arguments that all tensors of a call share.
struct StepParams {
  double shrink;
  bool bracket;
  int32_t* masks;
  std::atomic<int32_t> misses{0};
};

// The smallest key whose product is not flushed to zero; `speculate` postpones blocks with smaller
// keys.
template <typename T>
Key<T> flushed_below(typename T::Wide shrink) {
  using Bits = typename T::Bits;
  KeyRange<T> range{1, kInfinity<T>};
  while (range.lo < range.hi) {
    const Key<T> middle = range.lo + (range.hi - range.lo) / 2;
    if (shrunk<T>(Bits(middle), shrink) == 0) {
      range.lo = middle + 1;
    } else {
      range.hi = middle;
    }
  }
  return range.lo;
}

// At most two weights, which are neighbours, may have the same product. That holds for shrink >
// 1/2; 0.6 leaves a margin for the second rounding of the 16-bit types.
inline bool can_be_undone(double shrink) {
  return shrink > 0.6;
}

template <typename T>
class TensorStep {
  using Bits = typename T::Bits;
  using Wide = typename T::Wide;

 public:
  // update: may be null.
  TensorStep(const Item& item, StepParams& params, ThreadGroup threads, Scratch scratch,
             const TensorUpdate* update)
      : w_(static_cast<Bits*>(item.data)),
        numel_(item.numel),
        mask_(reinterpret_cast<uint64_t*>(params.masks + item.mask_start)),
        params_(params),
        shrink_(Wide(params.shrink + 0.0)),  // -0.0 would turn signs
        threads_(threads),
        scratch_(scratch),
        update_(update) {}

  void run(int64_t k, Bits& threshold, int64_t& flips, ThresholdPredictor& predictor) {
    // The scratch part of a small tensor holds few candidates; small_scratch holds all its keys.
    alignas(64) char small_scratch[kSmall / 64 * 20 + (kSmall + 16) * sizeof(Key<T>)];
    if (numel_ <= kSmall) scratch_ = {small_scratch, int64_t(sizeof(small_scratch))};
    KeyRange<T> range{};
    const bool hinted =
        params_.bracket && predict_threshold<T>(threshold, params_.shrink, predictor, range);
    std::optional<Key<T>> tau;
    bool missed = false;
    if (k > 0 && can_be_undone(params_.shrink)) {
      if (hinted) tau = try_speculation(range, k, flips);
      missed = hinted && !tau;
      if (!tau && sampled(k, range)) tau = try_speculation(range, k, flips);
    }
    if (!tau) {
      const bool use_hint = hinted && !can_be_undone(params_.shrink);
      const SearchResult<T> result = search(k, use_hint ? &range : nullptr, flips);
      missed |= result.missed;
      tau = result.tau;
    }
    if (missed) params_.misses.fetch_add(1, std::memory_order_relaxed);
    if (hinted && k > 0) update_predictor<T>(predictor, threshold, Bits(*tau), params_.shrink);
    threshold = Bits(*tau);
  }

 private:
  static constexpr int64_t kSmall = 4096;

  // The part of the tensor that one thread works on, its undo log, and memory for candidate keys.
  struct ThreadPart {
    Range blocks;
    UndoLog log;
    Key<T>* keys;
    int64_t capacity;
  };

  ThreadPart part_of(int64_t p) const {
    const Range blocks = threads_.range_of(p, numel_);
    const int64_t lines = (blocks.end - blocks.begin + kLineBlocks - 1) / kLineBlocks;
    const int64_t count = lines * kLineBlocks;
    const Scratch scratch = scratch_.slice(p, threads_.size);
    auto* const words = reinterpret_cast<uint64_t*>(scratch.data);
    auto* const listed = reinterpret_cast<int32_t*>(words + 2 * count);
    const Scratch rest = scratch.after(20 * count);
    return {blocks,
            {words, words + count, listed, blocks.end - blocks.begin},
            reinterpret_cast<Key<T>*>(rest.data),
            rest.bytes / int64_t(sizeof(Key<T>))};
  }

  bool sampled(int64_t k, KeyRange<T>& range) const {
    const ThreadPart first = part_of(0);
    return sample<T>(w_, numel_, k, first.keys, first.capacity, range);
  }

  // Shrinks below the range and resolves the candidates, or leaves the weights unchanged and
  // returns nothing.
  std::optional<Key<T>> try_speculation(KeyRange<T> range, int64_t k, int64_t& flips) {
    const PruneKernels<T>& kernels = prune_kernels<T>();
    const auto num_threads = size_t(threads_.size);
    const Key<T> flushed = flushed_below<T>(shrink_);
    std::vector<SpeculationStats> stats_of(num_threads);
    CandidateLists<T> lists(num_threads);
    threads_.run([&](int64_t p) {
      const ThreadPart part = part_of(p);
      const SpeculationStats stats =
          kernels.speculate(w_, numel_, part.blocks, update_, range, flushed, shrink_, part.log,
                            part.keys, part.capacity, mask_);
      stats_of[size_t(p)] = stats;
      lists[size_t(p)] = {part.keys, stats.stored, stats.inside};
    });
    update_ = nullptr;
    int64_t below = 0, inside = 0, stored = 0;
    for (size_t p = 0; p < num_threads; ++p) {
      below += stats_of[p].below;
      inside += stats_of[p].inside;
      stored += lists[p].stored;
    }
    const bool complete = range.lo == range.hi || stored == inside;
    if (k <= below || k > below + inside || !complete) {
      threads_.run([&](int64_t p) {
        const ThreadPart part = part_of(p);
        kernels.restore(w_, numel_, part.blocks, range.lo, shrink_, part.log, stats_of[size_t(p)],
                        mask_);
      });
      return std::nullopt;
    }
    const SearchResult<T> result = find_threshold(lists, range, k, below);
    flips = sum_over_threads([&](int64_t p) {
      const SpeculationStats& stats = stats_of[size_t(p)];
      return stats.flips + kernels.resolve_candidates(w_, numel_, range,
                                                      result.per_thread[size_t(p)], shrink_,
                                                      part_of(p).log, stats, mask_);
    });
    return result.tau;
  }

  // Two passes: one that counts and searches, then one that shrinks.
  SearchResult<T> search(int64_t k, const KeyRange<T>* hint, int64_t& flips) {
    if constexpr (std::is_same_v<T, Float32>) {
      if (update_) {
        threads_.run([&](int64_t p) {
          update_kernels().update(reinterpret_cast<float*>(w_), numel_,
                                  threads_.range_of(p, numel_), *update_, nullptr);
        });
      }
    }
    const SearchResult<T> result = ThresholdSearch<T>(w_, numel_, threads_, scratch_).find(k, hint);
    const PruneKernels<T>& kernels = prune_kernels<T>(result.tau >= kInfinity<T>);
    flips = sum_over_threads([&](int64_t p) {
      return kernels.apply(w_, numel_, threads_.range_of(p, numel_), mask_,
                           result.per_thread[size_t(p)], shrink_);
    });
    return result;
  }

  template <typename F>
  int64_t sum_over_threads(const F& body) const {
    std::vector<int64_t> results(size_t(threads_.size));
    threads_.run([&](int64_t p) { results[size_t(p)] = body(p); });
    int64_t total = 0;
    for (const int64_t result : results) total += result;
    return total;
  }

  Bits* w_;
  int64_t numel_;
  uint64_t* mask_;
  StepParams& params_;
  Wide shrink_;
  ThreadGroup threads_;
  Scratch scratch_;
  const TensorUpdate* update_;
};

// The layout of the scratch tensor: a header whose first word counts misses, a predictor per
// tensor, then memory for undo logs and candidates. Every thread has an equal part of that memory
// and reuses it for every tensor. A tensor contributes 0.4 bytes per weight and two cache lines;
// its undo log takes 0.31 bytes per weight.
struct StateBuffer {
  int32_t* words;
  ThresholdPredictor* predictors;
  Scratch scratch;

  // Wraps around: the first word may hold anything.
  void count_misses(int32_t more) const { words[0] = int32_t(uint32_t(words[0]) + uint32_t(more)); }

  StateBuffer(void* data, int64_t length, size_t tensors)
      : words(static_cast<int32_t*>(data)),
        predictors(reinterpret_cast<ThresholdPredictor*>(words + kScratchHeader)) {
    const int64_t used = 4 * kScratchHeader + int64_t(tensors * sizeof(ThresholdPredictor));
    scratch = {static_cast<char*>(data) + used, 4 * length - used};
  }
};

}  // namespace issp
