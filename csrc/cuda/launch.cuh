// The one way to start a kernel, and what the device has room for.
#pragma once

#include <cstdint>

#if !defined(ISSP_EMULATOR)
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace issp {

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// ISSP_CUDA_DEBUG=1: every launch is waited for, so that an error names its kernel's call, and
// waits inside a kernel end in a trap instead of lasting for ever.
inline bool debugs() {
  const char* wish = std::getenv("ISSP_CUDA_DEBUG");
  return wish != nullptr && std::strcmp(wish, "1") == 0;
}

// A stream that is captured into a graph cannot be waited for.
inline void wait_for(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "CUDA stream");
  if (status == cudaStreamCaptureStatusNone) check(cudaStreamSynchronize(stream), "CUDA kernel");
}

// Arguments have the parameters' very types, so that a table of 32 KB is not copied on its way.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
            Stream stream, const Args&... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "an argument needs a conversion");
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads),
                         pointers, shared_bytes, stream),
        "CUDA kernel launch");
  if (debugs()) wait_for(stream);
}

// Bytes of shared memory.
struct Room {
  uint32_t processors, per_processor, per_block, reserved_per_block;
};

inline Room room_of_device() {
  int device = 0;
  check(cudaGetDevice(&device), "CUDA device");
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "CUDA device attribute");
    return uint32_t(value);
  };
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          ask(cudaDevAttrReservedSharedMemoryPerBlock)};
}

// How many blocks of this much shared memory run on a processor; allows the kernel that much.
template <typename... Params>
uint32_t blocks_per_processor(void (*kernel)(Params...), uint32_t threads, uint32_t shared_bytes) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "CUDA shared memory");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry, threads, shared_bytes),
        "CUDA occupancy");
  return uint32_t(blocks);
}

// What probe(kernel) returns, asked once per kernel and device.
template <typename Probe, typename... Params>
auto once_per_device(void (*kernel)(Params...), const Probe& probe) {
  static std::mutex mutex;
  static std::map<std::pair<int, void (*)(Params...)>, decltype(probe(kernel))> known;
  int device = 0;
  check(cudaGetDevice(&device), "CUDA device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  return known[{device, kernel}] = probe(kernel);
}

// Throws if the device cannot run the kernel: asked before the first of several launches, so that
// an error leaves everything unmodified.
template <typename... Params>
void require_kernel(void (*kernel)(Params...), uint32_t threads) {
  const int most = once_per_device(kernel, [](auto asked) {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(asked)), "CUDA kernel");
    return attributes.maxThreadsPerBlock;
  });
  if (uint32_t(most) < threads) throw std::runtime_error("CUDA kernel: too many threads a block");
}

}  // namespace issp
#else
#include "emulator.h"
#endif
