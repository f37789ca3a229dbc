// An optimizer's update in front of the selection: what adam_soft_shrink_ and sgd_soft_shrink_
// share.
//
// Traffic per float32 weight with a float32 gradient: Adam 16 bytes read and 12 written, SGD with
// momentum 12 and 8. Pruning adds what it adds to the step alone: mask and undo log.
#pragma once

#include "soft_shrink.cuh"
#include "update.h"

namespace issp {

constexpr uint32_t kBFloat16Gradient = 1u << 30, kFirstStep = 1u << 29;  // in Entry::extra

// The learning rate: a number, or a tensor's element of any float dtype.
struct Rate {
  double lr;
  const void* tensor;  // null: none
  uint32_t dtype;      // 0 float32, 1 float16, 2 bfloat16, 3 float64
};

ISSP_DEVICE double load_rate(const Rate& rate) {
  if (rate.tensor == nullptr) return rate.lr;
  const auto bits16 = static_cast<const uint16_t*>(rate.tensor);
  switch (rate.dtype) {
    case 0: return widen(Float32{}, load(static_cast<const uint32_t*>(rate.tensor)));
    case 1: return widen(Float16{}, load(bits16));
    case 2: return widen(BFloat16{}, load(bits16));
    default: return widen(Float64{}, load(static_cast<const uint64_t*>(rate.tensor)));
  }
}

// Rule offers Entry, Step, kMoments, and
//   step(entry, lr)                     the numbers of this step, by one thread
//   moment(entry, j)                    where moment j lies; null where there is none
//   reads_moments(entry)                whether they mean anything yet
//   updated(w, g, moments, entry, by)   the new weight; moments in place
//   finish(entry)                       see prologue.cuh
template <typename Rule>
struct Optimizer {
  using Entry = typename Rule::Entry;
  static constexpr bool kUpdates = true;
  static constexpr uint32_t kBatch = Rule::kMoments == 2 ? 2 : 4;  // of update_strided

  Rule rule;
  Rate rate;
  const float* scale;  // null: gradients are not scaled
  uint32_t maximize, frozen;

  struct Numbers {
    typename Rule::Step step;
    float divisor;  // of the gradient: its scale, negative to maximize; the same as update.h's
  };
  static_assert(sizeof(Numbers) % 4 == 0 && sizeof(Numbers) <= 4 * kStepWords, "in kStepArea");

  ISSP_DEVICE bool selects(const Entry& entry) const {
    return !frozen && !(entry.extra & kUpdateOnly);
  }
  ISSP_DEVICE bool freezes(const Entry& entry) const {
    return frozen && !(entry.extra & kUpdateOnly);
  }
  ISSP_DEVICE void finish(const Entry& entry) const { rule.finish(entry); }

  // One thread computes, since float64 is slow on most GPUs. Nobody reads the old numbers any more.
  ISSP_DEVICE void prepare(const Entry& entry, Shared shared) const {
    if (thread() == 0) {
      Numbers numbers = {};
      numbers.step = rule.step(entry, load_rate(rate));
      const float divisor = scale ? load(scale) : 1.0f;
      numbers.divisor = maximize ? -divisor : divisor;
      share(shared.from(kStepArea), numbers);
    }
  }

  ISSP_DEVICE bool is_aligned(const Entry& entry) const {
    uintptr_t all = reinterpret_cast<uintptr_t>(entry.grad);
#pragma unroll
    for (uint32_t j = 0; j < Rule::kMoments; ++j) {
      all |= reinterpret_cast<uintptr_t>(rule.moment(entry, j));
    }
    return all % 16 == 0;
  }

  // Returns the updated weights of elements i..i + 3. What the mask denies becomes zero; null, or
  // kMasked not set: nothing does.
  template <bool kMasked>
  ISSP_DEVICE Vector<uint32_t, 4> update_vector(const Entry& entry, const uint32_t* mask,
                                                uint32_t i, Vector<uint32_t, 4> weights,
                                                Shared shared) const {
    const uint32_t kept = kMasked && mask ? load(mask + i / 32) >> i % 32 : ~0u;
    const bool reads_moments = rule.reads_moments(entry);
    Vector<uint32_t, 4> moments[kMoments] = {};
#pragma unroll
    for (uint32_t j = 0; j < kMoments; ++j) {
      if (reads_moments) moments[j] = load_vector<4>(moment(entry, j) + i);
    }
    float gradients[4];
    load_gradients(entry, i, gradients);
    update(entry, weights.x, gradients, moments, shared);
#pragma unroll
    for (uint32_t e = 0; e < 4; ++e) {
      if (!kMasked || (kept >> e & 1u)) continue;
      weights.x[e] = 0;
#pragma unroll
      for (uint32_t j = 0; j < kMoments; ++j) moments[j].x[e] = 0;
    }
#pragma unroll
    for (uint32_t j = 0; j < kMoments; ++j) {
      if (moment(entry, j)) store_vector(moment(entry, j) + i, moments[j]);
    }
    return weights;
  }

