// What the sparse products share: how a block of threads shares its work, how it walks along the
// positions of the weight, storage types.
//
// A block owns 256 pixels (or tokens) and up to 64 rows of the result: the inputs that its pixels
// see lie in shared memory, a chunk of channels at a time, float32 whatever the storage. A warp
// owns strips of the rows, V rows each that share their positions, and a thread 8 pixels of its
// warp's rows: 64 sums in registers.
//
// Work of a warp per position: 8 words of shared memory, 1 + V shuffles, which take the same unit
// of an SM (a warp's 32 words per cycle), and 8 V multiplications (4 warps' per cycle). So v = 1
// may reach 2 / 10 of the float32 peak, v = 4 8 / 13, v = 8 16 / 17. Its addresses are four
// additions and constants. More pixels per thread would shave the shuffles (v = 1: 9 words per 8
// products instead of 10) and stage every channel for fewer rows: at 99 % that costs more than it
// brings.
//
// Traffic per weight: 4 (1 + V) / V bytes per 256 multiplications, from L2. The inputs are read
// from L2 once for every 64 rows, by asynchronous copies.
//
// Occupancy: two blocks of 256 threads at 128 registers; while one waits for its inputs, the other
// multiplies. Half of an SM's shared memory is a block's: 66 channels of a 3x3 tile on sm_90, so
// that one or a few chunks hold all channels.
//
// Every sum is taken by one thread in the order of its list, in runs of kRun entries whose sums are
// added up: one chain of 2304 additions has several times the error of a dense product, which
// blocks its sums. Where runs end depends on the list alone, not on tiles, chunks or the device,
// and so do the bits. 64 sums leave no registers for 64 totals, so these wait where the results
// will be: 8 V words written and read back per thread and run, against kRun (8 + 1 + V) words of
// shared memory, and nothing at all for rows of one run. Sums of 16-bit types, which their rounding
// to storage would hide, are one run.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "update.h"  // fused

namespace issp {

constexpr uint32_t kProductWarps = 8, kProductThreads = 32 * kProductWarps;
constexpr uint32_t kWarpRows = 8;  // rows of the result that a warp may own
// Entries of a run. For rows of 2304 to 9216 entries 128 is best: shorter runs make more totals,
// whose sum is a chain again.
constexpr uint32_t kRun = 128;

#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kPixelWords = 2;
#else
constexpr uint32_t kPixelWords = 8;
#endif
// Pixels of a thread; float64, which few GPUs are fast at, takes two registers each.
template <typename Wide>
constexpr uint32_t kPixels = sizeof(Wide) == 8 ? 2 : kPixelWords;
template <typename Wide>
constexpr uint32_t kTilePixels = 32 * kPixels<Wide>;

enum class Storage : uint32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };
enum class Finish : uint32_t { kNone, kRelu, kGelu };

// What happens to a sum, and where it goes; bias and residual may be null.
struct Ends {
  const void *bias, *residual;
  void* result;
  Finish finish;
};

// Calls body(T{}) for the storage type; sums in float64 are of float64 alone.
template <typename Wide, typename Body>
ISSP_DEVICE void with_storage(Storage storage, const Body& body) {
  if constexpr (sizeof(Wide) == 8) {
    body(Float64{});
  } else if (storage == Storage::kFloat32) {
    body(Float32{});
  } else if (storage == Storage::kFloat16) {
    body(Float16{});
  } else {
    body(BFloat16{});
  }
}

template <typename T>
ISSP_DEVICE typename T::Wide load_wide(const void* data, uint64_t i) {
  return widen(T{}, load(static_cast<const typename T::Bits*>(data) + i));
}

// narrow() for any value: NaN stays NaN, what is too large for float16 becomes infinite.
template <typename T>
ISSP_DEVICE typename T::Bits rounded(typename T::Wide value) {
  if constexpr (sizeof(typename T::Bits) == 2) {
    if (value != value) return Limits<T>::magnitude;
    if (kInfinity<T> == kInfinity<Float16> && (value >= 65520.0f || value <= -65520.0f)) {
      return typename T::Bits(kInfinity<T> | (value < 0 ? Limits<T>::sign : 0));
    }
  }
  return narrow(T{}, value);
}

template <typename Wide>
ISSP_DEVICE Wide activated(Wide value, Finish finish) {
  if (finish == Finish::kRelu) return value < Wide(0) ? Wide(0) : value;
  if (finish == Finish::kNone) return value;
  return Wide(0.5) * value * (Wide(1) + error_function(value * Wide(0.70710678118654752440)));
}

