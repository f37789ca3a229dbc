// magnitude_threshold on the CPU: the search of the fused step, without a previous threshold.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/prune/search.h"

namespace issp {
namespace {

Tensor magnitude_threshold(const std::vector<Tensor>& weights, const std::vector<int64_t>& k) {
  const std::vector<Item> items = check_magnitude_threshold(weights, k);
  const Tensor found = torch::stable::new_empty(weights[0], {int64_t(items.size())});
  for_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const taus = static_cast<typename T::Bits*>(found.mutable_data_ptr());
    for_each_item(items, sizeof(typename T::Bits), [&](size_t i, int64_t, Team team) {
      // a tenth of the weights, as in the fused step: half a byte each, and some for a small tensor
      std::vector<Key<T>> keys(size_t(items[i].numel / 10 + 256 * team.size));
      const auto* w = static_cast<const typename T::Bits*>(items[i].data);
      Searcher<T> searcher(
          w, items[i].numel, team,
          {reinterpret_cast<char*>(keys.data()), int64_t(keys.size() * sizeof(Key<T>))});
      taus[i] = typename T::Bits(searcher.find(k[i], nullptr).tau);
    });
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("magnitude_threshold", TORCH_BOX(&magnitude_threshold));
}

}  // namespace issp
