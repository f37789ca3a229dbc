// The vectorised passes of the fused step and the run-time choice of their instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "../semantics.h"

namespace issp {

constexpr int kBins = 2048;

struct Range {  // of groups of 64 elements
  int64_t begin;
  int64_t end;
};

template <typename T>
struct Census {
  int64_t below;
  int64_t inside;
  int64_t stored;
};

// What the search found. bound: keys below it are shrunk. partial: of the keys equal to bound, the
// first `ties` in flat order are shrunk as well.
template <typename T>
struct Selection {
  Key<T> bound;
  bool partial;
  int64_t ties;
};

template <typename T>
struct Passes {
  using Bits = typename T::Bits;
  Census<T> (*census)(const Bits*, int64_t, Range, Key<T>, Key<T>, Key<T>*, int64_t);
  void (*histogram)(const Bits*, int64_t, Key<T>, Key<T>, int, int64_t*);
  int64_t (*apply)(Bits*, int64_t, Range, uint64_t*, const Selection<T>&, typename T::Wide);
  void (*clear)(Bits*, int64_t, Range, const uint64_t*);
};

// The passes of the instruction set in use. `exact`: the scalar ones, which also follow the rules
// for infinity and NaN.
template <typename T>
const Passes<T>& passes(bool exact = false);

// Name of the instruction set in use: avx512, avx2 or scalar. A non-empty `want` selects one that
// the CPU has; returns the one then in use.
std::string cpu_capability(std::string want);

}  // namespace issp