  // Updates elements first..first + count in memory, as far as there are so many; mask as above.
  ISSP_DEVICE void update_span(const Entry& entry, const uint32_t* mask, uint32_t first,
                               uint32_t count, Shared shared) const {
    uint32_t* const weights = static_cast<uint32_t*>(entry.data);
    const uint32_t left = entry.numel - first, end = first + (left < count ? left : count);
#pragma unroll 1
    for (uint32_t i = first + thread(); i < end; i += threads()) {
      const bool kept = mask == nullptr || (load(mask + i / 32) >> i % 32 & 1u);
      const auto sink = [&](uint32_t, uint32_t bits) { store(weights + i, kept ? bits : 0u); };
      update_strided<Float32, 1>(entry, weights, i, 0, 1, sink, shared);
#pragma unroll
      for (uint32_t j = 0; j < kMoments; ++j) {
        if (!kept && moment(entry, j)) store(moment(entry, j) + i, 0u);
      }
    }
  }

  template <typename T, uint32_t kCount = kBatch, typename Sink>
  ISSP_DEVICE void update_strided(const Entry& entry, const uint32_t* weights, uint32_t first,
                                  uint32_t stride, uint32_t count, const Sink& sink,
                                  Shared shared) const {
    const bool reads_moments = rule.reads_moments(entry);
    uint32_t bits[kCount];
    float gradients[kCount];
    Vector<uint32_t, kCount> moments[kMoments];
#pragma unroll
    for (uint32_t e = 0; e < kCount; ++e) {
      const bool inside = e < count;
      bits[e] = inside ? load(weights + first + stride * e) : 0u;
      gradients[e] = inside ? load_gradient(entry, first + stride * e) : 0.0f;
#pragma unroll
      for (uint32_t j = 0; j < kMoments; ++j) {
        const uint32_t* const from = moment(entry, j) + first;
        moments[j].x[e] = inside && reads_moments ? load(from + stride * e) : 0u;
      }
    }
    update(entry, bits, gradients, moments, shared);
#pragma unroll
    for (uint32_t e = 0; e < kCount; ++e) {
      if (e >= count) continue;
      sink(e, bits[e]);
#pragma unroll
      for (uint32_t j = 0; j < kMoments; ++j) {
        uint32_t* const to = moment(entry, j);
        if (to) store(to + first + stride * e, moments[j].x[e]);
      }
    }
  }

 private:
  static constexpr uint32_t kMoments = Rule::kMoments;

  ISSP_DEVICE uint32_t* moment(const Entry& entry, uint32_t j) const {
    return reinterpret_cast<uint32_t*>(rule.moment(entry, j));
  }

  ISSP_DEVICE float load_gradient(const Entry& entry, uint32_t i) const {
    if (entry.extra & kBFloat16Gradient) {
      return widen(BFloat16{}, load(static_cast<const uint16_t*>(entry.grad) + i));
    }
    return load(static_cast<const float*>(entry.grad) + i);
  }
  ISSP_DEVICE void load_gradients(const Entry& entry, uint32_t i, float (&to)[4]) const {
    if (entry.extra & kBFloat16Gradient) {
      const auto bits = load_vector<4>(static_cast<const uint16_t*>(entry.grad) + i);
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) to[e] = widen(BFloat16{}, bits.x[e]);
    } else {
      const auto bits = load_vector<4>(static_cast<const uint32_t*>(entry.grad) + i);
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) to[e] = bit_as<float>(bits.x[e]);
    }
  }

  // Weights and moments in registers.
  template <uint32_t kCount>
  ISSP_DEVICE void update(const Entry& entry, uint32_t (&weights)[kCount],
                          float (&gradients)[kCount], Vector<uint32_t, kCount> (&moments)[kMoments],
                          Shared shared) const {
    // Read anew every time: shared memory has room for them, registers have not.
    const auto by = shared_value<Numbers>(shared.from(kStepArea));
    if (by.divisor != 1.0f) {
#pragma unroll
      for (uint32_t e = 0; e < kCount; ++e) gradients[e] = over(gradients[e], by.divisor);
    }
#pragma unroll
    for (uint32_t e = 0; e < kCount; ++e) {
      float its[kMoments];
#pragma unroll
      for (uint32_t j = 0; j < kMoments; ++j) its[j] = bit_as<float>(moments[j].x[e]);
      const float w = bit_as<float>(weights[e]);
      weights[e] = bit_as<uint32_t>(rule.updated(w, gradients[e], its, entry, by.step));
#pragma unroll
      for (uint32_t j = 0; j < kMoments; ++j) moments[j].x[e] = bit_as<uint32_t>(its[j]);
    }
  }
};

// Host: copies a weight's optimizer state into its entry.
template <typename Rule, typename OptimState>
void complete_entry(typename Rule::Entry& entry, const OptimState& state, bool pruned, bool first) {
  entry.grad = state.grad;
  entry.first = state.first;
  entry.extra |= (pruned ? 0 : kUpdateOnly) | (state.bfloat16 ? kBFloat16Gradient : 0) |
                 (first ? kFirstStep : 0);
}

// The first `pruned` of the items are pruned, the others only updated; patterns as in soft_shrink.
template <typename Rule, typename Complete>
void update_and_shrink(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                       size_t pruned, const Call<Float32>& call, const Optimizer<Rule>& optimizer,
                       const Complete& complete, Stream stream) {
  const size_t selected_from = optimizer.frozen ? 0 : pruned;
  shrink_model(items, patterns, selected_from, call, optimizer, complete, stream);
}

}  // namespace issp
