// The vectorised passes of the fused step and the run-time choice of their instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/nm/shape.h"
#include "semantics.h"
#include "update.h"

namespace issp {

constexpr int kBins = 2048;
constexpr int64_t kLineGroups = 8;  // a line of the mask: 8 groups of 64 elements

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
struct KeyRange {
  Key<T> lo;
  Key<T> hi;
};

// What a speculative pass over a range of groups leaves behind; see speculate.inc.h.
struct Ledger {
  uint64_t* mask;   // a word per group: the mask before the pass
  uint64_t* odd;    // a word per group: the lowest bit of every weight before the pass
  int32_t* groups;  // groups to settle: those with candidates from the front, postponed ones from
  int64_t room;     //   the back; room for all
};

struct Sight {
  int64_t below;      // keys below the range
  int64_t inside;     // keys in it: the candidates
  int64_t listed;     // groups with candidates
  int64_t postponed;  // groups in which nothing has been shrunk yet
  int64_t stored;     // candidates whose keys were gathered; none of a range of one key
  int64_t flips;      // mask bits that changed; candidates keep theirs until they are settled
};

// Adam's or SGD's update of one tensor, whose weights are passed on their own.
struct TensorUpdate {
  enum Rule { kAdam, kSgd } rule = kAdam;
  const void* grad = nullptr;
  bool bfloat16 = false;    // the gradient's type
  float* first = nullptr;   // Adam's m, SGD's buffer (null without momentum)
  float* second = nullptr;  // Adam's v
  bool fresh = false;       // SGD: the buffer holds nothing yet
  Gradient gradient{};
  AdamStep adam{};
  SgdStep sgd{};
};

template <typename T>
struct Passes {
  using Bits = typename T::Bits;
  Sight (*speculate)(Bits*, int64_t, Range, const TensorUpdate*, KeyRange<T>, Key<T>,
                     typename T::Wide, const Ledger&, Key<T>*, int64_t, uint64_t*);
  void (*restore)(Bits*, int64_t, Range, Key<T>, typename T::Wide, const Ledger&, const Sight&,
                  uint64_t*);
  int64_t (*settle)(Bits*, int64_t, KeyRange<T>, const Selection<T>&, typename T::Wide,
                    const Ledger&, const Sight&, uint64_t*);
  int64_t (*count_less)(const Key<T>*, int64_t, Key<T>);
  Census<T> (*census)(const Bits*, int64_t, Range, Key<T>, Key<T>, Key<T>*, int64_t);
  void (*histogram)(const Bits*, int64_t, Key<T>, Key<T>, int, int64_t*);
  int64_t (*apply)(Bits*, int64_t, Range, uint64_t*, const Selection<T>&, typename T::Wide);
  void (*clear)(Bits*, int64_t, Range, const uint64_t*);
  int64_t (*shrink_groups)(Bits*, int64_t, const NmShape&, Range, const TensorUpdate*,
                           typename T::Wide, const NmDesk<T>&, uint64_t*, Key<T>*);
};

// The optimizer's update without a selection: of weights that are not pruned, and (mask given) of
// those whose mask is fixed, where weights and moments become +0.
struct UpdatePasses {
  void (*update)(float*, int64_t, Range, const TensorUpdate&, const uint64_t* mask);
};

const UpdatePasses& update_passes();

// The passes of the instruction set in use. `exact`: the scalar ones, which also follow the rules
// for infinity and NaN.
template <typename T>
const Passes<T>& passes(bool exact = false);

// Name of the instruction set in use: avx512, avx2 or scalar. A non-empty `want` selects one that
// the CPU has; returns the one then in use.
std::string cpu_capability(std::string want);

}  // namespace issp
