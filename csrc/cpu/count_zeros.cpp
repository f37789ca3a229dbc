// count_zeros on the CPU. Traffic: one read.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/streaming/streaming_kernels.h"
#include "cpu/threads.h"

namespace issp {
namespace {

Tensor count_zeros(const std::vector<Tensor>& tensors) {
  const std::vector<Item> items = check_tensor_list(tensors, false);
  const Tensor result =
      torch::stable::new_empty(tensors[0], {int64_t(items.size())}, ScalarType::Long);
  auto* const counts = static_cast<int64_t*>(result.mutable_data_ptr());
  for_each_item(items, sizeof(float), [&](size_t i, int64_t, ThreadGroup threads) {
    const int64_t numel = items[i].numel;
    std::vector<int64_t> counts_of(size_t(threads.size), 0);
    for_dtype(tensors[i].scalar_type(), [&](auto type) {
      using T = decltype(type);
      const auto* const data = static_cast<const typename T::Bits*>(items[i].data);
      const StreamingKernels<T>& kernels = streaming_kernels<T>();
      threads.run([&](int64_t p) {
        const Range range = threads.range_of(p, numel);
        const int64_t begin = 64 * range.begin, end = std::min(numel, 64 * range.end);
        counts_of[size_t(p)] = begin < end ? kernels.zeros(data + begin, end - begin) : 0;
      });
    });
    counts[i] = 0;
    for (const int64_t count : counts_of) counts[i] += count;
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("count_zeros", TORCH_BOX(&count_zeros));
}

}  // namespace issp