// Shared memory as floats or doubles.
template <typename Wide>
struct Staged {
  Shared words;
  ISSP_DEVICE Wide get(uint32_t i) const {
    if constexpr (sizeof(Wide) == 4) {
      return bit_as<float>(words.get(i));
    } else {
      return bit_as<double>(words.get(2 * i) | uint64_t(words.get(2 * i + 1)) << 32);
    }
  }
  ISSP_DEVICE void set(uint32_t i, Wide value) const {
    if constexpr (sizeof(Wide) == 4) {
      words.set(i, bit_as<uint32_t>(value));
    } else {
      const uint64_t bits = bit_as<uint64_t>(value);
      words.set(2 * i, uint32_t(bits));
      words.set(2 * i + 1, uint32_t(bits >> 32));
    }
  }
  ISSP_DEVICE Staged from(uint32_t i) const { return {words.from(i * uint32_t(sizeof(Wide) / 4))}; }
};

// What a thread holds in registers: for its pixels in each row of its strips a sum, or a gradient.
template <typename Wide, int V>
using Held = Wide[kWarpRows / V][V][kPixels<Wide>];

// Calls body(held[strip]): the strip is known at run time, registers when compiled.
template <typename Wide, int V, typename Body>
ISSP_DEVICE void with_strip(Held<Wide, V>& held, uint32_t strip, const Body& body) {
#pragma unroll
  for (uint32_t s = 0; s < kWarpRows / V; ++s) {
    if (s == strip) body(held[s]);
  }
}

// Pixel j + 2 of a row becomes pixel j; the first two go to the end, if they are kept.
template <typename Wide, bool kKept>
ISSP_DEVICE void move_up(Wide (&row)[kPixels<Wide>]) {
  const Wide pair[2] = {row[0], row[1]};
#pragma unroll
  for (uint32_t k = 2; k < kPixels<Wide>; ++k) row[k - 2] = row[k];
  if (kKept) row[kPixels<Wide> - 2] = pair[0], row[kPixels<Wide> - 1] = pair[1];
}

// Calls body(j) while pixels j and j + 1 are held[..][..][0] and [1]. Registers cannot be counted
// through, and 64 copies of what happens to a value in each dtype would neither stay in the
// instruction cache nor do with 128 registers.
template <typename Wide, int V, bool kKept, typename Body>
ISSP_DEVICE void each_pair(Held<Wide, V>& held, const Body& body) {
#pragma unroll 1
  for (uint32_t j = 0; j < kPixels<Wide>; j += 2) {
    body(j);
#pragma unroll
    for (uint32_t i = 0; i < kWarpRows; ++i) move_up<Wide, kKept>(held[i / V][i % V]);
  }
}

// Element k of x[from + k * stride] to to[k * step], or zeros: there for this thread after
// wait_for_copies. float32 is copied without a register in between, so that all of a chunk is on
// its way at once; what must be widened is loaded eight at a time.
template <typename T>
ISSP_DEVICE void fetch_run(Staged<typename T::Wide> to, uint32_t step, const void* x, uint64_t from,
                           uint64_t stride, uint32_t count, bool there) {
  if constexpr (std::is_same_v<T, Float32>) {
    const uint32_t* at = static_cast<const uint32_t*>(x) + (there ? from : 0);
#pragma unroll 4
    for (uint32_t k = 0; k < count; ++k) {
      copy_word_async(to.words.from(k * step), at, there);
      if (there) at += stride;
    }
  } else {
    using Wide = typename T::Wide;
    for (uint32_t first = 0; first < count; first += 8) {
      Wide values[8];
#pragma unroll
      for (uint32_t k = 0; k < 8; ++k) {
        const bool one = there && first + k < count;
        values[k] = one ? load_wide<T>(x, from + (first + k) * stride) : Wide(0);
      }
#pragma unroll
      for (uint32_t k = 0; k < 8; ++k) {
        if (first + k < count) to.set((first + k) * step, values[k]);
      }
    }
  }
}

template <typename T>
ISSP_DEVICE void fetch(Staged<typename T::Wide> to, const void* x, uint64_t from, bool there) {
  if constexpr (std::is_same_v<T, Float32>) {
    const uint32_t* const at = static_cast<const uint32_t*>(x) + (there ? from : 0);
    copy_word_async(to.words, at, there);
  } else {
    to.set(0, there ? load_wide<T>(x, from) : typename T::Wide(0));
  }
}

