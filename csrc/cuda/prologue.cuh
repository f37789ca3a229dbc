// What happens to a tile before it is counted: here nothing, in optimizer.cuh an update. It offers
//   Entry            what its table knows of a tensor, derived from issp::Entry
//   selects(entry)   whether the tensor takes part in the selection
//   freezes(entry)   whether the mask is applied to it instead
//   prepare(entry)   the numbers of this step, once per part, by the whole block
//   update_tile      hands out the updated weights of a tile; its other tensors are written back
//   finish(entry)    one thread, once per call and tensor, when no block reads the step any more
#pragma once

#include "table.cuh"

namespace issp {

struct NoUpdate {
  using Entry = issp::Entry;
  static constexpr bool kUpdates = false;
  uint32_t nothing = 0;

  ISSP_DEVICE bool selects(const Entry&) const { return true; }
  ISSP_DEVICE void finish(const Entry&) const {}
};

}  // namespace issp
