// What happens to weights before they are selected from: here nothing, in optimizer.cuh an update.
// It offers
//   Entry            what its table knows of a tensor, derived from issp::Entry
//   selects(entry)   whether the tensor takes part in the selection
//   freezes(entry)   whether the mask is applied to it instead
//   prepare(entry)   the numbers of this step, once per block, by the whole block
//   update_strided   hands out the updated weights of up to kBatch of the `count` elements first,
//                    first + stride, ...; moments are written back
//   finish(entry)    one thread, once per call and tensor, when no block reads the step any more
//   is_aligned       whether what belongs to the weights allows vectors
// and, where kUpdates is set, update_vector and update_span, see there.
#pragma once

#include "table.cuh"

namespace issp {

struct NoUpdate {
  using Entry = issp::Entry;
  static constexpr bool kUpdates = false;
  static constexpr uint32_t kBatch = 6;  // 8 spill on sm_120, where an SM has three blocks
  uint32_t nothing = 0;

  ISSP_DEVICE bool selects(const Entry&) const { return true; }
  ISSP_DEVICE bool freezes(const Entry&) const { return false; }
  ISSP_DEVICE bool is_aligned(const Entry&) const { return true; }
  ISSP_DEVICE void prepare(const Entry&, Shared) const {}
  ISSP_DEVICE void finish(const Entry&) const {}

  // All loads are on their way before sink(i, bits) takes the first.
  template <typename T, typename Sink>
  ISSP_DEVICE void update_strided(const Entry&, const typename T::Bits* weights, uint32_t first,
                                  uint32_t stride, uint32_t count, const Sink& sink, Shared) const {
    typename T::Bits bits[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      bits[i] = i < count ? load(weights + first + i * stride) : typename T::Bits(0);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      if (i < count) sink(i, bits[i]);
    }
  }
};

}  // namespace issp
