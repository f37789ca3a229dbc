// One element at a time: the reference for the vector versions. Used on CPUs without AVX2, for
// float64, and for tensors whose selection reaches infinity or NaN.
#pragma once

#include "update.h"

namespace issp::scalar {

// A cache line of eight 64-bit words.
struct Words {
  uint64_t v[8] = {};

  static Words load(const uint64_t* p) {
    Words words;
    memcpy(words.v, p, sizeof(v));
    return words;
  }
  void set(int64_t i, uint64_t word) { v[i] = word; }
  void store(uint64_t* p) const { memcpy(p, v, sizeof(v)); }
};

template <typename T>
struct Lanes {
  using Bits = typename T::Bits;
  using Wide = typename T::Wide;
  using Vector = Bits;
  using Mask = bool;
  static constexpr int width = 1;

  static uint64_t join(const Mask* m) {
    uint64_t word = 0;
    for (int i = 0; i < 64; ++i) word |= uint64_t(m[i]) << i;
    return word;
  }
  static Vector load(const Bits* p) { return *p; }
  static Mask less(Vector bits, Key<T> bound) { return key<T>(bits) < bound; }
  static Mask up_to(Vector bits, Key<T> bound) { return key<T>(bits) <= bound; }
  static Mask equal(Vector bits, Key<T> bound) { return key<T>(bits) == bound; }
  static Mask tiny(Vector bits, Key<T> bound) { return key<T>(bits) > 0 && key<T>(bits) < bound; }
  static Mask lsb(Vector bits) { return bits & 1; }
  static void compress(Key<T>* out, Vector bits, uint32_t) { *out = key<T>(bits); }
  static void store_shrunk(Bits* p, Vector bits, uint32_t mask, Wide shrink) {
    if (mask) *p = shrunk<T>(bits, shrink);
  }
  // Unlike store_shrunk, a vector version need not flush small products to zero. The caller must
  // not pass `tiny` elements.
  static void store_scaled(Bits* p, Vector bits, uint32_t mask, Wide shrink) {
    store_shrunk(p, bits, mask, shrink);
  }
  static void clear(Bits* p, uint32_t mask) {
    if (mask) *p = 0;
  }
};

// One float with the arithmetic of update.h.
struct Floats {
  float v;
  static constexpr int width = 1;

  Floats(float x) : v(x) {}
  static Floats load(const float* p) { return *p; }
  static Floats load_bfloat16(const uint16_t* p) { return widen(BFloat16{}, *p); }
  void store(float* p) const { *p = v; }
};
inline Floats operator+(Floats a, Floats b) {
  return a.v + b.v;
}
inline Floats operator-(Floats a, Floats b) {
  return a.v - b.v;
}
inline Floats operator-(Floats a) {
  return -a.v;
}
inline Floats fused(Floats a, Floats b, Floats c) {
  return issp::fused(a.v, b.v, c.v);
}
inline Floats times(Floats a, Floats b) {
  return issp::times(a.v, b.v);
}
inline Floats over(Floats a, Floats b) {
  return issp::over(a.v, b.v);
}
inline Floats root(Floats a) {
  return issp::root(a.v);
}
inline Floats flushed(Floats a) {
  return issp::flushed(a.v);
}

}  // namespace issp::scalar
