// One tensor's step: selection, shrink, mask and flips, behind an optimizer's update if there is
// one. Speculative where the shrink can be undone, else searched first and applied in a second
// pass.
#pragma once

#include <atomic>
#include <optional>

#include "cpu/prune/search.h"
#include "cpu/prune/threshold_predictor.h"

namespace issp {

// Everything of one call that does not change from tensor to tensor.
struct Call {
  double shrink;
  bool bracket;
  int32_t* masks;
  std::atomic<int32_t> misses{0};
};

// The smallest key whose product is not flushed to zero (speculate postpones those below).
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

// Weights with equal products must be neighbours, two at most, with room for a second rounding.
inline bool can_be_undone(double shrink) {
  return shrink > 0.6;
}

template <typename T>
class ShrinkItem {
  using Bits = typename T::Bits;
  using Wide = typename T::Wide;

 public:
  // update: may be null.
  ShrinkItem(const Item& item, Call& call, Team team, Space space, const TensorUpdate* update)
      : w_(static_cast<Bits*>(item.data)),
        numel_(item.numel),
        mask_(reinterpret_cast<uint64_t*>(call.masks + item.mask_start)),
        call_(call),
        shrink_(Wide(call.shrink)),
        team_(team),
        space_(space),
        update_(update) {}

  void run(int64_t k, Bits& threshold, int64_t& flips, Trend& trend) {
    // A small tensor's share of the scratch holds few candidates; here all of them fit.
    alignas(64) char desktop[kSmall / 64 * 20 + (kSmall + 16) * sizeof(Key<T>)];
    if (numel_ <= kSmall) space_ = {desktop, int64_t(sizeof(desktop))};
    KeyRange<T> range{};
    const bool hinted = call_.bracket && foretell<T>(threshold, call_.shrink, trend, range);
    std::optional<Key<T>> tau;
    bool missed = false;
    if (k > 0 && can_be_undone(call_.shrink)) {
      if (hinted) tau = attempt(range, k, flips);
      missed = hinted && !tau;
      if (!tau && sampled(k, range)) tau = attempt(range, k, flips);
    }
    if (!tau) {
      const bool use_hint = hinted && !can_be_undone(call_.shrink);
      const Found<T> found = search(k, use_hint ? &range : nullptr, flips);
      missed |= found.missed;
      tau = found.tau;
    }
    if (missed) call_.misses.fetch_add(1, std::memory_order_relaxed);
    if (hinted && k > 0) learn<T>(trend, threshold, Bits(*tau), call_.shrink);
    threshold = Bits(*tau);
  }

 private:
  static constexpr int64_t kSmall = 4096;

  // One member's share of the tensor, its ledger, and its room for candidates' keys.
  struct Desk {
    Range groups;
    Ledger ledger;
    Key<T>* keys;
    int64_t capacity;
  };

  Desk desk(int64_t p) const {
    const Range groups = team_.share(p, numel_);
    const int64_t lines = (groups.end - groups.begin + kLineGroups - 1) / kLineGroups;
    const int64_t count = lines * kLineGroups;
    const Space mine = space_.share(p, team_.size);
    auto* const words = reinterpret_cast<uint64_t*>(mine.data);
    auto* const listed = reinterpret_cast<int32_t*>(words + 2 * count);
    const Space rest = mine.from(20 * count);
    return {groups,
            {words, words + count, listed, groups.end - groups.begin},
            reinterpret_cast<Key<T>*>(rest.data),
            rest.bytes / int64_t(sizeof(Key<T>))};
  }

  bool sampled(int64_t k, KeyRange<T>& range) const {
    const Desk first = desk(0);
    return sample<T>(w_, numel_, k, first.keys, first.capacity, range);
  }

  // Shrinks below the range and settles what is inside, or leaves the weights as they were.
  std::optional<Key<T>> attempt(KeyRange<T> range, int64_t k, int64_t& flips) {
    const Passes<T>& pass = passes<T>();
    const auto members = size_t(team_.size);
    const Key<T> flushed = flushed_below<T>(shrink_);
    std::vector<Sight> seen(members);
    Parts<T> parts(members);
    team_.each([&](int64_t p) {
      const Desk at = desk(p);
      const Sight sight = pass.speculate(w_, numel_, at.groups, update_, range, flushed, shrink_,
                                         at.ledger, at.keys, at.capacity, mask_);
      seen[size_t(p)] = sight;
      parts[size_t(p)] = {at.keys, sight.stored, sight.inside};
    });
    update_ = nullptr;
    int64_t below = 0, inside = 0, stored = 0;
    for (size_t p = 0; p < members; ++p) {
      below += seen[p].below;
      inside += seen[p].inside;
      stored += parts[p].stored;
    }
    const bool complete = range.lo == range.hi || stored == inside;
    if (k <= below || k > below + inside || !complete) {
      team_.each([&](int64_t p) {
        const Desk at = desk(p);
        pass.restore(w_, numel_, at.groups, range.lo, shrink_, at.ledger, seen[size_t(p)], mask_);
      });
      return std::nullopt;
    }
    const Found<T> found = decide(parts, range, k, below);
    flips = over_team([&](int64_t p) {
      const Sight& sight = seen[size_t(p)];
      return sight.flips + pass.settle(w_, numel_, range, found.per_part[size_t(p)], shrink_,
                                       desk(p).ledger, sight, mask_);
    });
    return found.tau;
  }

  // Two passes: the census of a search, then the shrink.
  Found<T> search(int64_t k, const KeyRange<T>* hint, int64_t& flips) {
    if constexpr (std::is_same_v<T, Float32>) {
      if (update_) {
        team_.each([&](int64_t p) {
          update_passes().update(reinterpret_cast<float*>(w_), numel_, team_.share(p, numel_),
                                 *update_, nullptr);
        });
      }
    }
    const Found<T> found = Searcher<T>(w_, numel_, team_, space_).find(k, hint);
    const Passes<T>& pass = passes<T>(found.tau >= kInfinity<T>);
    flips = over_team([&](int64_t p) {
      return pass.apply(w_, numel_, team_.share(p, numel_), mask_, found.per_part[size_t(p)],
                        shrink_);
    });
    return found;
  }

  template <typename F>
  int64_t over_team(const F& work) const {
    std::vector<int64_t> results(size_t(team_.size));
    team_.each([&](int64_t p) { results[size_t(p)] = work(p); });
    int64_t total = 0;
    for (const int64_t result : results) total += result;
    return total;
  }

  Bits* w_;
  int64_t numel_;
  uint64_t* mask_;
  Call& call_;
  Wide shrink_;
  Team team_;
  Space space_;
  const TensorUpdate* update_;
};

// The scratch buffer: a header whose first word counts misses, a trend per tensor, then room for
// ledgers and candidates, of which every thread has an equal share and uses the beginning again and
// again. A tensor has 0.4 bytes per weight and two lines of it; a ledger takes 0.31.
struct Scratch {
  int32_t* words;
  Trend* trends;
  Space space;

  Scratch(void* data, int64_t length, size_t tensors)
      : words(static_cast<int32_t*>(data)),
        trends(reinterpret_cast<Trend*>(words + kScratchHeader)) {
    const int64_t used = 4 * kScratchHeader + int64_t(tensors * sizeof(Trend));
    space = {static_cast<char*>(data) + used, 4 * length - used};
  }
};

}  // namespace issp
