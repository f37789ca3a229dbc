// The one way to start a kernel.
#pragma once

#include <cstdint>

#if !defined(ISSP_EMULATOR)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace issp {

using Stream = cudaStream_t;

// Arguments have the parameters' very types, so that a table of 32 KB is not copied on its way.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
            Stream stream, const Args&... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "an argument needs a conversion");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel launch: ") + cudaGetErrorString(error));
  }
}

}  // namespace issp
#else
#include "emulator.h"
#endif
