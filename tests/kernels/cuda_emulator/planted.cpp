// Kernels with a fault each: the emulator must find every one.
#include <string>

#include "device.cuh"
#include "launch.cuh"

namespace {

using namespace issp;

// Each thread passes a value to the next; `good` has the barrier that this needs.
void neighbour(uint32_t* out, uint32_t good) {
  const Shared shared = shared_memory();
  shared.set(thread(), thread() * thread());
  if (good) barrier();
  store(out + thread(), shared.get((thread() + 1) % 64));
}

// Both barriers are there, but all threads write one word.
void same_word(uint32_t* out, uint32_t good) {
  const Shared shared = shared_memory();
  if (thread() == 0 || !good) shared.set(0, thread());
  barrier();
  store(out + thread(), shared.get(0));
}

void read_then_write(uint32_t* out, uint32_t good) {
  const Shared shared = shared_memory();
  shared.set(thread(), thread());
  barrier();
  const uint32_t value = shared.get(63 - thread());
  if (good) barrier();
  shared.set(thread(), value + 1);
  barrier();
  store(out + thread(), shared.get(thread()));
}

void counter_without_atomics(uint32_t* out, uint32_t good) {
  const Shared shared = shared_memory();
  if (thread() == 0) shared.set(0, 0);
  barrier();
  if (good) {
    shared.add(0, 1);
  } else {
    shared.set(0, shared.get(0) + 1);
  }
  barrier();
  store(out + thread(), shared.get(0));
}

void past_the_end(uint32_t* out, uint32_t good) {
  store(out + thread() + (good ? 0 : 1), 7u);
}

void past_shared(uint32_t* out, uint32_t good) {
  shared_memory().set(thread() + (good ? 0 : 193), 1);
  store(out + thread(), 0u);
}

void unwritten(uint32_t* out, uint32_t good) {
  const Shared shared = shared_memory();
  if (good) shared.set(thread(), 1);
  store(out + thread(), shared.get(thread()));
}

void split_barrier(uint32_t* out, uint32_t good) {
  if (good || thread() < 32) {
    barrier();
  } else {
    barrier();
  }
  store(out + thread(), 1u);
}

void early_return(uint32_t* out, uint32_t good) {
  store(out + thread(), 1u);
  if (!good && thread() == 5) return;
  barrier();
}

void half_a_warp(uint32_t* out, uint32_t good) {
  uint32_t word = 0;
  if (good || lane() < 16) word = ballot(true);
  store(out + thread(), word);
}

// Block 0 hands a word to block 1 through a flag.
void hand_over(uint32_t* out, uint32_t good) {
  if (thread() != 0) return;
  if (block() == 0) {
    store(out, 5u);
    if (good) fence();
    add(out + 1, 1u);
    return;
  }
  while (load_acquire(out + 1) == 0u) relax();
  store(out + 2, load(out));
}

// The whole block writes, one thread tells: without the barrier it speaks for itself alone.
void hand_over_block(uint32_t* out, uint32_t good) {
  if (block() == 0) {
    if (thread() < 32) store(out + thread(), 5u);
    if (good) barrier();
    if (thread() == 0) store_release(out + 63, 1u);
    return;
  }
  if (thread() != 0) return;
  while (load_acquire(out + 63) == 0u) relax();
  store(out + 62, load(out + 31));
}

// The last block to arrive adds up; it must fence after the count as well as before it.
void last_block(uint32_t* out, uint32_t good) {
  if (thread() != 0) return;
  store(out + block(), block() + 1);
  fence();
  if (add(out + 2, 1u) == 1) {
    if (good) fence();
    store(out + 3, load(out) + load(out + 1));
  }
}

void within_a_block(uint32_t* out, uint32_t good) {
  if (block() != 0) return;
  store(out + thread(), 5u);
  if (good) barrier();
  if (thread() == 0) store(out, load(out + 40));
}

void endless_wait(uint32_t* out, uint32_t good) {
  if (thread() == 0 && good) store_release(out, 1u);
  if (thread() == 1) {
    while (load_acquire(out) != 1u) relax();
  }
}

// Every block waits for all others, of which two run at a time; or for those that began before it.
void wait_for_all(uint32_t* out, uint32_t good) {
  if (thread() != 0) return;
  const uint32_t before = add(out, 1u);
  while (load_acquire(out) < (good ? before : blocks())) relax();
}

void copy_without_wait(uint32_t* out, uint32_t good) {
  if (thread() != 0) return;
  const Shared shared = shared_memory();
  copy_word_async(shared, out, true);
  if (good) wait_for_copies();
  add(out + 60, shared.get(0));
  wait_for_copies();
}

void slot_reused_too_early(uint32_t* out, uint32_t good) {
  const Shared shared = shared_memory();
  for (uint32_t i = thread(); i < 128; i += 64) shared.set(i, 0);
  barrier();
  const uint32_t value = shared.get(thread() ^ 32);
  if (good) barrier();
  if (thread() < 4) copy_word_async(shared.from(16 * thread()), out, true);
  wait_for_copies();
  if (thread() > 8) store(out + thread(), value);
}

void early_copy(uint32_t* out, uint32_t good) {
  if (thread() != 0) return;
  copy_word_async(shared_memory(), out, true);
  if (good) wait_for_copies();
}

using Kernel = void (*)(uint32_t*, uint32_t);
const struct {
  const char* name;
  Kernel kernel;
  uint32_t blocks = 1;
} kPlanted[] = {
    {"missing barrier", neighbour},
    {"write race", same_word},
    {"missing barrier before reuse", read_then_write},
    {"counter without atomics", counter_without_atomics},
    {"global out of bounds", past_the_end},
    {"shared out of bounds", past_shared},
    {"unwritten shared word", unwritten},
    {"different barriers", split_barrier},
    {"early return", early_return},
    {"half a warp", half_a_warp},
    {"hand-over without a fence", hand_over, 2},
    {"hand-over without a barrier", hand_over_block, 2},
    {"last block without a fence", last_block, 2},
    {"global race within a block", within_a_block},
    {"endless wait", endless_wait},
    {"wait for blocks that may not run", wait_for_all, 6},
    {"copy without a wait", copy_without_wait},
    {"slot reused too early", slot_reused_too_early},
    {"copy left on its way", early_copy},
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* planted_name(uint32_t i) {
  return i < sizeof(kPlanted) / sizeof(kPlanted[0]) ? kPlanted[i].name : nullptr;
}

const char* run_planted(uint32_t i, uint32_t good, uint64_t seed) {
  static std::string message;
  message.clear();
  alignas(16) uint32_t out[65] = {};
  emulator::options() = {seed, 2, -1};
  emulator::allow(out, 64 * sizeof(uint32_t));
  try {
    launch(kPlanted[i].kernel, kPlanted[i].blocks, 64, 256 * 4, nullptr, +out, good);
  } catch (const std::exception& error) {
    message = error.what();
  }
  emulator::forget_buffers();
  return message.empty() ? nullptr : message.c_str();
}

}  // extern "C"
#pragma GCC visibility pop
