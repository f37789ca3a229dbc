// soft_shrink_ on the CPU. Traffic per weight in steady state: one read of DRAM (the census), one
// read out of the cache and one write (the shrink), 1/8 byte of mask where it changes.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../checks.h"
#include "dtypes.h"
#include "search.h"

namespace issp {
namespace {

// The keys around the previous threshold among which the k-th is looked for first. Right after a
// shrink the k-th magnitude is exactly shrink * tau, hence the lower end; weights that come down
// meet the old tau, hence the upper. Hard thresholding leaves no such anchor: tau alone serves.
template <typename T>
bool hint_from(typename T::Bits previous, double shrink, double margin, KeyRange<T>& hint) {
  const Key<T> tau = key<T>(previous);
  if (tau >= kInfinity<T>) return false;
  using Wide = typename T::Wide;
  const double value = widen(T{}, typename T::Bits(tau));
  const double anchor = shrink > 0.5 ? shrink : 1.0;
  hint.lo = key<T>(narrow(T{}, Wide(anchor * value / (1 + margin))));
  hint.hi = key<T>(narrow(T{}, Wide(value * (1 + margin))));
  return true;
}

// How far beyond the anchors to look: wide enough to hit, narrow enough to keep few candidates.
// A miss costs two more passes, a candidate a few cycles, so 1/512 to 1/96 of the weights is right.
float adapted(float margin, bool missed, int64_t inside, int64_t numel) {
  if (missed) return std::min(2 * margin, 3.0f);
  if (inside > numel / 96) return std::max(margin / 1.5f, 1e-3f);
  if (inside < numel / 512) return std::min(1.25f * margin, 3.0f);
  return margin;
}

// Everything of one call that does not change from tensor to tensor.
struct Call {
  double shrink;
  bool bracket;
  int32_t* masks;
  std::atomic<int32_t> misses{0};
};

template <typename T>
void shrink_item(const Item& item, int64_t k, typename T::Bits& threshold, int64_t& flips,
                 float& margin, Call& call, Team team, Room<T> room) {
  auto* w = static_cast<typename T::Bits*>(item.data);
  KeyRange<T> hint{};
  if (margin == 0) margin = 0.03f;
  const bool hinted = call.bracket && hint_from<T>(threshold, call.shrink, margin, hint);
  const Found<T> found = Searcher<T>(w, item.numel, team, room).find(k, hinted ? &hint : nullptr);
  if (hinted) margin = adapted(margin, found.missed, found.inside, item.numel);
  const Passes<T>& pass = passes<T>(found.tau >= kInfinity<T>);
  auto* mask = reinterpret_cast<uint64_t*>(call.masks + item.mask_start);
  std::vector<int64_t> changed(size_t(team.size));
  team.each([&](int64_t p) {
    changed[size_t(p)] = pass.apply(w, item.numel, team.share(p, item.numel), mask,
                                    found.per_part[size_t(p)], typename T::Wide(call.shrink));
  });
  flips = 0;
  for (const int64_t count : changed) flips += count;
  threshold = typename T::Bits(found.tau);
  if (found.missed) call.misses.fetch_add(1, std::memory_order_relaxed);
}

void soft_shrink_(const std::vector<Tensor>& weights, const Tensor& k, double shrink,
                  const Tensor& thresholds, const Tensor& masks, const Tensor& flips,
                  const Tensor& scratch, const std::optional<Tensor>& found_inf, bool bracket) {
  const std::vector<Item> items =
      check_soft_shrink(weights, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const auto* counts = static_cast<const int64_t*>(k.const_data_ptr());
  for (size_t i = 0; i < items.size(); ++i) check_rank(counts[i], items[i], i);
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0.0f) return;

  // Scratch: a header whose first word counts misses, a margin per tensor, and room for candidates,
  // of which every thread has an equal share and uses the beginning again and again.
  auto* const words = static_cast<int32_t*>(scratch.mutable_data_ptr());
  auto* const margins = reinterpret_cast<float*>(words + kScratchHeader);
  const int64_t used = kScratchHeader + (int64_t(items.size()) + 1) / 2 * 2;
  auto* const flip_counts = static_cast<int64_t*>(flips.mutable_data_ptr());
  Call call{shrink, bracket, static_cast<int32_t*>(masks.mutable_data_ptr())};
  const int64_t members = whole_team().size;  // asked here: a worker would be told 1
  for_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const taus = static_cast<typename T::Bits*>(thresholds.mutable_data_ptr());
    const int64_t bytes = (scratch.numel() - used) * int64_t(sizeof(int32_t));
    const Room<T> all{reinterpret_cast<Key<T>*>(words + used), bytes / int64_t(sizeof(Key<T>))};
    for_each_item(items, sizeof(typename T::Bits), [&](size_t i, int64_t member, Team team) {
      const Room<T> room = team.size == 1 ? all.share(member, members) : all;
      shrink_item<T>(items[i], counts[i], taus[i], flip_counts[i], margins[i], call, team, room);
    });
  });
  words[0] += call.misses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("soft_shrink_", TORCH_BOX(&soft_shrink_));
}

}  // namespace issp
