// magnitude_threshold on the CPU: the search of the pruning step, without a prediction.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/prune/search.h"

namespace issp {
namespace {

Tensor magnitude_threshold(const std::vector<Tensor>& weights, const std::vector<int64_t>& k) {
  const std::vector<Item> items = check_magnitude_threshold(weights, k);
  const Tensor result = torch::stable::new_empty(weights[0], {int64_t(items.size())});
  for_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const taus = static_cast<typename T::Bits*>(result.mutable_data_ptr());
    for_each_item(items, sizeof(typename T::Bits), [&](size_t i, int64_t, ThreadGroup threads) {
      // Space for a tenth of the keys, as in the pruning step, and some more for small tensors.
      std::vector<Key<T>> keys(size_t(items[i].numel / 10 + 256 * threads.size));
      const auto* w = static_cast<const typename T::Bits*>(items[i].data);
      ThresholdSearch<T> search(
          w, items[i].numel, threads,
          {reinterpret_cast<char*>(keys.data()), int64_t(keys.size() * sizeof(Key<T>))});
      taus[i] = typename T::Bits(search.find(k[i], nullptr).tau);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("magnitude_threshold", TORCH_BOX(&magnitude_threshold));
}

}  // namespace issp
