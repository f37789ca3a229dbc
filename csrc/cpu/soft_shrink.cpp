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
// meet the old tau, hence the upper. Hard thresholding leaves no such anchor: a wider range.
template <typename T>
bool hint_from(typename T::Bits previous, double shrink, KeyRange<T>& hint) {
  const Key<T> tau = key<T>(previous);
  if (tau >= kInfinity<T>) return false;
  using Wide = typename T::Wide;
  const Wide value = widen(T{}, typename T::Bits(tau));
  const double low = shrink > 0.5 ? 0.97 * shrink : 0.7, high = shrink > 0.5 ? 1.03 : 1.4;
  hint.lo = key<T>(narrow(T{}, Wide(low * value)));
  hint.hi = key<T>(narrow(T{}, Wide(high * value)));
  return true;
}

template <typename T>
void shrink_item(const Item& item, int64_t k, double shrink, typename T::Bits& threshold,
                 int32_t* masks, int64_t& flips, std::atomic<int32_t>& misses, bool bracket,
                 Team team, Key<T>* room, int64_t capacity) {
  auto* w = static_cast<typename T::Bits*>(item.data);
  KeyRange<T> hint{};
  const bool hinted = bracket && hint_from<T>(threshold, shrink, hint);
  Searcher<T> searcher(w, item.numel, team, room, capacity);
  const Found<T> found = searcher.find(k, hinted ? &hint : nullptr);
  const Passes<T>& pass = passes<T>(found.tau >= kInfinity<T>);
  auto* mask = reinterpret_cast<uint64_t*>(masks + item.mask_start);
  std::vector<int64_t> changed(size_t(team.size));
  team.each([&](int64_t p) {
    changed[size_t(p)] = pass.apply(w, item.numel, team.share(p, item.numel), mask,
                                    found.per_part[size_t(p)], typename T::Wide(shrink));
  });
  flips = 0;
  for (const int64_t count : changed) flips += count;
  threshold = typename T::Bits(found.tau);
  if (found.missed) misses.fetch_add(1, std::memory_order_relaxed);
}

void soft_shrink_(const std::vector<Tensor>& weights, const Tensor& k, double shrink,
                  const Tensor& thresholds, const Tensor& masks, const Tensor& flips,
                  const Tensor& scratch, const std::optional<Tensor>& found_inf, bool bracket) {
  const std::vector<Item> items =
      check_soft_shrink(weights, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const auto* counts = static_cast<const int64_t*>(k.const_data_ptr());
  for (size_t i = 0; i < items.size(); ++i) check_rank(counts[i], items[i], i);
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0.0f) return;

  auto* const words = static_cast<int32_t*>(scratch.mutable_data_ptr());
  auto* const mask_words = static_cast<int32_t*>(masks.mutable_data_ptr());
  auto* const flip_counts = static_cast<int64_t*>(flips.mutable_data_ptr());
  std::atomic<int32_t> misses{0};
  for_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const taus = static_cast<typename T::Bits*>(thresholds.mutable_data_ptr());
    // Every thread has an equal share of the scratch and uses its beginning again and again.
    auto* const room = reinterpret_cast<Key<T>*>(words + kScratchHeader);
    const int64_t capacity =
        (scratch.numel() - kScratchHeader) * int64_t(sizeof(int32_t)) / int64_t(sizeof(Key<T>));
    const int64_t share = capacity / whole_team().size;
    for_each_item(items, sizeof(typename T::Bits), [&](size_t i, int64_t member, Team team) {
      shrink_item<T>(items[i], counts[i], shrink, taus[i], mask_words, flip_counts[i], misses,
                     bracket, team, room + member * share, team.size == 1 ? share : capacity);
    });
  });
  words[0] += misses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("soft_shrink_", TORCH_BOX(&soft_shrink_));
}

}  // namespace issp
