// A range that should contain the new threshold, from the previous ones: cpu/prune/
// threshold_predictor.h in the precision of the weights.
#pragma once

#include <cmath>

#include "tensor_view.cuh"

namespace issp {

// Keys in [lo, hi] are candidates.
template <typename K>
struct KeyRange {
  K lo, hi;
  bool usable;
};

// Statistics of the last thresholds of a tensor, all zero before the first step.
struct ThresholdPredictor {
  float ratio;  // of one threshold to the one before
  float error;  // relative, of the last predictions
};

// A guess for the first forecast. Directly after a step the k-th magnitude is shrink * tau; until
// the next step the weights grow again. Strong shrinks leave a gap below tau, and the next k-th
// magnitude depends on what has grown back.
ISSP_DEVICE ThresholdPredictor first_guess(float shrink) {
  if (shrink <= 0.5f) return {1.0f, 0.1f};
  return {(1.0f + shrink) / 2, ((1.0f - shrink) / (1.0f + shrink) + 0.03f) / 4};
}

template <typename T>
ISSP_DEVICE ThresholdPredictor load_predictor(const TensorView<T>& tensor, const Call<T>& call) {
  const uint32_t* const words = tensor.header + kPredictor;
  const ThresholdPredictor learned = {bit_as<float>(load(words)), bit_as<float>(load(words + 1))};
  return learned.ratio > 0 ? learned : first_guess(float(call.shrink));
}

// A miss costs a search, a candidate a few cycles: four recent errors to both sides.
template <typename T>
ISSP_DEVICE KeyRange<Key<T>> predict_threshold(typename T::Bits previous,
                                               const ThresholdPredictor& predictor,
                                               const Call<T>& call) {
  using Wide = typename T::Wide;
  const Key<T> tau = key<T>(previous);
  if (!call.bracket || tau >= kInfinity<T>) return {0, 0, false};
  const Wide centre = Wide(predictor.ratio) * widen(T{}, typename T::Bits(tau));
  const Wide margin = Wide(1) + 4 * Wide(predictor.error);
  const Key<T> lo = key<T>(narrow(T{}, centre / margin));
  const Key<T> high = key<T>(narrow(T{}, centre * margin));
  const Key<T> hi = high < kInfinity<T> ? high : kInfinity<T> - 1;
  return {lo < hi ? lo : hi, hi, true};
}

// One thread learns from a threshold that was predicted, or should have been.
template <typename T>
ISSP_DEVICE void update_predictor(const TensorView<T>& tensor, const Call<T>& call,
                                  typename T::Bits previous, typename T::Bits tau) {
  if (!call.bracket || key<T>(previous) >= kInfinity<T> || tau >= kInfinity<T>) return;
  const float before = float(widen(T{}, typename T::Bits(key<T>(previous))));
  const float now = float(widen(T{}, tau));
  if (!(before > 0.0f && now > 0.0f)) return;
  const bool first = load(tensor.header + kPredictor) == 0u;
  ThresholdPredictor learned = load_predictor(tensor, call);
  const float ratio = fminf(fmaxf(now / before, 0.25f), 4.0f);
  const float miss = fminf(fabsf(now / (learned.ratio * before) - 1.0f), 1.0f);
  learned.error = fmaxf(fmaxf(miss, first ? 0.0f : 0.9f * learned.error), 2e-4f);
  learned.ratio += (first ? 1.0f : 0.3f) * (ratio - learned.ratio);
  store(tensor.header + kPredictor, bit_as<uint32_t>(learned.ratio));
  store(tensor.header + kPredictor + 1, bit_as<uint32_t>(learned.error));
}

}  // namespace issp
