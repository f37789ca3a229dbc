// From the checked arguments of a product to what its kernels take.
#pragma once

#include "checks_sparse.h"
#include "product_host.cuh"
#include "torch_call.h"

namespace issp {

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Storage::kFloat32;
    case ScalarType::Half: return Storage::kFloat16;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    default: return Storage::kFloat64;
  }
}

inline Finish finish_of(Activation activation) {
  switch (activation) {
    case Activation::kRelu: return Finish::kRelu;
    case Activation::kGelu: return Finish::kGelu;
    default: return Finish::kNone;
  }
}

inline uint32_t fitting(int64_t number, const char* name) {
  if (number < 0 || number > INT32_MAX) refuse(name, " is ", number, ": it must be below 2^31");
  return uint32_t(number);
}

inline Lists lists_of(const Convolution& call, const Tensor& columns, const Tensor& starts) {
  return {pointer<const int32_t>(columns),
          pointer<const int32_t>(starts),
          fitting(call.product.entries, "the number of entries"),
          fitting(call.product.v, "v"),
          fitting(call.geometry.rows, "the number of rows"),
          fitting(call.geometry.length(), "the length of a row")};
}

inline Window window_of(const Geometry& from) {
  Window window = {fitting(from.batch, "the batch"), fitting(from.channels, "the channels"),
                   fitting(from.rows, "the number of rows")};
  for (size_t axis : {0, 1}) {
    window.input[axis] = fitting(from.input[axis], "the image's size");
    window.output[axis] = fitting(from.size[axis], "size");
    window.kernel[axis] = fitting(from.kernel[axis], "kernel");
    window.stride[axis] = fitting(from.stride[axis], "stride");
    window.dilation[axis] = fitting(from.dilation[axis], "dilation");
    window.upsample[axis] = fitting(from.upsample[axis], "upsample");
    const int64_t padding = from.padding[axis];
    if (padding > INT32_MAX || padding < -INT32_MAX) refuse("padding must lie within 2^31");
    window.padding[axis] = int32_t(padding);
  }
  return window;
}

inline Ends ends_of(const Convolution& call, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, const Tensor& result) {
  return {bias ? pointer<const void>(*bias) : nullptr,
          residual ? pointer<const void>(*residual) : nullptr, pointer<void>(result),
          finish_of(call.product.activation)};
}

}  // namespace issp
