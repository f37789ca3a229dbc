// adam_soft_shrink_: Adam's update and the pruning of a parameter group in two launches, 28.5 bytes
// per weight: see speculate.cuh and optimizer.cuh; the rule is update.h's.
#pragma once

#include "optimizer.cuh"

namespace issp {

struct AdamRule {
  struct Entry : issp::Entry {
    const void* grad;
    float* first;
    float* second;
    float* step;
  };
  using Step = AdamStep;
  static constexpr uint32_t kMoments = 2;

  Adam adam;

  ISSP_DEVICE Step step(const Entry& entry, double lr) const {
    return adam_step(adam, lr, load(entry.step) + 1.0f);
  }
  ISSP_DEVICE float* moment(const Entry& entry, uint32_t j) const {
    return j == 0 ? entry.first : entry.second;
  }
  ISSP_DEVICE bool reads_moments(const Entry&) const { return true; }
  ISSP_DEVICE float updated(float w, float g, float (&moments)[2], const Entry&,
                            const Step& by) const {
    return adam_updated(w, g, moments[0], moments[1], by);
  }
  ISSP_DEVICE void finish(const Entry& entry) const { store(entry.step, load(entry.step) + 1.0f); }
};

}  // namespace issp
