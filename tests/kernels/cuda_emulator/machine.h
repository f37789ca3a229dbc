// What the scheduler (emulator.cpp) and the memory (memory.cpp) of the emulator know of a launch.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "order.h"

namespace issp::emulator {

constexpr uint32_t kNobody = ~0u, kSeveral = ~1u;

// The last accesses to a shared word. `era` counts the barriers that the thread had passed.
struct Touch {
  uint32_t thread = kNobody;
  uint32_t era = 0;
  bool atomic = false;
};
struct Shadow {
  bool written = false;
  Touch writer, reader, other_reader;
};

struct Fiber;
struct Block {
  uint32_t number = 0;
  uint32_t running = 0;  // threads that have not returned
  uint32_t arrived = 0;
  int site = -1;
  uint32_t era = 0;
  std::vector<uint32_t> shared;
  std::vector<Shadow> shadow;
  std::vector<Fiber*> waiting;
  std::vector<Fiber>* fibers = nullptr;
  struct Warp {
    uint32_t arrived = 0, left = 0;
    int kind = -1;
    std::array<uint32_t, 32> values, results;
    std::vector<Fiber*> waiting;
  };
  std::vector<Warp> warps;
};

struct Copy {
  uint32_t to;       // shared word
  const void* from;  // null: zeros
};

struct Fiber {
  FiberContext context;
  Block* block = nullptr;
  uint32_t thread = 0;
  Witness witness;
  std::vector<Copy> copies;  // on their way
};

struct Machine {
  Options options;
  uint64_t random = 1;
  uint64_t switches = 0, idle = 0, launches = 0;
  uint32_t blocks = 0, threads = 0;
  uint32_t yield_odds = 16;
  const std::function<void()>* kernel = nullptr;
  FiberContext scheduler;
  Fiber* current = nullptr;
  std::vector<Fiber*> ready;
  std::vector<char*> stacks;
  std::string error;
  std::vector<std::pair<uintptr_t, uintptr_t>> buffers;
  std::pair<uintptr_t, uintptr_t> last_buffer{0, 0};
  bool sorted = false;
  std::vector<std::pair<std::string, int>> sites;  // barriers and fences
  GlobalOrder order;
};
extern Machine machine;

inline uint64_t draw() {  // xorshift64*
  machine.random ^= machine.random >> 12;
  machine.random ^= machine.random << 25;
  machine.random ^= machine.random >> 27;
  return (machine.random * 2685821657736338717ull) >> 32;
}

// Ends the launch with this message, naming the current thread.
[[noreturn]] void fail(const std::string& what);
// The number of a barrier, a fence or a wait for copies, which its first visit gives it.
size_t site_of(const char* file, int line);

}  // namespace issp::emulator
