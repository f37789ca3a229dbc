// sgd_soft_shrink_: SGD's update and the pruning of a parameter group in two launches, 20.5 bytes
// per weight with momentum, 12.5 without: see speculate.cuh and optimizer.cuh; the rule is
// update.h's.
#pragma once

#include "optimizer.cuh"

namespace issp {

struct SgdRule {
  struct Entry : issp::Entry {
    const void* grad;
    float* first;  // the momentum buffer, or null
  };
  using Step = SgdStep;
  static constexpr uint32_t kMoments = 1;

  Sgd sgd;

  ISSP_DEVICE Step step(const Entry&, double lr) const { return sgd_step(sgd, lr); }
  ISSP_DEVICE float* moment(const Entry& entry, uint32_t) const { return entry.first; }
  ISSP_DEVICE bool reads_moments(const Entry& entry) const {
    return entry.first != nullptr && !(entry.extra & kFirstStep);
  }
  ISSP_DEVICE float updated(float w, float g, float (&moments)[1], const Entry& entry,
                            const Step& by) const {
    return sgd_updated(w, g, moments[0], (entry.extra & kFirstStep) != 0, by);
  }
  ISSP_DEVICE void finish(const Entry&) const {}
};

}  // namespace issp
