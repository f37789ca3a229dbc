// The passes that read or write every element once and wait for memory: plain loops, compiled for
// each instruction set, chosen as passes.h chooses.
#pragma once

#include <cstdint>

#include "cpu/prune/prune_kernels.h"
#include "semantics.h"
#include "statistics.h"

namespace issp {

constexpr int64_t kStatisticsTile = 4096;  // 16 KB of float32: sums are taken tile by tile

template <typename T>
struct Streams {
  using Bits = typename T::Bits;
  void (*regularize)(Bits*, const Bits*, typename T::Wide, int64_t, Range, const uint32_t*);
  int64_t (*zeros)(const Bits*, int64_t);
  PartSums (*sums)(const Bits*, int64_t);
};

template <typename T>
const Streams<T>& streams();

}  // namespace issp
