// The vectorized kernels of pruning, and the table of the kernels that the CPU supports.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/nm/shape.h"
#include "semantics.h"
#include "update.h"

namespace issp {

constexpr int kBins = 2048;
// A block is 64 elements: one 64-bit word of the packed mask. A cache line holds 8 such words.
constexpr int64_t kLineBlocks = 8;

struct Range {  // of blocks
  int64_t begin;
  int64_t end;
};

template <typename T>
struct RangeCount {
  int64_t below;   // keys below the range
  int64_t inside;  // keys in the range
  int64_t stored;  // keys in the range that were copied
};

// The elements to shrink: every key below `bound` and, if `partial` is set, the first `ties` keys
// equal to `bound` in flat order.
template <typename T>
struct Threshold {
  Key<T> bound;
  bool partial;
  int64_t ties;
};

template <typename T>
struct KeyRange {
  Key<T> lo;
  Key<T> hi;
};

// What a speculative pass over a range of blocks needs to be undone or completed; see
// speculate.inc.h.
struct UndoLog {
  uint64_t* mask;    // a word per block: the mask before the pass
  uint64_t* lsb;     // a word per block: the lowest bit of every weight before the pass
  int32_t* blocks;   // those with candidates from the front, the postponed ones from the back
  int64_t capacity;  // of `blocks`: all blocks of the range
};

struct SpeculationStats {
  int64_t below;      // keys below the range
  int64_t inside;     // keys in the range: the candidates
  int64_t listed;     // blocks with candidates
  int64_t postponed;  // blocks in which nothing has been shrunk yet
  int64_t stored;     // gathered candidate keys; 0 if the range is a single key
  int64_t flips;      // mask bits that changed; those of candidates change when they are resolved
};

// The update of one tensor by Adam or SGD. The weights are a separate argument.
struct TensorUpdate {
  enum Rule { kAdam, kSgd } rule = kAdam;
  const void* grad = nullptr;
  bool bfloat16 = false;    // the gradient's dtype; float32 otherwise
  float* first = nullptr;   // Adam: exp_avg; SGD: momentum buffer, null without momentum
  float* second = nullptr;  // Adam: exp_avg_sq
  bool first_step = false;  // SGD: the buffer is not initialized yet
  Gradient gradient{};
  AdamStep adam{};
  SgdStep sgd{};
};

template <typename T>
struct PruneKernels {
  using Bits = typename T::Bits;
  using Wide = typename T::Wide;
  SpeculationStats (*speculate)(Bits* w, int64_t numel, Range blocks, const TensorUpdate* update,
                                KeyRange<T> range, Key<T> flushed_below, Wide shrink,
                                const UndoLog& log, Key<T>* keys, int64_t capacity, uint64_t* mask);
  void (*restore)(Bits* w, int64_t numel, Range blocks, Key<T> lo, Wide shrink, const UndoLog& log,
                  const SpeculationStats& stats, uint64_t* mask);
  int64_t (*resolve_candidates)(Bits* w, int64_t numel, KeyRange<T> range,
                                const Threshold<T>& threshold, Wide shrink, const UndoLog& log,
                                const SpeculationStats& stats, uint64_t* mask);
  int64_t (*count_less)(const Key<T>* keys, int64_t count, Key<T> bound);
  RangeCount<T> (*count_range)(const Bits* w, int64_t numel, Range blocks, Key<T> lo, Key<T> hi,
                               Key<T>* out, int64_t capacity);
  void (*histogram)(const Bits* w, int64_t numel, Key<T> lo, Key<T> hi, int shift, int64_t* bins);
  int64_t (*apply)(Bits* w, int64_t numel, Range blocks, uint64_t* mask,
                   const Threshold<T>& threshold, Wide shrink);
  void (*clear)(Bits* w, int64_t numel, Range blocks, const uint64_t* mask);
  int64_t (*nm_shrink)(Bits* w, int64_t numel, const NmShape& by, Range work_units,
                       const TensorUpdate* update, Wide shrink, const NmScratch<T>& scratch,
                       uint64_t* mask, Key<T>* largest);
  void (*unit_scores)(Bits* w, int64_t numel, const NmShape& by, Range work_units,
                      const TensorUpdate* update, const NmScratch<T>& scratch, Key<T>* scores);
  int64_t (*shrink_units)(Bits* w, int64_t numel, const NmShape& by, Range work_units,
                          const uint64_t* dropped, Wide shrink, bool exact,
                          const NmScratch<T>& scratch, uint64_t* mask, Key<T>* largest);
};

// The optimizer update without a selection. With a mask (a fixed one), the pruned weights and their
// moments become +0.
struct UpdateKernels {
  void (*update)(float* w, int64_t numel, Range blocks, const TensorUpdate& update,
                 const uint64_t* mask);
};

const UpdateKernels& update_kernels();

// The kernels of the instruction set in use. `exact` returns the scalar kernels, which also follow
// the rules for infinity and NaN.
template <typename T>
const PruneKernels<T>& prune_kernels(bool exact = false);

// Returns the name of the instruction set in use: avx512, avx2 or scalar. A non-empty `want` first
// selects a set that the CPU supports.
std::string cpu_capability(std::string want);

}  // namespace issp
