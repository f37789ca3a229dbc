// Who does what: threads, their shares of a tensor, and the floating-point mode they work in.
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

// The floating-point mode of this thread until the end of a scope. By default gradual underflow and
// round-to-nearest, whatever the caller's mode: the rules of selection and shrinkage are stated for
// it, and bits must not depend on torch.set_flush_denormal.
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

// How a call's tensors are divided among the threads. Each belongs to one thread, so that nobody
// waits for anybody; only what would spoil the balance, more than a 32nd of a thread's part, is
// shared by the team, in pieces that pay for waking a thread (some microseconds).
class Split {
 public:
  Split(const std::vector<Item>& items, size_t element_size) : team_(whole_team()) {
    for (const Item& item : items) total_ += item.numel;
    int64_t rest = 0;
    for (const Item& item : items) rest += shared(item) ? 0 : item.numel;
    rest_ = rest;
    const int64_t worth = rest * int64_t(element_size) / (1 << 18);
    members_ = std::min(team_.size, std::max<int64_t>(1, worth));
  }

  bool shared(const Item& item) const {
    return team_.size > 1 && item.numel >= 2 * kPiece && item.numel > total_ / (32 * team_.size);
  }
  Team team_for(const Item& item) const { return {std::min(team_.size, item.numel / kPiece)}; }
  // Threads that work on the tensors that are not shared, and those tensors' elements.
  int64_t members() const { return members_; }
  int64_t rest() const { return rest_; }

 private:
  static constexpr int64_t kPiece = 16384;
  Team team_;
  int64_t total_ = 0, rest_ = 0, members_ = 1;
};

// Runs work(index, member, team) on every item: shared ones by a team, one after the other
// (member 0), then the rest, each by one of split.members() threads. The split depends on sizes
// alone, so that a thread meets the same small tensors, still in its cache, in every call.
template <typename F>
void for_each_item(const std::vector<Item>& items, const Split& split, const F& work) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (split.shared(items[i])) work(i, int64_t(0), split.team_for(items[i]));
  }
  if (!split.rest()) return;
  Team{split.members()}.each([&](int64_t member) {
    int64_t before = 0;
    for (size_t i = 0; i < items.size(); ++i) {
      if (split.shared(items[i])) continue;
      const int64_t middle = before + items[i].numel / 2;
      before += items[i].numel;
      if (middle * split.members() / split.rest() == member) work(i, member, Team{1});
    }
  });
}

template <typename F>
void for_each_item(const std::vector<Item>& items, size_t element_size, const F& work) {
  for_each_item(items, Split(items, element_size), work);
}

}  // namespace issp
