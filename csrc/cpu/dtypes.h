// From torch's dtypes to the storage types of semantics.h.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "semantics.h"

namespace issp {

// Calls work(T{}) with the storage type of a dtype that checks.h has let through.
template <typename F>
void for_dtype(torch::headeronly::ScalarType dtype, const F& work) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return work(Float32{});
    case ScalarType::Half: return work(Float16{});
    case ScalarType::BFloat16: return work(BFloat16{});
    default: return work(Float64{});
  }
}

}  // namespace issp
