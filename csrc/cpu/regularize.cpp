// regularize_ on the CPU. Traffic per float32 weight: 4 bytes of weight and 4 of gradient read, 4
// of gradient written, 1/8 byte of mask. Where a mask word keeps all its weights, only the mask is
// read.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/streaming/streaming_kernels.h"
#include "cpu/threads.h"

namespace issp {
namespace {

void regularize_(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                 const Tensor& factors, const Tensor& masks) {
  const std::vector<Item> items = check_regularize(grads, weights, factors, masks);
  const auto* const words = static_cast<const uint32_t*>(masks.const_data_ptr());
  for_dtype(grads[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    using Bits = typename T::Bits;
    const auto* const factor = static_cast<const typename T::Wide*>(factors.const_data_ptr());
    const StreamingKernels<T>& kernels = streaming_kernels<T>();
    for_each_item(items, 2 * sizeof(Bits), [&](size_t i, int64_t, ThreadGroup threads) {
      const Item& item = items[i];
      const auto* const from = static_cast<const Bits*>(weights[i].const_data_ptr());
      threads.run([&](int64_t p) {
        kernels.regularize(static_cast<Bits*>(item.data), from, factor[i], item.numel,
                           threads.range_of(p, item.numel), words + item.mask_start);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("regularize_", TORCH_BOX(&regularize_));
}

}  // namespace issp
