// The full radix search of tensors that the bracket missed: every part counts the digits of its
// keys, 11 bits at a time (3 passes for float32, the sign is free), and the last of them to arrive
// picks the digit and opens the next phase; one more phase ranks ties across the parts. The host
// launches nothing for it and never learns of it. The resident launch counts what it holds.
#pragma once

#include "job.cuh"

namespace issp {

template <typename T>
constexpr uint32_t kPasses = (uint32_t(kKeyBits<T>) + kRadixBits - 1) / kRadixBits;

// Where a search's phase stands, which phase ranks the ties; the next one is the verdict. Passes
// are the phases before. The streamed phases start at 0, the resident ones at 1: 0 is "counting".
struct Phases {
  uint32_t word, ties;
};
template <typename T>
ISSP_DEVICE Phases streamed_phases() {
  return {kPhase, kPasses<T>};
}
ISSP_DEVICE Phases resident_phases() {
  return {kOpen, 64};
}

// A whole block begins its tensor's search; the tensor's other blocks do not use the scratch now.
template <typename T>
ISSP_DEVICE void begin_search(const Job<T>& job, uint32_t k) {
  for (uint32_t i = thread(); i < 1u << job.width(); i += kThreads) store(job.candidates() + i, 0u);
  if (thread() != 0) return;
  store(job.header + kState, kSearching);
  store(job.header + kPhase, 0u);
  store(job.header + kRank, k);
  store_pair(job.header + kBase, 0);
  store(job.header + kBitsLeft, uint32_t(kKeyBits<T>));
}

template <typename T>
ISSP_DEVICE Search<Key<T>> load_search(const Job<T>& job) {
  return {Key<T>(load_pair(job.header + kBase)), int(load_fresh(job.header + kBitsLeft)),
          load_fresh(job.header + kRank), 0, job.width()};
}

// One thread: everything before `phase` is complete, for blocks that wait for it.
template <typename T>
ISSP_DEVICE void enter_phase(const Job<T>& job, const Phases& phases, uint32_t phase) {
  store(job.header + kArrived, 0u);
  store_release(job.header + phases.word, phase);
}

// Returns the phase that the tensor has reached, at least `phase`.
template <typename T>
ISSP_DEVICE uint32_t wait_for_phase(const Job<T>& job, const Phases& phases, uint32_t phase,
                                    Shared shared) {
  uint32_t reached = 0;
  if (thread() == 0) {
    reached = load_acquire(job.header + phases.word);
    while (reached < phase) {
      relax();
      reached = load_acquire(job.header + phases.word);
    }
  }
  return broadcast_block(reached, shared);
}

// The last block of a pass picks the digit and opens the next phase.
template <typename T>
ISSP_DEVICE void end_pass(const Job<T>& job, const Call<T>& call, const Phases& phases,
                          Search<Key<T>> search, uint32_t phase, Shared shared) {
  for (uint32_t i = thread(); i < 1u << search.width; i += kThreads) {
    shared.set(i, load_fresh(job.candidates() + i));  // the bins behind these are empty
    store(job.candidates() + i, 0u);
  }
  barrier();
  search.narrow(pick_digit(search.rank, shared));
  if (thread() != 0) return;
  store(job.header + kRank, search.rank);
  store_pair(job.header + kBase, search.base);
  store(job.header + kBitsLeft, uint32_t(search.bits));
  if (search.bits > 0) {
    enter_phase(job, phases, phase + 1);
  } else {
    const Verdict<Key<T>> verdict = verdict_of(search);
    publish(job, call, verdict);
    enter_phase(job, phases, phases.ties + (verdict.split() ? 0 : 1));
  }
}

template <typename T, typename Held>
ISSP_DEVICE void count_pass(const Job<T>& job, const Call<T>& call, const Phases& phases,
                            const Held& held, uint32_t phase, Shared shared) {
  const Search<Key<T>> search = load_search(job);
  clear_bins(shared);
  HeldSource<T, Held>{held}.each([&](Key<T> key) { search.count(key, shared); });
  barrier();
  for (uint32_t i = thread(); i < 1u << search.width; i += kThreads) {
    const uint32_t count = shared.get(i);
    if (count) add(job.candidates() + i, count);
  }
  if (last_to_arrive(job.header + kArrived, job.parts, shared)) {
    end_pass(job, call, phases, search, phase, shared);
  }
}

template <typename T, typename Held>
ISSP_DEVICE void tie_pass(const Job<T>& job, const Phases& phases, const Held& held,
                          Shared shared) {
  const Key<T> tau = Key<T>(load_pair(job.header + kTau));
  uint32_t equal = 0;
  held.each_tile([&](const auto& rows) { equal += count_equal_warp<T>(rows, tau); });
  const Scan scan = scan_warps(equal, shared);
  if (thread() == 0) store(job.record(job.part), scan.total);
  if (last_to_arrive(job.header + kArrived, job.parts, shared)) {
    accumulate_records(job, shared);
    if (thread() == 0) enter_phase(job, phases, phases.ties + 1);
  }
}

}  // namespace issp
