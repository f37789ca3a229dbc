// Maps torch dtypes to the storage types of semantics.h.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "semantics.h"

namespace issp {

// Calls body(T{}) with the storage type of a dtype that checks.h has accepted.
template <typename F>
void for_dtype(torch::headeronly::ScalarType dtype, const F& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return body(Float32{});
    case ScalarType::Half: return body(Float16{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(Float64{});
  }
}

}  // namespace issp
