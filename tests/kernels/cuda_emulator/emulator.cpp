// The scheduler of emulator.h.
#include <sys/mman.h>

#include <algorithm>

#include "machine.h"

namespace issp::emulator {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kPatience = 200000;  // switches in a row in which every fiber only waited

void leave() {
  ++machine.switches;
  switch_fiber(machine.current->context, machine.scheduler);
}

void wake(std::vector<Fiber*>& fibers) {
  machine.ready.insert(machine.ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

void entry() {
  (*machine.kernel)();
  Fiber& fiber = *machine.current;
  Block& block = *fiber.block;
  if (block.warps[fiber.thread / 32].arrived) fail("a lane returned while its warp exchanges");
  if (block.arrived) fail("a thread returned while its block waits at a barrier");
  if (!fiber.copies.empty()) fail("a thread returned with copies on their way");
  ++block.warps[fiber.thread / 32].left;
  --block.running;
  leave();
}

char* new_stack(size_t i) {
  while (machine.stacks.size() <= i) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the fibers' stacks");
    machine.stacks.push_back(static_cast<char*>(memory));
  }
  return machine.stacks[i];
}

std::unique_ptr<Block> new_block(uint32_t number, uint32_t words, std::vector<Fiber>& fibers,
                                 size_t first_stack) {
  auto block = std::make_unique<Block>();
  block->number = number;
  block->running = machine.threads;
  block->shared.assign(words, 0xdeadbeefu);
  block->shadow.assign(words, {});
  block->warps.resize((machine.threads + 31) / 32);
  fibers.assign(machine.threads, {});
  block->fibers = &fibers;
  for (uint32_t t = 0; t < machine.threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.block = block.get();
    fiber.thread = t;
    fiber.witness.block = number;
    fiber.witness.thread = t;
    start_fiber(fiber.context, new_stack(first_stack + t), kStackBytes, entry);
    machine.ready.push_back(&fiber);
  }
  return block;
}

void run_one() {
  if (machine.ready.empty()) throw std::runtime_error("deadlock: every thread waits");
  if (machine.idle > kPatience) throw std::runtime_error("deadlock: threads spin for ever");
  const size_t i = draw() % machine.ready.size();
  std::swap(machine.ready[i], machine.ready.back());
  machine.current = machine.ready.back();
  machine.ready.pop_back();
  ++machine.idle;
  switch_fiber(machine.scheduler, machine.current->context);
  machine.current = nullptr;
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

struct Slot {
  std::unique_ptr<Block> block;
  std::vector<Fiber> fibers;
};

void schedule(uint32_t shared_words) {
  const uint32_t drawn = machine.options.resident ? machine.options.resident : 1 + draw() % 6;
  std::vector<uint32_t> order(machine.blocks);  // blocks start in no particular order
  for (uint32_t i = 0; i < machine.blocks; ++i) order[i] = i;
  for (uint32_t i = machine.blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  std::vector<Slot> slots(std::min(drawn, machine.blocks));
  size_t next = 0, finished = 0;
  while (finished < machine.blocks) {
    for (size_t s = 0; s < slots.size(); ++s) {
      Slot& slot = slots[s];
      if (slot.block && slot.block->running == 0) {
        slot.block.reset();
        ++finished;
      }
      if (!slot.block && next < order.size()) {
        slot.block = new_block(order[next++], shared_words, slot.fibers, s * machine.threads);
      }
    }
    // Blocks seldom end: look for one only after a stretch of switches, or when nothing else runs.
    for (int i = 0; i < 64 && !machine.ready.empty(); ++i) run_one();
    const bool ended = std::any_of(slots.begin(), slots.end(), [](const Slot& slot) {
      return slot.block && slot.block->running == 0;
    });
    if (machine.ready.empty() && !ended && finished < machine.blocks) run_one();
  }
}

// After a barrier every thread knows what any of them knew.
void share_knowledge(Block& block) {
  SharedClock all;
  for (const Fiber& fiber : *block.fibers) all = join(all, fiber.witness.knows);
  for (Fiber& fiber : *block.fibers) {
    fiber.witness.knows = all;
    fiber.witness.era = block.era;
  }
}

}  // namespace

void fail(const std::string& what) {
  if (!machine.current) throw std::runtime_error(what);
  const Fiber& fiber = *machine.current;
  machine.error = "block " + std::to_string(fiber.block->number) + ", thread " +
                  std::to_string(fiber.thread) + ": " + what;
  leave();  // for good: the scheduler abandons every fiber
  std::abort();
}

size_t site_of(const char* file, int line) {
  size_t site = 0;
  while (site < machine.sites.size() &&
         (machine.sites[site].second != line || machine.sites[site].first != file)) {
    ++site;
  }
  if (site == machine.sites.size()) machine.sites.emplace_back(file, line);
  return site;
}

Options& options() {
  return machine.options;
}
uint64_t switch_count() {
  return machine.switches;
}
uint64_t launch_count() {
  return machine.launches;
}
int site_count() {
  return int(machine.sites.size());
}
std::string site_name(int number) {
  const auto& [file, line] = machine.sites.at(size_t(number));
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line);
}

uint32_t blocks_per_processor(uint32_t threads, uint32_t shared_bytes) {
  const uint32_t by_shared = machine.options.shared_bytes / std::max(shared_bytes, 1u);
  return std::min(by_shared, 2048 / threads);
}

void require() {
  if (machine.options.refused == 0) throw std::runtime_error("CUDA kernel: no kernel image");
  --machine.options.refused;
}

void run(uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
         const std::function<void()>& kernel) {
  if (blocks == 0 || threads == 0 || threads > 1024 || threads % 32 ||
      shared_bytes > machine.options.shared_bytes) {
    throw std::runtime_error("invalid launch");
  }
  ++machine.launches;
  machine.random = machine.options.seed * 0x9e3779b97f4a7c15ull + 0x1234567ull;
  for (int i = 0; i < 4; ++i) draw();
  ++machine.options.seed;  // the next launch runs in another order
  machine.yield_odds = 4u << draw() % 6;
  machine.blocks = blocks;
  machine.threads = threads;
  machine.kernel = &kernel;
  machine.idle = 0;
  machine.error.clear();
  machine.ready.clear();
  machine.current = nullptr;
  machine.order.clear();
  if (!machine.sorted) std::sort(machine.buffers.begin(), machine.buffers.end());
  machine.sorted = true;
  schedule((shared_bytes + 3) / 4);
}

uint32_t thread_number() {
  return machine.current->thread;
}
uint32_t thread_total() {
  return machine.threads;
}
uint32_t block_number() {
  return machine.current->block->number;
}
uint32_t block_total() {
  return machine.blocks;
}

void stop(const char* why) {
  fail(why);
}

void wait_in_turn() {
  machine.ready.push_back(machine.current);
  leave();
}

void perhaps_yield() {
  if (draw() % machine.yield_odds == 0) wait_in_turn();
}

void pass_fence(const char* file, int line) {
  const size_t site = site_of(file, line);
  if (int(site) != machine.options.removed) machine.order.fence(machine.current->witness);
  perhaps_yield();
}

void wait_at_barrier(const char* file, int line) {
  const size_t site = site_of(file, line);
  if (int(site) == machine.options.removed) return;
  machine.idle = 0;
  Block& block = *machine.current->block;
  if (block.running < machine.threads) fail("a barrier after some threads have returned");
  if (block.arrived && block.site != int(site)) {
    fail("threads of a block wait at different barriers: " + site_name(int(site)) + " and " +
         site_name(block.site));
  }
  block.site = int(site);
  if (++block.arrived < block.running) {
    block.waiting.push_back(machine.current);
    leave();
    return;
  }
  block.arrived = 0;
  ++block.era;
  share_knowledge(block);
  wake(block.waiting);
  wait_in_turn();
}

const std::array<uint32_t, 32>& exchange(uint32_t value, int kind) {
  machine.idle = 0;
  Block::Warp& warp = machine.current->block->warps[machine.current->thread / 32];
  if (warp.left) fail("a warp operation after some lanes have returned");
  if (warp.arrived && warp.kind != kind) fail("lanes of a warp are at different operations");
  warp.kind = kind;
  warp.values[machine.current->thread % 32] = value;
  if (++warp.arrived < 32) {
    warp.waiting.push_back(machine.current);
    leave();
  } else {
    warp.arrived = 0;
    warp.results = warp.values;
    wake(warp.waiting);
  }
  return warp.results;
}

}  // namespace issp::emulator
