// The one way to start a kernel.
#pragma once

#include <cstdint>

#if !defined(ISSP_EMULATOR)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace issp {

using Stream = cudaStream_t;

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
            Stream stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel launch: ") + cudaGetErrorString(error));
  }
}

}  // namespace issp
#else
#include "emulator.h"
#endif
