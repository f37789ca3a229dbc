// What an op needs of torch to launch: the device, the current stream, the dtype.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

#include "checks.h"
#include "launch.cuh"
#include "semantics.h"

namespace issp {

// issp/ops/backends.py looks for these bytes before it loads the library: a driver that is older
// than the CUDA runtime linked into it would make every op throw.
#define ISSP_DIGITS_OF(number) #number
#define ISSP_DIGITS(macro) ISSP_DIGITS_OF(macro)
[[gnu::used]] inline constexpr char kRuntime[] =
    "issp needs a driver for CUDART_VERSION " ISSP_DIGITS(CUDART_VERSION);

inline Stream current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

template <typename Pointed>
Pointed* pointer(const Tensor& x) {
  if constexpr (std::is_const_v<Pointed>) {
    return static_cast<Pointed*>(x.const_data_ptr());
  } else {
    return static_cast<Pointed*>(x.mutable_data_ptr());
  }
}

// Calls body(T{}) for the storage type of a checked weight.
template <typename Body>
void with_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(Float32{});
    case ScalarType::Half: return body(Float16{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Double: return body(Float64{});
    default: refuse("weights must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace issp
