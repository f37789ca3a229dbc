// Merges the sums of the tiles of a tensor to its row of magnitude_statistics, for host and device.
// triton_kernels/magnitude_statistics.py merges in the same way.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics.h"

namespace issp {

// Sums over the magnitudes of a tile. guess: an estimate of their mean. rest: the sum of their
// deviations from the guess. squares: the squared deviations from the mean of the tile. A mean
// rounded to float64 would be too coarse where the deviations are a millionth of it, hence guess
// and rest.
struct PartialSums {
  double guess, rest, squares;
};

// The guess must be finite, so that infinities and NaNs reach the sums unchanged.
ISSP_RULE double finite_or_zero(double guess) {
  return guess <= 1.7976931348623157e308 ? guess : 0;
}

// The squared deviations of n numbers from their mean, given the sums about a guess.
ISSP_RULE double about_mean(double squares, double rest, double n) {
  const double result = squares - rest * rest / n;
  return result < 0 ? 0 : result;
}

ISSP_RULE double sum_of(const PartialSums& tile, double n) {
  return n * tile.guess + tile.rest;
}

// The mean of a tile relative to the pivot, a number near the means that all tiles of a tensor
// share. Both terms are small where the deviations are small, so there is no cancellation.
ISSP_RULE double from_pivot(const PartialSums& tile, double n, double pivot) {
  return (tile.guess - pivot) + tile.rest / n;
}

// The contribution of a tile to the squared deviations from the mean of the tensor; `mean` is
// relative to the pivot. All terms are positive, so there is no cancellation.
ISSP_RULE double squares_about(const PartialSums& tile, double n, double pivot, double mean) {
  const double distance = from_pivot(tile, n, pivot) - mean;
  return tile.squares + n * distance * distance;
}

struct Statistics {
  double norm, variance, mean, deviation;
};

// squares: squared deviations from the mean. An infinite element makes them NaN, but the norm is
// infinite.
ISSP_RULE Statistics statistics(double mean, double squares, double n) {
  const double variance = squares / (n - 1);
  const bool infinite = mean > 1.7976931348623157e308;
  return {infinite ? mean : sqrt(squares + n * mean * mean), variance, mean, sqrt(variance)};
}

}  // namespace issp
