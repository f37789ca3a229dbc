// magnitude_threshold: the k-th smallest |w| of every tensor, one block per tensor.
// For setting up and for reports, not for the training step: 3 reads of a float32 tensor by a
// single SM, all tensors of the model at once, no scratch memory.
#pragma once

#include "select.cuh"
#include "table.cuh"

namespace issp {

template <typename T, int Capacity>
ISSP_KERNEL(kThreads, 1)
threshold_kernel(const ISSP_PARAM Table<Capacity> table, typename T::Bits* found) {
  const Entry& entry = table.entries[block()];
  const TensorSource<T> source = {static_cast<const typename T::Bits*>(entry.data), entry.numel};
  const auto keys = [&](const auto& visit) {
    source.each([&](Key<T> key, uint32_t) { visit(key); });
  };
  Search<Key<T>> search = {0, kKeyBits<T>, entry.extra, 0};  // extra: k
  if (entry.extra > 0) search = search_block(search, keys, shared_memory());
  if (thread() == 0) {
    store(found + table.first_tensor + block(), typename T::Bits(search.base));
  }
}

template <typename T>
void magnitude_threshold(const std::vector<Item>& items, const std::vector<uint32_t>& k,
                         typename T::Bits* found, Stream stream) {
  for_tables(items, k, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(threshold_kernel<T, capacity>, table.count, kThreads, kSharedBytes, stream, table,
           found);
  });
}

}  // namespace issp
