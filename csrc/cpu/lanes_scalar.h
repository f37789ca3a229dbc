// One element at a time: the readable form of the lanes, and the path of CPUs without AVX2, of
// float64, and of tensors whose selection reaches infinity or NaN.
#pragma once

#include "../semantics.h"

namespace issp::scalar {

template <typename T>
struct Lanes {
  using Bits = typename T::Bits;
  using Wide = typename T::Wide;
  using Vector = Bits;
  static constexpr int width = 1;

  static Vector load(const Bits* p) { return *p; }
  static uint32_t less(Vector bits, Key<T> bound) { return key<T>(bits) < bound; }
  static uint32_t above(Vector bits, Key<T> bound) { return key<T>(bits) > bound; }
  static uint32_t equal(Vector bits, Key<T> bound) { return key<T>(bits) == bound; }
  static void compress(Key<T>* out, Vector bits, uint32_t) { *out = key<T>(bits); }
  static void store_shrunk(Bits* p, Vector bits, uint32_t mask, Wide shrink) {
    if (mask) *p = shrunk<T>(bits, shrink);
  }
  static void clear(Bits* p, uint32_t mask) {
    if (mask) *p = 0;
  }
};

}  // namespace issp::scalar
