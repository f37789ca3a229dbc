// Global and shared memory of emulator.h: bounds, alignment, races, copies on their way.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace issp::emulator {
namespace {

bool ordered(const Touch& touch, uint32_t thread, uint32_t era) {
  return touch.thread == kNobody || touch.thread == thread || touch.era != era;
}

void check_race(const Touch& touch, const Fiber& fiber, uint32_t i, const char* what) {
  if (!ordered(touch, fiber.thread, fiber.block->era)) {
    fail("race on shared word " + std::to_string(i) + ": " + what + " thread " +
         (touch.thread == kSeveral ? "several" : std::to_string(touch.thread)) +
         " with no barrier between");
  }
}

void check_bounds(const void* p, uint64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  auto& last = machine.last_buffer;
  if (begin < last.first || end > last.second) {
    auto after = std::upper_bound(machine.buffers.begin(), machine.buffers.end(),
                                  std::make_pair(begin, ~uintptr_t(0)));
    if (after == machine.buffers.begin() || end > (after - 1)->second) {
      fail("global access of " + std::to_string(bytes) + " bytes out of bounds");
    }
    last = *(after - 1);
  }
  if (begin % bytes) fail("misaligned global access");
}

}  // namespace

void allow(const void* begin, uint64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  machine.buffers.emplace_back(address, address + bytes);
  machine.sorted = false;
}
void forget_buffers() {
  machine.buffers.clear();
  machine.last_buffer = {0, 0};
}

void touch_global(const void* p, uint64_t bytes, Global how) {
  check_bounds(p, bytes);
  const auto address = reinterpret_cast<uintptr_t>(p);
  Witness& witness = machine.current->witness;
  std::string race;
  const bool strong = how != Global::load && how != Global::store;
  if (how == Global::load || how == Global::load_acquire) {
    race = machine.order.read(witness, address, strong);
  } else {
    race = machine.order.write(witness, address, strong);
    machine.idle = 0;
  }
  if (!race.empty()) fail("race on global memory: " + race + ", with nothing to order them");
  if (how == Global::load_acquire) machine.order.acquire(witness, address);
  if (how == Global::store_release) machine.order.release(witness, address);
  if (how == Global::atomic) machine.order.atomic(witness, address);
}

void touch_vector(const void* p, uint32_t count, uint32_t bytes, Global how) {
  if (reinterpret_cast<uintptr_t>(p) % (count * bytes)) fail("misaligned global access");
  for (uint32_t i = 0; i < count; ++i)
    touch_global(static_cast<const char*>(p) + i * bytes, bytes, how);
}

uint32_t* shared_word(uint32_t i, Access access) {
  Fiber& fiber = *machine.current;
  Block& block = *fiber.block;
  if (i >= block.shared.size()) fail("shared word " + std::to_string(i) + " is out of bounds");
  perhaps_yield();
  machine.idle = 0;
  Shadow& shadow = block.shadow[i];
  const Touch touch = {fiber.thread, block.era, access == Access::atomic};
  if (!(touch.atomic && shadow.writer.atomic)) {
    check_race(shadow.writer, fiber, i,
               access == Access::read ? "read after a write by" : "written after a write by");
  }
  if (access == Access::read) {
    if (!shadow.written) fail("shared word " + std::to_string(i) + " is read before it is written");
    if (shadow.reader.era != block.era || shadow.reader.thread == kNobody) {
      shadow.reader = touch;
      shadow.other_reader = {};
    } else if (shadow.reader.thread != fiber.thread) {
      shadow.other_reader = touch;
    }
  } else {
    check_race(shadow.reader, fiber, i, "written after a read by");
    check_race(shadow.other_reader, fiber, i, "written after a read by");
    if (access == Access::atomic && !shadow.written) fail("an atomic on an unwritten shared word");
    const bool another = !ordered(shadow.writer, fiber.thread, block.era);
    shadow.writer = touch;
    if (another) shadow.writer.thread = kSeveral;  // atomics of several threads
    shadow.written = true;
  }
  return &block.shared[i];
}

void start_copy(uint32_t to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 4) fail("misaligned copy");
  *shared_word(to, Access::write) = 0xdeadbeefu;
  machine.current->block->shadow[to].written = false;
  machine.current->copies.push_back({to, from});
}

void finish_copies(const char* file, int line) {
  const size_t site = site_of(file, line);
  Fiber& fiber = *machine.current;
  for (const Copy& copy : fiber.copies) {
    if (int(site) == machine.options.removed) break;
    uint32_t word = 0;
    if (copy.from) {
      touch_global(copy.from, 4, Global::load);
      memcpy(&word, copy.from, 4);
    }
    *shared_word(copy.to, Access::write) = word;
  }
  fiber.copies.clear();
}

}  // namespace issp::emulator
