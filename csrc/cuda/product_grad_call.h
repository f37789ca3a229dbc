// A gradient of values: its buffer of partial sums, and the result.
#pragma once

#include "product_call.h"
#include "product_grad.cuh"

namespace issp {

// The gradient of the values: add(totals) adds up `splits` parts of it, which become one.
template <typename Add>
Tensor summed_values(const Tensor& x, const Lists& lists, uint32_t splits, const Add& add) {
  const int64_t values = int64_t(lists.entries) * lists.v;
  const Storage storage = storage_of(x.scalar_type());
  const bool wide = x.element_size() >= 4;
  if (values == 0 || (wide && splits == 1)) {
    Tensor found = torch::stable::new_zeros(x, {lists.entries, lists.v});
    if (values > 0) add(pointer<void>(found));
    return found;
  }
  const ScalarType sums = wide ? x.scalar_type() : ScalarType::Float;
  Tensor totals = torch::stable::new_zeros(x, {splits, values}, sums);
  Tensor found = torch::stable::new_empty(x, {lists.entries, lists.v});
  add(pointer<void>(totals));
  sum_totals(lists, splits, storage, pointer<const void>(totals), pointer<void>(found),
             current_stream(x));
  return found;
}

}  // namespace issp
