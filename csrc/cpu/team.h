// Who does what: threads, their shares of a tensor, and the floating-point mode they work in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../layout.h"
#include "passes.h"

namespace issp {

// Gradual underflow and round-to-nearest while a kernel runs, whatever the caller's mode: the
// rules are stated for it, and bits must not depend on torch.set_flush_denormal.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatMode() { std::feholdexcept(&saved_), std::fesetenv(FE_DFL_ENV); }
  ~FloatMode() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

// The threads that share one piece of work.
struct Team {
  int64_t size;

  template <typename F>
  void each(const F& work) const {
    if (size == 1) {
      const FloatMode mode;
      return work(0);
    }
    torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
      const FloatMode mode;
      for (int64_t member = begin; member < end; ++member) work(member);
    });
  }

  // A member's groups of 64 elements, in whole lines of the mask: no line has two writers.
  Range share(int64_t member, int64_t numel) const {
    const int64_t lines = (numel + 511) / 512, groups = (numel + 63) / 64;
    return {std::min(groups, 8 * (lines * member / size)),
            std::min(groups, 8 * (lines * (member + 1) / size))};
  }
};

inline Team whole_team() {
  return {int64_t(torch::stable::get_num_threads())};
}

// Tensors above this many bytes are shared by the team, so that each member's part, read by the
// census, is still in its own L2 cache when the second pass writes it.
inline int64_t shared_bytes() {
  static const int64_t l2 = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 18);
  return l2 / 2;
}

// Runs work(index, team) on every item: large ones by the whole team one after the other, then the
// small ones, each by one thread. The split depends on sizes alone, so that a thread meets the
// same small tensors, still in its cache, in every call.
template <typename F>
void for_each_item(const std::vector<Item>& items, int64_t element_size, const F& work) {
  const Team team = whole_team();
  const auto large = [&](const Item& item) {
    return team.size > 1 && item.numel * element_size > shared_bytes();
  };
  int64_t total = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (large(items[i])) {
      work(i, int64_t(0), team);
    } else {
      total += items[i].numel;
    }
  }
  if (!total) return;
  // Waking a thread costs some microseconds: below 16 k elements it does not pay.
  const Team some{total < 16384 ? 1 : team.size};
  some.each([&](int64_t member) {
    int64_t before = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      if (large(items[i])) continue;
      const int64_t middle = before + items[i].numel / 2;
      before += items[i].numel;
      if (middle * some.size / total == member) work(i, member, Team{1});
    }
  });
}

}  // namespace issp
