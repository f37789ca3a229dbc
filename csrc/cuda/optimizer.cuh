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
                                                uint32_t i, const Vector<uint32_t, 4>& weights,
                                                Shared shared) const {
    const uint32_t kept = kMasked && mask ? load(mask + i / 32) >> i % 32 : ~0u;
    const bool reads_moments = rule.reads_moments(entry);
    Vector<uint32_t, 4> bits[Rule::kMoments] = {}, updated;
#pragma unroll
    for (uint32_t j = 0; j < Rule::kMoments; ++j) {
      if (reads_moments) bits[j] = load_vector<4>(moment_bits(entry, j) + i);
    }
    float gradients[4];
    load_gradients(entry, i, gradients);
    // Read anew for every vector: shared memory has room for them, registers have not.
    const auto by = shared_value<Numbers>(shared.from(kStepArea));
    if (by.divisor != 1.0f) {
#pragma unroll
      for (uint32_t e = 0; e < 4; ++e) gradients[e] = over(gradients[e], by.divisor);
    }
#pragma unroll
    for (uint32_t e = 0; e < 4; ++e) {
      float moments[Rule::kMoments];
#pragma unroll
      for (uint32_t j = 0; j < Rule::kMoments; ++j) moments[j] = bit_as<float>(bits[j].x[e]);
      const float w =
          rule.updated(bit_as<float>(weights.x[e]), gradients[e], moments, entry, by.step);
      const bool keeps = !kMasked || (kept >> e & 1u);
      updated.x[e] = keeps ? bit_as<uint32_t>(w) : 0u;
#pragma unroll
      for (uint32_t j = 0; j < Rule::kMoments; ++j) {
        bits[j].x[e] = keeps ? bit_as<uint32_t>(moments[j]) : 0u;
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < Rule::kMoments; ++j) {
      if (rule.moment(entry, j)) store_vector(moment_bits(entry, j) + i, bits[j]);
    }
    return updated;
  }

  // Updates elements first..first + count in memory, as far as there are so many; mask as above.
  ISSP_DEVICE void update_span(const Entry& entry, const uint32_t* mask, uint32_t first,
                               uint32_t count, Shared shared) const {
    uint32_t* const weights = static_cast<uint32_t*>(entry.data);
    const uint32_t left = entry.numel - first, end = first + (left < count ? left : count);
#pragma unroll 1
    for (uint32_t i = first + thread(); i < end; i += threads()) {
      const auto keeps = [&](uint32_t) {
        return mask == nullptr || (load(mask + i / 32) >> i % 32 & 1u) != 0;
      };
      const auto sink = [&](uint32_t, uint32_t bits) { store(weights + i, bits); };
      const auto weight = [&](uint32_t) { return load(weights + i); };
      const auto inside = [](uint32_t) { return true; };
      if (entry.extra & kBFloat16Gradient) {
        update_batch<BFloat16, 1>(entry, i, 0, inside, keeps, weight, sink, shared);
      } else {
        update_batch<Float32, 1>(entry, i, 0, inside, keeps, weight, sink, shared);
      }
    }
  }

  // Elements that a call in which nothing is frozen selects from.
  template <typename T, typename Sink>
  ISSP_DEVICE void update_strided(const Entry& entry, const uint32_t* weights, uint32_t first,
                                  uint32_t stride, uint32_t count, const Sink& sink,
                                  Shared shared) const {
    if (entry.extra & kBFloat16Gradient) {
      update_strided_by<BFloat16>(entry, weights, first, stride, count, sink, shared);
    } else {
      update_strided_by<Float32>(entry, weights, first, stride, count, sink, shared);
    }
  }

 private:
  template <typename G, typename Sink>
  ISSP_DEVICE void update_strided_by(const Entry& entry, const uint32_t* weights, uint32_t first,
                                     uint32_t stride, uint32_t count, const Sink& sink,
                                     Shared shared) const {
    uint32_t bits[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      bits[i] = i < count ? load(weights + first + stride * i) : 0u;
    }
    update_batch<G, kBatch>(
        entry, first, stride, [&](uint32_t i) { return i < count; }, [](uint32_t) { return true; },
        [&](uint32_t i) { return bits[i]; }, sink, shared);
  }

  ISSP_DEVICE uint32_t* moment_bits(const Entry& entry, uint32_t j) const {
    return reinterpret_cast<uint32_t*>(rule.moment(entry, j));
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

  // Elements first + stride * i that are inside(i); what keeps(i) denies becomes zero.
  template <typename G, uint32_t kCount, typename Inside, typename Keeps, typename Weights,
            typename Sink>
  ISSP_DEVICE void update_batch(const Entry& entry, uint32_t first, uint32_t stride,
                                const Inside& inside, const Keeps& keeps, const Weights& weights,
                                const Sink& sink, Shared shared) const {
    // Pointers of this lane, so that rows are constants away.
    const auto gradients = static_cast<const typename G::Bits*>(entry.grad) + first;
    const bool moments_mean = rule.reads_moments(entry);
    float moments[kCount][Rule::kMoments];
    typename G::Bits g[kCount];
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      g[i] = inside(i) ? load(gradients + stride * i) : typename G::Bits(0);
#pragma unroll
      for (uint32_t j = 0; j < Rule::kMoments; ++j) {
        const float* moment = rule.moment(entry, j) + first;
        moments[i][j] = inside(i) && moments_mean ? load(moment + stride * i) : 0.0f;
      }
    }
    // Read anew for every batch: shared memory has room for them, registers have not.
    const auto by = shared_value<Numbers>(shared.from(kStepArea));
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      const bool kept = keeps(i);
      float gradient = widen(G{}, g[i]);
      if (by.divisor != 1.0f) gradient = over(gradient, by.divisor);
      const float w = bit_as<float>(weights(i));
      const float updated = rule.updated(w, gradient, moments[i], entry, by.step);
      if (!inside(i)) continue;
      sink(i, kept ? bit_as<uint32_t>(updated) : 0u);
#pragma unroll
      for (uint32_t j = 0; j < Rule::kMoments; ++j) {
        float* moment = rule.moment(entry, j);
        if (moment) store(moment + first + stride * i, kept ? moments[i][j] : 0.0f);
      }
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
