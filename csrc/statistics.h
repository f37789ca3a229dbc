// Merges the sums of the tiles of a tensor to its row of magnitude_statistics, for host and device.
// triton_kernels/magnitude_statistics.py merges in the same way.
#pragma once

#include <cmath>
#include <cstdint>

#include "semantics.h"

namespace issp {

// Sums over the magnitudes of a tile, all multiplied by `scale`, a power of two. guess: an estimate
// of their mean. rest: the sum of their deviations from the guess. squares: the squared deviations
// from the mean of the tile. A mean rounded to float64 would be too coarse where the deviations are
// a millionth of it, hence guess and rest.
struct PartialSums {
  double guess, rest, squares, scale;
};

// The scale of a tile whose largest magnitude is given (the bits of a NaN: any). The squares of the
// largest and of the smallest float64 would leave its range; those of the other dtypes do not.
ISSP_RULE double scale_for(Float64, uint64_t largest) {
  const double magnitude = bit_as<double>(largest);
  return magnitude > 0x1p400 ? 0x1p-700 : magnitude < 0x1p-400 ? 0x1p700 : 1;
}
template <typename T>
ISSP_RULE double scale_for(T, uint32_t) {
  return 1;
}

// The same sums with the scale of the whole tensor: the smallest of its tiles. What becomes zero
// would not change a digit beside the tile that has this scale.
ISSP_RULE PartialSums rescaled(const PartialSums& tile, double scale) {
  const double by = scale / tile.scale;
  return {tile.guess * by, tile.rest * by, tile.squares * by * by, scale};
}

// The guess is the first magnitude and the mean distance of others from it: exact where all are
// equal. It must be finite, so that infinities and NaNs reach the sums unchanged.
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

// mean and squares, the squared deviations from it, have the scale of the tensor. An infinite
// element makes the squares NaN, but the norm is infinite.
ISSP_RULE Statistics statistics(double mean, double squares, double n, double scale) {
  const double variance = squares / (n - 1), unit = 1 / scale;
  const bool infinite = mean > 1.7976931348623157e308;
  return {(infinite ? mean : sqrt(squares + n * mean * mean)) * unit, variance * unit * unit,
          mean * unit, sqrt(variance) * unit};
}

}  // namespace issp
