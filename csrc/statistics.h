// From the sums of a tensor's parts to its row of magnitude_statistics, for the host and for the
// device.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics.h"

namespace issp {

// What a part with this sum and these squared deviations from its own mean adds to the squared
// deviations from `mean`: both terms are positive, so nothing cancels however large the mean is.
ISSP_RULE double deviations(double sum, double squares, int64_t numel, double mean) {
  const double apart = sum / double(numel) - mean;
  return squares + double(numel) * apart * apart;
}

struct Statistics {
  double norm, variance, mean, deviation;
};

// sum: of the magnitudes; squares: of their deviations from the mean. An infinite element makes
// the deviations NaN, but the norm is infinite.
ISSP_RULE Statistics statistics(double sum, double squares, int64_t numel) {
  const double mean = sum / double(numel);
  const double variance = squares / double(numel - 1);
  const bool infinite = sum > 1.7976931348623157e308;
  return {infinite ? sum : sqrt(squares + mean * sum), variance, mean, sqrt(variance)};
}

}  // namespace issp
