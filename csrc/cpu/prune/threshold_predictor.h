// A range that should contain the new threshold: from the previous threshold, or from a sample.
#pragma once

#include <cmath>

#include "cpu/prune/candidates.h"

namespace issp {

// Statistics of the last thresholds of a tensor. They are kept in the scratch tensor; all zero
// before the first step.
struct ThresholdPredictor {
  float ratio;  // of one threshold to the one before
  float error;  // relative, of the last predictions
};

// Directly after a step the k-th magnitude is exactly shrink * tau. Until the next step the
// optimizer lets the weights grow again. So the ratio of consecutive thresholds lies between shrink
// (early in training) and 1 (in equilibrium) and changes slowly. For shrink <= 1/2, close to hard
// thresholding, this does not hold: the first prediction is then the previous threshold.
template <typename T>
double predicted_threshold(typename T::Bits previous, double shrink,
                           const ThresholdPredictor& predictor) {
  const double ratio = predictor.ratio > 0 ? predictor.ratio : shrink > 0.5 ? shrink : 1.0;
  return ratio * double(widen(T{}, typename T::Bits(key<T>(previous))));
}

// A miss costs two more passes, a candidate a few cycles. So the range extends four recent errors
// to both sides, which makes 0.1 to 1 % of the weights candidates.
template <typename T>
bool predict_threshold(typename T::Bits previous, double shrink,
                       const ThresholdPredictor& predictor, KeyRange<T>& range) {
  if (key<T>(previous) >= kInfinity<T>) return false;
  using Wide = typename T::Wide;
  const double centre = predicted_threshold<T>(previous, shrink, predictor);
  const double margin = predictor.error > 0 ? 4 * double(predictor.error) : 0.1;
  range.lo = key<T>(narrow(T{}, Wide(centre / (1 + margin))));
  range.hi = std::min<Key<T>>(key<T>(narrow(T{}, Wide(centre * (1 + margin)))), kInfinity<T> - 1);
  range.lo = std::min(range.lo, range.hi);
  return true;
}

template <typename T>
void update_predictor(ThresholdPredictor& predictor, typename T::Bits previous,
                      typename T::Bits tau, double shrink) {
  const double centre = predicted_threshold<T>(previous, shrink, predictor);
  const double before = widen(T{}, typename T::Bits(key<T>(previous)));
  const double now = widen(T{}, tau);
  if (!(centre > 0) || !(now > 0)) return;
  const double ratio = std::min(std::max(now / before, 0.25), 4.0);
  const double old = predictor.ratio > 0 ? predictor.ratio : ratio;
  const double miss = std::min(std::abs(now / centre - 1), 1.0);
  predictor.error = float(std::max({miss, 0.9 * double(predictor.error), 2e-4}));
  predictor.ratio = float(old + 0.3 * (ratio - old));
}

// Predicts the range from a sample: evenly spaced cache lines of 16 elements. The range extends
// four standard deviations of the sample rank to both sides. `keys` has space for `capacity` keys.
// Returns false if the candidates would hardly fit into `keys`: the sample of a small tensor is too
// coarse, and a search of a small tensor is cheap.
template <typename T>
bool sample(const typename T::Bits* w, int64_t numel, int64_t k, Key<T>* keys, int64_t capacity,
            KeyRange<T>& range) {
  const int64_t lines = std::min<int64_t>({numel / 256, capacity / 16, 4096});
  if (lines < 4) return false;
  const int64_t count = 16 * lines, stride = numel / lines;
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < 16; ++i) keys[16 * line + i] = key<T>(w[line * stride + i]);
  }
  const double fraction = double(k) / double(numel);
  const double slack = 4 * std::sqrt(double(count) * fraction * (1 - fraction)) + 2;
  if (2 * slack / double(count) * double(numel) > 0.7 * double(capacity)) return false;
  const auto low = int64_t(fraction * double(count) - slack);
  const auto high = int64_t(fraction * double(count) + slack);
  const CandidateLists<T> lists{{keys, count, count}};
  const KeyRange<T> finite{0, kInfinity<T> - 1};
  range.lo = low < 1 ? 0 : kth_candidate(lists, finite, low);
  range.hi = high > count ? finite.hi : kth_candidate(lists, {range.lo, finite.hi}, high);
  return true;
}

}  // namespace issp
