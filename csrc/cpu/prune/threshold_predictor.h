// Where the new threshold is expected: from the previous one, or from a sample.
#pragma once

#include <cmath>

#include "cpu/prune/candidates.h"

namespace issp {

// What a tensor's last thresholds say of the next, in the scratch buffer; zero before the first.
struct Trend {
  float ratio;   // of one threshold to the one before
  float spread;  // relative error of the last predictions
};

// Right after a shrink the k-th magnitude is exactly shrink * tau; until the next one the weights
// drift back up. So a threshold is the previous one times a ratio from shrink (early in training)
// to 1 (in balance) that hardly moves from step to step. Hard thresholding leaves no such anchor.
template <typename T>
double expected(typename T::Bits previous, double shrink, const Trend& trend) {
  const double ratio = trend.ratio > 0 ? trend.ratio : shrink > 0.5 ? shrink : 1.0;
  return ratio * double(widen(T{}, typename T::Bits(key<T>(previous))));
}

// A miss costs two more passes, a candidate some cycles: the range reaches four recent errors,
// which makes candidates of 0.1 to 1 % of the weights.
template <typename T>
bool foretell(typename T::Bits previous, double shrink, const Trend& trend, KeyRange<T>& range) {
  if (key<T>(previous) >= kInfinity<T>) return false;
  using Wide = typename T::Wide;
  const double centre = expected<T>(previous, shrink, trend);
  const double margin = trend.spread > 0 ? 4 * double(trend.spread) : 0.1;
  range.lo = key<T>(narrow(T{}, Wide(centre / (1 + margin))));
  range.hi = std::min<Key<T>>(key<T>(narrow(T{}, Wide(centre * (1 + margin)))), kInfinity<T> - 1);
  range.lo = std::min(range.lo, range.hi);
  return true;
}

template <typename T>
void learn(Trend& trend, typename T::Bits previous, typename T::Bits tau, double shrink) {
  const double centre = expected<T>(previous, shrink, trend);
  const double before = widen(T{}, typename T::Bits(key<T>(previous)));
  const double now = widen(T{}, tau);
  if (!(centre > 0) || !(now > 0)) return;
  const double ratio = std::min(std::max(now / before, 0.25), 4.0);
  const double old = trend.ratio > 0 ? trend.ratio : ratio;
  const double error = std::min(std::abs(now / centre - 1), 1.0);
  trend.spread = float(std::max({error, 0.9 * double(trend.spread), 2e-4}));
  trend.ratio = float(old + 0.3 * (ratio - old));
}

// From lines of 16 elements, evenly spaced; four standard deviations of the sample's rank to either
// side. keys: room for `room` of them. Not if the candidates would hardly fit there: of a small
// tensor the sample is too coarse, and a search costs little.
template <typename T>
bool sample(const typename T::Bits* w, int64_t numel, int64_t k, Key<T>* keys, int64_t room,
            KeyRange<T>& range) {
  const int64_t lines = std::min<int64_t>({numel / 256, room / 16, 4096});
  if (lines < 4) return false;
  const int64_t count = 16 * lines, stride = numel / lines;
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t i = 0; i < 16; ++i) keys[16 * line + i] = key<T>(w[line * stride + i]);
  }
  const double share = double(k) / double(numel);
  const double slack = 4 * std::sqrt(double(count) * share * (1 - share)) + 2;
  if (2 * slack / double(count) * double(numel) > 0.7 * double(room)) return false;
  const auto low = int64_t(share * double(count) - slack);
  const auto high = int64_t(share * double(count) + slack);
  const Parts<T> parts{{keys, count, count}};
  const KeyRange<T> finite{0, kInfinity<T> - 1};
  range.lo = low < 1 ? 0 : candidate(parts, finite, low);
  range.hi = high > count ? finite.hi : candidate(parts, {range.lo, finite.hi}, high);
  return true;
}

}  // namespace issp
