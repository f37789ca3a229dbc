// Kernels that read or write every element once and are limited by memory bandwidth: plain loops,
// compiled for each instruction set. The set in use is that of prune_kernels.h.
#pragma once

#include <cstdint>

#include "cpu/prune/prune_kernels.h"
#include "semantics.h"
#include "statistics.h"

namespace issp {

constexpr int64_t kStatisticsTile = 4096;  // elements per partial sum: 16 KB of float32

template <typename T>
struct StreamingKernels {
  using Bits = typename T::Bits;
  void (*regularize)(Bits* grad, const Bits* w, typename T::Wide factor, int64_t numel,
                     Range blocks, const uint32_t* mask);
  int64_t (*zeros)(const Bits* w, int64_t numel);
  PartialSums (*sums)(const Bits* w, int64_t numel);
};

template <typename T>
const StreamingKernels<T>& streaming_kernels();

}  // namespace issp
