// How tensors are divided among threads, and the floating-point mode of the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/prune/prune_kernels.h"
#include "layout.h"

namespace issp {

// Sets the floating-point mode of this thread until the end of the scope. The default is gradual
// underflow and round-to-nearest: the rules of selection and shrinkage are defined for it, and
// results must not depend on torch.set_flush_denormal.
class FloatMode {
 public:
#if defined(__x86_64__)
  using State = unsigned;
  static State current() { return _mm_getcsr(); }
  explicit FloatMode(State mode = 0x1f80) : saved_(current()) { _mm_setcsr(mode); }
  ~FloatMode() { _mm_setcsr(saved_); }
#else
  using State = std::fenv_t;
  static State current() {
    State mode;
    std::fegetenv(&mode);
    return mode;
  }
  FloatMode() : saved_(current()) { std::fesetenv(FE_DFL_ENV); }
  explicit FloatMode(const State& mode) : saved_(current()) { std::fesetenv(&mode); }
  ~FloatMode() { std::fesetenv(&saved_); }
#endif

 private:
  State saved_;
};

// The threads that work on one tensor, or on one list of tensors.
struct ThreadGroup {
  int64_t size;

  template <typename F>
  void run(const F& body) const {
    if (size == 1) {
      const FloatMode mode;
      return body(0);
    }
    torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
      const FloatMode mode;
      for (int64_t thread = begin; thread < end; ++thread) body(thread);
    });
  }

  // The blocks of 64 elements that a thread works on. They cover whole cache lines of the mask, so
  // no two threads write the same line.
  Range range_of(int64_t thread, int64_t numel) const {
    const int64_t lines = (numel + 511) / 512, blocks = (numel + 63) / 64;
    return {std::min(blocks, 8 * (lines * thread / size)),
            std::min(blocks, 8 * (lines * (thread + 1) / size))};
  }
};

inline ThreadGroup all_threads() {
  return {int64_t(torch::stable::get_num_threads())};
}

// How the tensors of a call are divided among the threads. One thread processes a tensor alone, so
// that no thread waits. Only a tensor with more than 1/32 of the elements per thread is divided
// among several threads, since it would unbalance them; each gets enough elements to outweigh its
// wake-up (some microseconds).
class Split {
 public:
  Split(const std::vector<Item>& items, size_t element_size) : all_(all_threads()) {
    for (const Item& item : items) total_ += item.numel;
    int64_t rest = 0;
    for (const Item& item : items) rest += is_divided(item) ? 0 : item.numel;
    undivided_ = rest;
    const int64_t useful = rest * int64_t(element_size) / (1 << 18);
    num_threads_ = std::min(all_.size, std::max<int64_t>(1, useful));
  }

  bool is_divided(const Item& item) const {
    return all_.size > 1 && item.numel >= 2 * kGrain && item.numel > total_ / (32 * all_.size);
  }
  ThreadGroup threads_for(const Item& item) const {
    return {std::min(all_.size, item.numel / kGrain)};
  }
  // Threads that work on the undivided tensors, and the number of elements of those tensors.
  int64_t num_threads() const { return num_threads_; }
  int64_t rest() const { return undivided_; }

 private:
  static constexpr int64_t kGrain = 16384;
  ThreadGroup all_;
  int64_t total_ = 0, undivided_ = 0, num_threads_ = 1;
};

// Calls body(index, thread, threads) for every item. First the divided items, one after the other,
// each by all its threads (thread 0). Then the others, each by one of split.num_threads() threads.
// The split depends on sizes alone: a thread gets the same small tensors in every call and may
// still have them in its cache.
template <typename F>
void for_each_item(const std::vector<Item>& items, const Split& split, const F& body) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (split.is_divided(items[i])) body(i, int64_t(0), split.threads_for(items[i]));
  }
  if (!split.rest()) return;
  ThreadGroup{split.num_threads()}.run([&](int64_t thread) {
    int64_t before = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      if (split.is_divided(items[i])) continue;
      const int64_t middle = before + items[i].numel / 2;
      before += items[i].numel;
      if (middle * split.num_threads() / split.rest() == thread) body(i, thread, ThreadGroup{1});
    }
  });
}

template <typename F>
void for_each_item(const std::vector<Item>& items, size_t element_size, const F& body) {
  for_each_item(items, Split(items, element_size), body);
}

}  // namespace issp
