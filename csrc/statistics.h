// From the sums of a tensor's parts to its row of magnitude_statistics, for the host and for the
// device. The same merge stands in triton_kernels/magnitude_statistics.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics.h"

namespace issp {

// Magnitudes of a part of a tensor: a guess of their mean, the sum of their deviations from it, and
// the squared deviations from the part's own mean. Three numbers, since a mean rounded to float64
// is too coarse where the deviations are a millionth of it.
struct PartialSums {
  double guess, rest, squares;
};

// A guess must be finite: infinities and NaNs go through to the sums as they are.
ISSP_RULE double finite_or_zero(double guess) {
  return guess <= 1.7976931348623157e308 ? guess : 0;
}

// The squared deviations of n numbers from their mean, from the sums about a guess of it.
ISSP_RULE double about_mean(double squares, double rest, double n) {
  const double result = squares - rest * rest / n;
  return result < 0 ? 0 : result;
}

ISSP_RULE double sum_of(const PartialSums& part, double n) {
  return n * part.guess + part.rest;
}

// Where a part's mean lies, seen from the pivot that all parts of a tensor share: any number near
// them. Both terms are small where the deviations are, so nothing is lost.
ISSP_RULE double from_pivot(const PartialSums& part, double n, double pivot) {
  return (part.guess - pivot) + part.rest / n;
}

// What a part adds to the squared deviations from the tensor's mean, itself seen from the pivot.
// All terms are positive: nothing cancels.
ISSP_RULE double squares_about(const PartialSums& part, double n, double pivot, double mean) {
  const double apart = from_pivot(part, n, pivot) - mean;
  return part.squares + n * apart * apart;
}

struct Statistics {
  double norm, variance, mean, deviation;
};

// squares: deviations from the mean. An infinite element makes them NaN, but the norm is infinite.
ISSP_RULE Statistics statistics(double mean, double squares, double n) {
  const double variance = squares / (n - 1);
  const bool infinite = mean > 1.7976931348623157e308;
  return {infinite ? mean : sqrt(squares + n * mean * mean), variance, mean, sqrt(variance)};
}

}  // namespace issp