ISSP_DEVICE float shuffle_wide(float value, uint32_t from) {
  return bit_as<float>(shuffle(bit_as<uint32_t>(value), from));
}
ISSP_DEVICE double shuffle_wide(double value, uint32_t from) {
  const uint64_t bits = bit_as<uint64_t>(value);
  const uint32_t low = shuffle(uint32_t(bits), from);
  return bit_as<double>(low | uint64_t(shuffle(uint32_t(bits >> 32), from)) << 32);
}

// The weight's positions, as issp/ops/schemas/sparse.py has them.
struct Lists {
  const int32_t *columns, *starts;
  uint32_t entries, v, rows, length;
};

// Who has which rows: `groups` blocks of `warps` warps, each warp with `each` strips.
struct Team {
  uint32_t warps, each, groups, strips;
  ISSP_RULE uint32_t threads() const { return 32 * warps; }
};

// Strip i of this warp: neighbouring warps have neighbouring strips, so few rows keep all busy.
ISSP_DEVICE uint32_t strip_number(const Team& team, uint32_t group, uint32_t i) {
  return (group * team.each + i) * team.warps + warp();
}

// The entries of a strip.
struct Strip {
  uint32_t begin = 0, end = 0;
};

ISSP_DEVICE uint32_t at_most(uint32_t x, uint32_t most) {
  return x < most ? x : most;
}

// Where a strip begins within the rows of its block of the weight.
template <int V>
ISSP_DEVICE uint32_t strip_offset(const Lists& lists, const Team& team, uint32_t group,
                                  uint32_t i) {
  return lists.v == V ? 0 : strip_number(team, group, i) * V % lists.v;
}

// Nothing for numbers behind the last. Starts that are no positions are cut off, and those that
// descend are nothing: a GPU's lists are not checked by the host.
template <int V>
ISSP_DEVICE Strip find_strip(const Lists& lists, const Team& team, uint32_t group, uint32_t i) {
  const uint32_t number = strip_number(team, group, i);
  if (i >= team.each || number >= team.strips) return {};
  const int32_t* const owner = lists.starts + number * V / lists.v;
  const uint32_t end = at_most(uint32_t(load(owner + 1)), lists.entries);
  return {at_most(uint32_t(load(owner)), end), end};
}

// Columns that the staged part of the input holds.
struct Columns {
  uint32_t begin, end;
};

// Up to 32 entries whose columns are staged, one per lane; lanes behind `count` have a staged
// column as well, and no entry.
struct Batch {
  uint32_t entry, column, count;
};

ISSP_DEVICE uint32_t lowest_bit(uint32_t x) {
  return popcount((x & (0u - x)) - 1u);
}

// Calls body(batch, what the lane loads of its entry) until the list ends or reaches a column
// behind the staged ones, and moves `at` there. Columns outside the weight are passed over.
// load_entry(entry, whether there is one) is on its way beside the column: both come from L2, one
// wait is enough.
template <typename Load, typename Body>
ISSP_DEVICE void each_batch(const Lists& lists, Columns staged, uint32_t& at, uint32_t end,
                            const Load& load_entry, const Body& body) {
  uint32_t passed = 32;
  while (passed == 32) {
    Batch batch = {at + lane(), staged.begin, 0};
    const bool listed = batch.entry < end;
    const uint32_t column = listed ? uint32_t(load(lists.columns + batch.entry)) : 0u;
    auto loaded = load_entry(batch.entry, listed);
    const uint32_t waiting = ballot(!listed || (column >= staged.end && column < lists.length));
    passed = waiting ? lowest_bit(waiting) : 32;
    const bool mine = lane() < passed && column >= staged.begin && column < staged.end;
    if (mine) batch.column = column;
    uint32_t taken = ballot(mine);
    batch.count = popcount(taken);
    if (taken & (taken + 1)) {  // columns outside the weight: the lanes close up
      for (uint32_t i = 0; i < lane(); ++i) taken &= taken - 1;
      const uint32_t from = lowest_bit(taken) & 31u;
      batch.entry = shuffle(batch.entry, from);
      batch.column = shuffle(batch.column, from);
      if (lane() >= batch.count) batch.column = staged.begin;
      loaded = load_entry(batch.entry, lane() < batch.count);
    }
    at += passed;
    if (batch.count) body(batch, loaded);
  }
}

inline uint32_t parts_of_size(uint64_t all, uint64_t size) {
  return uint32_t((all + size - 1) / size);
}

// Units per chunk, at least one and at most `room`, in chunks of like size.
inline uint32_t even_chunk(uint64_t units, uint64_t room) {
  return units ? parts_of_size(units, parts_of_size(units, room)) : 1;
}

}  // namespace issp
